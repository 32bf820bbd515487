"""What a handler takes and what it returns; nobody is handed a `send`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field

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


Answer = Response | EventStream
