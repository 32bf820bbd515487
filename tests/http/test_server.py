"""Listeners on real sockets, on both event loops: addresses, the connection cap, and the end.

Each test is one coroutine, run on asyncio's loop and on uvloop's, because their transports differ in
what they do on end of file, on close and with socket files.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from tests.support.streams import GUARD_S, ReceivedAnswer, read_answers
from wingman.errors import ConfigurationError
from wingman.http.connection import ConnectionLimits
from wingman.http.messages import Answer, Request, Response
from wingman.http.server import Server

GET = b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n"
LAST = b"GET /a HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    def run_in_loop(main: Coroutine[Any, Any, None]) -> None:
        async def guarded() -> None:
            async with asyncio.timeout(GUARD_S):
                await main

        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(guarded())

    return run_in_loop


class EchoApp:
    """Answers with the request's body; holds `/hold` until released."""

    is_draining = False

    def __init__(self) -> None:
        self.holding = asyncio.Event()
        self.release = asyncio.Event()
        self.cancelled = asyncio.Event()

    def screen(self, request: Request) -> Response | None:
        return None

    async def handle(self, request: Request) -> Answer:
        if request.path == "/hold":
            self.holding.set()
            try:
                await self.release.wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        return Response(200, request.body or b"ok")

    def refuse(self, status: int, message: str) -> Response:
        return Response(status, message.encode(), headers=(("connection", "close"),))

    def request_id(self, offered: str | None) -> str:
        return "id"


@asynccontextmanager
async def running(*hosts: str, max_connections: int = 100) -> AsyncIterator[tuple[Server, EchoApp]]:
    app = EchoApp()
    server = Server(app, ConnectionLimits(), max_connections)
    try:
        for host in hosts:
            await server.listen(host, 0)
        yield server, app
    finally:
        await server.aclose(0)
    assert server.n_connections == 0


@asynccontextmanager
async def connected(address: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    if "/" in address:
        reader, writer = await asyncio.open_unix_connection(address)
    else:
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def ask(address: str, request: bytes = LAST) -> ReceivedAnswer:
    """Send a last request and read until the server closes."""
    async with connected(address) as (reader, writer):
        writer.write(request)
        (answer,) = read_answers(await reader.read(), "GET")
        return answer


async def settled(condition: Callable[[], bool]) -> None:
    """Wait for something that gives no signal."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


async def is_cut(reader: asyncio.StreamReader) -> bool:
    try:
        return await reader.read() == b""
    except ConnectionResetError:
        return True


def test_every_listener_answers(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "w.sock"

    async def check() -> None:
        async with running("127.0.0.1", "localhost", str(path)) as (server, _):
            assert len(server.addresses) >= 3
            assert str(path) in server.addresses
            assert len(set(server.addresses)) == len(server.addresses)
            for address in server.addresses:
                answer = await ask(address)
                assert (answer.status, answer.body) == (200, b"ok")
        assert not path.exists()

    run(check())


def test_a_stale_socket_file_is_replaced(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "w.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.is_socket()

    async def check() -> None:
        async with running(str(path)):
            assert (await ask(str(path))).status == 200

    run(check())


def test_a_live_socket_is_left_alone(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "w.sock"

    async def check() -> None:
        async with running(str(path)):
            with pytest.raises(ConfigurationError, match="another process listens"):
                async with running(str(path)):
                    pass
            assert (await ask(str(path))).status == 200

    run(check())


def test_a_file_that_is_no_socket_is_left_alone(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "w.sock"
    path.write_text("mine")

    async def check() -> None:
        with pytest.raises(ConfigurationError, match="is no socket"):
            async with running(str(path)):
                pass

    run(check())
    assert path.read_text() == "mine"


@pytest.mark.parametrize("host", ["192.0.2.1", "/nonexistent/dir/w.sock"])
def test_an_address_that_is_not_ours_is_refused(run: Run, host: str) -> None:
    async def check() -> None:
        with pytest.raises(ConfigurationError, match="can't listen on"):
            async with running(host):
                pass

    run(check())


def test_a_taken_port_is_refused(run: Run) -> None:
    async def check() -> None:
        async with running("127.0.0.1") as (server, app):
            port = int(server.addresses[0].rpartition(":")[2])
            second = Server(app, ConnectionLimits(), 1)
            with pytest.raises(ConfigurationError, match=f"127.0.0.1:{port}"):
                await second.listen("127.0.0.1", port)
            assert second.addresses == []

    run(check())


def test_connections_over_the_cap_are_told_to_come_back(run: Run) -> None:
    async def check() -> None:
        async with running("127.0.0.1", max_connections=1) as (server, _):
            async with connected(server.addresses[0]) as (first, writer):
                await settled(lambda: server.n_connections == 1)
                async with connected(server.addresses[0]) as (second, _):
                    (refusal,) = read_answers(await second.read(), "GET")
                assert (refusal.status, refusal.body, refusal.is_complete) == (503, b"", True)
                assert (refusal.headers["connection"], refusal.headers["retry-after"]) == ("close", "1")
                writer.write(GET)  # the first is not disturbed
                assert b"200 OK" in await first.readuntil(b"ok")
            await settled(lambda: server.n_connections == 0)
            assert (await ask(server.addresses[0])).status == 200

    run(check())


def test_a_large_body_passes_through_the_read_limit(run: Run) -> None:
    body = bytes(range(256)) * 8192

    async def check() -> None:
        async with running("127.0.0.1") as (server, _):
            head = b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(
                body
            )
            answer = await ask(server.addresses[0], head + body)
            assert answer.body == body

    run(check())


def test_many_pipelined_requests_are_all_answered(run: Run) -> None:
    async def check() -> None:
        async with running("127.0.0.1") as (server, _):
            async with connected(server.addresses[0]) as (reader, writer):
                writer.write(GET * 5000 + LAST)  # beyond the read limit
                data = await reader.read()
        assert data.count(b"HTTP/1.1 200 OK\r\n") == 5001

    run(check())


@pytest.mark.parametrize("leave", ["close", "half-close"])
def test_a_client_that_leaves_cancels_its_handler(run: Run, leave: str) -> None:
    async def check() -> None:
        async with running("127.0.0.1") as (server, app):
            async with connected(server.addresses[0]) as (_, writer):
                writer.write(GET.replace(b"/a", b"/hold"))
                await app.holding.wait()
                if leave == "close":
                    writer.close()
                else:
                    writer.write_eof()
                await app.cancelled.wait()
                await settled(lambda: server.n_connections == 0)

    run(check())


def test_closing_ends_idle_connections_and_listeners(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "w.sock"

    async def check() -> None:
        async with running("127.0.0.1", str(path)) as (server, _):
            async with connected(server.addresses[0]) as (fresh, _), connected(str(path)) as (used, writer):
                writer.write(GET)
                await used.readuntil(b"ok")
                await settled(lambda: server.n_connections == 2)
                await server.aclose(0)
                assert server.n_connections == 0
                assert await is_cut(fresh)
                assert await is_cut(used)
            assert not path.exists()
            with pytest.raises(ConnectionRefusedError):
                async with connected(server.addresses[0]):
                    pass

    run(check())


def test_closing_lets_a_running_answer_finish(run: Run) -> None:
    async def check() -> None:
        async with running("127.0.0.1") as (server, app):
            async with connected(server.addresses[0]) as (reader, writer):
                writer.write(GET.replace(b"/a", b"/hold"))
                await app.holding.wait()
                app.is_draining = True
                closing = asyncio.create_task(server.aclose(GUARD_S))
                await asyncio.sleep(0)
                app.release.set()
                (answer,) = read_answers(await reader.read(), "GET")
                assert (answer.status, answer.headers["connection"]) == (200, "close")
                writer.close()
                await closing
                assert not app.cancelled.is_set()

    run(check())


def test_closing_cuts_what_does_not_finish_in_time(run: Run) -> None:
    async def check() -> None:
        async with running("127.0.0.1") as (server, app):
            async with connected(server.addresses[0]) as (reader, writer):
                writer.write(GET.replace(b"/a", b"/hold"))
                await app.holding.wait()
                await server.aclose(0.01)
                assert app.cancelled.is_set()
                assert await is_cut(reader)

    run(check())
