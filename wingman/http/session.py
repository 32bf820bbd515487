"""One WebSocket on the loop: what `messages.Socket` promises, over a byte stream.

The connection's own task is the only one: it serves the endpoint, which pulls messages with
`receive`; pings are answered and the closing handshake is finished while it does so. One timer
per session watches for silence and, once closing has begun, for a peer that never answers; so an
idle socket costs a wake every 20 seconds. Whoever pushes never waits: the stream's buffer is the
only queue, and `push` says when it is full.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

from protocol import (
    NEED_DATA,
    CloseCode,
    CloseReceived,
    PingReceived,
    RemoteProtocolError,
    Signal,
    SocketEvent,
    SocketState,
    TextMessage,
    WebSocketConnection,
    close_frame,
    ping_frame,
)
from protocol.websocket import MAX_MESSAGE_BYTES
from wingman.http.messages import Socket
from wingman.http.stream import ByteStream, WriteTimeout

log = logging.getLogger("wingman.http")

EVENTS_PER_TURN = 16
"""Frames handled before other connections get their turn; thousands of them fit in one read."""


@dataclass(frozen=True, slots=True)
class SocketLimits:
    """Caps and time-outs of a WebSocket."""

    max_message_bytes: int = MAX_MESSAGE_BYTES
    ping_interval_s: float = 20.0
    """Silence after which the peer is asked whether it is there."""
    ping_timeout_s: float = 20.0
    """Further silence after which it is gone."""
    close_timeout_s: float = 5.0
    """How long the peer's half of the closing handshake is waited for."""
    write_timeout_s: float = 30.0


class WebSocketSession:
    """A `messages.Socket`, open once it is made; `received` is what came after the handshake."""

    def __init__(self, stream: ByteStream, limits: SocketLimits, received: bytes = b"") -> None:
        self.peer = stream.peer
        self.sent_bytes = 0
        self._stream = stream
        self._limits = limits
        self._connection = WebSocketConnection(limits.max_message_bytes)
        if received:
            self._connection.receive_data(received)
        self._loop = asyncio.get_running_loop()
        self._heard_at = self._loop.time()
        self._is_reading = False
        self._n_events = 0
        self._timer: asyncio.TimerHandle | None = None

    async def run(self, serve: Callable[[Socket], Awaitable[None]]) -> None:
        """Serve until the endpoint or the peer is done, then close. Raises nothing but CancelledError."""
        self._stream.on_stop = functools.partial(self.close, CloseCode.GOING_AWAY, "the server is stopping")
        self._check_silence()
        try:
            self.close(await self._serve(serve))
            await self.receive()  # nothing but the end can come
        finally:
            self._stream.on_stop = None
            self._stop_timer()

    async def _serve(self, serve: Callable[[Socket], Awaitable[None]]) -> CloseCode:
        try:
            await serve(self)
        except Exception:
            log.exception("the WebSocket of %s failed", self.peer)
            return CloseCode.INTERNAL_ERROR
        return CloseCode.NORMAL

    # -- messages.Socket, called by the endpoint ---------------------------------------------------

    async def receive(self) -> str | None:  # noqa: D102
        while True:
            self._n_events += 1
            if self._n_events % EVENTS_PER_TURN == 0:
                await asyncio.sleep(0)
            event = self._next_event()
            if isinstance(event, TextMessage):
                return event.text
            if isinstance(event, PingReceived):
                self.push(event.reply)
                await self.drain()  # a peer that asks without listening is not read any further
            elif isinstance(event, CloseReceived):
                self._write(event.reply)
            elif event is NEED_DATA:
                if self._connection.state is SocketState.CLOSED:
                    return None
                await self._read()

    def push(self, frame: bytes) -> bool:  # noqa: D102
        if self._connection.state is SocketState.OPEN:
            self._write(frame)
            return self._stream.is_writable
        return True

    async def drain(self) -> None:  # noqa: D102
        try:
            await self._stream.drain(self._limits.write_timeout_s)
        except (ConnectionError, WriteTimeout):
            self._drop()

    def close(self, code: int, reason: str = "") -> None:  # noqa: D102
        frame = self._connection.send_close(code, reason)
        if frame:
            self._write(frame)
            self._stop_timer()
            self._timer = self._loop.call_later(self._limits.close_timeout_s, self._drop)

    # -- below the endpoint ------------------------------------------------------------------------

    def _next_event(self) -> SocketEvent | Literal[Signal.NEED_DATA]:
        was_open = self._connection.state is SocketState.OPEN
        try:
            return self._connection.next_event()
        except RemoteProtocolError as error:
            log.debug("the WebSocket of %s ends: %s", self.peer, error)
            if was_open:
                self._write(close_frame(error.close_code, str(error)))
            return NEED_DATA

    async def _read(self) -> None:
        self._is_reading = True
        try:
            data = await self._stream.read()
        finally:
            self._is_reading = False
        self._heard_at = self._loop.time()
        self._connection.receive_data(data)

    def _write(self, data: bytes) -> None:
        self.sent_bytes += len(data)
        self._stream.push(data)

    def _drop(self) -> None:
        """Give up on the peer: it is gone or takes nothing."""
        self._connection.receive_data(b"")
        self._stream.abort()

    def _check_silence(self) -> None:
        """Ping a silent peer, close one that stays silent, and look again in time."""
        now = self._loop.time()
        if not self._is_reading:  # then the endpoint is busy: what the peer sent has not been seen yet
            self._heard_at = now
        due = self._heard_at + self._limits.ping_interval_s
        if now >= due + self._limits.ping_timeout_s:
            self.close(CloseCode.INTERNAL_ERROR, "no answer to a ping")
            return
        if now >= due:
            self.push(ping_frame())
            due = min(now + self._limits.ping_interval_s, due + self._limits.ping_timeout_s)
        self._timer = self._loop.call_at(due, self._check_silence)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
