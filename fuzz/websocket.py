"""WebSocket frames and handshakes from a hostile peer.

Invariant: for any bytes, in any split, only RemoteProtocolError with a close code that may be sent
escapes `WebSocketConnection`; the split changes nothing; no message is over the cap, and little more
than one read is held; nothing follows a close or an error. A handshake with any header values is
accepted or refused, and what is accepted has a key of 16 bytes.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from fuzz.mutate import pieces
from protocol import (
    NEED_DATA,
    CloseReceived,
    FragmentReceived,
    Headers,
    PingReceived,
    RemoteProtocolError,
    RequestHead,
    SocketEvent,
    SocketState,
    TextMessage,
    WebSocketConnection,
    check_handshake,
    close_frame,
    offered_subprotocols,
)

TOKENS = (
    b"\x81\x80\0\0\0\0", b"\x01\x81\0\0\0\0a", b"\x00\x81\0\0\0\0b", b"\x80\x81\0\0\0\0c", b"\x82\x81\0\0\0\0d",
    b"\x89\x80\0\0\0\0", b"\x8a\x80\0\0\0\0", b"\x88\x80\0\0\0\0", b"\x88\x82\0\0\0\0\x03\xe8",
    b"\x81\xfe\0\x7e\0\0\0\0",
    b"\x81\xff\0\0\0\0\0\1\0\0\0\0\0\0", b"\x81\x05", b"\xc1\x80", b"\x09\x80\0\0\0\0", b"\x8b\x80\0\0\0\0",
    b"\xe2\x82\xac", b"\xe2\x82", b"\xff", b"\xed\xa0\x80", b"\xf0\x9f\x98\x80", b"\0\0\0\0", b"*" * 64,
)  # fmt: skip

_CAP_BYTES = 128
_MAX_HELD_BYTES = 14 + 125
"""A head that is not complete, or a control frame."""


@dataclass
class _Transcript:
    """What a connection said; `close_code` when it ended with an error."""

    events: list[SocketEvent] = field(default_factory=list)
    close_code: int | None = None


def one(data: bytes) -> None:
    """Check the invariant for `data`."""
    whole = _read([data])
    assert _read([data[at : at + 1] for at in range(len(data))]) == whole
    assert _read(pieces(data)) == whole
    _read(pieces(data), closes_at=len(data) % 3)
    _check_handshake(data)


def _read(split: Sequence[bytes], closes_at: int | None = None) -> _Transcript:
    connection = WebSocketConnection(_CAP_BYTES)
    transcript = _Transcript()
    for number, piece in enumerate(split):
        if number == closes_at:
            connection.send_close(1000)
        connection.receive_data(piece)
        try:
            _pull(connection, transcript)
        except RemoteProtocolError as error:
            transcript.close_code = error.close_code
        if transcript.close_code is not None:
            assert close_frame(transcript.close_code)
            assert connection.state is SocketState.CLOSED
        assert len(connection._decoder.buffer) <= _MAX_HELD_BYTES
    return transcript


def _pull(connection: WebSocketConnection, transcript: _Transcript) -> None:
    while (event := connection.next_event()) is not NEED_DATA:
        assert transcript.close_code is None
        assert not transcript.events or not isinstance(transcript.events[-1], CloseReceived)
        if isinstance(event, TextMessage):
            assert connection.state is SocketState.OPEN
            assert len(event.text.encode()) <= _CAP_BYTES
        if isinstance(event, PingReceived):
            assert len(event.reply) <= 2 + 125
        if isinstance(event, CloseReceived):
            assert connection.state is SocketState.CLOSED
        if not isinstance(event, FragmentReceived):
            transcript.events.append(event)


def _check_handshake(data: bytes) -> None:
    fields = [(b"upgrade", b"websocket"), (b"connection", b"upgrade"), (b"sec-websocket-version", b"13")]
    headers = Headers([*fields, (b"sec-websocket-key", data), (b"sec-websocket-protocol", data)])
    assert all(name.isascii() and "," not in name for name in offered_subprotocols(headers))
    with contextlib.suppress(RemoteProtocolError):
        check_handshake(RequestHead("GET", b"/", headers, "1.1", 0))
        assert len(base64.b64decode(data)) == 16
    noise = Headers([(name, data) for name, _ in fields])
    with contextlib.suppress(RemoteProtocolError):
        check_handshake(RequestHead("GET", b"/", noise, "1.1", 0))
