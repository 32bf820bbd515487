"""Jobs -> Server-Sent Events: what all streams have in common.

A writer turns the events of a request's jobs into encoded blocks and knows no waiting; the one coroutine
here asks it once a step, so that what a step says leaves in one write. On the loop.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterable
from itertools import chain
from typing import Any, Final

import orjson

from protocol import encode_event
from wingman.api.errors import error_body
from wingman.engine.stream import JobStream
from wingman.engine.types import JobEvent
from wingman.http.messages import EventStream

DONE: Final = encode_event(b"[DONE]")


def encode(body: dict[str, Any]) -> bytes:
    """An event block with a JSON object."""
    return encode_event(orjson.dumps(body))


class TextFrame:
    """Event blocks that differ in one text: those of `encode(make(text))`, with all else rendered once."""

    def __init__(self, make: Callable[[str], dict[str, Any]]) -> None:
        place = secrets.token_hex(16)
        self._before, self._after = encode(make(place)).split(orjson.dumps(place))

    def block(self, text: str) -> bytes:
        """The block with this text."""
        return self._before + orjson.dumps(text) + self._after


class EventWriter(ABC):
    """Follows the jobs of one request and returns encoded event blocks."""

    def start(self) -> Iterable[bytes]:
        """The blocks before anything is known."""
        return ()

    @abstractmethod
    def take(self, event: JobEvent) -> Iterable[bytes]:
        """The blocks that follow from an event; from the last one, those that end the stream too."""

    def fail(self, error: BaseException) -> bytes:
        """The blocks that tell of a failure, after which nothing follows."""
        return encode(error_body(error)[1])


def event_stream(writer: EventWriter, jobs: JobStream, ping_s: int) -> EventStream:
    """The answer that streams jobs; however it ends, they do too. `ping_s` <= 0 sends no comments."""
    return EventStream(_blocks(writer, jobs), jobs.close, float(ping_s) if ping_s > 0 else None)


async def _blocks(writer: EventWriter, jobs: JobStream) -> AsyncGenerator[bytes, None]:
    """What is written of each step, where it is anything."""
    try:
        if blocks := b"".join(writer.start()):
            yield blocks
        async for events in jobs.steps():
            if blocks := b"".join(chain.from_iterable(map(writer.take, events))):
                yield blocks
    except Exception as error:  # noqa: BLE001 - the task root of a stream
        yield writer.fail(error)
