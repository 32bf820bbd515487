"""One coroutine per connection: read a request, let the application answer, write the answer.

The loop is linear and pull-style. While a handler runs, the read side is watched: the end of
file cancels the handler (and so its generation) within the same loop turn; bytes that a
pipelining peer sent ahead stay in the stream, which stops reading at its cap. After any error
the protocol's own state decides whether an answer can still be sent and whether the connection
can be used again. A WebSocket takes the connection over until its end. Runs on the loop thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from typing import Protocol

from protocol import (
    NEED_DATA,
    BodyChunk,
    ConnectionClosed,
    EndOfRequest,
    EndOfResponse,
    Headers,
    Http1Connection,
    Limits,
    RemoteProtocolError,
    RequestHead,
    ResponseHead,
    Target,
    check_handshake,
    encode_comment,
    parse_target,
)
from protocol.websocket import HANDSHAKE_ADVICE
from wingman.http.messages import Answer, EventStream, Request, Response, Upgrade
from wingman.http.session import SocketLimits, WebSocketSession
from wingman.http.stream import ByteStream, WriteTimeout, close_gently

log = logging.getLogger("wingman.http")
access_log = logging.getLogger("wingman.access")

CLIENT_GONE = 499
"""Logged status of a request whose client left before the answer was complete (nginx's number)."""
EVENTS_PER_TURN = 64
"""Body chunks read before other connections get their turn."""
_SSE_HEADERS = (
    ("content-type", "text/event-stream"),
    ("cache-control", "no-cache"),
    ("x-accel-buffering", "no"),
)


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Byte caps and time-outs of a connection; each has a flag of `wingman serve`."""

    wire: Limits = field(default_factory=Limits)
    head_timeout_s: float = 10.0
    body_timeout_s: float = 60.0
    idle_timeout_s: float = 75.0
    write_timeout_s: float = 30.0
    socket: SocketLimits = field(default_factory=SocketLimits)


class Application(Protocol):
    """What the connection asks of the layers above."""

    def screen(self, request: Request) -> Response | None:
        """Refuse a request by its head alone, before its body is read; None lets it in."""

    async def handle(self, request: Request) -> Answer:
        """Answer a complete request; turns its own errors into answers."""

    def refuse(self, status: int, message: str) -> Response:
        """The answer to something that is no valid request."""

    def request_id(self, offered: str | None) -> str:
        """The id of a request: the peer's own when acceptable, else a fresh one."""

    @property
    def is_draining(self) -> bool:
        """Whether connections are to be closed after their current answer."""


async def serve_connection(stream: ByteStream, app: Application, limits: ConnectionLimits) -> None:
    """Serve requests on `stream` until either side is done; always closes it, never raises but
    CancelledError."""
    connection = _Connection(stream, app, limits)
    try:
        await connection.run()
    except asyncio.CancelledError:
        if not stream.is_disconnected:  # the server is stopping, not the peer
            stream.abort()
            raise
    except (ConnectionError, WriteTimeout) as error:
        log.debug("connection to %s lost: %s", stream.peer, error)
    except Exception:
        log.exception("connection to %s failed", stream.peer)
    finally:
        stream.abort()


class _Connection:
    def __init__(self, stream: ByteStream, app: Application, limits: ConnectionLimits) -> None:
        self._stream = stream
        self._app = app
        self._limits = limits
        self._http = Http1Connection(limits.wire)
        self._sent_bytes = 0

    async def run(self) -> None:
        try:
            while await self._serve_one():
                self._http.start_next_cycle()
                await asyncio.sleep(0)  # a peer with thousands of requests in one packet takes turns too
        except RemoteProtocolError as error:
            if self._http.can_answer:
                self._send_response(self._app.refuse(error.status_hint, str(error)))
                access_log.info("- refused %s: %s", self._stream.peer, error)
        except TimeoutError:
            if self._http.can_answer:
                self._send_response(self._app.refuse(408, "the request did not arrive in time"))
        await close_gently(self._stream)

    async def _serve_one(self) -> bool:
        """One request and its answer; whether the connection can carry another."""
        head = await self._read_head()
        if head is None:
            return False
        started = time.perf_counter()
        self._sent_bytes = 0
        request = self._open_request(head, parse_target(head.target))
        status = CLIENT_GONE
        try:
            refusal = self._app.screen(request)
            if refusal is None:
                body = await self._read_body(head)
                request = _with_body(request, body)
            elif head.content_length == 0:
                self._next_buffered()
            status = await self._answer(head, request, refusal)
        except RemoteProtocolError as error:
            status = error.status_hint
            raise
        except TimeoutError:
            status = 408
            raise
        finally:
            _log_access(request, status, time.perf_counter() - started, self._sent_bytes)
        return self._http.can_reuse and not self._app.is_draining

    async def _read_head(self) -> RequestHead | None:
        """The next request head; None when the peer closed or stayed idle for too long."""
        event = self._http.next_event()
        if event is NEED_DATA and not self._http.has_partial_head:
            self._stream.is_idle = True
            try:
                async with asyncio.timeout(self._limits.idle_timeout_s):
                    await self._receive()
            except TimeoutError:
                return None
            finally:
                self._stream.is_idle = False
        async with asyncio.timeout(self._limits.head_timeout_s):
            while event is NEED_DATA:
                event = self._http.next_event()
                if event is NEED_DATA:
                    await self._receive()
        if isinstance(event, ConnectionClosed):
            return None
        assert isinstance(event, RequestHead), event
        return event

    def _open_request(self, head: RequestHead, target: Target) -> Request:
        request_id = self._app.request_id(head.headers.get_text(b"x-request-id"))
        return Request(head.method, target, head.headers, request_id, self._stream.peer)

    async def _read_body(self, head: RequestHead) -> bytes:
        """The whole body; raises RemoteProtocolError over its limit, TimeoutError past its time."""
        if head.content_length == 0:
            self._next_buffered()
            return b""
        if self._http.wants_continue:
            self._push(self._http.send_continue())
        parts: list[bytes] = []
        async with asyncio.timeout(self._limits.body_timeout_s):
            while True:
                event = self._http.next_event()
                if event is NEED_DATA:
                    await self._receive()
                elif isinstance(event, BodyChunk):
                    parts.append(event.data)
                    if len(parts) % EVENTS_PER_TURN == 0:
                        await asyncio.sleep(0)
                elif isinstance(event, EndOfRequest):
                    return b"".join(parts)

    def _next_buffered(self) -> None:
        event = self._http.next_event()
        assert isinstance(event, EndOfRequest), event

    async def _receive(self) -> None:
        self._http.receive_data(await self._stream.read())

    async def _answer(self, head: RequestHead, request: Request, refusal: Response | None) -> int:
        """Run the handler and write what it returns; the status that was sent."""
        task = asyncio.current_task()
        assert task is not None
        self._stream.watch_disconnect(_canceller(task))
        try:
            answer = refusal or await self._app.handle(request)
            if isinstance(answer, EventStream):
                await self._send_events(answer)
                return 200
            if isinstance(answer, Upgrade):
                return await self._upgrade(head, answer)
            self._send_response(answer)
            await self._stream.drain(self._limits.write_timeout_s)
            return answer.status
        finally:
            self._stream.watch_disconnect(None)

    async def _upgrade(self, head: RequestHead, answer: Upgrade) -> int:
        """Finish the WebSocket handshake and serve the socket; the status that was sent."""
        try:
            accept = check_handshake(head)
        except RemoteProtocolError as error:
            advice = HANDSHAKE_ADVICE if error.status_hint == 426 else ()
            refusal = self._app.refuse(error.status_hint, str(error))
            self._send_response(replace(refusal, headers=(*refusal.headers, *advice)))
            return refusal.status
        self._stream.watch_disconnect(None)  # from here on bytes are messages, not requests sent ahead
        fields = [("upgrade", "websocket"), ("connection", "upgrade"), ("sec-websocket-accept", accept)]
        if answer.subprotocol is not None:
            fields.append(("sec-websocket-protocol", answer.subprotocol))
        self._push(self._http.send(ResponseHead(101, _raw((*fields, *answer.headers)))))
        session = WebSocketSession(self._stream, self._limits.socket, self._http.trailing_data)
        try:
            await session.run(answer.serve)
        finally:
            self._sent_bytes += session.sent_bytes
        return 101

    def _send_response(self, response: Response) -> None:
        headers = [("content-type", response.content_type), ("content-length", str(len(response.body)))]
        self._send_head(response.status, (*headers, *response.headers))
        self._push(self._http.send(BodyChunk(response.body)) + self._http.send(EndOfResponse()))

    async def _send_events(self, answer: EventStream) -> None:
        try:
            async with aclosing(answer.events) as events:
                self._send_head(200, (*_SSE_HEADERS, *answer.headers))
                with _Pinger(self._send_comment, answer.ping_interval_s) as pinger:
                    async for block in events:
                        pinger.postpone()
                        self._push(self._http.send(BodyChunk(block)))
                        await self._stream.drain(self._limits.write_timeout_s)
        finally:
            answer.close()
        self._push(self._http.send(EndOfResponse()))
        await self._stream.drain(self._limits.write_timeout_s)

    def _send_comment(self) -> None:
        if self._http.is_streaming:
            self._push(self._http.send(BodyChunk(encode_comment())))

    def _send_head(self, status: int, headers: tuple[tuple[str, str], ...]) -> None:
        fields = [("date", formatdate(usegmt=True)), ("server", "wingman"), *headers]
        if self._app.is_draining or not self._http.is_request_complete:
            fields.append(("connection", "close"))
        self._push(self._http.send(ResponseHead(status, _raw(fields))))

    def _push(self, data: bytes) -> None:
        self._sent_bytes += len(data)
        self._stream.push(data)


class _Pinger:
    """Sends a comment whenever a stream was silent for an interval; one timer, no task."""

    def __init__(self, send: Callable[[], None], interval_s: float | None) -> None:
        self._send = send
        self._interval_s = interval_s
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None

    def postpone(self) -> None:
        self._last = self._loop.time()

    def _arm(self) -> None:
        if self._interval_s is not None:
            self._timer = self._loop.call_at(self._last + self._interval_s, self._fire)

    def _fire(self) -> None:
        assert self._interval_s is not None
        if self._loop.time() >= self._last + self._interval_s:
            self._send()
            self._last = self._loop.time()
        self._arm()

    def __enter__(self) -> _Pinger:
        self._arm()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._timer is not None:
            self._timer.cancel()


def _raw(fields: Iterable[tuple[str, str]]) -> Headers:
    return Headers((name.encode("ascii"), value.encode("latin-1", "replace")) for name, value in fields)


def _canceller(task: asyncio.Task[object]) -> Callable[[], None]:
    def cancel() -> None:
        task.cancel("the client has gone")

    return cancel


def _with_body(request: Request, body: bytes) -> Request:
    return Request(request.method, request.target, request.headers, request.id, request.client, body)


def _log_access(request: Request, status: int, seconds: float, sent_bytes: int) -> None:
    access_log.info(
        '%s "%s %s" %d %d %.1fms %s',
        request.client,
        request.method,
        request.path,
        status,
        sent_bytes,
        seconds * 1000,
        request.id,
        extra={
            "client": request.client,
            "method": request.method,
            "path": request.path,
            "status": status,
            "sent_bytes": sent_bytes,
            "duration_ms": round(seconds * 1000, 3),
            "request_id": request.id,
        },
    )
