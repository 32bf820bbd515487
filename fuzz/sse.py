"""Server-Sent Events from a hostile server, and our own encoder.

Invariant: for any bytes, in any split, `SseParser` gives the same events and raises nothing but
RemoteProtocolError; what `encode_event` writes comes back as one event with the same text, line
ends normalised; a comment comes back as nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from fuzz.mutate import pieces
from protocol import RemoteProtocolError, SseEvent, SseParser, encode_comment, encode_event

TOKENS = (
    b"\r\n", b"\n", b"\r", b"\n\n", b"\r\r", b"\r\n\r\n", b"data: ", b"data:", b"data", b"event: ", b"id: ", b"id:\x00",
    b"retry: 1", b":", b": c\n", b"\xef\xbb\xbf", b"\xff", b"\xe2\x82", b"\xe2\x80\xa8", b"\xc2\x85",
    b"data: [DONE]\n\n",
)  # fmt: skip

_TIGHT_BYTES = 16


def one(data: bytes) -> None:
    """Check the invariant for `data`."""
    whole = _parse([data])
    assert _parse([data[at : at + 1] for at in range(len(data))]) == whole
    assert _parse(pieces(data)) == whole
    with contextlib.suppress(RemoteProtocolError):
        _parse(pieces(data), _TIGHT_BYTES)
    _check_round_trip(data.decode("utf-8", "replace"))


def _parse(split: Sequence[bytes], max_bytes: int = 1 << 20) -> list[SseEvent]:
    parser = SseParser(max_bytes)
    return [event for piece in split for event in parser.feed(piece)]


def _check_round_trip(text: str) -> None:
    normal = text.replace("\r\n", "\n").replace("\r", "\n")
    assert _parse([encode_event(text.encode())]) == [SseEvent(normal)]
    name, _, rest = normal.partition("\n")
    assert _parse([encode_event(rest.encode(), name)]) == [SseEvent(rest, name or "message")]
    assert _parse([encode_comment(text.encode())]) == []
