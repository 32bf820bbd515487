"""Where a lazy grammar begins: watches what is generated for the trigger texts and tokens.

Engine thread only. The native lazy grammar is not used: it takes in the rest of the token that
completes a trigger unasked, and aborts the process when the grammar forbids it.
"""

from __future__ import annotations

from typing import Protocol

from wingman.engine.types import Constraint


class Speller(Protocol):
    """What is asked about tokens."""

    def piece(self, token: int, special: bool = False) -> bytes:
        """The token's bytes; a special token has none unless `special`."""

    def spell(self, data: bytes) -> list[int] | None:
        """Tokens whose bytes together are `data`, or None when there are none."""


class Trigger:
    """Waits for the first trigger of a lazy constraint."""

    def __init__(self, constraint: Constraint, tokenizer: Speller) -> None:
        self._tokenizer = tokenizer
        self._tokens = frozenset(constraint.trigger_tokens)
        self._words = tuple(word.encode("utf-8", "replace") for word in constraint.trigger_texts if word)
        self._n_kept = max(map(len, self._words), default=1) - 1
        self._recent = b""

    def push(self, token: int) -> list[int] | None:
        """Take a generated token; once a trigger is complete, the tokens of all text from its start on,
        which the grammar has to take in, not those that were generated: a trigger may begin within one. Empty
        when no tokens make up that text."""
        if token in self._tokens:
            return [token]
        window = self._recent + self._tokenizer.piece(token, special=True)
        starts = [at for word in self._words if (at := window.find(word)) >= 0]
        if not starts:
            self._recent = window[max(len(window) - self._n_kept, 0) :]
            return None
        return self._tokenizer.spell(window[min(starts) :]) or []
