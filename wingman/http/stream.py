"""A byte stream with time-outs, back-pressure and an instant notice of disconnect.

`ByteStream` is what a connection needs of a socket; tests give it a fake. `SocketStream`
is an asyncio Protocol of our own rather than a StreamReader pair: the end of file must reach
a running handler within the same loop turn, also while nobody reads. All on the loop thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Protocol, cast

READ_BYTES = 16 * 1024
"""Most bytes handed out at once: it bounds how long one connection can keep the loop busy."""
READ_LIMIT_BYTES = 64 * 1024
"""Buffered bytes at which reading pauses while a request is being read."""
LINGER_S = 2.0
"""How long a refused upload is read and dropped, so that the peer sees the answer, not a reset."""


class WriteTimeout(Exception):
    """The peer took nothing for the whole write time-out."""


class ByteStream(Protocol):
    """An ordered stream of bytes to and from one peer."""

    peer: str
    is_idle: bool
    """Set by the connection while it waits for a request: such a stream may be closed at any time."""
    on_stop: Callable[[], None] | None
    """Set by who must say something to the peer before the server stops; called once it is about to."""

    async def read(self) -> bytes:
        """Bytes that arrived, at least one and at most READ_BYTES; b"" once the peer has closed or is lost."""

    def push(self, data: bytes) -> None:
        """Hand bytes to the transport without waiting; lost if the peer is gone."""

    @property
    def is_writable(self) -> bool:
        """Whether the transport's buffer has room; if not, `drain` waits for it."""

    async def drain(self, timeout_s: float) -> None:
        """Wait until the peer has taken enough to go on. Raises WriteTimeout, or
        ConnectionResetError when the peer is gone."""

    def watch_disconnect(self, callback: Callable[[], None] | None) -> None:
        """Call `callback` once, as soon as the peer closes its side, is lost, or sends too far ahead; None
        stops watching."""

    @property
    def is_disconnected(self) -> bool:
        """Whether the peer has closed its sending side, is lost, or is not listened to any more."""

    def push_eof(self) -> None:
        """Close our sending side after what is buffered; reading goes on."""

    async def aclose(self) -> None:
        """Send what is buffered, then close. Never raises."""

    def abort(self) -> None:
        """Close at once and drop what is buffered."""


class SocketStream(asyncio.Protocol):
    """ByteStream over an asyncio transport; made by a listener for each accepted socket."""

    def __init__(self, on_connect: Callable[[SocketStream], None], max_ahead_bytes: int = 256 * 1024) -> None:
        """`max_ahead_bytes` may arrive while an answer is owed. Reading must not pause then, or the end of
        file would go unseen; so a peer that sends more is dropped."""
        self._max_ahead_bytes = max_ahead_bytes
        self._on_connect = on_connect
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._eof = False
        self._lost = False
        self._read_paused = False
        self._writable = asyncio.Event()
        self._writable.set()
        self._closed = asyncio.Event()
        self._reader: asyncio.Future[None] | None = None
        self._on_disconnect: Callable[[], None] | None = None
        self.peer = ""
        self.is_idle = False
        self.on_stop: Callable[[], None] | None = None

    # -- asyncio.Protocol, called by the transport ------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:  # noqa: D102
        self._transport = cast("asyncio.Transport", transport)
        self.peer = _peer_name(self._transport)
        sock = self._transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            with contextlib.suppress(OSError):  # each event of a stream leaves at once
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._on_connect(self)

    def data_received(self, data: bytes) -> None:  # noqa: D102
        self._buffer += data
        if self._on_disconnect is not None:
            if len(self._buffer) > self._max_ahead_bytes:
                self._eof = True
                self._buffer.clear()
                self._notice_disconnect()
        elif len(self._buffer) >= READ_LIMIT_BYTES and not self._read_paused:
            self._read_paused = True
            self._open_transport().pause_reading()
        self._wake_reader()

    def eof_received(self) -> bool:  # noqa: D102
        self._eof = True
        self._wake_reader()
        self._notice_disconnect()
        return True  # keep our side open: a broken request may still get its answer

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: D102
        self._eof = self._lost = True
        self._writable.set()
        self._closed.set()
        self._wake_reader()
        self._notice_disconnect()

    def pause_writing(self) -> None:  # noqa: D102
        self._writable.clear()

    def resume_writing(self) -> None:  # noqa: D102
        self._writable.set()

    # -- ByteStream, called by the connection -----------------------------------------------

    async def read(self) -> bytes:  # noqa: D102
        while not self._buffer and not self._eof:
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        data = bytes(self._buffer[:READ_BYTES])
        del self._buffer[:READ_BYTES]
        if len(self._buffer) < READ_LIMIT_BYTES:
            self._resume_reading()
        return data

    def push(self, data: bytes) -> None:  # noqa: D102
        transport = self._open_transport()
        if not transport.is_closing():  # it says so before `connection_lost` comes
            transport.write(data)

    @property
    def is_writable(self) -> bool:  # noqa: D102
        return self._writable.is_set()

    async def drain(self, timeout_s: float) -> None:  # noqa: D102
        while not self._writable.is_set():
            n_before = self._open_transport().get_write_buffer_size()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._writable.wait()
            except TimeoutError:
                if self._open_transport().get_write_buffer_size() >= n_before:
                    raise WriteTimeout(f"the peer took nothing for {timeout_s} s") from None
        if self._lost:
            raise ConnectionResetError("the peer is gone")

    def watch_disconnect(self, callback: Callable[[], None] | None) -> None:  # noqa: D102
        self._on_disconnect = callback
        if callback is not None:
            self._resume_reading()
            if self._eof:
                self._notice_disconnect()

    @property
    def is_disconnected(self) -> bool:  # noqa: D102
        return self._eof

    def push_eof(self) -> None:  # noqa: D102
        if not self._lost and self._open_transport().can_write_eof():
            with contextlib.suppress(OSError, RuntimeError):
                self._open_transport().write_eof()

    async def aclose(self) -> None:  # noqa: D102
        if not self._lost:
            self._open_transport().close()
        await self._closed.wait()

    def close_soon(self) -> None:
        """Send what is buffered, then close, without waiting for it."""
        if not self._lost:
            self._open_transport().close()

    def abort(self) -> None:  # noqa: D102
        if not self._lost:
            self._open_transport().abort()

    def _open_transport(self) -> asyncio.Transport:
        assert self._transport is not None, "used before connection_made"
        return self._transport

    def _resume_reading(self) -> None:
        if self._read_paused and not self._lost:
            self._read_paused = False
            self._open_transport().resume_reading()

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _notice_disconnect(self) -> None:
        callback, self._on_disconnect = self._on_disconnect, None
        if callback is not None:
            callback()


async def close_gently(stream: ByteStream) -> None:
    """Close so that the peer sees the last answer even if it is still sending (RFC 9112, 9.6)."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            stream.push_eof()
            while await stream.read():
                pass
            await stream.aclose()


def _peer_name(transport: asyncio.Transport) -> str:
    name = transport.get_extra_info("peername")
    if isinstance(name, tuple):
        return f"[{name[0]}]:{name[1]}" if ":" in str(name[0]) else f"{name[0]}:{name[1]}"
    return "unix"
