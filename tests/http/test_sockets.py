"""WebSockets on real sockets, on both event loops: the `websockets` package as a stranger, and raw bytes
where it refuses to misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import socket
import struct
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop
import websockets

from protocol import offered_subprotocols, text_frame
from protocol.websocket import accept_key
from tests.support.frames import (
    CAP,
    CASES,
    HELLO,
    TEXT,
    Case,
    close,
    close_code,
    frame,
    pongs,
    read_frames,
    texts,
)
from tests.support.streams import GUARD_S, read_answers
from wingman.http.connection import ConnectionLimits
from wingman.http.messages import Answer, Request, Response, Socket, Upgrade
from wingman.http.server import Server
from wingman.http.session import SocketLimits

KEY = b"dGhlIHNhbXBsZSBub25jZQ=="
ASK = (
    b"GET /echo HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: " + KEY + b"\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
PLAIN = b"GET /plain HTTP/1.1\r\nHost: a\r\n\r\n"
SMALL = SocketLimits(max_message_bytes=CAP)
FRAMES = 400
"""Of 64 KiB each: more than the kernel takes for a peer that does not read."""


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def loop_factory(request: pytest.FixtureRequest) -> Callable[[], asyncio.AbstractEventLoop]:
    factory: Callable[[], asyncio.AbstractEventLoop] = request.param
    return factory


def on_both_loops(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """The test as a plain function that pytest runs once per kind of loop."""

    def run(loop_factory: Callable[[], asyncio.AbstractEventLoop], **arguments: Any) -> None:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(test(**arguments))

    signature = inspect.signature(test)
    factory = inspect.Parameter("loop_factory", inspect.Parameter.KEYWORD_ONLY)
    run.__name__ = test.__name__
    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), factory], return_annotation=None
    )
    return run


class SocketApp:
    """Echoes texts at `/echo`, sends much at `/much`, and answers plainly elsewhere."""

    is_draining = False

    def __init__(self) -> None:
        self.n_full = 0
        self.ended = asyncio.Event()

    def screen(self, request: Request) -> Response | None:
        return None

    async def handle(self, request: Request) -> Answer:
        serve = {"/echo": self.echo, "/much": self.send_much}.get(request.path)
        if serve is None:
            return Response(200, b"plain")
        offered = offered_subprotocols(request.headers)
        return Upgrade(serve, "wingman" if "wingman" in offered else None, (("x-a", "b"),))

    async def echo(self, socket: Socket) -> None:
        try:
            while (text := await socket.receive()) is not None:
                if text.startswith("close "):
                    _, code, reason = text.split(" ", 2)
                    socket.close(int(code), reason)
                elif not socket.push(text_frame(text.encode())):
                    await socket.drain()
        finally:
            self.ended.set()

    async def send_much(self, socket: Socket) -> None:
        for number in range(FRAMES):
            if not socket.push(text_frame(f"{number:09} ".encode() * 6554)):
                self.n_full += 1
                await socket.drain()
        assert await socket.receive() is None

    def refuse(self, status: int, message: str) -> Response:
        return Response(status, message.encode(), "text/plain", (("connection", "close"),))

    def request_id(self, offered: str | None) -> str:
        return "id"


@asynccontextmanager
async def running(limits: SocketLimits | None = None) -> AsyncIterator[tuple[Server, SocketApp, str]]:
    app = SocketApp()
    server = Server(app, ConnectionLimits(socket=limits or SocketLimits()), 100)
    async with asyncio.timeout(GUARD_S):
        try:
            await server.listen("127.0.0.1", 0)
            yield server, app, server.addresses[0]
        finally:
            await server.aclose(0)
    assert server.n_connections == 0


@asynccontextmanager
async def raw(address: str) -> AsyncIterator[tuple[StreamReader, StreamWriter]]:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def converse(address: str, *pieces: bytes) -> tuple[bytes, bytes]:
    """Send pieces; the head of the answer and all that follows until the server closes."""
    async with raw(address) as (reader, writer):
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        head, _, rest = (await reader.read()).partition(b"\r\n\r\n")
        return head, rest


# -- frames, as raw bytes -------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@on_both_loops
async def test_a_peer_gets_what_it_deserves(case: Case) -> None:
    async with running(SMALL) as (_, _, address):
        head, rest = await converse(address, ASK + case.data + (close(1000) if case.code is None else b""))
    assert head.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
    frames = read_frames(rest)
    assert texts(frames) == list(case.texts)
    assert pongs(frames) == list(case.pings)
    assert close_code(frames) == (case.code or 1000)


@on_both_loops
async def test_frames_may_come_in_any_pieces() -> None:
    data = ASK + frame(TEXT, b"*" * 100_000) + HELLO + close(1000)
    async with running() as (_, _, address):
        for size in (1, 7, 1000):
            start = ASK + data[len(ASK) :][:300]  # the rest in one piece: byte by byte it takes long
            pieces = [start[at : at + size] for at in range(0, len(start), size)]
            _, rest = await converse(address, *pieces, data[len(start) :])
            frames = read_frames(rest)
            assert [len(text) for text in texts(frames)] == [100_000, 5]
            assert close_code(frames) == 1000


@on_both_loops
async def test_a_half_closed_peer_gets_its_answers() -> None:
    async with running() as (_, app, address), raw(address) as (reader, writer):
        writer.write(ASK + HELLO)
        writer.write_eof()
        _, _, rest = (await reader.read()).partition(b"\r\n\r\n")
        assert texts(read_frames(rest)) == ["hello"]
        await app.ended.wait()


@on_both_loops
async def test_a_peer_that_resets_ends_its_endpoint() -> None:
    async with running() as (_, app, address), raw(address) as (reader, writer):
        writer.write(ASK)
        await reader.readuntil(b"\r\n\r\n")
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        await app.ended.wait()


@on_both_loops
async def test_a_slow_reader_is_waited_for_and_gets_everything() -> None:
    async with running() as (_, app, address), raw(address) as (reader, writer):
        writer.write(ASK.replace(b"/echo", b"/much"))
        await reader.readuntil(b"\r\n\r\n")
        while not app.n_full:  # noqa: ASYNC110 - nothing tells that the peer's buffers are full
            await asyncio.sleep(0.001)
        for number in range(FRAMES):
            data = await reader.readexactly(10 + 65540)
            assert data[10:20] == f"{number:09} ".encode()
        writer.write(close(1000))
        assert close_code(read_frames(await reader.read())) == 1000


# -- the handshake --------------------------------------------------------------------------------


@on_both_loops
async def test_a_handshake_is_answered_as_the_standard_says(caplog: pytest.LogCaptureFixture) -> None:
    async with running() as (_, _, address):
        with caplog.at_level(logging.INFO, "wingman.access"):
            head, rest = await converse(address, ASK + HELLO + close(1000))
    status, *lines = head.decode().lower().split("\r\n")
    assert status == "http/1.1 101 switching protocols"
    assert sorted(lines) == [
        "connection: upgrade",
        f"sec-websocket-accept: {accept_key(KEY)}".lower(),
        "upgrade: websocket",
        "x-a: b",
    ]
    (record,) = caplog.records
    assert (record.path, record.status) == ("/echo", 101)  # type: ignore[attr-defined]
    assert record.sent_bytes == len(head) + 4 + len(rest)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("old", "new", "status"),
    [
        (b"GET", b"POST", 400),
        (b"HTTP/1.1", b"HTTP/1.0", 400),
        (b"Sec-WebSocket-Key: " + KEY + b"\r\n", b"", 400),
        (KEY, b"AAAA", 400),
        (b"Version: 13", b"Version: 8", 426),
        (b"Sec-WebSocket-Version: 13\r\n", b"", 426),
        (b"Upgrade: websocket\r\nConnection: Upgrade\r\n", b"", 426),
        (b"Upgrade: websocket", b"Upgrade: h2c", 426),
    ],
)
@on_both_loops
async def test_a_wrong_handshake_is_refused(old: bytes, new: bytes, status: int) -> None:
    async with running() as (_, _, address), raw(address) as (reader, writer):
        writer.write(ASK.replace(old, new))
        (answer,) = read_answers(await reader.read(), "GET")
    assert (answer.status, answer.is_complete) == (status, True)
    assert answer.headers.get("sec-websocket-version") == ("13" if status == 426 else None)


@on_both_loops
async def test_an_upgrade_that_is_answered_plainly_keeps_its_connection() -> None:
    async with running() as (_, _, address), raw(address) as (reader, writer):
        writer.write(ASK.replace(b"/echo", b"/plain"))
        assert (await reader.readuntil(b"plain")).startswith(b"HTTP/1.1 200 ")
        writer.write(ASK + HELLO)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
        assert await reader.readuntil(b"hello")


@on_both_loops
async def test_a_request_before_the_handshake_is_answered_first() -> None:
    async with running() as (_, _, address):
        head, rest = await converse(address, PLAIN + ASK + HELLO + close(1000))
    assert head.startswith(b"HTTP/1.1 200 ")
    assert rest.startswith(b"plainHTTP/1.1 101 ")
    assert texts(read_frames(rest.partition(b"\r\n\r\n")[2])) == ["hello"]


# -- the websockets package -----------------------------------------------------------------------


@on_both_loops
async def test_a_client_talks() -> None:
    async with running() as (_, _, address), websockets.connect(f"ws://{address}/echo") as client:
        assert client.protocol.extensions == []  # though it offers to compress
        assert client.subprotocol is None
        for n in (0, 1, 125, 126, 65535, 65536, 262_144):
            await client.send("\u00e9" * (n // 2))
            assert await client.recv() == "\u00e9" * (n // 2)
        await client.send(["a", "", "b\u20ac", "c"])
        assert await client.recv() == "ab\u20acc"
        await (await client.ping(b"payload"))
        await client.close(4321, "bye")
        assert (client.close_code, client.close_reason) == (4321, "")


@on_both_loops
async def test_a_client_is_told_why_it_is_closed() -> None:
    async with running() as (_, _, address):
        for sent, code, reason in (
            ("close 4000 enough", 4000, "enough"),
            (b"binary", 1003, "messages are text"),
            ("*" * 262_145, 1009, "a message may have 262144 bytes"),
            (["*" * 200_000, "*" * 100_000], 1009, "a message may have 262144 bytes"),
        ):
            async with websockets.connect(f"ws://{address}/echo") as client:
                with contextlib.suppress(websockets.ConnectionClosed):
                    await client.send(sent)
                with pytest.raises(websockets.ConnectionClosed):
                    await client.recv()
                assert (client.close_code, client.close_reason) == (code, reason)


@on_both_loops
async def test_a_client_chooses_a_subprotocol() -> None:
    async with running() as (_, _, address):
        offered = [websockets.Subprotocol("other"), websockets.Subprotocol("wingman")]
        async with websockets.connect(f"ws://{address}/echo", subprotocols=offered) as client:
            assert client.subprotocol == "wingman"


@on_both_loops
async def test_clients_are_told_when_the_server_stops() -> None:
    async with running() as (server, app, address):
        clients = [await websockets.connect(f"ws://{address}/echo") for _ in range(20)]
        await server.aclose(GUARD_S)
        for client in clients:
            await client.wait_closed()
            assert (client.close_code, client.close_reason) == (1001, "the server is stopping")
        assert app.ended.is_set()


@on_both_loops
async def test_a_client_that_ignores_the_stop_is_cut() -> None:
    async with running() as (server, _, address), raw(address) as (reader, writer):
        writer.write(ASK)
        await reader.readuntil(b"\r\n\r\n")
        await server.aclose(0)
        with contextlib.suppress(ConnectionError):
            await reader.read()
    assert server.n_connections == 0
