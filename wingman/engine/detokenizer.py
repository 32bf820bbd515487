"""Token bytes -> text for the client: whole UTF-8 characters only, and nothing of a stop string.

Pure, one per sequence, on the engine thread. The text that `push` and `finish` return over a
generation is the text a non-streamed answer holds: streamed and not are equal by construction.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that may leave now, and the stop string that ended it, if one did."""

    text: str
    stopping_word: str | None = None


class Detokenizer:
    """Incremental decoder with stop strings. Invalid bytes become U+FFFD (llama-server does the same)."""

    __slots__ = ("_decoder", "_drops_partial", "_held", "_stop")

    def __init__(self, stop: tuple[str, ...] = (), *, drops_partial: bool = False) -> None:
        self._drops_partial = drops_partial
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(word for word in stop if word)
        self._held = ""

    def push(self, data: bytes) -> Piece:
        """Take a token's bytes; return what is safe to send.

        The earliest match of any stop string ends the text; at one place the first listed wins.
        """
        text = self._decoder.decode(data)
        if not self._stop:
            return Piece(text)
        text = self._held + text
        match = _first_match(text, self._stop)
        if match is not None:
            position, word = match
            self._held = ""
            return Piece(text[:position], word)
        keep = _held_back(text, self._stop)
        self._held = text[len(text) - keep :]
        return Piece(text[: len(text) - keep])

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


def _held_back(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of a stop string."""
    longest = 0
    for word in stop:
        for length in range(min(len(word) - 1, len(text)), longest, -1):
            if word.startswith(text[-length:]):
                longest = length
                break
    return longest
