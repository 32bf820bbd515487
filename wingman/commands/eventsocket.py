"""A blocking client of the event socket (RFC 6455), over a plain socket and wsproto.

It only listens: whoever sends uses another client. Pings are answered while messages are read.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final
from urllib.parse import SplitResult, urlencode

import orjson
from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    CloseConnection,
    Event,
    Ping,
    RejectConnection,
    Request,
    TextMessage,
)
from wsproto.utilities import LocalProtocolError, RemoteProtocolError

from wingman.commands.api import EventsRefused, Message

_HANDSHAKE_S: Final = 10.0
_SILENCE_S: Final = 60.0
"""The server pings every 20 s; after this long without a byte it is gone."""
_MAX_MESSAGE_BYTES: Final = 16 * 1024 * 1024


@contextmanager
def open_events(
    url: SplitResult, names: tuple[str, ...], key: str | None, idle_s: float
) -> Iterator[Iterator[Message | None]]:
    """The messages of these names, as `Api.events` has them. Raises EventsRefused."""
    connection = WSConnection(ConnectionType.CLIENT)
    try:
        wire = _connect(url)
    except OSError:
        raise EventsRefused(f"no answer from {url.netloc}") from None
    with wire:
        try:
            _shake_hands(wire, connection, url, names, key)
        except (OSError, LocalProtocolError, RemoteProtocolError):
            raise EventsRefused(f"{url.netloc} opens no event socket") from None
        wire.settimeout(idle_s)
        try:
            yield _messages(wire, connection)
        finally:
            with suppress(OSError, LocalProtocolError):
                wire.sendall(connection.send(CloseConnection(code=1000)))


def _connect(url: SplitResult) -> socket.socket:
    is_secure = url.scheme == "https"
    address = (url.hostname or "", url.port or (443 if is_secure else 80))
    wire = socket.create_connection(address, _HANDSHAKE_S)
    if not is_secure:
        return wire
    return ssl.create_default_context().wrap_socket(wire, server_hostname=url.hostname)


def _shake_hands(
    wire: socket.socket, connection: WSConnection, url: SplitResult, names: tuple[str, ...], key: str | None
) -> None:
    headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
    target = f"{url.path.rstrip('/')}/ws?{urlencode({'events': ','.join(names)})}"
    wire.sendall(connection.send(Request(host=url.netloc, target=target, extra_headers=headers)))
    for event in _wire_events(wire, connection):
        if isinstance(event, AcceptConnection):
            return
        if isinstance(event, RejectConnection):
            raise EventsRefused(
                f"{url.netloc} refuses the event socket ({event.status_code})", event.status_code
            )
    raise ConnectionResetError


def _wire_events(wire: socket.socket, connection: WSConnection) -> Iterator[Event | None]:
    """What arrives; None after each silence as long as the socket's time-out. Ends with the stream."""
    heard = time.monotonic()
    while True:
        yield from connection.events()
        try:
            data = wire.recv(65536)
        except TimeoutError:
            if time.monotonic() - heard > _SILENCE_S:
                return
            yield None
            continue
        if not data:
            return
        heard = time.monotonic()
        connection.receive_data(data)


def _messages(wire: socket.socket, connection: WSConnection) -> Iterator[Message | None]:
    text = ""
    try:
        for event in _wire_events(wire, connection):
            if event is None:
                yield None
            elif isinstance(event, Ping):
                wire.sendall(connection.send(event.response()))
            elif isinstance(event, CloseConnection):
                return
            elif isinstance(event, TextMessage):
                text += event.data
                if len(text) > _MAX_MESSAGE_BYTES:
                    return
                if event.message_finished:
                    message, text = _decode(text), ""
                    if message is not None:
                        yield message
    except (OSError, LocalProtocolError, RemoteProtocolError):
        return


def _decode(text: str) -> Message | None:
    try:
        message = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return message if isinstance(message, dict) else None
