"""GBNF text -> rules, as llama.cpp's parser would make them.

Owns the syntax; only `wingman.chat.grammar` calls it, on any thread. llama.cpp's parser recurses into
groups and copies what is repeated without a limit on the sum, so this one counts before it copies.
Repetitions become extra rules here in the same way as there (src/llama-grammar.cpp, b11434): what is
analysed afterwards has the stacks that llama.cpp will have. It accepts no more than that one, but for
duplicate work and left recursion, and refuses references to tokens (`<...>`): inside a longer token
llama.cpp admits by such a reference what it then can't accept, which ends the process.
"""

from __future__ import annotations

import re
from typing import NoReturn, TypeAlias

from msgspec import Struct

MAX_GRAMMAR_BYTES = 262_144
"""UTF-8 text; llama.cpp's own examples stay below 3 000, a schema of the largest size gives some 200 000."""
MAX_DEPTH = 100
"""Nested groups; llama.cpp takes some 700 bytes of stack for each (120 000 of them crashed it)."""
MAX_RULES = 20_000
"""Rules, groups and optional repetitions; the check for left recursion recurses over them."""
MAX_SYMBOLS = 100_000
"""Symbols once repetitions are written out; 16 bytes each in every copy of the grammar."""
MAX_RANGES = 256
"""Ranges and characters in a class."""
MAX_REPEATS = 2_000
"""llama.cpp refuses a larger least count, and takes a larger greatest one to be no limit."""

CharSet: TypeAlias = tuple[tuple[int, int], ...]
"""Code points as sorted, disjoint ranges, both ends inclusive."""
Symbol: TypeAlias = int | CharSet
"""A reference to a rule by number, or one character."""
Sequence: TypeAlias = list[Symbol]
Rule: TypeAlias = list[Sequence]
"""Its alternatives."""

_LAST_CODE_POINT = 0x10FFFF
_ANY: CharSet = ((0, _LAST_CODE_POINT),)
_BLANKS = re.compile(r"(?:[ \t]|#[^\r\n]*+)*+")
_BLANKS_AND_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*+)*+")
_ESCAPE = r'\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[trn\\"\[\]-])'
_LITERAL = re.compile(rf'"((?:{_ESCAPE}|[^"\\])*+)"')
_CLASS = re.compile(rf"\[(\^?)((?:{_ESCAPE}|[^\]\\])*+)\]")
_CHARACTER = re.compile(rf"{_ESCAPE}|[^\\]", re.DOTALL)
_RANGE = re.compile(rf"({_ESCAPE}|[^\\])(?:-({_ESCAPE}|[^\\]))?+", re.DOTALL)
_NAME = re.compile(r"[a-zA-Z0-9-]++")
_INTEGER = re.compile(r"[0-9]{1,9}+")
_CONTROL = {r"\t": 9, r"\r": 13, r"\n": 10}


class BadGrammar(Exception):
    """The text is no grammar, or exceeds a limit; the argument says why, in our words."""


class Grammar(Struct, frozen=True):
    """Rules by number, each a list of alternatives; `root` is the number of the start rule."""

    rules: list[Rule]
    root: int


def parse(text: str) -> Grammar:
    """The grammar in `text`. Raises BadGrammar."""
    if len(text) > MAX_GRAMMAR_BYTES or "\0" in text:
        raise BadGrammar("it is too long or contains NUL")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise BadGrammar("it is not valid Unicode") from None
    if size > MAX_GRAMMAR_BYTES:
        raise BadGrammar("it is too long")
    return _Parser(text).run()


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0
        self._n_symbols = 0
        self._names: dict[str, int] = {}
        self._rules: list[Rule | None] = []

    def run(self) -> Grammar:
        self._skip(_BLANKS_AND_LINES)
        while self._at < len(self._text):
            self._rule()
        if "root" not in self._names:
            self._fail("it has no rule called root")
        rules = [rule for rule in self._rules if rule is not None]
        if len(rules) < len(self._rules):
            self._fail("a rule is used but not defined")
        return Grammar(rules, self._names["root"])

    def _rule(self) -> None:
        number = self._reference()
        self._skip(_BLANKS)
        self._expect("::=")
        self._skip(_BLANKS_AND_LINES)
        self._rules[number] = self._alternatives(_BLANKS)
        if self._at < len(self._text) and self._text[self._at] not in "\r\n":
            self._fail("a rule does not end with its line")
        self._skip(_BLANKS_AND_LINES)

    def _alternatives(self, blanks: re.Pattern[str]) -> Rule:
        alternatives = [self._sequence(blanks)]
        while self._peek() == "|":
            self._at += 1
            self._skip(_BLANKS_AND_LINES)
            alternatives.append(self._sequence(blanks))
        self._spend(len(alternatives))
        return alternatives

    def _sequence(self, blanks: re.Pattern[str]) -> Sequence:
        symbols: Sequence = []
        start = 0  # of what a quantifier would repeat
        while (char := self._peek()) and char not in "|)\r\n":
            if char in "*+?{":
                least, most = self._quantifier(char, blanks)
                self._repeat(symbols, start, least, most)
            else:
                start = len(symbols)
                symbols += self._item(char)
                self._spend(len(symbols) - start)
            self._skip(blanks)
        return symbols

    def _item(self, char: str) -> Sequence:
        if char == '"':
            inside = self._match(_LITERAL, "a literal does not end or has an unknown escape")[1]
            return [((code, code),) for code in map(_code_point, _CHARACTER.findall(inside))]
        if char == "[":
            return self._class()
        if char == ".":
            self._at += 1
            return [_ANY]
        if char == "(":
            return [self._group()]
        if char in "<!":
            self._fail("references to tokens are not supported")
        return [self._reference()]

    def _class(self) -> Sequence:
        match = self._match(_CLASS, "a character class does not end or has an unknown escape")
        ranges = []
        for low, high in _RANGE.findall(match[2]):
            first = _code_point(low)
            ranges.append((first, _code_point(high) if high else first))
        if not ranges:
            return []
        if len(ranges) > MAX_RANGES:
            self._fail("a character class is too long")
        self._spend(len(ranges) // 4)  # llama.cpp compares with all, also with repeated ones
        return [_complement(_union(ranges)) if match[1] else _union(ranges)]

    def _group(self) -> int:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self._fail("groups are nested too deep")
        self._at += 1
        self._skip(_BLANKS_AND_LINES)
        number = self._new_rule(None)
        self._rules[number] = self._alternatives(_BLANKS_AND_LINES)
        self._expect(")")
        self._depth -= 1
        return number

    def _quantifier(self, char: str, blanks: re.Pattern[str]) -> tuple[int, int | None]:
        self._at += 1
        if char != "{":
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[char]
        self._skip(blanks)
        least = most = int(self._match(_INTEGER, "a count is missing")[0])
        self._skip(blanks)
        unlimited = False
        if self._peek() == ",":
            self._at += 1
            self._skip(blanks)
            unlimited = self._peek() == "}"
            if not unlimited:
                most = int(self._match(_INTEGER, "a count is missing")[0])
                self._skip(blanks)
        self._expect("}")
        if least > MAX_REPEATS or (most < least and not unlimited):
            self._fail("a count is too large or out of order")
        return least, None if unlimited or most > MAX_REPEATS else most

    def _repeat(self, symbols: Sequence, start: int, least: int, most: int | None) -> None:
        """Write out the repetition of `symbols[start:]`, what is optional as rules that call each other."""
        item = symbols[start:]
        if not item:
            self._fail("there is nothing to repeat")
        n_optional = 1 if most is None else most - least
        self._spend(len(item) * least + (len(item) + 2) * n_optional)
        symbols[start:] = item * least
        if most is None:
            again = self._new_rule([])
            self._rules[again] = [[*item, again], []]
            symbols.append(again)
        following: Sequence = []
        for _ in range(n_optional if most is not None else 0):
            following = [self._new_rule([[*item, *following], []])]
        symbols += following

    def _reference(self) -> int:
        name = self._match(_NAME, "a name is missing")[0]
        if name not in self._names:
            self._names[name] = self._new_rule(None)
        return self._names[name]

    def _new_rule(self, rule: Rule | None) -> int:
        if len(self._rules) >= MAX_RULES:
            self._fail("it has too many rules")
        self._rules.append(rule)
        return len(self._rules) - 1

    def _spend(self, n_symbols: int) -> None:
        self._n_symbols += n_symbols
        if self._n_symbols > MAX_SYMBOLS:
            self._fail("it is too large once repetitions are written out")

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _skip(self, blanks: re.Pattern[str]) -> None:
        match = blanks.match(self._text, self._at)
        assert match is not None  # it may be empty
        self._at = match.end()

    def _match(self, pattern: re.Pattern[str], otherwise: str) -> re.Match[str]:
        match = pattern.match(self._text, self._at)
        if match is None:
            self._fail(otherwise)
        self._at = match.end()
        return match

    def _expect(self, text: str) -> None:
        if not self._text.startswith(text, self._at):
            self._fail(f"{text} is missing")
        self._at += len(text)

    def _fail(self, reason: str) -> NoReturn:
        line = self._text.count("\n", 0, self._at) + 1
        raise BadGrammar(f"{reason} (line {line})")


def _code_point(text: str) -> int:
    if text[0] != "\\" or len(text) == 1:
        return ord(text)
    return int(text[2:], 16) if text[1] in "xuU" else _CONTROL.get(text, ord(text[1]))


def _union(ranges: list[tuple[int, int]]) -> CharSet:
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        elif low <= high:
            merged.append((low, high))
    return tuple(merged)


def _complement(ranges: CharSet) -> CharSet:
    ends = [-1, *(high for _, high in ranges)]
    starts = [*(low for low, _ in ranges), _LAST_CODE_POINT + 1]
    return tuple((end + 1, start - 1) for end, start in zip(ends, starts, strict=True) if end + 1 < start)
