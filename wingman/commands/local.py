"""No server runs: the same application in this process, without listeners.

Its loop runs in a background thread; the main thread hands it coroutines and waits. What crosses are
frozen values and queues. Closing pauses downloads and unloads models, as a server's shutdown does.
"""

from __future__ import annotations

import asyncio
import dataclasses
import queue
import threading
from collections.abc import Callable, Coroutine, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import orjson

from wingman.commands.api import CommandFailed, Message, control_request, decode_json, refusal, sse_messages
from wingman.config import Config
from wingman.http.messages import EventStream, Response

T = TypeVar("T")
_JOIN_S: Final = 10.0


class LocalApi:
    """`Api` of an application that lives as long as this object."""

    is_daemon = False

    def __init__(self, config: Config, make: Callable[..., Any] | None = None) -> None:
        """Starts it; `make` stands in for `wingman.lifecycle.Wingman` in tests. Raises WingmanError."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="wingman-local", daemon=True)
        self._thread.start()
        try:
            self._wingman = self._wait(_start(config, make))
        except BaseException:
            self._end_loop()
            raise

    def call(self, path: str, query: Mapping[str, str], *, method: str = "GET") -> tuple[int, Any]:
        """As in `Api`."""
        answer = self._dispatch(method, *control_request(path, query, method))
        if isinstance(answer, EventStream):
            raise CommandFailed(f"{path} answers with a stream")
        return answer.status, decode_json(answer.body)

    @contextmanager
    def events(self, names: Sequence[str], idle_s: float = 1.0) -> Iterator[Iterator[Message | None]]:
        """As in `Api`."""
        inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        unsubscribe = self._wait(_on_loop(lambda: self._wingman.subscribe(inbox.put, tuple(names))))
        try:
            yield _received(inbox, idle_s)
        finally:
            self._wait(_on_loop(unsubscribe))

    def infer(self, path: str, body: Mapping[str, Any]) -> Generator[Message, None, None]:
        """As in `Api`."""
        answer = self._dispatch("POST", path, orjson.dumps(body))
        if isinstance(answer, Response):
            raise refusal(answer.status, decode_json(answer.body))
        inbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        pump = asyncio.run_coroutine_threadsafe(_pump(answer, inbox.put), self._loop)
        try:
            yield from sse_messages(iter(inbox.get, None))
        finally:
            pump.cancel()

    def close(self) -> None:
        """As in `Api`."""
        try:
            self._wait(self._wingman.close())
        finally:
            self._end_loop()

    def _dispatch(self, method: str, target: str, body: bytes = b"") -> Response | EventStream:
        answer: Response | EventStream = self._wait(self._wingman.dispatch(method, target, body))
        return answer

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _end_loop(self) -> None:
        """Cancel what is left, then end the thread."""
        asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result(_JOIN_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_JOIN_S)
        self._loop.close()


async def _start(config: Config, make: Callable[..., Any] | None) -> Any:
    if make is None:
        from wingman.lifecycle import Wingman  # the whole application: commands to a server don't need it

        make = Wingman
    wingman = make(_for_commands(config), listen=False)
    try:
        await wingman.start()
    except BaseException:
        await wingman.close()
        raise
    return wingman


def _for_commands(config: Config) -> Config:
    """The same without anything that a server would load when it starts."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, model=None, starter=False),
        control=dataclasses.replace(config.control, control=True, restore=False),
    )


async def _on_loop(work: Callable[[], T]) -> T:
    return work()


async def _pump(answer: EventStream, put: Callable[[bytes | None], None]) -> None:
    """Hand over every block, then None. An answer is bounded by its context, so the queue is too."""
    try:
        async for block in answer.events:
            put(block)
    finally:
        put(None)
        await answer.events.aclose()
        answer.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()
    await asyncio.get_running_loop().shutdown_default_executor()


def _received(inbox: queue.SimpleQueue[Message], idle_s: float) -> Iterator[Message | None]:
    while True:
        try:
            yield inbox.get(timeout=idle_s)
        except queue.Empty:
            yield None
