"""Follows a JSON object (RFC 8259) character by character without building it.

Tool call arguments are streamed as the text the model wrote, so they are checked while they pass:
a client may parse them only if every object that was completed is valid JSON. Pure, one scanner an
object, work linear in the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import Enum, auto
from typing import Final

MAX_DEPTH: Final = 100
"""Objects and arrays within each other: clients parse with recursion."""

_DIGITS: Final = "0123456789"
_SPACE: Final = " \t\r\n"
_STRING_RUN: Final = re.compile(r'[^"\\\x00-\x1f]*')


class _State(Enum):
    START = auto()
    FIRST_KEY = auto()
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    FIRST_ITEM = auto()
    AFTER = auto()
    STRING = auto()
    ESCAPE = auto()
    HEX = auto()
    WORD = auto()
    MINUS = auto()
    ZERO = auto()
    INTEGER = auto()
    POINT = auto()
    FRACTION = auto()
    E = auto()
    SIGN = auto()
    POWER = auto()


_S = _State
_NUMBER: Final[dict[_State, dict[str, _State]]] = {
    _S.MINUS: {"0": _S.ZERO} | dict.fromkeys(_DIGITS[1:], _S.INTEGER),
    _S.ZERO: {".": _S.POINT, "e": _S.E, "E": _S.E},
    _S.INTEGER: {".": _S.POINT, "e": _S.E, "E": _S.E} | dict.fromkeys(_DIGITS, _S.INTEGER),
    _S.POINT: dict.fromkeys(_DIGITS, _S.FRACTION),
    _S.FRACTION: {"e": _S.E, "E": _S.E} | dict.fromkeys(_DIGITS, _S.FRACTION),
    _S.E: {"+": _S.SIGN, "-": _S.SIGN} | dict.fromkeys(_DIGITS, _S.POWER),
    _S.SIGN: dict.fromkeys(_DIGITS, _S.POWER),
    _S.POWER: dict.fromkeys(_DIGITS, _S.POWER),
}
_WHOLE_NUMBER: Final = frozenset({_S.ZERO, _S.INTEGER, _S.FRACTION, _S.POWER})
_WORDS: Final = {"t": "rue", "f": "alse", "n": "ull"}
_SPACED: Final = frozenset({_S.FIRST_KEY, _S.KEY, _S.COLON, _S.VALUE, _S.FIRST_ITEM, _S.AFTER})


class ObjectScanner:
    """Takes text until one object, from `{` on, is complete or can't become one."""

    def __init__(self) -> None:
        self.complete = False
        self.failed = False
        self._state = _State.START
        self._open: list[str] = []
        self._is_key = False
        self._rest = ""  # of true, false or null
        self._n_hex = 0

    def scan(self, text: str, start: int) -> int:
        """Take `text` from `start`; where it stopped: at the end, after the object or at the first
        character that can't be part of it."""
        at = start
        while at < len(text) and not self.complete:
            if self._state is _State.STRING:
                match = _STRING_RUN.match(text, at)
                assert match is not None
                at = match.end()
                if at == len(text):
                    break
            if not self._step(text[at]):
                self.failed = True
                break
            at += 1
        return at

    def _step(self, char: str) -> bool:
        """Whether `char` may follow."""
        state = self._state
        if state in _NUMBER:
            following = _NUMBER[state].get(char)
            if following is not None:
                self._state = following
                return True
            if state not in _WHOLE_NUMBER:
                return False
            self._state = state = _State.AFTER
        if char in _SPACE and state in _SPACED:
            return True
        return _STEPS[state](self, char)

    def _start(self, char: str) -> bool:
        return char == "{" and self._enter(char, _State.FIRST_KEY)

    def _first_key(self, char: str) -> bool:
        return self._leave() if char == "}" else self._key(char)

    def _key(self, char: str) -> bool:
        self._is_key = True
        self._state = _State.STRING
        return char == '"'

    def _colon(self, char: str) -> bool:
        self._state = _State.VALUE
        return char == ":"

    def _first_item(self, char: str) -> bool:
        return self._leave() if char == "]" else self._value(char)

    def _value(self, char: str) -> bool:
        if char == "{":
            return self._enter(char, _State.FIRST_KEY)
        if char == "[":
            return self._enter(char, _State.FIRST_ITEM)
        if char in _WORDS:
            self._rest = _WORDS[char]
            self._state = _State.WORD
            return True
        if char == "-":
            self._state = _State.MINUS
            return True
        if char in _DIGITS:
            self._state = _NUMBER[_State.MINUS][char]
            return True
        self._is_key = False
        self._state = _State.STRING
        return char == '"'

    def _after(self, char: str) -> bool:
        in_object = self._open[-1] == "{"
        if char == ",":
            self._state = _State.KEY if in_object else _State.VALUE
            return True
        return char == ("}" if in_object else "]") and self._leave()

    def _string(self, char: str) -> bool:
        if char == "\\":
            self._state = _State.ESCAPE
            return True
        self._state = _State.COLON if self._is_key else _State.AFTER
        return char == '"'

    def _escape(self, char: str) -> bool:
        self._n_hex = 4
        self._state = _State.HEX if char == "u" else _State.STRING
        return char in 'u"\\/bfnrt'

    def _hex(self, char: str) -> bool:
        self._n_hex -= 1
        if not self._n_hex:
            self._state = _State.STRING
        return char in "0123456789abcdefABCDEF"

    def _word(self, char: str) -> bool:
        expected, self._rest = self._rest[0], self._rest[1:]
        if not self._rest:
            self._state = _State.AFTER
        return char == expected

    def _enter(self, bracket: str, state: _State) -> bool:
        self._open.append(bracket)
        self._state = state
        return len(self._open) <= MAX_DEPTH

    def _leave(self) -> bool:
        self._open.pop()
        self._state = _State.AFTER
        self.complete = not self._open
        return True


_STEPS: Final[dict[_State, Callable[[ObjectScanner, str], bool]]] = {
    state: getattr(ObjectScanner, f"_{state.name.lower()}") for state in _State if state not in _NUMBER
}
