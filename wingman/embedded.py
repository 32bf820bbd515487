"""Wingman inside another asyncio program: chat, downloads, models and messages without HTTP.

Requests take the way of HTTP ones from the router on, so that what they mean, and what they answer, is the same;
they need no key. All on the loop that started it.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final

import orjson

from protocol import Headers, SseParser, parse_target
from wingman.app import App
from wingman.errors import ConfigurationError, WingmanError
from wingman.http.messages import Answer, EventStream, Request, Response
from wingman.services.deployments import Start
from wingman.services.inference import Inference
from wingman.services.items import DownloadItem, WingmanItem

if TYPE_CHECKING:
    from wingman.api.control import ControlPlane

log = logging.getLogger("wingman.embedded")

_DONE: Final = "[DONE]"


class RequestFailed(WingmanError):
    """A request was refused; `status` and `body` are what HTTP would have answered."""

    def __init__(self, status: int, body: Any) -> None:
        error = body.get("error", {}) if isinstance(body, dict) else {}
        super().__init__(str(error.get("message", f"answered with {status}")))
        self.status = status
        self.body = body


class Embedded:
    """What a running Wingman does for the program around it."""

    inference: Inference
    _inner: App
    _plane: ControlPlane | None

    # -- requests -------------------------------------------------------------------------------------

    async def dispatch(self, method: str, target: str, body: bytes = b"") -> Answer:
        """Answer a request as the listeners would; `target` is a path with its query. Whoever gets an
        EventStream iterates `events`, closes it, and calls `close`."""
        request = Request(
            method, parse_target(target.encode()), Headers(), secrets.token_hex(8), "embedded", body
        )
        return await self._inner.handle(request)

    async def chat(
        self, messages: Sequence[Mapping[str, Any]], *, model: str | None = None, **fields: Any
    ) -> dict[str, Any]:
        """A chat completion, as POST /v1/chat/completions answers it; `fields` are those of its body. Raises
        RequestFailed."""
        body = {**fields, "messages": list(messages), "model": model, "stream": False}
        answer = await self.dispatch("POST", "/v1/chat/completions", orjson.dumps(body))
        assert isinstance(answer, Response)
        if answer.status != 200:
            raise RequestFailed(answer.status, orjson.loads(answer.body))
        completion: dict[str, Any] = orjson.loads(answer.body)
        return completion

    async def stream_chat(
        self, messages: Sequence[Mapping[str, Any]], *, model: str | None = None, **fields: Any
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The same in chunks, as they come; leaving the iteration (`aclosing`) ends the generation. Raises
        RequestFailed."""
        body = {**fields, "messages": list(messages), "model": model, "stream": True}
        answer = await self.dispatch("POST", "/v1/chat/completions", orjson.dumps(body))
        if not isinstance(answer, EventStream):
            assert isinstance(answer, Response)
            raise RequestFailed(answer.status, orjson.loads(answer.body))
        parser = SseParser()
        try:
            async with aclosing(answer.events) as blocks:
                async for block in blocks:
                    for event in parser.feed(block):
                        if event.data == _DONE:
                            return
                        chunk = orjson.loads(event.data)
                        if "error" in chunk:
                            raise RequestFailed(chunk["error"].get("code", 500), chunk)
                        yield chunk
        finally:
            answer.close()

    # -- models ---------------------------------------------------------------------------------------

    async def download(self, model_repo: str, file_path: str, revision: str | None = None) -> DownloadItem:
        """Queue a download and return its item; `subscribe` tells how it goes on. Raises
        NotFound, Forbidden, UpstreamFailure, InsufficientRoom."""
        return (await self._control.downloads.enqueue(model_repo, file_path, revision)).item

    async def start_model(
        self,
        alias: str,
        model_repo: str,
        file_path: str,
        *,
        context_size: int = 0,
        gpu_layers: int = -1,
        chat_template: str = "",
        force: bool = False,
    ) -> WingmanItem:
        """Load a downloaded model under an alias; returns once it answers requests. Raises what keeps it
        from loading."""
        start = Start(
            alias,
            model_repo,
            file_path,
            context_size=context_size,
            gpu_layers=gpu_layers,
            chat_template=chat_template,
            force=force,
        )
        await self.inference.start(start)
        (await self.inference.lease(alias)).release()
        await self.inference.settle()
        return self.inference.item(alias)

    async def stop_model(self, alias: str) -> WingmanItem:
        """Stop a model; returns once it is gone. Raises NotFound."""
        return await self.inference.stop(alias)

    # -- messages -------------------------------------------------------------------------------------

    @property
    def _control(self) -> ControlPlane:
        if self._plane is None:
            raise ConfigurationError("this Wingman runs without the control API: configure(control=True)")
        return self._plane

    def on(self, name: str, handler: Callable[[Any, str], None]) -> Callable[[], None]:
        """Call `handler(data, sender)` for each custom message of a name that WebSocket clients send; the
        result ends that. Raises InvalidRequest for a name of Wingman's own."""
        return self._control.sockets.broadcast.on(name, handler)

    def broadcast(self, name: str, data: Any) -> None:
        """Send a custom message, `{"event": name, "data": data}`, to every WebSocket client that wants it.
        Raises InvalidRequest for a name of Wingman's own."""
        self._control.sockets.broadcast.send(name, data)

    def subscribe(
        self, callback: Callable[[dict[str, Any]], None], events: Sequence[str] | None = None
    ) -> Callable[[], None]:
        """Call `callback` with each message that a WebSocket client would get, of these events or of all,
        beginning with how things are; the result ends that. It must not block."""
        from wingman.services.broadcast import Filter  # of the control API, where there is one

        broadcast, monitor = self._control.sockets.broadcast, self._control.sockets.monitor
        wanted = Filter(frozenset(events) if events else None)
        subscriber = broadcast.subscribe(_CallbackSink(callback), wanted)
        monitor.greet(subscriber)
        return lambda: broadcast.unsubscribe(subscriber)


class _CallbackSink:
    """A WebSocket client that is a function."""

    def __init__(self, callback: Callable[[dict[str, Any]], None]) -> None:
        self._callback = callback

    def push(self, frame: bytes) -> bool:
        """Take a frame: unmasked, final, of text (RFC 6455, 5.2)."""
        start = {126: 4, 127: 10}.get(frame[1], 2)
        try:
            self._callback(orjson.loads(frame[start:]))
        except Exception:
            log.exception("a subscriber failed")
        return True

    async def drain(self) -> None:
        """It never has to be waited for."""

    def close(self, code: int, reason: str = "") -> None:
        """It can't be closed."""
