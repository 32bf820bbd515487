"""`LocalApi` on an application without listeners."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import orjson
import pytest

from wingman.commands.api import CommandFailed
from wingman.commands.local import LocalApi
from wingman.config import Config, ControlConfig, ModelConfig
from wingman.errors import ConfigurationError
from wingman.http.messages import EventStream, Response

CHUNK = b'data: {"n": 1}\n\n'


class FakeWingman:
    """Answers with what it was asked; streams `/chat`, which hangs after its first chunk."""

    last: FakeWingman

    def __init__(self, config: Config, *, listen: bool) -> None:
        assert not listen
        FakeWingman.last = self
        self.config = config
        self.thread = threading.current_thread()
        self.asked: list[tuple[str, str, bytes]] = []
        self.callbacks: list[Callable[[dict[str, Any]], None]] = []
        self.stream_closed = threading.Event()
        self.is_closed = False

    async def start(self) -> None:
        assert threading.current_thread() is self.thread is not threading.main_thread()

    async def close(self) -> None:
        self.is_closed = True

    async def dispatch(self, method: str, target: str, body: bytes = b"") -> Response | EventStream:
        self.asked.append((method, target, body))
        if target == "/chat":
            return EventStream(self._events(), self.stream_closed.set)
        return Response(404 if target == "/none" else 200, orjson.dumps({"error": {"message": "none here"}}))

    async def _events(self) -> AsyncGenerator[bytes, None]:
        yield CHUNK
        await asyncio.Event().wait()

    def subscribe(
        self, callback: Callable[[dict[str, Any]], None], events: Sequence[str]
    ) -> Callable[[], None]:
        assert threading.current_thread() is self.thread
        self.callbacks.append(callback)
        callback({"event": events[0]})
        return lambda: self.callbacks.remove(callback)


def local() -> LocalApi:
    return LocalApi(Config(), FakeWingman)


def test_a_call_runs_in_process() -> None:
    with closing(local()) as api:
        assert api.call("/api/x", {"a": "b c"})[0] == 200
        assert api.call("/api/x", {"a": "b"}, method="POST")[0] == 200
        assert FakeWingman.last.asked == [("GET", "/api/x?a=b+c", b""), ("POST", "/api/x", b'{"a":"b"}')]
    assert FakeWingman.last.is_closed
    assert not FakeWingman.last.thread.is_alive()


def test_nothing_of_a_servers_start_is_done() -> None:
    model = ModelConfig(model=Path("x.gguf"), starter=True)
    with closing(LocalApi(Config(model=model, control=ControlConfig(restore=True)), FakeWingman)):
        config = FakeWingman.last.config
    assert (config.model.model, config.model.starter) == (None, False)
    assert (config.control.control, config.control.restore) == (True, False)


def test_events_are_subscribed_while_listened_to() -> None:
    with closing(local()) as api:
        with api.events(("status",), idle_s=0.01) as messages:
            assert [next(messages), next(messages)] == [{"event": "status"}, None]
        assert FakeWingman.last.callbacks == []


def test_closing_a_stream_cancels_it() -> None:
    with closing(local()) as api:
        with closing(api.infer("/chat", {"stream": True})) as chunks:
            assert next(chunks) == {"n": 1}
        assert FakeWingman.last.stream_closed.wait(10)
        assert FakeWingman.last.asked == [("POST", "/chat", b'{"stream":true}')]


def test_a_refused_stream_is_an_error() -> None:
    with closing(local()) as api, pytest.raises(CommandFailed, match="none here"):
        next(api.infer("/none", {}))


def test_a_failed_start_leaves_no_thread() -> None:
    class Failing(FakeWingman):
        async def start(self) -> None:
            raise ConfigurationError("another server uses this home")

    with pytest.raises(ConfigurationError, match="another server"):
        LocalApi(Config(), Failing)
    assert FakeWingman.last.is_closed
    assert not FakeWingman.last.thread.is_alive()
