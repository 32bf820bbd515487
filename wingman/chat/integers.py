"""Integer ranges -> GBNF alternatives over decimal digits.

Owns the spelling of a range and nothing else; `wingman.chat.schema` calls it, on any thread. The
texts are those that llama-server's converter gives, so that greedy output under a bounded integer
is the same token for token. A range open at one end admits numbers of up to 16 digits, there as
here; that keeps a model from writing digits for ever.
"""

from __future__ import annotations

_MAX_DIGITS = 16
"""Digits of a number in an open range, as in llama-server."""


def integer_range(low: int | None, high: int | None) -> str:
    """Alternatives for the integers from `low` to `high`, both inclusive; one of them may be None."""
    if low is not None and high is not None:
        return _between(low, high)
    if low is not None:
        return _at_least(low)
    assert high is not None
    return _at_most(high)


def _at_least(low: int) -> str:
    if low < 0:
        return f'"-" ({_between(0, -low)}) | [0] | [1-9] {_digits(0, _MAX_DIGITS - 1)}'
    if low == 0:
        return f"[0] | [1-9] {_digits(0, _MAX_DIGITS - 1)}"
    return _open(low, _room(low), "1")


def _at_most(high: int) -> str:
    if high < 0:
        return f'"-" ({_open(-high, _room(-high), "0")})'
    return f'"-" [1-9] {_digits(0, _MAX_DIGITS - 1)} | {_between(0, high)}'


def _room(low: int) -> int:
    """Digits an open range from `low` may have: a bound of 16 digits and more needs room above it."""
    return max(_MAX_DIGITS, len(str(low)) + 1)


def _open(low: int, room: int, first: str) -> str:
    """`low` and above, at most `room` digits, the first of them not below `first`."""
    if low == 0:
        return _digits(1, room)
    text, rest = str(low), max(room - 1, 1)
    head, width = text[0], len(text)
    alternatives = []
    if head > (first if width == 1 else "1"):
        alternatives.append(f"{_one(first, _before(head))} {_digits(width, rest)}")
    if width == 1:
        return " | ".join([*alternatives, f"{_one(head, '9')} {_digits(0, rest)}"])
    alternatives.append(f"{_one(head, head)} ({_open(int(text[1:]), rest, '0')})")
    if head < "9":
        alternatives.append(f"{_one(_after(head), '9')} {_digits(width - 1, rest)}")
    return " | ".join(alternatives)


def _between(low: int, high: int) -> str:
    if high < 0:
        return f'"-" ({_between(-high, -low)})'
    alternatives = []
    if low < 0:
        alternatives.append(f'"-" ({_between(0, -low)})')
        low = 0
    start, end = str(low), str(high)
    for width in range(len(start), len(end)):
        alternatives.append(_same_width(start, "9" * width))
        start = "1" + "0" * width
    return " | ".join([*alternatives, _same_width(start, end)])


def _same_width(low: str, high: str) -> str:
    n_common = next((i for i, (a, b) in enumerate(zip(low, high, strict=True)) if a != b), len(low))
    parts = [f'"{low[:n_common]}"'] if n_common else []
    if n_common < len(low):
        parts.append(_diverging(low[n_common:], high[n_common:]))
    return " ".join(parts)


def _diverging(low: str, high: str) -> str:
    """Equally many digits, of which the first differ."""
    first, last, width = low[0], high[0], len(low) - 1
    if width == 0:
        return f"[{first}-{last}]"
    zeros, nines = "0" * width, "9" * width
    alternatives = []
    reached = False
    if low[1:] == zeros:
        alternatives.append(f"{_one(first, _before(last))} {_digits(width, width)}")
    else:
        alternatives.append(f"[{first}] ({_same_width(low[1:], nines)})")
        if first < _before(last):
            reached = high[1:] == nines
            upto = last if reached else _before(last)
            alternatives.append(f"{_one(_after(first), upto)} {_digits(width, width)}")
    if not reached:
        alternatives.append(f"{_one(last, last)} {_same_width(zeros, high[1:])}")
    return f"({' | '.join(alternatives)})"


def _before(digit: str) -> str:
    return chr(ord(digit) - 1)


def _after(digit: str) -> str:
    return chr(ord(digit) + 1)


def _one(first: str, last: str) -> str:
    return f"[{first}]" if first == last else f"[{first}-{last}]"


def _digits(least: int, most: int) -> str:
    if least == most:
        return "[0-9]" if least == 1 else f"[0-9]{{{least}}}"
    return f"[0-9]{{{least},{most}}}"
