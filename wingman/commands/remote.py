"""A running server: its control API and event socket on one address, inference on another.

Blocking http.client, one connection a call. The calling thread only.
"""

from __future__ import annotations

import http.client
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import SplitResult, urlsplit

import orjson

from wingman.commands.api import CommandFailed, Message, control_request, decode_json, refusal, sse_messages
from wingman.commands.eventsocket import open_events

_CALL_TIMEOUT_S: Final = 120.0
"""Stopping a model waits for its requests, enqueueing for the Hub."""
_STREAM_TIMEOUT_S: Final = 300.0
"""Between two chunks; the server sends comments while a prompt is read."""
_MAX_BODY_BYTES: Final = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Address:
    """Base URLs of a server."""

    control: str
    inference: str


class RemoteApi:
    """`Api` of a server that runs."""

    is_daemon = True

    def __init__(self, address: Address, admin_key: str | None = None, api_key: str | None = None) -> None:
        """Of two keys, one may be left out: then the other serves both, as it does in the server."""
        self._control = _split(address.control)
        self._inference = _split(address.inference)
        self._admin_key = admin_key or api_key
        self._api_key = api_key or admin_key

    def call(
        self, path: str, query: Mapping[str, str], *, method: str = "GET", timeout_s: float = _CALL_TIMEOUT_S
    ) -> tuple[int, Any]:
        """As in `Api`."""
        target, sent = control_request(path, query, method)
        connection = _connection(self._control, timeout_s)
        with closing(connection):
            answer = _request(connection, self._control, method, target, self._admin_key, sent)
            try:
                body = answer.read(_MAX_BODY_BYTES)
            except (OSError, http.client.HTTPException):
                raise _no_answer(self._control) from None
            return answer.status, decode_json(body)

    def events(
        self, names: Sequence[str], idle_s: float = 1.0
    ) -> AbstractContextManager[Iterator[Message | None]]:
        """As in `Api`."""
        return open_events(self._control, tuple(names), self._admin_key, idle_s)

    def infer(self, path: str, body: Mapping[str, Any]) -> Generator[Message, None, None]:
        """As in `Api`."""
        connection = _connection(self._inference, _STREAM_TIMEOUT_S)
        with closing(connection):
            answer = _request(connection, self._inference, "POST", path, self._api_key, orjson.dumps(body))
            if answer.status != 200:
                raise refusal(answer.status, decode_json(answer.read(_MAX_BODY_BYTES)))
            yield from sse_messages(_blocks(answer, self._inference))

    def close(self) -> None:
        """Nothing is held."""


def _split(url: str) -> SplitResult:
    try:
        split = urlsplit(url)
        is_usable = split.scheme in ("http", "https") and bool(split.hostname) and split.port != 0
    except ValueError:
        is_usable = False
    if not is_usable:
        raise CommandFailed(f"{url} is no address: give one like http://127.0.0.1:6568")
    return split


def _connection(url: SplitResult, timeout_s: float) -> http.client.HTTPConnection:
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    return kind(url.hostname or "", url.port, timeout=timeout_s)


def _request(
    connection: http.client.HTTPConnection,
    url: SplitResult,
    method: str,
    target: str,
    key: str | None,
    body: bytes = b"",
) -> http.client.HTTPResponse:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    if body:
        headers["Content-Type"] = "application/json"
    try:
        connection.request(method, url.path.rstrip("/") + target, body or None, headers)
        return connection.getresponse()
    except (OSError, http.client.HTTPException):
        raise _no_answer(url) from None


def _blocks(answer: http.client.HTTPResponse, url: SplitResult) -> Iterator[bytes]:
    try:
        while block := answer.read1(65536):
            yield block
    except (OSError, http.client.HTTPException):
        raise CommandFailed(f"{url.netloc} ended the answer in the middle") from None


def _no_answer(url: SplitResult) -> CommandFailed:
    return CommandFailed(f"no answer from {url.scheme}://{url.netloc}: does the server run?")
