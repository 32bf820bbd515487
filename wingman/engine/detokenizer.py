"""Token bytes -> text for the client: whole UTF-8 characters only, and nothing of a stop string.

Pure, one per sequence, on the engine thread. The text that `push` and `finish` return over a
generation is the text a non-streamed answer holds: streamed and not are equal by construction.
"""

from __future__ import annotations

import codecs

from msgspec import Struct


class Piece(Struct, frozen=True):
    """Text that may leave now, and the stop string that ended it, if one did."""

    text: str
    stopping_word: str | None = None


class Detokenizer:
    """Incremental decoder with stop strings. Invalid bytes become U+FFFD (llama-server does the same)."""

    __slots__ = ("_beginnings", "_decoder", "_drops_partial", "_held", "_n_longest", "_stop")

    def __init__(self, stop: tuple[str, ...] = (), *, drops_partial: bool = False) -> None:
        self._drops_partial = drops_partial
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(word for word in stop if word)
        self._n_longest = max(map(len, self._stop), default=0)
        self._beginnings: dict[str, list[str]] = {}
        """Stop strings by their first character, the longest first."""
        for word in sorted(self._stop, key=len, reverse=True):
            self._beginnings.setdefault(word[0], []).append(word)
        self._held = ""

    def push(self, data: bytes) -> Piece:
        """Take a token's bytes; return what is safe to send.

        The earliest match of any stop string ends the text; at one place the first listed wins.
        """
        text = self._decoder.decode(data)
        if not self._stop:
            return Piece(text)
        text = self._held + text
        if self._beginnings.keys().isdisjoint(text):
            return Piece(text)
        match = _first_match(text, self._stop)
        if match is not None:
            position, word = match
            self._held = ""
            return Piece(text[:position], word)
        n_safe = self._safe_length(text)
        self._held = text[n_safe:]
        return Piece(text[:n_safe])

    def _safe_length(self, text: str) -> int:
        """Length of `text` without its longest end that begins a stop string; none is in it as a whole."""
        for position in range(max(0, len(text) - self._n_longest + 1), len(text)):
            end = text[position:]
            for word in self._beginnings.get(text[position], ()):
                if len(word) < len(end):
                    break
                if word.startswith(end):
                    return position
        return len(text)

    def finish(self) -> str:
        """What was held back, when generation ends for another reason than a stop string."""
        text = self._held + ("" if self._drops_partial else self._decoder.decode(b"", final=True))
        self._held = ""
        return text


def _first_match(text: str, stop: tuple[str, ...]) -> tuple[int, str] | None:
    best: tuple[int, str] | None = None
    for word in stop:
        position = text.find(word)
        if position >= 0 and (best is None or position < best[0]):
            best = (position, word)
    return best
