"""Sans-IO HTTP/1.1 and WebSocket (server side) and Server-Sent Events: bytes in, events out.

Nothing here opens a socket, starts a thread, reads a clock or logs. Feed an
`Http1Connection` the bytes that arrived, pull frozen events from it, hand it the
events you want to send and write the bytes it returns. The package needs h11, wsproto
and the standard library only and is usable without the rest of Wingman.
"""

from protocol.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from protocol.events import (
    NEED_DATA,
    PAUSED,
    BodyChunk,
    CloseReceived,
    ConnectionClosed,
    EndOfRequest,
    EndOfResponse,
    Event,
    FragmentReceived,
    PingReceived,
    PongReceived,
    RequestHead,
    ResponseHead,
    Signal,
    SocketEvent,
    TextMessage,
)
from protocol.headers import Headers
from protocol.http1 import Http1Connection, Limits
from protocol.sse import SseEvent, SseParser, encode_comment, encode_event
from protocol.target import Target, parse_target
from protocol.websocket import (
    CloseCode,
    SocketState,
    WebSocketConnection,
    check_handshake,
    close_frame,
    is_upgrade,
    offered_subprotocols,
    ping_frame,
    text_frame,
)

__all__ = [
    "NEED_DATA",
    "PAUSED",
    "BodyChunk",
    "CloseCode",
    "CloseReceived",
    "ConnectionClosed",
    "EndOfRequest",
    "EndOfResponse",
    "Event",
    "FragmentReceived",
    "Headers",
    "Http1Connection",
    "Limits",
    "LocalProtocolError",
    "PingReceived",
    "PongReceived",
    "ProtocolError",
    "RemoteProtocolError",
    "RequestHead",
    "ResponseHead",
    "Signal",
    "SocketEvent",
    "SocketState",
    "SseEvent",
    "SseParser",
    "Target",
    "TextMessage",
    "WebSocketConnection",
    "check_handshake",
    "close_frame",
    "encode_comment",
    "encode_event",
    "is_upgrade",
    "offered_subprotocols",
    "parse_target",
    "ping_frame",
    "text_frame",
]
