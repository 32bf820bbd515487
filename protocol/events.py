"""Every event of this package, frozen: what the peer did, and what we ask to be sent.

Inbound order per request: RequestHead, BodyChunk*, EndOfRequest; ConnectionClosed at the
end. Outbound: ResponseHead, BodyChunk*, EndOfResponse. Inbound on a WebSocket: FragmentReceived,
TextMessage, PingReceived and PongReceived in any order, CloseReceived last. `NEED_DATA` and
`PAUSED` are not events but answers of `next_event`: more bytes are needed; nothing more may be
read until the current response is finished.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Final, Literal

from protocol.headers import Headers


class Signal(enum.Enum):
    """Answers of `next_event` that are no event."""

    NEED_DATA = enum.auto()
    PAUSED = enum.auto()


NEED_DATA: Final = Signal.NEED_DATA
PAUSED: Final = Signal.PAUSED


@dataclass(frozen=True, slots=True)
class RequestHead:
    """Request line and header fields. `target` is the raw request target (RFC 9112, 3.2)."""

    method: str
    target: bytes
    headers: Headers
    http_version: Literal["1.0", "1.1"]
    content_length: int | None
    """Declared body size in bytes; None for a chunked body; 0 when there is no body."""


@dataclass(frozen=True, slots=True)
class BodyChunk:
    """Some bytes of a request or response body, never empty when received."""

    data: bytes


@dataclass(frozen=True, slots=True)
class EndOfRequest:
    """The request is complete."""


@dataclass(frozen=True, slots=True)
class ConnectionClosed:
    """The peer will send nothing more; seen only between requests."""


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """Status and header fields. Without Content-Length an HTTP/1.1 body is sent chunked; 101 has none."""

    status: int
    headers: Headers = field(default_factory=Headers)


@dataclass(frozen=True, slots=True)
class EndOfResponse:
    """The response is complete."""


Event = RequestHead | BodyChunk | EndOfRequest | ConnectionClosed


@dataclass(frozen=True, slots=True)
class TextMessage:
    """A whole text message."""

    text: str


@dataclass(frozen=True, slots=True)
class FragmentReceived:
    """Some of a message that is not complete yet. How many of them there are depends on how bytes arrive."""


@dataclass(frozen=True, slots=True)
class PingReceived:
    """The peer asks whether we are there; `reply` is the frame that says so."""

    reply: bytes


@dataclass(frozen=True, slots=True)
class PongReceived:
    """The answer to a ping of ours, or a sign of life."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class CloseReceived:
    """The peer closes; it sends nothing more. `code` is 1005 when it gave none; `reply` is the frame
    to answer with, empty when ours went out before."""

    code: int
    reason: str
    reply: bytes


SocketEvent = TextMessage | FragmentReceived | PingReceived | PongReceived | CloseReceived
