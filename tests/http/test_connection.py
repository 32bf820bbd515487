"""One connection from its first byte to its close, against a peer in memory and a scripted application."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import pytest

import wingman.http.stream
from protocol import Limits
from tests.support.streams import GUARD_S, FakeStream, read_answers
from wingman.http.connection import ConnectionLimits, serve_connection
from wingman.http.messages import Answer, Request, Response

GET = b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n"
POST = b"POST /b?c=d HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
WIRE = Limits(max_head_bytes=256, max_body_bytes=16)
LONG = ConnectionLimits(WIRE, GUARD_S, GUARD_S, GUARD_S, GUARD_S)

Handler = Callable[[Request], Awaitable[Answer]]


async def echo(request: Request) -> Answer:
    return Response(200, request.method.encode() + b" " + request.body, "text/plain")


class ScriptedApp:
    """An application of one handler, which records what reaches it."""

    def __init__(self, handler: Handler = echo, refusal: Response | None = None) -> None:
        self.handler = handler
        self.refusal = refusal
        self.is_draining = False
        self.screened: list[Request] = []
        self.handled: list[Request] = []

    def screen(self, request: Request) -> Response | None:
        self.screened.append(request)
        return self.refusal

    async def handle(self, request: Request) -> Answer:
        self.handled.append(request)
        return await self.handler(request)

    def refuse(self, status: int, message: str) -> Response:
        return Response(status, message.encode(), "text/plain", (("connection", "close"),))

    def request_id(self, offered: str | None) -> str:
        return offered or "fresh"


async def serve(stream: FakeStream, app: ScriptedApp, limits: ConnectionLimits = LONG) -> None:
    async with asyncio.timeout(GUARD_S):
        await serve_connection(stream, app, limits)
    assert stream.is_closed


# -- requests and their bodies --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "body"),
    [
        ([GET], b"GET "),
        ([POST + b"hello"], b"POST hello"),
        ([POST, b"he", b"llo"], b"POST hello"),
        ([CHUNKED, b"2\r\nhe\r\n", b"3\r\nllo\r\n0\r\n\r\n"], b"POST hello"),
        ([CHUNKED + b"0\r\n\r\n"], b"POST "),
        ([bytes([byte]) for byte in POST + b"hello"], b"POST hello"),
    ],
    ids=["no body", "in one piece", "in pieces", "chunked", "empty chunked", "byte by byte"],
)
async def test_a_request_is_answered(pieces: list[bytes], body: bytes) -> None:
    stream = FakeStream(*pieces)
    task = asyncio.create_task(serve(stream, ScriptedApp()))
    await stream.until_written(body)
    stream.feed_eof()
    await task
    (answer,) = read_answers(stream.written, "POST")
    assert (answer.status, answer.body, answer.is_complete) == (200, body, True)
    assert answer.headers["content-type"] == "text/plain"
    assert answer.headers["server"] == "wingman"
    assert "date" in answer.headers
    assert "connection" not in answer.headers


async def test_the_handler_gets_the_whole_request() -> None:
    raw = POST.replace(b"\r\n\r\n", b"\r\nX-Request-Id: mine\r\n\r\n") + b"hello"
    app = ScriptedApp()
    stream = FakeStream(raw)
    task = asyncio.create_task(serve(stream, app))
    await stream.until_written(b"hello")
    stream.feed_eof()
    await task
    (request,) = app.handled
    assert (request.method, request.path, request.target.first("c"), request.body) == (
        "POST",
        "/b",
        "d",
        b"hello",
    )
    assert (request.id, request.client, request.headers.get(b"host")) == ("mine", "the test", b"a")
    assert app.screened[0].body == b""  # screened before the body


@pytest.mark.parametrize("is_pipelined", [True, False])
async def test_a_connection_carries_requests_one_after_the_other(is_pipelined: bool) -> None:
    order: list[str] = []
    stream = FakeStream()

    async def handle(request: Request) -> Answer:
        order.append(f"{request.path} after {stream.written.count(b'HTTP/1.1 200')}")
        await asyncio.sleep(0)
        return await echo(request)

    requests = [GET, POST + b"hello", CHUNKED + b"1\r\nx\r\n0\r\n\r\n", GET]
    for request in [b"".join(requests)] if is_pipelined else requests:
        stream.feed(request)
    task = asyncio.create_task(serve(stream, ScriptedApp(handle)))
    await stream.until_written(b"HTTP/1.1 200", 4)
    stream.feed_eof()
    await task
    answers = read_answers(stream.written, "GET", "POST", "POST", "GET")
    assert [answer.body for answer in answers] == [b"GET ", b"POST hello", b"POST x", b"GET "]
    assert order == ["/a after 0", "/b after 1", "/ after 2", "/a after 3"]


async def test_what_is_sent_ahead_stays_unread_while_a_handler_runs() -> None:
    started, release = asyncio.Event(), asyncio.Event()

    async def handle(request: Request) -> Answer:
        started.set()
        await release.wait()
        return await echo(request)

    app = ScriptedApp(handle)
    stream = FakeStream(GET)
    task = asyncio.create_task(serve(stream, app))
    await started.wait()
    stream.feed(GET)
    for _ in range(10):
        await asyncio.sleep(0)
    assert stream.n_reads == 1
    release.set()
    await stream.until_written(b"HTTP/1.1 200", 2)
    stream.feed_eof()
    await task


@pytest.mark.parametrize(
    "raw",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" + GET,
        b"GET / HTTP/1.0\r\n\r\n" + GET,
        b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" + GET,
    ],
    ids=["close", "1.0", "1.0 keep-alive"],
)
async def test_a_last_request_is_the_last(raw: bytes) -> None:
    app = ScriptedApp()
    stream = FakeStream(raw)
    await serve(stream, app)
    (answer,) = read_answers(stream.written, "GET")
    assert answer.headers["connection"] == "close"
    assert answer.is_complete
    assert len(app.handled) == 1
    assert stream.sent_eof


async def test_head_is_answered_without_a_body() -> None:
    stream = FakeStream(GET.replace(b"GET", b"HEAD") + GET)
    task = asyncio.create_task(serve(stream, ScriptedApp()))
    await stream.until_written(b"GET ")
    stream.feed_eof()
    await task
    first, second = read_answers(stream.written, "HEAD", "GET")
    assert (first.headers["content-length"], first.body, first.is_complete) == ("5", b"", True)
    assert second.body == b"GET "


async def test_a_draining_server_closes_after_the_answer() -> None:
    app = ScriptedApp()
    app.is_draining = True
    stream = FakeStream(GET + GET)
    await serve(stream, app)
    (answer,) = read_answers(stream.written.partition(b"GET ")[0] + b"GET ", "GET")
    assert answer.headers["connection"] == "close"
    assert len(app.handled) == 1


# -- refusals -------------------------------------------------------------------------------------

UNAUTHENTICATED = Response(401, b"no key", "text/plain")


@pytest.mark.parametrize(
    "raw",
    [
        b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n",
        POST,
        POST + b"hello" + GET,
        CHUNKED + b"5\r\n",
    ],
    ids=["expect", "no body yet", "body and more", "chunked"],
)
async def test_a_refusal_by_the_head_alone_reads_no_body(raw: bytes) -> None:
    app = ScriptedApp(refusal=UNAUTHENTICATED)
    stream = FakeStream(raw)
    await serve(stream, app)
    (answer,) = read_answers(stream.written, "POST")
    assert (answer.status, answer.body, answer.interim) == (401, b"no key", [])
    assert len(app.screened) == 1
    assert app.handled == []


async def test_a_refused_request_without_body_keeps_the_connection() -> None:
    app = ScriptedApp(refusal=UNAUTHENTICATED)
    stream = FakeStream(GET + b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n" + GET)
    task = asyncio.create_task(serve(stream, app))
    await stream.until_written(b"no key", 3)
    stream.feed_eof()
    await task
    assert [answer.status for answer in read_answers(stream.written, "GET", "POST", "GET")] == [401] * 3


async def test_expect_is_answered_before_the_body_is_read() -> None:
    stream = FakeStream(b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
    task = asyncio.create_task(serve(stream, ScriptedApp()))
    await stream.until_written(b"HTTP/1.1 100 Continue\r\n\r\n")
    stream.feed(b"hello")
    await stream.until_written(b"POST hello")
    stream.feed_eof()
    await task
    (answer,) = read_answers(stream.written, "POST")
    assert (answer.interim, answer.status) == ([100], 200)


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET /%ff HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (CHUNKED + b"zz\r\n", 400),
        (CHUNKED + b"11\r\n01234567890123456\r\n", 413),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 17\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 17\r\n\r\n", 413),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 256 + b"\r\n\r\n", 431),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
    ],
)
async def test_a_broken_request_is_refused_and_the_connection_closed(raw: bytes, status: int) -> None:
    app = ScriptedApp()
    stream = FakeStream(raw, GET)
    await serve(stream, app)
    (answer,) = read_answers(stream.written, "POST")
    assert (answer.status, answer.headers["connection"], answer.is_complete) == (status, "close", True)
    assert answer.interim == []
    assert app.handled == []
    assert stream.sent_eof


@pytest.mark.parametrize(
    ("raw", "status"), [(b"", None), (b"GET / HT", 400), (POST + b"he", 400), (CHUNKED + b"5\r\nhe", 400)]
)
async def test_end_of_file_in_a_request_is_answered_in_case_somebody_listens(
    raw: bytes, status: int | None
) -> None:
    app = ScriptedApp()
    stream = FakeStream(*[raw] if raw else [])
    stream.feed_eof()
    await serve(stream, app)
    assert [answer.status for answer in read_answers(stream.written, "POST")] == ([status] if status else [])
    assert app.handled == []


@pytest.mark.parametrize(
    ("raw", "limits", "statuses"),
    [
        (b"GET / HTTP/1.1\r\nHo", ConnectionLimits(WIRE, 0.01, GUARD_S, GUARD_S), [408]),
        (POST + b"he", ConnectionLimits(WIRE, GUARD_S, 0.01, GUARD_S), [408]),
        (CHUNKED, ConnectionLimits(WIRE, GUARD_S, 0.01, GUARD_S), [408]),
        (b"", ConnectionLimits(WIRE, GUARD_S, GUARD_S, 0.01), []),  # idle: there is nothing to answer
        (GET, ConnectionLimits(WIRE, GUARD_S, GUARD_S, 0.01), [200]),
    ],
    ids=["head", "body", "chunked body", "idle from the start", "idle after an answer"],
)
async def test_a_peer_that_falls_silent_is_let_go(
    raw: bytes, limits: ConnectionLimits, statuses: list[int]
) -> None:
    stream = FakeStream(*[raw] if raw else [])
    await serve(stream, ScriptedApp(), limits)
    assert [answer.status for answer in read_answers(stream.written, "GET")] == statuses
    assert stream.sent_eof


async def test_a_refused_upload_is_read_and_dropped_until_the_peer_stops() -> None:
    stream = FakeStream(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 17\r\n\r\n", hangs_up=False)
    app = ScriptedApp()
    task = asyncio.create_task(serve(stream, app))
    await stream.until(lambda: stream.sent_eof)
    before = stream.n_reads
    for _ in range(3):
        stream.feed(GET)
    stream.feed_eof()
    await task
    assert stream.n_reads > before + 2
    assert len(read_answers(stream.written, "POST")) == 1
    assert app.handled == []


async def test_a_peer_that_never_hangs_up_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wingman.http.stream, "LINGER_S", 0.01)
    stream = FakeStream(b"nonsense\r\n\r\n", hangs_up=False)
    await serve(stream, ScriptedApp())
    assert not stream.is_disconnected


# -- ends of the road -----------------------------------------------------------------------------


async def test_a_failing_handler_ends_the_connection_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def handle(request: Request) -> Answer:
        raise ValueError("a bug")

    stream = FakeStream(GET, GET)
    await serve(stream, ScriptedApp(handle))
    assert not stream.written
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ValueError)


async def test_a_header_that_splits_the_answer_is_never_sent(caplog: pytest.LogCaptureFixture) -> None:
    async def handle(request: Request) -> Answer:
        return Response(200, b"", headers=(("x", "a\r\nset-cookie: b"),))

    stream = FakeStream(GET)
    await serve(stream, ScriptedApp(handle))
    assert not stream.written
    assert any(record.levelno >= logging.ERROR for record in caplog.records)


@pytest.mark.parametrize("leave", [FakeStream.feed_eof, FakeStream.lose], ids=["end of file", "reset"])
async def test_a_client_that_leaves_cancels_the_handler(
    leave: Callable[[FakeStream], None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "wingman.access")
    started = asyncio.Event()
    ends: list[str] = []

    async def handle(request: Request) -> Answer:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ends.append("cancelled")
            raise
        return Response(200)

    stream = FakeStream(GET)
    task = asyncio.create_task(serve(stream, ScriptedApp(handle)))
    await started.wait()
    leave(stream)
    await task
    assert ends == ["cancelled"]
    assert not stream.written
    (record,) = [record for record in caplog.records if record.name == "wingman.access"]
    assert record.__dict__["status"] == 499


async def test_a_stopping_server_cancels_and_says_so() -> None:
    stream = FakeStream()
    task = asyncio.create_task(serve_connection(stream, ScriptedApp(), LONG))
    await stream.until(lambda: stream.n_reads == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert stream.is_closed


async def test_every_request_has_a_line_in_the_access_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "wingman.access")
    await serve(
        FakeStream(GET, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n\x00", b""), ScriptedApp()
    )
    lines = [record.__dict__ for record in caplog.records if record.name == "wingman.access"]
    assert [(line["method"], line["path"], line["status"]) for line in lines if "path" in line] == [
        ("GET", "/a", 200),
        ("POST", "/", 400),
    ]
    assert lines[0]["request_id"] == "fresh"
    assert lines[0]["sent_bytes"] > 0
