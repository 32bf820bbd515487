"""Sans-IO HTTP/1.1 (server side) and Server-Sent Events: bytes in, events out.

Nothing here opens a socket, starts a thread, reads a clock or logs. Feed an
`Http1Connection` the bytes that arrived, pull frozen events from it, hand it the
events you want to send and write the bytes it returns. The package needs h11 and
the standard library only and is usable without the rest of Wingman.
"""

from protocol.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from protocol.events import (
    NEED_DATA,
    PAUSED,
    BodyChunk,
    ConnectionClosed,
    EndOfRequest,
    EndOfResponse,
    Event,
    RequestHead,
    ResponseHead,
    Signal,
)
from protocol.headers import Headers
from protocol.http1 import Http1Connection, Limits
from protocol.sse import SseEvent, SseParser, encode_comment, encode_event
from protocol.target import Target, parse_target

__all__ = [
    "NEED_DATA",
    "PAUSED",
    "BodyChunk",
    "ConnectionClosed",
    "EndOfRequest",
    "EndOfResponse",
    "Event",
    "Headers",
    "Http1Connection",
    "Limits",
    "LocalProtocolError",
    "ProtocolError",
    "RemoteProtocolError",
    "RequestHead",
    "ResponseHead",
    "Signal",
    "SseEvent",
    "SseParser",
    "Target",
    "encode_comment",
    "encode_event",
    "parse_target",
]
