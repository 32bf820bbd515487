"""A WebSocket as Broadcast and the events endpoint see it, in memory."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson


class FakeSocket:
    """Takes frames; full when `room` frames have been taken since the last drain."""

    peer = "test"

    def __init__(self, room: int = 1_000_000) -> None:
        self.room = room
        self.frames: list[bytes] = []
        self.closed: tuple[int, str] | None = None
        self.inbox: asyncio.Queue[str | None] = asyncio.Queue()
        self._is_free = asyncio.Event()
        self._is_free.set()

    def push(self, frame: bytes) -> bool:
        assert self._is_free.is_set(), "pushed without waiting for drain"
        if self.closed is None:
            self.frames.append(frame)
        self.room -= 1
        if self.room <= 0:
            self._is_free.clear()
        return self._is_free.is_set()

    def let_go(self, room: int = 1_000_000) -> None:
        """The peer reads again, `room` frames."""
        self.room = room
        self._is_free.set()

    async def drain(self) -> None:
        await self._is_free.wait()

    async def receive(self) -> str | None:
        return await self.inbox.get()

    def close(self, code: int, reason: str = "") -> None:
        self.closed = self.closed or (code, reason)
        self.inbox.put_nowait(None)

    @property
    def texts(self) -> list[bytes]:
        """The text of each frame."""
        return [payload_of(frame) for frame in self.frames]

    @property
    def messages(self) -> list[dict[str, Any]]:
        """Each frame as JSON."""
        return [orjson.loads(text) for text in self.texts]

    @property
    def events(self) -> list[str]:
        """The event of each frame."""
        return [message["event"] for message in self.messages]


def payload_of(frame: bytes) -> bytes:
    """The text of an unmasked final text frame (RFC 6455, 5.2)."""
    assert frame[0] == 0x81
    n_extra = {126: 2, 127: 8}.get(frame[1], 0)
    length = int.from_bytes(frame[2 : 2 + n_extra], "big") if n_extra else frame[1]
    payload = frame[2 + n_extra :]
    assert len(payload) == length
    return payload


async def settle(n_turns: int = 200) -> None:
    """Let everything run that can."""
    for _ in range(n_turns):
        await asyncio.sleep(0)
