"""WebSocket frames made by hand, so that they can be wrong, and read back by the `websockets` package.

`CASES` is what a peer may send and what must come of it, after the Autobahn test suite's chapters.
"""

from __future__ import annotations

import struct
from collections.abc import Generator
from dataclasses import dataclass
from itertools import cycle, pairwise
from typing import TypeVar

from websockets.frames import Frame
from websockets.streams import StreamReader

T = TypeVar("T")
CONT, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
MASK = b"\x0d\xf0\x5a\x81"
CAP = 1024
"""The message cap that `CASES` count on."""


def frame(
    opcode: int,
    payload: bytes = b"",
    *,
    fin: bool = True,
    rsv: int = 0,
    mask: bytes = MASK,
    declared: int | None = None,
) -> bytes:
    """A client's frame; `declared` makes its length a lie."""
    length = len(payload) if declared is None else declared
    first = fin << 7 | rsv << 4 | opcode
    bit = 0x80 if mask else 0
    if length < 126:
        head = struct.pack("!BB", first, bit | length)
    elif length < 1 << 16:
        head = struct.pack("!BBH", first, bit | 126, length)
    else:
        head = struct.pack("!BBQ", first, bit | 127, length)
    masked = bytes(a ^ b for a, b in zip(payload, cycle(mask), strict=False)) if mask else payload
    return head + mask + masked


def close(code: int, reason: bytes = b"") -> bytes:
    return frame(CLOSE, struct.pack("!H", code) + reason)


def read_frames(data: bytes) -> list[Frame]:
    """What a server sent: whole frames, nothing left over."""
    reader = StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    frames = []
    while not _finish(reader.at_eof()):
        frames.append(_finish(Frame.parse(reader.read_exact, mask=False)))
    return frames


def _finish(work: Generator[None, None, T]) -> T:
    try:
        next(work)
    except StopIteration as stop:
        value: T = stop.value
        return value
    raise AssertionError("bytes are missing")


def texts(frames: list[Frame]) -> list[str]:
    return [bytes(item.data).decode() for item in frames if item.opcode == TEXT]


def pongs(frames: list[Frame]) -> list[bytes]:
    return [bytes(item.data) for item in frames if item.opcode == PONG]


def close_code(frames: list[Frame]) -> int | None:
    """The code of the close frame, which must be the last one; 1005 when it has none."""
    if any(item.opcode == CLOSE for item in frames[:-1]):
        raise AssertionError("something follows a close frame")
    if not frames or frames[-1].opcode != CLOSE:
        return None
    payload = bytes(frames[-1].data)
    return int.from_bytes(payload[:2], "big") if payload else 1005


@dataclass(frozen=True)
class Case:
    """What is sent, the texts and pings seen of it, and the code that it is closed with, if it is."""

    data: bytes
    texts: tuple[str, ...] = ()
    pings: tuple[bytes, ...] = ()
    code: int | None = None


def _fragments(payload: bytes, *cuts: int) -> bytes:
    edges = [0, *cuts, len(payload)]
    parts = [payload[start:end] for start, end in pairwise(edges)]
    last = len(parts) - 1
    return b"".join(
        frame(CONT if number else TEXT, part, fin=number == last) for number, part in enumerate(parts)
    )


_EURO = "x\u20ac\U0001f600".encode()
HELLO = frame(TEXT, b"hello")
_OPEN = frame(TEXT, b"he", fin=False)

CASES = {
    **{f"text of {n}": Case(frame(TEXT, b"*" * n), ("*" * n,)) for n in (0, 1, 125, 126, 127, 128, 1000, CAP)},
    "two texts": Case(HELLO * 2, ("hello", "hello")),
    "control characters": Case(frame(TEXT, b"a\r\nb\x00\xc2\x85"), ("a\r\nb\x00\x85",)),
    "ping": Case(frame(PING), pings=(b"",)),
    "full ping": Case(frame(PING, bytes(range(125))), pings=(bytes(range(125)),)),
    "pings": Case(b"".join(frame(PING, b"%d" % n) for n in range(9)), pings=tuple(b"%d" % n for n in range(9))),
    "pong nobody asked for": Case(frame(PONG, b"x") + HELLO, ("hello",)),
    "two fragments": Case(_fragments(b"hello", 2), ("hello",)),
    "fragments of one byte": Case(_fragments(b"hello", 1, 2, 3, 4), ("hello",)),
    "empty fragments": Case(_fragments(b"hello", 0, 0, 2, 2, 5), ("hello",)),
    "all empty": Case(_fragments(b"", 0, 0), ("",)),
    "controls between fragments": Case(
        _OPEN + frame(PING, b"1") + frame(CONT, b"l", fin=False) + frame(PONG) + frame(PING, b"2")
        + frame(CONT, b"lo"), ("hello",), (b"1", b"2"),
    ),
    "close between fragments": Case(_OPEN + close(1000) + frame(CONT, b"llo"), code=1000),
    "fragments up to the cap": Case(_fragments(b"*" * CAP, 1, 1000), ("*" * CAP,)),
    "no sum over messages": Case(frame(TEXT, b"*" * CAP) * 3, ("*" * CAP,) * 3),
    "a full message and a long ping": Case(
        frame(TEXT, b"*" * CAP, fin=False) + frame(PING, b"p" * 125) + frame(CONT), ("*" * CAP,), (b"p" * 125,)
    ),
    # framing
    **{f"reserved bits {n}": Case(HELLO + frame(TEXT, b"x", rsv=n) + HELLO, ("hello",), code=1002)
       for n in (1, 2, 4, 7)},
    **{f"opcode {n}": Case(HELLO + frame(n, b"x") + HELLO, ("hello",), code=1002)
       for n in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)},
    "unmasked": Case(frame(TEXT, b"hello", mask=b""), code=1002),
    "unmasked ping": Case(frame(PING, mask=b""), code=1002),
    "long ping": Case(frame(PING, b"x" * 126), code=1002),
    "long close": Case(frame(CLOSE, b"\x03\xe8" + b"x" * 124), code=1002),
    "fragmented ping": Case(frame(PING, b"x", fin=False), code=1002),
    "fragmented close": Case(frame(CLOSE, fin=False), code=1002),
    "continuation of nothing": Case(frame(CONT, b"x") + HELLO, code=1002),
    "last continuation of nothing": Case(HELLO + frame(CONT, b"x", fin=False), ("hello",), code=1002),
    "text within a text": Case(_OPEN + HELLO, code=1002),
    "binary within a text": Case(_OPEN + frame(BINARY, b"x"), code=1002),
    "length in too many bytes": Case(b"\x81\xfe\x00\x05" + MASK, code=1002),
    "length in far too many bytes": Case(b"\x81\xff" + struct.pack("!Q", 5) + MASK, code=1002),
    "negative length": Case(b"\x81\xff" + struct.pack("!Q", 1 << 63) + MASK, code=1002),
    # what is no text
    "binary": Case(HELLO + frame(BINARY, b"x") + HELLO, ("hello",), code=1003),
    "empty binary": Case(frame(BINARY), code=1003),
    "binary fragment": Case(frame(BINARY, b"x", fin=False), code=1003),
    "UTF-8": Case(frame(TEXT, _EURO), (_EURO.decode(),)),
    **{f"UTF-8 cut at {n}": Case(_fragments(_EURO, n), (_EURO.decode(),)) for n in range(1, len(_EURO))},
    **{f"bad UTF-8 {bad.hex()}": Case(HELLO + frame(TEXT, b"a" + bad + b"b") + HELLO, ("hello",), code=1007)
       for bad in (b"\xff", b"\x80", b"\xc0\x80", b"\xe2\x82", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xf8\x88")},
    "bad UTF-8 in a fragment": Case(frame(TEXT, b"\xe2", fin=False) + frame(CONT, b"x", fin=False), code=1007),
    "UTF-8 that ends early": Case(frame(TEXT, b"\xe2\x82"), code=1007),
    "UTF-8 that ends early in a fragment": Case(_OPEN + frame(CONT, b"\xe2\x82"), code=1007),
    # size
    "too big": Case(frame(TEXT, b"*" * (CAP + 1)), code=1009),
    "announced as too big": Case(frame(TEXT, b"", declared=CAP + 1), code=1009),
    "announced as huge": Case(frame(TEXT, b"", declared=(1 << 63) - 1), code=1009),
    "too big and binary": Case(frame(BINARY, b"*" * (CAP + 1)), code=1009),
    "too big and no text": Case(frame(TEXT, b"\xff" * (CAP + 1)), code=1009),
    "too big by its fragments": Case(_fragments(b"*" * (CAP + 1), 600), code=1009),
    "too big in its last fragment": Case(_fragments(b"*" * (CAP + 1), CAP) + HELLO, code=1009),
    "too big by what a fragment announces": Case(_OPEN + frame(CONT, declared=CAP - 1), code=1009),
    # closing
    **{f"close with {n}": Case(HELLO + close(n, b"why") + HELLO, ("hello",), code=n)
       for n in (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 3000, 3999, 4000, 4999)},
    **{f"close with wrong {n}": Case(close(n), code=1002)
       for n in (0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535)},
    "close without a code": Case(frame(CLOSE) + frame(PING), code=1005),
    "close with half a code": Case(frame(CLOSE, b"\x03"), code=1002),
    "close with the longest reason": Case(close(1000, b"*" * 123), code=1000),
    "close with a reason that is no text": Case(close(1000, b"\xff"), code=1007),
}  # fmt: skip
