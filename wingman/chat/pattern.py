"""The `pattern` of a JSON schema -> the body of a GBNF rule.

Owns the translation of one regular expression; `wingman.chat.schema` calls it, on any thread. The
dialect is what llama-server's converter knows: `^...$`, groups, alternatives, classes, `.`,
quantifiers. What is a regular expression but has no equivalent (look-around, `\\d`, no anchors) is
reported as None and the schema then admits any string, there as here; what is no regular
expression is refused. Unlike there, a quantifier binds to one character also after an escape or
outside ASCII, and a quote, backslash or control character is written as JSON escapes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from msgspec import Struct

from wingman.errors import InvalidRequest

MAX_PATTERN_CHARS = 2000
"""Longer ones are refused; real ones (an RFC 5322 address) stay below 500."""
_MAX_DEPTH = 50
"""Nested groups: each costs two frames here and several in llama.cpp's recursive parser."""

_GBNF_ESCAPE = re.compile(r'\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[trn\\"\[\]-])')
_COUNT = re.compile(r"\{(\d{0,9})(?:(,)(\d{0,9}))?\}")
_PLAIN_ESCAPES = frozenset("^$.[]()|{}*+?")
_SPECIAL = frozenset("|.()[]{}*+?^$")
_CONTROL = {"t": "\t", "r": "\r", "n": "\n"}
DOT = r"[^\x0A\x0D]"

AddRule = Callable[[str, str], str]


class _UnsupportedPattern(Exception):
    """A regular expression without an equivalent in GBNF."""


class _Item(Struct, frozen=True):
    """A piece of a sequence: the inside of a literal, or GBNF text."""

    text: str
    is_literal: bool = False

    def __str__(self) -> str:
        return f'"{self.text}"' if self.is_literal else self.text


def pattern_body(pattern: str, name: str, add_rule: AddRule) -> str | None:
    """The text between the quotes of a string that matches, or None when GBNF can't say it.

    Sub-rules go through `add_rule(name, text)`, which returns the name to refer to. Raises
    InvalidRequest when `pattern` is no regular expression or is too long.
    """
    if len(pattern) > MAX_PATTERN_CHARS:
        raise InvalidRequest(f"a pattern has more than {MAX_PATTERN_CHARS} characters", "json_schema")
    if len(pattern) < 2 or pattern[0] != "^" or pattern[-1] != "$":
        return None
    try:
        return _Translation(pattern[1:-1], name, add_rule).run()
    except _UnsupportedPattern:
        return None


def repetition(item: str, least: int, most: int | None, separator: str = "") -> str:
    """`item` from `least` to `most` times (None: no limit), with `separator` between; "" for none at all."""
    if most == 0:
        return ""
    if (least, most) == (0, 1):
        return f"{item}?"
    if separator:
        rest = repetition(f"({separator} {item})", max(least - 1, 0), None if most is None else most - 1)
        return f"({item} {rest})?" if least == 0 else f"{item} {rest}"
    if most is None and least < 2:
        return f"{item}{'*+'[least]}"
    return f"{item}{{{least},{'' if most is None else most}}}"


def escape_literal(text: str) -> str:
    """`text` as the inside of a GBNF literal."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\r", "\\r").replace("\n", "\\n")


class _Translation:
    """One pattern, read from left to right."""

    def __init__(self, source: str, name: str, add_rule: AddRule) -> None:
        self._source = source
        self._at = 0
        self._name = name
        self._add_rule = add_rule
        self._repeated: dict[str, str] = {}

    def run(self) -> str:
        text = self._sequence(0)
        if self._at < len(self._source):
            raise _invalid("unbalanced parentheses")
        return text

    def _sequence(self, depth: int) -> str:
        """Up to the end or to the `)` that closes this group, which is left."""
        items: list[_Item] = []
        while self._at < len(self._source) and (char := self._source[self._at]) != ")":
            if char in "*+?":
                self._at += 1
                items[-1:] = [_Item(str(_last(items)) + char)]
            elif char == "{":
                items[-1:] = [self._counted(_last(items))]
            else:
                items.append(self._atom(char, depth))
        return " ".join(_joined(items))

    def _atom(self, char: str, depth: int) -> _Item:
        if char == "(":
            return self._group(depth)
        if char == "[":
            return self._class()
        if char not in _SPECIAL:
            return _Item(escape_literal(json.dumps(self._character(), ensure_ascii=False)[1:-1]), True)
        self._at += 1
        if char == ".":
            return _Item(self._add_rule("dot", DOT))
        if char == "|":
            return _Item("|")
        raise _UnsupportedPattern

    def _group(self, depth: int) -> _Item:
        self._at += 1
        if self._source.startswith("?", self._at):
            if not self._source.startswith("?:", self._at):
                raise _UnsupportedPattern
            self._at += 2
        if depth >= _MAX_DEPTH:
            raise _UnsupportedPattern
        inside = self._sequence(depth + 1)
        if self._at == len(self._source):
            raise _invalid("unbalanced parentheses")
        self._at += 1
        return _Item(f"({inside})")

    def _class(self) -> _Item:
        start = self._at
        self._at += 1
        while (char := self._source[self._at : self._at + 1]) != "]":
            if not char:
                raise _invalid("unterminated character class")
            self._at += len(self._escape()) if char == "\\" else 1
        self._at += 1
        return _Item(self._source[start : self._at])

    def _escape(self) -> str:
        match = _GBNF_ESCAPE.match(self._source, self._at)
        if match is None:
            raise _UnsupportedPattern
        return match[0]

    def _character(self) -> str:
        """One character that stands for itself, escaped or not."""
        char = self._source[self._at]
        if char != "\\":
            self._at += 1
            return char
        if self._at + 1 == len(self._source):
            raise _invalid("trailing backslash")
        following = self._source[self._at + 1]
        escape = char + following if following in _PLAIN_ESCAPES else self._escape()
        self._at += len(escape)
        if len(escape) == 2:
            return _CONTROL.get(following, following)
        return _code_point(escape)

    def _counted(self, item: _Item) -> _Item:
        match = _COUNT.match(self._source, self._at)
        if match is None or match[0] in ("{}", "{,}"):
            raise _UnsupportedPattern
        self._at = match.end()
        least = int(match[1] or 0)
        most = None if match[2] and not match[3] else int(match[3] or least)
        if most is not None and most < least:
            raise _invalid("a count is out of order")
        if item.is_literal:
            return _Item(repetition(str(item), least, most))
        if item.text not in self._repeated:
            name = f"{self._name}-{len(self._repeated) + 1}"
            self._repeated[item.text] = self._add_rule(name, item.text)
        return _Item(repetition(self._repeated[item.text], least, most))


def _code_point(escape: str) -> str:
    value = int(escape[2:], 16)
    if value > 0x10FFFF or 0xD800 <= value <= 0xDFFF:
        raise _UnsupportedPattern
    return chr(value)


def _last(items: list[_Item]) -> _Item:
    if not items:
        raise _invalid("nothing to repeat")
    return items[-1]


def _joined(items: list[_Item]) -> list[str]:
    """Texts of `items`, literals that follow each other as one."""
    joined: list[_Item] = []
    for item in items:
        if item.is_literal and joined and joined[-1].is_literal:
            joined[-1] = _Item(joined[-1].text + item.text, True)
        else:
            joined.append(item)
    return [str(item) for item in joined]


def _invalid(reason: str) -> InvalidRequest:
    return InvalidRequest(f"invalid pattern: {reason}", "json_schema")
