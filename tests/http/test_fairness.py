"""No connection keeps the loop, or a handler, from the others: floods, tiny chunks, bytes sent ahead."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from protocol import Limits
from wingman.http.connection import ConnectionLimits
from wingman.http.messages import Answer, Request, Response
from wingman.http.server import Server

GET = b"GET /fast HTTP/1.1\r\nHost: x\r\n\r\n"


class CountingApp:
    """/fast answers at once, /slow never; counts what it sees."""

    is_draining = False

    def __init__(self) -> None:
        self.n_fast = 0
        self.slow_began = asyncio.Event()
        self.slow_cancelled = asyncio.Event()

    def screen(self, request: Request) -> Response | None:
        return None

    def refuse(self, status: int, message: str) -> Response:
        return Response(status)

    def request_id(self, offered: str | None) -> str:
        return "id"

    async def handle(self, request: Request) -> Answer:
        if request.path == "/slow":
            self.slow_began.set()
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                self.slow_cancelled.set()
                raise
        self.n_fast += 1
        return Response(200, b"ok")


@contextlib.asynccontextmanager
async def served(app: CountingApp) -> AsyncIterator[int]:
    limits = ConnectionLimits(wire=Limits(max_pipelined_bytes=64 * 1024))
    server = Server(app, limits, 100)
    await server.listen("127.0.0.1", 0)
    yield int(server.addresses[0].rsplit(":", 1)[1])
    await server.aclose(1.0)


async def ask_once(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(GET)
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    writer.close()


async def test_a_flood_of_pipelined_requests_takes_turns() -> None:
    app = CountingApp()
    async with served(app) as port:
        _, flood = await asyncio.open_connection("127.0.0.1", port)
        flood.write(GET * 1500)
        while not app.n_fast:  # noqa: ASYNC110 - it has no event for this
            await asyncio.sleep(0)
        await ask_once(port)
        assert app.n_fast < 1500, "the flood was served to its end before anybody else"
        flood.close()


async def test_a_body_of_one_byte_chunks_takes_turns() -> None:
    app = CountingApp()
    async with served(app) as port:
        reader, slow = await asyncio.open_connection("127.0.0.1", port)
        slow.write(
            b"POST /fast HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 20_000
        )
        await asyncio.sleep(0.01)
        await ask_once(port)
        assert app.n_fast == 1
        slow.write(b"0\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        slow.close()


async def test_a_client_that_sent_ahead_is_still_seen_leaving() -> None:
    app = CountingApp()
    async with served(app) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n" + GET * 1000)
        await app.slow_began.wait()
        writer.close()
        await asyncio.wait_for(app.slow_cancelled.wait(), 5)


async def test_a_client_that_sends_too_far_ahead_is_dropped() -> None:
    app = CountingApp()
    async with served(app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
        await app.slow_began.wait()
        writer.write(GET * 10_000)
        await asyncio.wait_for(app.slow_cancelled.wait(), 5)
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
