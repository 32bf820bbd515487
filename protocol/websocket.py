"""The server side of one WebSocket: the handshake's rules, and bytes <-> messages (RFC 6455).

wsproto's frame decoder reads and checks frames: opcodes, reserved bits, masks, lengths. This
module assembles messages from them, so that a message is refused by the length its frames declare,
before any of it is kept, and the outcome never depends on how the bytes were split. Text only:
the control protocol is JSON. Extensions are never negotiated, so a reserved bit is an error.

Call order: `receive_data` with whatever arrived, then `next_event` until it says NEED_DATA. Each
call takes one frame, or what there is of it, so that the caller can let others have their turn.
After a RemoteProtocolError the peer is owed a close frame with its `close_code`, and nothing is
read any more.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import enum
import hashlib
import io
import re
import struct
from typing import Final, Literal

from wsproto.frame_protocol import Frame, FrameDecoder, Opcode, ParseFailed

from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.events import (
    NEED_DATA,
    CloseReceived,
    FragmentReceived,
    PingReceived,
    PongReceived,
    RequestHead,
    Signal,
    SocketEvent,
    TextMessage,
)
from protocol.headers import Headers

MAX_MESSAGE_BYTES: Final = 256 * 1024
"""The original backend's cap on a message."""
_MAX_CONTROL_BYTES: Final = 125
_FIN: Final = 0x80
_KEY_SUFFIX: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, 1.3
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2


class CloseCode(enum.IntEnum):
    """Why a WebSocket is closed (RFC 6455, 7.4.1, and IANA's registry)."""

    NORMAL = 1000
    GOING_AWAY = 1001
    PROTOCOL_ERROR = 1002
    UNSUPPORTED_DATA = 1003
    NO_STATUS = 1005
    """Stands for a close frame without a code; never sent."""
    INVALID_TEXT = 1007
    POLICY_VIOLATION = 1008
    TOO_BIG = 1009
    MANDATORY_EXTENSION = 1010
    INTERNAL_ERROR = 1011
    SERVICE_RESTART = 1012
    TRY_AGAIN_LATER = 1013
    BAD_GATEWAY = 1014


_SENDABLE: Final = frozenset(CloseCode) - {CloseCode.NO_STATUS}


def _is_sendable(code: int) -> bool:
    return code in _SENDABLE or 3000 <= code <= 4999  # 3000 and up: libraries' and applications' own


# -- the handshake --------------------------------------------------------------------------------


def is_upgrade(headers: Headers) -> bool:
    """Whether a request asks for a WebSocket; `check_handshake` says whether it does so properly."""
    return headers.has_token(b"upgrade", b"websocket") and headers.has_token(b"connection", b"upgrade")


def check_handshake(head: RequestHead) -> str:
    """The Sec-WebSocket-Accept that answers a handshake (RFC 6455, 4.2).

    Raises RemoteProtocolError with status 400, or 426 when another protocol or version was asked for:
    that answer carries `HANDSHAKE_ADVICE`.
    """
    if head.http_version == "1.0":  # there is no Upgrade in it (RFC 9110, 7.8)
        raise RemoteProtocolError("a WebSocket needs HTTP/1.1")
    if not is_upgrade(head.headers):
        raise RemoteProtocolError("only WebSockets are answered here", 426)
    if head.method != "GET":
        raise RemoteProtocolError("a WebSocket begins with GET")
    if head.headers.get_all(b"sec-websocket-version") != (b"13",):
        raise RemoteProtocolError("only version 13 of the WebSocket protocol is spoken here", 426)
    keys = head.headers.get_all(b"sec-websocket-key")
    if len(keys) != 1 or not _is_key(keys[0]):
        raise RemoteProtocolError("Sec-WebSocket-Key must be 16 bytes in base64")
    return accept_key(keys[0])


HANDSHAKE_ADVICE: Final = (
    ("upgrade", "websocket"),
    ("connection", "upgrade"),
    ("sec-websocket-version", "13"),
)
"""Header fields of a 426: what to ask for instead."""


def _is_key(key: bytes) -> bool:
    try:
        return len(base64.b64decode(key, validate=True)) == 16
    except binascii.Error:
        return False


def accept_key(key: bytes) -> str:
    """The proof that a handshake with this Sec-WebSocket-Key was understood (RFC 6455, 4.2.2)."""
    digest = hashlib.sha1(key + _KEY_SUFFIX, usedforsecurity=False).digest()
    return base64.b64encode(digest).decode("ascii")


def offered_subprotocols(headers: Headers) -> tuple[str, ...]:
    """The subprotocols the client offers, in its order; what is no token is left out."""
    offered = b",".join(headers.get_all(b"sec-websocket-protocol")).decode("latin-1")
    return tuple(name for part in offered.split(",") if _TOKEN.fullmatch(name := part.strip()))


# -- frames we send: final and unmasked -----------------------------------------------------------


def text_frame(payload: bytes) -> bytes:
    """One text message of UTF-8 bytes, the same for any number of peers."""
    return _frame(Opcode.TEXT, payload)


def ping_frame(payload: bytes = b"") -> bytes:
    """A ping with at most 125 bytes."""
    return _frame(Opcode.PING, payload)


def close_frame(code: int, reason: str = "") -> bytes:
    """A close frame; the reason is cut to the 123 bytes that fit.

    Raises LocalProtocolError for a code that may not be sent (RFC 6455, 7.4).
    """
    if not _is_sendable(code):
        raise LocalProtocolError(f"close code {code} may not be sent")
    text = reason.encode("utf-8", "replace")[: _MAX_CONTROL_BYTES - 2].decode("utf-8", "ignore")
    return _frame(Opcode.CLOSE, struct.pack("!H", code) + text.encode())


def _frame(opcode: Opcode, payload: bytes) -> bytes:
    length = len(payload)
    if length <= _MAX_CONTROL_BYTES:
        return bytes((_FIN | opcode, length)) + payload
    if opcode.iscontrol():
        raise LocalProtocolError("a control frame carries at most 125 bytes")
    if length < 1 << 16:
        return struct.pack("!BBH", _FIN | opcode, 126, length) + payload
    return struct.pack("!BBQ", _FIN | opcode, 127, length) + payload


# -- the connection -------------------------------------------------------------------------------


class SocketState(enum.Enum):
    """Who has closed (RFC 6455, 7.1)."""

    OPEN = enum.auto()
    LOCAL_CLOSING = enum.auto()
    """We have sent a close frame: messages are dropped until the peer's comes."""
    CLOSED = enum.auto()
    """The peer's close frame came, or it left, or it sent what makes all that follows unreadable."""


class WebSocketConnection:
    """One open WebSocket, after its handshake."""

    def __init__(self, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self.state = SocketState.OPEN
        self._max_message_bytes = max_message_bytes
        self._decoder = FrameDecoder(client=False)
        self._message: _Message | None = None

    def receive_data(self, data: bytes) -> None:
        """Take bytes from the peer; b"" means that it is gone. Dropped once it has closed."""
        if not data:
            self._end()
        elif self.state is not SocketState.CLOSED:
            self._decoder.receive_bytes(data)

    def next_event(self) -> SocketEvent | Literal[Signal.NEED_DATA]:
        """What the next frame does, or NEED_DATA.

        Raises RemoteProtocolError with the close code to send: 1002 for broken framing, 1003 for a
        binary message, 1007 for text that is no UTF-8, 1009 for a message over the limit.
        """
        if self.state is SocketState.CLOSED:
            return NEED_DATA
        try:
            return self._read_frame()
        except ParseFailed:
            self._end()
            raise RemoteProtocolError("the frame is not valid") from None
        except RemoteProtocolError:
            self._end()
            raise

    def _read_frame(self) -> SocketEvent | Literal[Signal.NEED_DATA]:
        frame = self._decoder.process_buffer()
        if frame is None:
            self._check_size(0)
            return NEED_DATA
        assert isinstance(frame.payload, bytes)
        if frame.opcode.iscontrol():
            return self._control_event(frame.opcode, frame.payload)
        return self._data_event(frame, frame.payload)

    def send_close(self, code: int, reason: str = "") -> bytes:
        """Our close frame; empty when closing has begun already. Raises LocalProtocolError for a code
        that may not be sent."""
        data = close_frame(code, reason)
        if self.state is not SocketState.OPEN:
            return b""
        self.state = SocketState.LOCAL_CLOSING
        return data

    def _control_event(self, opcode: Opcode, payload: bytes) -> SocketEvent:
        if opcode is Opcode.PING:
            return PingReceived(_frame(Opcode.PONG, payload))
        if opcode is Opcode.PONG:
            return PongReceived(payload)
        code, reason = _read_close(payload)
        reply = _frame(Opcode.CLOSE, payload[:2]) if self.state is SocketState.OPEN else b""
        self._end()
        return CloseReceived(code, reason, reply)

    def _data_event(self, frame: Frame, payload: bytes) -> SocketEvent:
        """A piece of a frame of data: wsproto hands out what has arrived of it."""
        if self.state is SocketState.LOCAL_CLOSING:
            return FragmentReceived()
        self._check_size(len(payload))
        if (self._message is None) == (frame.opcode is Opcode.CONTINUATION):
            raise RemoteProtocolError("a message is continued that was not begun, or begun within another")
        if frame.opcode is Opcode.BINARY:
            raise RemoteProtocolError("messages are text", close_code=CloseCode.UNSUPPORTED_DATA)
        message = self._message = self._message or _Message()
        is_complete = frame.frame_finished and frame.message_finished
        message.add(payload, is_final=is_complete)
        if not is_complete:
            return FragmentReceived()
        self._message = None
        return TextMessage(message.text)

    def _check_size(self, n_bytes: int) -> None:
        """Raise when the message would be too big with `n_bytes` more and what its current frame still
        announces."""
        header = self._decoder.header
        if header is not None and not header.opcode.iscontrol():
            n_bytes += header.payload_len - self._decoder.payload_consumed
        if self._message is not None:
            n_bytes += self._message.n_bytes
        if n_bytes > self._max_message_bytes and self.state is SocketState.OPEN:
            raise RemoteProtocolError(
                f"a message may have {self._max_message_bytes} bytes", 413, CloseCode.TOO_BIG
            )

    def _end(self) -> None:
        self.state = SocketState.CLOSED
        self._message = None
        self._decoder = FrameDecoder(client=False)  # lets go of what it buffered

    def __repr__(self) -> str:
        return f"<WebSocketConnection {self.state.name}>"


class _Message:
    """Text in the making, checked as it comes."""

    def __init__(self) -> None:
        self.n_bytes = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text = io.StringIO()

    def add(self, payload: bytes, *, is_final: bool) -> None:
        self.n_bytes += len(payload)
        try:
            self._text.write(self._decoder.decode(payload, is_final))
        except UnicodeDecodeError:
            raise RemoteProtocolError("the text is not UTF-8", close_code=CloseCode.INVALID_TEXT) from None

    @property
    def text(self) -> str:
        return self._text.getvalue()


def _read_close(payload: bytes) -> tuple[int, str]:
    if not payload:
        return CloseCode.NO_STATUS, ""
    code = int.from_bytes(payload[:2], "big")
    if len(payload) == 1 or not _is_sendable(code):
        raise RemoteProtocolError("a close frame has a code that may not be sent")
    try:
        return code, payload[2:].decode("utf-8")
    except UnicodeDecodeError:
        raise RemoteProtocolError(
            "the reason of a close frame is not UTF-8", close_code=CloseCode.INVALID_TEXT
        ) from None
