"""A WebSocket session against a peer in memory: silence, closing, back-pressure, and fairness."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from protocol import text_frame
from tests.support.frames import (
    CLOSE,
    CONT,
    HELLO,
    PING,
    PONG,
    TEXT,
    close,
    close_code,
    frame,
    pongs,
    read_frames,
    texts,
)
from tests.support.streams import GUARD_S, FakeStream
from wingman.http.messages import Socket
from wingman.http.session import EVENTS_PER_TURN, SocketLimits, WebSocketSession

LONG = SocketLimits(
    ping_interval_s=GUARD_S, ping_timeout_s=GUARD_S, close_timeout_s=GUARD_S, write_timeout_s=GUARD_S
)
Serve = Callable[[Socket], Awaitable[None]]


async def echo(socket: Socket) -> None:
    while (text := await socket.receive()) is not None:
        socket.push(text_frame(text.encode()))


@asynccontextmanager
async def session(
    stream: FakeStream, serve: Serve = echo, limits: SocketLimits = LONG, received: bytes = b""
) -> AsyncIterator[WebSocketSession]:
    """A running session; on exit waits for its end."""
    made = WebSocketSession(stream, limits, received)
    task = asyncio.create_task(made.run(serve))
    async with asyncio.timeout(GUARD_S):
        try:
            yield made
            await task
        finally:
            task.cancel()
    assert stream.on_stop is None


async def test_what_came_with_the_handshake_is_read_first() -> None:
    stream = FakeStream(HELLO[3:], close(1000))
    async with session(stream, received=frame(TEXT, b"first") + HELLO[:3]) as made:
        pass
    frames = read_frames(stream.written)
    assert (texts(frames), close_code(frames)) == (["first", "hello"], 1000)
    assert made.sent_bytes == len(stream.written)


@pytest.mark.parametrize("byte_by_byte", [True, False])
async def test_bytes_may_come_in_any_pieces(byte_by_byte: bool) -> None:
    data = frame(TEXT, b"he", fin=False) + frame(PING, b"p") + frame(CONT, b"llo") + close(4000)
    stream = FakeStream(*(bytes([byte]) for byte in data)) if byte_by_byte else FakeStream(data)
    async with session(stream):
        pass
    frames = read_frames(stream.written)
    assert (texts(frames), pongs(frames), close_code(frames)) == (["hello"], [b"p"], 4000)


# -- silence --------------------------------------------------------------------------------------


class Clock:
    """The loop's clock, moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self._timers: list[tuple[float, asyncio.TimerHandle]] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, (), asyncio.get_running_loop())
        self._timers.append((when, timer))
        return timer

    def call_later(self, delay: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        return self.call_at(self.now + delay, callback)

    async def run_until(self, now: float) -> None:
        """Run what is due, each at its time, and let the others work after it."""
        while due := [item for item in self._timers if item[0] <= now and not item[1].cancelled()]:
            first = min(due, key=lambda item: item[0])
            self._timers.remove(first)
            self.now = first[0]
            first[1]._run()
            await settle()
        self.now = now


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


PING_FRAME = b"\x89\x00"


@asynccontextmanager
async def clocked(
    stream: FakeStream, serve: Serve = echo, limits: SocketLimits | None = None
) -> AsyncIterator[Clock]:
    clock = Clock()
    made = WebSocketSession(stream, limits or SocketLimits())
    made._loop = clock  # type: ignore[assignment]
    made._heard_at = 0.0
    task = asyncio.create_task(made.run(serve))
    await settle()
    async with asyncio.timeout(GUARD_S):
        yield clock
        await task
    assert not [timer for _, timer in clock._timers if not timer.cancelled()]


async def test_a_silent_peer_is_asked_and_stays_if_it_answers() -> None:
    stream = FakeStream()
    async with clocked(stream) as clock:
        for number in range(5):
            await clock.run_until(21 * number + 19.9)
            assert stream.written == PING_FRAME * number
            await clock.run_until(21 * number + 21)
            assert stream.written == PING_FRAME * (number + 1)
            stream.feed(frame(PONG))
            await settle()
        stream.feed(close(1000))
    assert close_code(read_frames(stream.written)) == 1000


async def test_a_peer_that_speaks_is_not_asked() -> None:
    stream = FakeStream()
    async with clocked(stream) as clock:
        for number in range(50):
            await clock.run_until(number * 10)
            stream.feed(frame(PONG))
            await settle()
        stream.feed(close(1000))
    assert [item.opcode for item in read_frames(stream.written)] == [CLOSE]


@pytest.mark.parametrize(("interval_s", "timeout_s", "n_pings"), [(20, 20, 1), (20, 5, 1), (10, 35, 4)])
async def test_a_peer_that_does_not_answer_is_dropped(
    interval_s: float, timeout_s: float, n_pings: int
) -> None:
    stream = FakeStream()
    limits = SocketLimits(ping_interval_s=interval_s, ping_timeout_s=timeout_s)
    async with clocked(stream, limits=limits) as clock:
        await clock.run_until(interval_s + timeout_s - 0.1)
        assert stream.written == PING_FRAME * n_pings
        await clock.run_until(interval_s + timeout_s)
        assert close_code(read_frames(stream.written)) == 1011
        assert not stream.is_closed
        await clock.run_until(interval_s + timeout_s + limits.close_timeout_s)
    assert stream.is_closed


async def test_a_busy_endpoint_is_not_the_peers_silence() -> None:
    is_free = asyncio.Event()

    async def serve(socket: Socket) -> None:
        await is_free.wait()
        assert await socket.receive() == "hello"

    stream = FakeStream(HELLO)
    async with clocked(stream, serve) as clock:
        await clock.run_until(1000)
        is_free.set()
        await settle()
        stream.feed(close(1000))
    assert [item.opcode for item in read_frames(stream.written)] == [CLOSE]


# -- closing --------------------------------------------------------------------------------------


async def test_the_endpoint_closes_and_waits_for_the_peer() -> None:
    received: list[str | None] = []

    async def serve(socket: Socket) -> None:
        received.append(await socket.receive())
        socket.close(4001, "enough")
        socket.close(4002)
        assert socket.push(text_frame(b"too late"))
        received.append(await socket.receive())

    stream = FakeStream(HELLO)
    async with session(stream, serve):
        await stream.until_written(b"enough")
        stream.feed(HELLO + frame(PING, b"x"))
        stream.feed(close(4001))
    assert received == ["hello", None]
    (closing,) = read_frames(stream.written)
    assert bytes(closing.data) == b"\x0f\xa1enough"
    assert not stream.is_closed  # which is left to the connection


async def test_a_peer_that_never_closes_is_dropped() -> None:
    async def serve(socket: Socket) -> None:
        socket.close(1000)
        assert await socket.receive() is None

    stream = FakeStream(HELLO)
    async with session(stream, serve, SocketLimits(close_timeout_s=0.001)):
        pass
    assert stream.is_closed


@pytest.mark.parametrize("wrong", [frame(TEXT, mask=b""), frame(3)], ids=["unmasked", "opcode"])
async def test_an_error_after_our_close_is_not_answered(wrong: bytes) -> None:
    stream = FakeStream()
    async with session(stream) as made:
        made.close(1000)
        stream.feed(wrong)
    assert close_code(read_frames(stream.written)) == 1000


async def test_an_endpoint_that_returns_closes_the_socket() -> None:
    async def serve(socket: Socket) -> None:
        await socket.receive()

    stream = FakeStream(HELLO, close(1000))
    async with session(stream, serve):
        pass
    assert close_code(read_frames(stream.written)) == 1000


async def test_an_endpoint_that_fails_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def serve(socket: Socket) -> None:
        raise ValueError("a bug")

    stream = FakeStream(close(1011))
    with caplog.at_level(logging.ERROR):
        async with session(stream, serve):
            pass
    assert "a bug" in caplog.text
    assert close_code(read_frames(stream.written)) == 1011


async def test_the_stop_of_the_server_is_told() -> None:
    stream = FakeStream()
    async with session(stream):
        await stream.until(lambda: stream.n_reads > 0)
        assert stream.on_stop is not None
        stream.on_stop()
        await stream.until_written(b"stopping")
        stream.feed(close(1001))
    assert close_code(read_frames(stream.written)) == 1001


@pytest.mark.parametrize("is_reset", [True, False], ids=["reset", "half-closed"])
async def test_a_peer_may_just_go(is_reset: bool) -> None:
    stream = FakeStream(HELLO + frame(TEXT, b"unfinished", fin=False))
    async with session(stream):
        await stream.until_written(b"hello")
        if is_reset:
            stream.lose()
        else:
            stream.feed_eof()
    assert stream.written == text_frame(b"hello")


# -- back-pressure --------------------------------------------------------------------------------


async def test_push_says_when_the_peer_is_slow() -> None:
    async def serve(socket: Socket) -> None:
        assert socket.push(b"1")
        stream.is_slow = True
        assert not socket.push(b"2")
        asyncio.get_running_loop().call_soon(stream.take_all)
        await socket.drain()
        assert socket.push(b"3")

    stream = FakeStream(close(1000))
    async with session(stream, serve):
        pass
    assert stream.written.startswith(b"123")


@pytest.mark.parametrize("is_lost", [True, False])
async def test_drain_ends_when_the_peer_takes_nothing(is_lost: bool) -> None:
    async def serve(socket: Socket) -> None:
        stream.is_slow = True
        if is_lost:
            stream.lose()
        await socket.drain()
        assert socket.push(b"dropped")
        assert await socket.receive() is None

    stream = FakeStream()
    async with session(stream, serve, SocketLimits(write_timeout_s=0.001)):
        pass
    assert stream.is_closed
    assert stream.written == b""


async def test_a_peer_that_asks_without_listening_is_not_read() -> None:
    stream = FakeStream(*[frame(PING) * 10] * 10, is_slow=True)
    async with session(stream):
        await stream.until_written(b"\x8a\x00")
        for _ in range(20):
            await asyncio.sleep(0)
        assert stream.n_reads == 1
        stream.take_all()
        stream.feed(close(1000))
    assert len(pongs(read_frames(stream.written))) == 100


# -- fairness -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flood",
    [
        frame(TEXT, b"x") * 3200,
        frame(PONG) * 3200,
        frame(TEXT, fin=False) + frame(CONT, fin=False) * 3200,
    ],
    ids=["texts", "pongs", "fragments"],
)
async def test_a_flood_in_one_read_lets_others_work(flood: bytes) -> None:
    n_turns = 0

    async def others() -> None:
        nonlocal n_turns
        while True:
            await asyncio.sleep(0)
            n_turns += 1

    task = asyncio.create_task(others())
    stream = FakeStream(flood, close(1000))
    async with session(stream):
        pass
    task.cancel()
    assert n_turns >= 3200 // EVENTS_PER_TURN


async def test_a_cancelled_receive_loses_nothing() -> None:
    received: list[str | None] = []

    async def serve(socket: Socket) -> None:
        for attempt in itertools.count():
            task = asyncio.create_task(socket.receive())
            for _ in range(attempt % 5):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                received.append(await task)
            if len(received) == 100:
                return

    stream = FakeStream(*(frame(TEXT, b"%d" % number) for number in range(100)), close(1000))
    async with session(stream, serve):
        pass
    assert received == [str(number) for number in range(100)]
