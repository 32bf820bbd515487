"""Listeners, the set of connection tasks, and draining.

Owns every connection task: asyncio's own stream server would log a traceback for each that
is cancelled. Decides nothing about requests. Runs on the loop thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import stat
from pathlib import Path

from protocol import Headers, Http1Connection, ResponseHead
from wingman.errors import ConfigurationError
from wingman.http.connection import Application, ConnectionLimits, serve_connection
from wingman.http.stream import SocketStream, close_gently

log = logging.getLogger("wingman.http")

BACKLOG = 512
"""Connections the kernel queues while the loop is busy."""

_BUSY_HEADERS = Headers([(b"connection", b"close"), (b"content-length", b"0"), (b"retry-after", b"1")])
MAX_TURNED_AWAY = 64
"""Connections over the limit that are closed with care at once; the rest may see a reset."""


class Server:
    """Accepts connections for one application on any number of addresses."""

    def __init__(self, app: Application, limits: ConnectionLimits, max_connections: int) -> None:
        self._app = app
        self._limits = limits
        self._max_connections = max_connections
        self._listeners: list[asyncio.AbstractServer] = []
        self._unix_paths: list[Path] = []
        self._tasks: dict[asyncio.Task[None], SocketStream] = {}
        self.addresses: list[str] = []
        """Where it listens: "host:port" or the path of a Unix socket."""

    async def listen(self, host: str, port: int) -> None:
        """Listen on a host name, an IP address or, when `host` ends in `.sock`, a Unix socket.

        Port 0 lets the system choose. Raises ConfigurationError when the address can't be bound.
        """
        try:
            if host.endswith(".sock"):
                await self._listen_unix(Path(host))
            else:
                await self._listen_tcp(host, port)
        except OSError as error:
            reason = error.strerror or "no such host"
            raise ConfigurationError(f"can't listen on {host}:{port}: {reason}") from error

    async def _listen_tcp(self, host: str, port: int) -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            self._new_stream, host, port, backlog=BACKLOG, reuse_address=True, start_serving=True
        )
        self._listeners.append(server)
        for sock in server.sockets:
            name = sock.getsockname()
            shown = f"[{name[0]}]" if ":" in name[0] else name[0]
            self.addresses.append(f"{shown}:{name[1]}")

    async def _listen_unix(self, path: Path) -> None:
        _remove_stale_socket(path)
        loop = asyncio.get_running_loop()
        server = await loop.create_unix_server(self._new_stream, str(path), backlog=BACKLOG)
        self._listeners.append(server)
        self._unix_paths.append(path)
        self.addresses.append(str(path))

    def _new_stream(self) -> SocketStream:
        return SocketStream(self._accept, self._limits.wire.max_pipelined_bytes)

    def _accept(self, stream: SocketStream) -> None:
        if len(self._tasks) >= self._max_connections:
            log.warning("refused a connection from %s: --max-connections reached", stream.peer)
            stream.push(Http1Connection().send(ResponseHead(503, _BUSY_HEADERS)))
            if len(self._tasks) >= self._max_connections + MAX_TURNED_AWAY:
                stream.close_soon()
                return
            work = _turn_away(stream)
        else:
            work = serve_connection(stream, self._app, self._limits)
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[task] = stream
        task.add_done_callback(self._tasks.pop)

    @property
    def n_connections(self) -> int:
        """Open connections, idle ones included."""
        return len(self._tasks)

    async def aclose(self, grace_s: float) -> None:
        """Stop listening, close idle connections and begin to close WebSockets, give the others `grace_s`
        seconds to finish their answers, then end them. Never raises."""
        for server in self._listeners:
            server.close()
        for stream in self._tasks.values():
            if stream.is_idle:
                stream.close_soon()
            elif stream.on_stop is not None:
                stream.on_stop()
        if self._tasks:
            await asyncio.wait(tuple(self._tasks), timeout=grace_s)
        for task in tuple(self._tasks):
            task.cancel("the server is stopping")
        if self._tasks:
            await asyncio.wait(tuple(self._tasks))
        for path in self._unix_paths:
            with contextlib.suppress(OSError):
                path.unlink()


async def _turn_away(stream: SocketStream) -> None:
    try:
        await close_gently(stream)
    finally:
        stream.abort()


def _remove_stale_socket(path: Path) -> None:
    """Remove a socket file that no process serves; raises ConfigurationError when one does."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigurationError(f"{path} exists and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise ConfigurationError(f"another process listens on {path}")
