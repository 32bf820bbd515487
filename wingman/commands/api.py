"""What every command talks to: one small interface, answered by a running server or in-process.

`RemoteApi` and `LocalApi` implement `Api`; commands know no other way to anything. Synchronous, used
by the main thread only, so that ctrl-C lands in the command that waits.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final, Protocol, TypeVar
from urllib.parse import urlencode

import msgspec
import orjson

from protocol.errors import RemoteProtocolError
from protocol.sse import SseParser
from wingman.errors import WingmanError

T = TypeVar("T")
Message = dict[str, Any]
"""One message of the event socket, or one chunk of a streamed answer."""

_HINTS: Final = {
    401: "give its key with --admin-key and --api-key, or WINGMAN_ADMIN_KEY and WINGMAN_API_KEY",
}
_MAX_EVENT_BYTES: Final = 16 * 1024 * 1024


class CommandFailed(WingmanError):
    """A command can't do what was asked; `status` is the server's when it refused."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class EventsRefused(CommandFailed):
    """There is no event socket to be had."""


class Api(Protocol):
    """The control and inference APIs. Everything raises CommandFailed when there is no answer at all."""

    is_daemon: bool
    """Whether what was asked for goes on after this process ends."""

    def call(self, path: str, query: Mapping[str, str], *, method: str = "GET") -> tuple[int, Any]:
        """Status and decoded JSON of a control endpoint."""

    def events(
        self, names: Sequence[str], idle_s: float = 1.0
    ) -> AbstractContextManager[Iterator[Message | None]]:
        """The socket's messages of these names; None whenever nothing came for `idle_s` seconds. The
        iterator ends when the server closes it. Raises EventsRefused."""

    def infer(self, path: str, body: Mapping[str, Any]) -> Generator[Message, None, None]:
        """The chunks of a streamed answer; closing it cancels the generation."""

    def close(self) -> None:
        """Let go; an in-process application stops, its downloads stay resumable."""


def control_request(path: str, query: Mapping[str, str], method: str) -> tuple[str, bytes]:
    """Target and body of a control request. What is posted goes into the body: it may be long."""
    if method == "POST":
        return path, orjson.dumps(query) if query else b""
    return (f"{path}?{urlencode(query)}" if query else path), b""


def ask(api: Api, path: str, method: str = "GET", **query: str) -> Any:
    """The body of a successful answer. Raises CommandFailed in the server's words."""
    status, body = api.call(path, query, method=method)
    if status >= 300:
        raise refusal(status, body)
    return body


def decode_json(body: bytes) -> Any:
    """A body's JSON; None when it is none."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None


def read_as(value: Any, kind: type[T]) -> T:
    """Decoded JSON as a type. Raises CommandFailed when it does not fit."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError:
        raise CommandFailed("the server's answer can't be understood; is it of another version?") from None


def refusal(status: int, body: Any) -> CommandFailed:
    """The exception for an answer that is an error."""
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    text = str(message) if message else f"the server answered {status}"
    hint = _HINTS.get(status)
    return CommandFailed(f"{text}: {hint}" if hint else text, status)


def sse_messages(blocks: Iterable[bytes]) -> Iterator[Message]:
    """Chunks of a streamed answer up to its `[DONE]`. Raises CommandFailed for an error among them, and when
    it ends before."""
    parser = SseParser(_MAX_EVENT_BYTES)
    try:
        for block in blocks:
            for event in parser.feed(block):
                if event.data == "[DONE]":
                    return
                message = orjson.loads(event.data)
                if "error" in message:
                    raise refusal(500, message)
                yield message
    except (RemoteProtocolError, orjson.JSONDecodeError, TypeError):
        raise CommandFailed("the server's answer can't be understood") from None
    raise CommandFailed("the answer ended in the middle")
