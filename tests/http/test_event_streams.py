"""Answers of Server-Sent Events: framing, comments while idle, and an end in every case.

Whatever happens to a stream, its generator is closed and `close` is called once: both end the
generation behind it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable

import pytest

from protocol import SseParser, encode_event
from tests.support.streams import GUARD_S, FakeStream, read_answers
from wingman.http.connection import ConnectionLimits, serve_connection
from wingman.http.messages import Answer, EventStream, Request, Response

GET = b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n"
LONG = ConnectionLimits(
    head_timeout_s=GUARD_S, body_timeout_s=GUARD_S, idle_timeout_s=GUARD_S, write_timeout_s=GUARD_S
)
IMPATIENT = ConnectionLimits(
    head_timeout_s=GUARD_S, body_timeout_s=GUARD_S, idle_timeout_s=GUARD_S, write_timeout_s=0.01
)
Events = Callable[[], AsyncGenerator[bytes, None]]


class StreamingApp:
    """Answers every request with the events of one script, and records how the stream ended."""

    is_draining = False

    def __init__(self, events: Events, ping_interval_s: float | None = None) -> None:
        self._events = events
        self._ping_interval_s = ping_interval_s
        self.n_started = 0
        self.n_generators_ended = 0
        self.n_closed = 0

    def screen(self, request: Request) -> Response | None:
        return None

    async def handle(self, request: Request) -> Answer:
        self.n_started += 1
        return EventStream(self._guarded(), self._close, self._ping_interval_s, (("x-a", "b"),))

    async def _guarded(self) -> AsyncGenerator[bytes, None]:
        events = self._events()
        try:
            async for block in events:
                yield block
        finally:
            self.n_generators_ended += 1
            await events.aclose()

    def _close(self) -> None:
        self.n_closed += 1

    def refuse(self, status: int, message: str) -> Response:
        return Response(status, message.encode())

    def request_id(self, offered: str | None) -> str:
        return "id"


async def serve(stream: FakeStream, app: StreamingApp, limits: ConnectionLimits = LONG) -> None:
    async with asyncio.timeout(GUARD_S):
        await serve_connection(stream, app, limits)
    assert stream.is_closed


async def two_events() -> AsyncGenerator[bytes, None]:
    yield encode_event(b"1")
    await asyncio.sleep(0)
    yield encode_event(b"2")


async def no_events() -> AsyncGenerator[bytes, None]:
    for block in ():
        yield block


async def endless() -> AsyncGenerator[bytes, None]:
    yield encode_event(b"1")
    await asyncio.Event().wait()


async def silent() -> AsyncGenerator[bytes, None]:
    await asyncio.Event().wait()
    yield b""


async def failing() -> AsyncGenerator[bytes, None]:
    yield encode_event(b"1")
    raise ValueError("a bug")


async def test_a_stream_is_chunked_and_keeps_the_connection() -> None:
    app = StreamingApp(two_events)
    stream = FakeStream(GET + GET)
    task = asyncio.create_task(serve(stream, app))
    await stream.until_written(b"0\r\n\r\n", 2)
    stream.feed_eof()
    await task
    for answer in read_answers(stream.written, "GET", "GET"):
        assert (answer.status, answer.is_complete) == (200, True)
        assert answer.headers["content-type"] == "text/event-stream"
        assert answer.headers["transfer-encoding"] == "chunked"
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["x-accel-buffering"] == "no"
        assert answer.headers["x-a"] == "b"
        assert "content-length" not in answer.headers
        assert [event.data for event in SseParser().feed(answer.body)] == ["1", "2"]
    assert (app.n_generators_ended, app.n_closed) == (2, 2)


async def test_each_event_leaves_when_it_is_made() -> None:
    release = asyncio.Event()

    async def stepwise() -> AsyncGenerator[bytes, None]:
        yield encode_event(b"1")
        await release.wait()
        yield encode_event(b"2")

    stream = FakeStream(GET)
    task = asyncio.create_task(serve(stream, StreamingApp(stepwise)))
    await stream.until_written(b"data: 1\n\n")
    assert b"data: 2" not in stream.written
    release.set()
    await stream.until_written(b"data: 2\n\n")
    stream.feed_eof()
    await task


async def test_an_empty_stream_is_complete() -> None:
    app = StreamingApp(no_events)
    stream = FakeStream(GET)
    task = asyncio.create_task(serve(stream, app))
    await stream.until_written(b"0\r\n\r\n")
    stream.feed_eof()
    await task
    (answer,) = read_answers(stream.written, "GET")
    assert (answer.body, answer.is_complete, app.n_closed) == (b"", True, 1)


async def test_http_1_0_reads_a_stream_until_close() -> None:
    app = StreamingApp(two_events)
    stream = FakeStream(b"GET / HTTP/1.0\r\n\r\n")
    await serve(stream, app)
    head, _, body = bytes(stream.written).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert b"\r\nConnection: close" in head
    assert body == b"data: 1\n\ndata: 2\n\n"
    assert stream.sent_eof
    assert app.n_closed == 1


async def test_head_gets_the_head_of_a_stream_only() -> None:
    app = StreamingApp(two_events, ping_interval_s=0.001)
    stream = FakeStream(GET.replace(b"GET", b"HEAD"))
    task = asyncio.create_task(serve(stream, app))
    await stream.until(lambda: stream.n_reads == 2)
    stream.feed_eof()
    await task
    (answer,) = read_answers(stream.written, "HEAD")
    assert (answer.status, answer.body, answer.is_complete) == (200, b"", True)
    assert answer.headers["content-type"] == "text/event-stream"
    assert app.n_closed == 1


async def test_a_silent_stream_gets_comments() -> None:
    stream = FakeStream(GET)

    async def late() -> AsyncGenerator[bytes, None]:
        await stream.until_written(b":\n\n", 3)
        yield encode_event(b"1")
        await stream.until_written(b":\n\n", 4)
        yield encode_event(b"2")

    task = asyncio.create_task(serve(stream, StreamingApp(late, ping_interval_s=0.001)))
    await stream.until_written(b"0\r\n\r\n")
    stream.feed_eof()
    await task
    (answer,) = read_answers(stream.written, "GET")
    assert [event.data for event in SseParser().feed(answer.body)] == ["1", "2"]
    assert answer.body.endswith(b"data: 2\n\n")  # nothing after the last event
    assert answer.body.count(b":\n\n") >= 4


@pytest.mark.parametrize("leave", [FakeStream.feed_eof, FakeStream.lose], ids=["end of file", "reset"])
@pytest.mark.parametrize("events", [endless, silent], ids=["after an event", "before the first event"])
async def test_a_client_that_leaves_ends_the_stream(
    events: Events, leave: Callable[[FakeStream], None]
) -> None:
    app = StreamingApp(events)
    stream = FakeStream(GET)
    task = asyncio.create_task(serve(stream, app))
    await stream.until_written(b"data: 1" if events is endless else b"\r\n\r\n")
    leave(stream)
    await task
    assert (app.n_started, app.n_generators_ended, app.n_closed) == (1, 1, 1)
    assert not stream.written.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("events", [two_events, endless, silent])
async def test_a_client_that_left_before_the_answer_ends_the_stream(events: Events) -> None:
    app = StreamingApp(events)
    stream = FakeStream(GET)
    stream.feed_eof()
    await serve(stream, app)
    assert (app.n_started, app.n_closed) == (1, 1)
    assert not stream.written.endswith(b"0\r\n\r\n")


async def test_a_failing_stream_is_cut_off_so_that_the_client_notices(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = StreamingApp(failing)
    stream = FakeStream(GET + GET)
    await serve(stream, app)
    (answer,) = read_answers(stream.written, "GET")
    assert (answer.body, answer.is_complete) == (b"data: 1\n\n", False)
    assert (app.n_started, app.n_generators_ended, app.n_closed) == (1, 1, 1)
    assert any(record.levelno >= logging.ERROR for record in caplog.records)


async def test_a_slow_reader_holds_the_generator_back() -> None:
    made: list[int] = []

    async def counted() -> AsyncGenerator[bytes, None]:
        for number in range(3):
            made.append(number)
            yield encode_event(b"%d" % number)

    stream = FakeStream(GET, is_slow=True)
    task = asyncio.create_task(serve(stream, StreamingApp(counted)))
    await stream.until_written(b"data: 0")
    for _ in range(10):
        await asyncio.sleep(0)
    assert made == [0]
    stream.take_all()
    await stream.until_written(b"0\r\n\r\n")
    assert made == [0, 1, 2]
    stream.feed_eof()
    await task


@pytest.mark.parametrize("events", [two_events, endless])
async def test_a_reader_that_takes_nothing_is_cut_off(events: Events) -> None:
    app = StreamingApp(events)
    stream = FakeStream(GET, is_slow=True)
    await serve(stream, app, IMPATIENT)
    assert (app.n_generators_ended, app.n_closed) == (1, 1)
    assert b"data: 1" in stream.written
    assert b"data: 2" not in stream.written


async def test_a_whole_answer_has_the_write_time_out_too() -> None:
    class WholeApp(StreamingApp):
        async def handle(self, request: Request) -> Answer:
            self.n_started += 1
            return Response(200, b"x")

    app = WholeApp(no_events)
    stream = FakeStream(GET + GET, is_slow=True)
    await serve(stream, app, IMPATIENT)
    assert app.n_started == 1


async def test_a_stopping_server_ends_the_stream() -> None:
    app = StreamingApp(endless)
    stream = FakeStream(GET)
    task = asyncio.create_task(serve_connection(stream, app, LONG))
    await stream.until_written(b"data: 1")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (app.n_generators_ended, app.n_closed, stream.is_closed) == (1, 1, True)
