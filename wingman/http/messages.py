"""What a handler takes and what it returns; nobody is handed a `send`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from protocol import Headers, Target


@dataclass(frozen=True, slots=True)
class Request:
    """One complete request. `id` is the peer's X-Request-Id or one of ours."""

    method: str
    target: Target
    headers: Headers
    id: str
    client: str
    body: bytes = b""
    params: Mapping[str, str] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """The decoded path."""
        return self.target.path


@dataclass(frozen=True, slots=True)
class Response:
    """A complete answer; Content-Length is added by the connection."""

    status: int
    body: bytes = b""
    content_type: str = "application/json; charset=utf-8"
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class EventStream:
    """An answer of Server-Sent Events.

    `events` yields encoded event blocks; the connection iterates it and calls `close` in the end,
    also when the client has gone before the first event. After `ping_interval_s` seconds
    without an event a comment is sent; None sends none.
    """

    events: AsyncGenerator[bytes, None]
    close: Callable[[], None]
    ping_interval_s: float | None = 30.0
    headers: tuple[tuple[str, str], ...] = ()


class Socket(Protocol):
    """An open WebSocket, as an endpoint sees it; the loop thread only."""

    peer: str

    async def receive(self) -> str | None:
        """The next text message; None once the peer has closed or is gone. Pings, fragments, the
        message cap and bad input are dealt with below."""

    def push(self, frame: bytes) -> bool:
        """Hand an encoded frame to the transport without waiting; False when its buffer is full: then
        wait for `drain` before the next. Dropped once the socket is closed."""

    async def drain(self) -> None:
        """Wait until the peer has taken enough to go on, or is gone. Raises nothing but CancelledError."""

    def close(self, code: int, reason: str = "") -> None:
        """Begin the closing handshake (RFC 6455, 7); `receive` then ends."""


@dataclass(frozen=True, slots=True)
class Upgrade:
    """The answer to a WebSocket handshake: accept it and let `serve` have the socket until it returns."""

    serve: Callable[[Socket], Awaitable[None]]
    subprotocol: str | None = None
    headers: tuple[tuple[str, str], ...] = ()


Answer = Response | EventStream | Upgrade
