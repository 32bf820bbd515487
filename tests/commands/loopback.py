"""A server on loopback that runs in a thread of its own: HTTP, event streams and the event socket."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Any, Self

import orjson

from wingman.http.connection import ConnectionLimits
from wingman.http.messages import Answer, EventStream, Request, Response, Socket, Upgrade
from wingman.http.server import Server


class Loopback:
    """Answers by `replies` (path -> handler); records every request it saw."""

    is_draining = False

    def __init__(self, replies: dict[str, Callable[[Request], Answer]]) -> None:
        self.replies = replies
        self.requests: list[Request] = []
        self.url = ""
        self.stream_closed = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._server: Server | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server is not None
        asyncio.run_coroutine_threadsafe(self._server.aclose(0), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _listen(self) -> None:
        self._server = Server(self, ConnectionLimits(), 100)
        await self._server.listen("127.0.0.1", 0)
        self.url = f"http://{self._server.addresses[0]}"

    def keys(self) -> list[str | None]:
        """The Authorization header of each request."""
        return [request.headers.get_text(b"authorization") for request in self.requests]

    def screen(self, request: Request) -> Response | None:
        return None

    async def handle(self, request: Request) -> Answer:
        self.requests.append(request)
        reply = self.replies.get(request.path)
        return reply(request) if reply else json_reply({"error": {"message": "File Not Found"}}, 404)

    def refuse(self, status: int, message: str) -> Response:
        return Response(status, message.encode(), headers=(("connection", "close"),))

    def request_id(self, offered: str | None) -> str:
        return "id"

    def stream(self, *blocks: bytes, hangs: bool = False) -> EventStream:
        """A streamed answer; one that hangs ends when its client goes."""

        async def events() -> AsyncGenerator[bytes, None]:
            for block in blocks:
                yield block
            if hangs:
                await asyncio.Event().wait()

        return EventStream(events(), self.stream_closed.set)


def json_reply(value: Any, status: int = 200) -> Response:
    """A JSON answer."""
    return Response(status, orjson.dumps(value))


def wingman_replies(**more: Callable[[Request], Answer]) -> dict[str, Callable[[Request], Answer]]:
    """What makes a server look like ours."""
    return {"/api/inference": lambda _: json_reply({"WingmanItems": []})} | {
        f"/{name.replace('_', '/')}": reply for name, reply in more.items()
    }


def socket_of(*frames: bytes) -> Callable[[Request], Answer]:
    """An event socket that sends these frames, then waits for its client to go."""

    async def serve(socket: Socket) -> None:
        for frame in frames:
            socket.push(frame)
        await socket.receive()

    return lambda _: Upgrade(serve)
