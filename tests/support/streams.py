"""A peer in memory: the ByteStream of `wingman.http.stream` without a socket.

The test plays the client: it feeds bytes, looks at what was written, takes it slowly or leaves. One
`read` gives one fed piece. What was written is read back by h11's client side, so that the answers
are judged by other code than ours.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import h11

from wingman.http.stream import WriteTimeout

GUARD_S = 30.0
"""Ends a test that hangs; nothing is measured with it."""


class FakeStream:
    """A ByteStream whose peer is the test."""

    def __init__(self, *reads: bytes, is_slow: bool = False, hangs_up: bool = True) -> None:
        self.peer = "the test"
        self.is_idle = False
        self.on_stop: Callable[[], None] | None = None
        self.written = bytearray()
        self.n_reads = 0
        self.is_slow = is_slow
        """While set, `drain` waits: the peer takes nothing."""
        self.hangs_up = hangs_up
        """Whether the peer closes its side when it sees ours closed."""
        self.sent_eof = False
        self.is_closed = False
        self._incoming = deque(reads)
        self._eof = False
        self._lost = False
        self._changed = asyncio.Event()
        self._on_disconnect: Callable[[], None] | None = None

    # -- the peer's side ------------------------------------------------------------------------

    def feed(self, data: bytes) -> None:
        """Send a piece."""
        self._incoming.append(data)
        self._touch()

    def feed_eof(self) -> None:
        """Close the sending side."""
        self._eof = True
        self._touch()
        self._notice_disconnect()

    def lose(self) -> None:
        """Reset the connection."""
        self._lost = True
        self.feed_eof()

    def take_all(self) -> None:
        """Stop being slow."""
        self.is_slow = False
        self._touch()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that reads, writes or state of this stream change."""
        async with asyncio.timeout(GUARD_S):
            while not condition():
                await self._changed.wait()

    async def until_written(self, part: bytes, times: int = 1) -> None:
        """Wait until `part` was written so many times."""
        await self.until(lambda: self.written.count(part) >= times)

    # -- ByteStream -----------------------------------------------------------------------------

    async def read(self) -> bytes:
        self.n_reads += 1
        self._touch()
        await self.until(lambda: bool(self._incoming) or self._eof or self.is_closed)
        return self._incoming.popleft() if self._incoming else b""

    def push(self, data: bytes) -> None:
        if not self._lost and not self.is_closed:
            self.written += data
            self._touch()

    @property
    def is_writable(self) -> bool:
        return not self.is_slow

    async def drain(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while self.is_slow and not self._lost:
                    await self._changed.wait()
        except TimeoutError:
            raise WriteTimeout("the peer took nothing") from None
        if self._lost:
            raise ConnectionResetError("the peer is gone")

    def watch_disconnect(self, callback: Callable[[], None] | None) -> None:
        self._on_disconnect = callback
        if self._eof:
            self._notice_disconnect()

    @property
    def is_disconnected(self) -> bool:
        return self._eof

    def push_eof(self) -> None:
        self.sent_eof = True
        self._touch()
        if self.hangs_up:
            self.feed_eof()

    async def aclose(self) -> None:
        self.is_closed = True
        self._touch()

    def abort(self) -> None:
        self.is_closed = True
        self._touch()

    def _touch(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _notice_disconnect(self) -> None:
        callback, self._on_disconnect = self._on_disconnect, None
        if callback is not None:
            callback()


@dataclass
class ReceivedAnswer:
    """One answer as a client sees it; `is_complete` when its framing ended."""

    status: int
    headers: dict[str, str]
    interim: list[int] = field(default_factory=list)
    body: bytes = b""
    is_complete: bool = False


def read_answers(data: bytes, *methods: str, is_closed: bool = True) -> list[ReceivedAnswer]:
    """Parse what was written as the answers to requests with these methods; nothing may be left over."""
    client = h11.Connection(h11.CLIENT)
    client.receive_data(bytes(data))
    if is_closed:
        client.receive_data(b"")
    answers: list[ReceivedAnswer] = []
    for number, method in enumerate(methods):
        if number:
            client.start_next_cycle()
        client.send(h11.Request(method=method, target="/", headers=[("host", "a")]))
        client.send(h11.EndOfMessage())
        answer = _read_answer(client)
        if answer is None:
            break
        answers.append(answer)
    left = client.trailing_data[0]
    assert not left, left
    return answers


def _read_answer(client: h11.Connection) -> ReceivedAnswer | None:
    interim: list[int] = []
    answer: ReceivedAnswer | None = None
    while True:
        try:
            event = client.next_event()
        except h11.RemoteProtocolError:  # closed within the answer
            return answer
        if isinstance(event, h11.InformationalResponse):
            interim.append(event.status_code)
        elif isinstance(event, h11.Response):
            headers = {name.decode(): value.decode("latin-1") for name, value in event.headers}
            answer = ReceivedAnswer(event.status_code, headers, interim)
        elif isinstance(event, h11.Data):
            assert answer is not None
            answer.body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            assert answer is not None
            answer.is_complete = True
            return answer
        else:
            return answer
