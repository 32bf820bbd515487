"""Text that arrives in pieces, read by code that is written as if all of it were there.

Readers are generators: they yield when they need text that has not come yet, and are resumed after
`push` or `close`. What they find depends on the text alone, never on how it was cut, because every
primitive decides only on text that it has, or knows to be the last. Whatever is read stays with the
cursor until `release`, so that a reader who was wrong can still give it back as it was.
Each character is looked at a bounded number of times. Pure; used by `wingman.chat.output` alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Generator
from typing import Final, TypeVar

from wingman.chat.jsonscan import ObjectScanner

T = TypeVar("T")
Steps = Generator[None, None, T]
"""A reader: yields while it waits for text, returns what it read."""

_SPACE: Final = re.compile(r"[ \t\r\n]+")


class Markers:
    """Literal texts to look for; none may begin with another, or the cut of the text would matter."""

    def __init__(self, texts: Collection[str]) -> None:
        self._pattern = re.compile("|".join(_prefixes(text) for text in sorted(texts))) if texts else None
        self._texts = frozenset(texts)

    def find(self, text: str, start: int) -> tuple[int, str | None]:
        """Where the first marker begins, and it; (place, None) when it may only begin there."""
        match = self._pattern.search(text, start) if self._pattern else None
        if match is None:
            return len(text), None
        return match.start(), match[0] if match[0] in self._texts else None


def _prefixes(text: str) -> str:
    """A pattern for `text`, or for the beginning of it at the very end."""
    pattern = ""
    for char in reversed(text[1:]):
        pattern = rf"(?:{re.escape(char)}{pattern}|\Z)"
    return re.escape(text[0]) + pattern


class Cursor:
    """A place in a growing text."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._kept_from = 0
        self._kept: list[str] = []
        self._closed = False

    def push(self, text: str) -> None:
        """Append a piece."""
        self._kept.append(self._text[self._kept_from : self._at])
        self._text = self._text[self._at :] + text
        self._at = self._kept_from = 0

    def close(self) -> None:
        """No piece will follow."""
        self._closed = True

    @property
    def ended(self) -> bool:
        """Whether everything was read and nothing will follow."""
        return self._closed and self._at == len(self._text)

    def release(self) -> str:
        """What was read since the last release."""
        text = "".join((*self._kept, self._text[self._kept_from : self._at]))
        self._kept.clear()
        self._kept_from = self._at
        return text

    def peek(self) -> Steps[str]:
        """The next character, "" at the end."""
        while self._at == len(self._text) and not self._closed:
            yield
        return self._text[self._at : self._at + 1]

    def maybe(self, literal: str) -> Steps[bool]:
        """Read `literal` if it is next; a beginning of it that ends the text is read too, in vain."""
        while not self._text.startswith(literal, self._at):
            rest = self._text[self._at : self._at + len(literal)]
            if not literal.startswith(rest):
                return False
            if self._closed:
                self._at = len(self._text)
                return False
            yield
        self._at += len(literal)
        return True

    def sees(self, literals: tuple[str, ...]) -> Steps[bool]:
        """Whether one of `literals` is next; reads nothing."""
        while not self._text.startswith(literals, self._at):
            rest = self._text[self._at : self._at + max(map(len, literals))]
            if self._closed or not any(literal.startswith(rest) for literal in literals):
                return False
            yield
        return True

    def word(self, pattern: re.Pattern[str], limit: int) -> Steps[str]:
        """Read characters of the class `pattern`, which has a `+`: at most `limit`."""
        found: list[str] = []
        while limit and (yield from self.peek()):
            match = pattern.match(self._text, self._at, self._at + limit)
            if match is None:
                break
            found.append(match[0])
            self._at = match.end()
            limit -= len(match[0])
        return "".join(found)

    def space(self) -> Steps[None]:
        """Read white space."""
        while (yield from self.peek()):
            match = _SPACE.match(self._text, self._at)
            if match is None:
                return
            self._at = match.end()

    def run(self, markers: Markers) -> Steps[str | None]:
        """Go on towards the next marker: "" when text was read, the marker when it is next (it is not
        read), None at the end."""
        while True:
            place, marker = markers.find(self._text, self._at)
            if marker is None and self._closed:
                place = len(self._text)
            if place > self._at:
                self._at = place
                return ""
            if marker is not None:
                return marker
            if self._closed:
                return None
            yield

    def scan(self, scanner: ObjectScanner) -> None:
        """Read what `scanner` takes of the text that is there."""
        self._at = scanner.scan(self._text, self._at)
