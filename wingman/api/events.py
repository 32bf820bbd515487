"""The WebSocket: everything that is watched, and the few words a client may say.

A client gets a `welcome`, how things are now and, with `?since=N`, what it missed; then whatever
happens. What it sends wrongly is answered with an `error` message and nothing else. On the loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

import msgspec
from msgspec import Struct

from protocol import CloseCode, offered_subprotocols, text_frame
from wingman.api.errors import error_body
from wingman.api.schema import parse_json
from wingman.errors import Forbidden, InvalidRequest, Unavailable, WingmanError
from wingman.http.access import KEY_PROTOCOL
from wingman.http.messages import Request, Socket, Upgrade
from wingman.services.broadcast import Broadcast, Filter, Subscriber, check_event_name
from wingman.services.deployments import MAX_ALIAS_CHARS
from wingman.services.monitor import Monitor

SUBPROTOCOL: Final = "wingman"
MAX_EVENTS: Final = 64
BYTES_A_TOKEN: Final = 4096
"""A message of this size counts as two: long ones are more work for everybody."""


class EventLimits(Struct, frozen=True):
    """What clients may use."""

    max_monitors: int = 2048
    messages_per_s: float = 200.0
    burst: float = 400.0


class Envelope(msgspec.Struct):
    """A client's message; `data` is JSON that is passed on as it is."""

    event: str
    data: msgspec.Raw = msgspec.Raw(b"null")


class Subscribe(msgspec.Struct):
    """`subscribe`: null or nothing is everything."""

    events: list[str] | None = None
    alias: str | None = None


class Allowance:
    """A token bucket."""

    def __init__(self, limits: EventLimits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._n_left = limits.burst
        self._at = clock()

    def take(self, n_tokens: float) -> bool:
        """Whether that many tokens were there; they are gone then."""
        now = self._clock()
        self._n_left += (now - self._at) * self._limits.messages_per_s
        self._n_left = min(self._n_left, self._limits.burst) - n_tokens
        self._at = now
        return self._n_left >= 0


class EventsEndpoint(Struct, frozen=True):
    """Where WebSocket clients come in."""

    broadcast: Broadcast
    monitor: Monitor
    shutdown: Callable[[], None]
    """Begins a graceful stop of the server and returns."""
    limits: EventLimits = EventLimits()
    clock: Callable[[], float] = time.monotonic

    def connect(self, request: Request, *, may_shutdown: bool) -> Upgrade:
        """The answer to a handshake; who may connect is the caller's to check. Raises InvalidRequest for a bad
        query, Unavailable when all places are taken."""
        since = _read_since(request)
        events = request.target.first("events")
        what = read_filter(events.split(",") if events else None, request.target.first("alias"))
        if self._is_full:
            raise Unavailable("too many WebSocket clients (--max-monitors)", retry_after_s=5)

        async def serve(socket: Socket) -> None:
            if self._is_full:  # others came during the handshake
                socket.close(CloseCode.TRY_AGAIN_LATER, "too many clients")
            else:
                await self._serve(socket, what, since, may_shutdown=may_shutdown)

        return Upgrade(serve, choose_subprotocol(offered_subprotocols(request.headers)))

    @property
    def _is_full(self) -> bool:
        return self.broadcast.n_subscribers >= self.limits.max_monitors

    async def _serve(self, socket: Socket, what: Filter, since: int | None, *, may_shutdown: bool) -> None:
        subscriber = self.broadcast.subscribe(socket, what, since)
        shutdown = self.shutdown if may_shutdown else None
        client = Client(self.broadcast, self.monitor, socket, subscriber, shutdown)
        try:
            self.broadcast.send_to(subscriber, "welcome", {"id": subscriber.id})
            self.monitor.greet(subscriber)
            self.broadcast.replay(subscriber)
            await client.listen(Allowance(self.limits, self.clock))
        finally:
            self.broadcast.unsubscribe(subscriber)


class Client:
    """One socket, and what its messages mean."""

    def __init__(
        self,
        broadcast: Broadcast,
        monitor: Monitor,
        socket: Socket,
        subscriber: Subscriber,
        shutdown: Callable[[], None] | None,
    ) -> None:
        """Without `shutdown` this client may not ask for one."""
        self._broadcast = broadcast
        self._monitor = monitor
        self._socket = socket
        self._subscriber = subscriber
        self._stop_server = shutdown
        self._actions: dict[str, Callable[[bytes], None]] = {
            "shutdown": self._shutdown,
            "subscribe": self._subscribe,
            "ping": self._ping,
        }

    async def listen(self, allowance: Allowance) -> None:
        """Do what the client says until it has gone."""
        while (text := await self._socket.receive()) is not None:
            if not allowance.take(1 + len(text) // BYTES_A_TOKEN):
                self._socket.close(CloseCode.POLICY_VIOLATION, "too many messages")
                return
            try:
                self._obey(text)
            except WingmanError as error:
                self._answer_error(error)
            await asyncio.sleep(0)  # many may have arrived at once

    def _obey(self, text: str) -> None:
        if text.strip() == "shutdown":  # the original's only message
            self._shutdown(b"")
            return
        body = text.encode()
        message = parse_json(body, Envelope)
        action = self._actions.get(message.event)
        if action is not None:
            action(body)
        else:
            self._broadcast.relay(message.event, bytes(message.data), self._subscriber.id)

    def _shutdown(self, _: bytes) -> None:
        if self._stop_server is None:
            raise Forbidden("a shutdown needs the admin key")
        self._socket.push(text_frame(b"Shutting down"))
        self._socket.close(CloseCode.NORMAL)
        self._stop_server()

    def _subscribe(self, body: bytes) -> None:
        wanted = parse_json(body, Subscribe)
        self._subscriber.filter = read_filter(wanted.events, wanted.alias)
        self._monitor.greet(self._subscriber)

    def _ping(self, _: bytes) -> None:
        self._broadcast.send_to(self._subscriber, "pong", {})

    def _answer_error(self, error: WingmanError) -> None:
        _, body = error_body(error)
        answer = {"message": body["error"]["message"], "param": body["error"].get("param")}
        self._broadcast.send_to(self._subscriber, "error", answer)


def read_filter(events: list[str] | None, alias: str | None) -> Filter:
    """A filter from a client's words; an empty alias is none. Raises InvalidRequest."""
    if events is not None and len(events) > MAX_EVENTS:
        raise InvalidRequest(f"Field 'events': at most {MAX_EVENTS} names", "events")
    for name in events or ():
        check_event_name(name, "events")
    if alias is not None and len(alias) > MAX_ALIAS_CHARS:
        raise InvalidRequest(f"Field 'alias': at most {MAX_ALIAS_CHARS} characters", "alias")
    return Filter(None if events is None else frozenset(events), alias or None)


def _read_since(request: Request) -> int | None:
    text = request.target.first("since")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 16):  # as far as JSON's readers count
        raise InvalidRequest("Field 'since': the seq of a message is expected", "since")
    return int(text)


def choose_subprotocol(offered: tuple[str, ...]) -> str | None:
    """The one to answer with. A browser that offered any gives up when none is chosen (RFC 6455, 4.1), so a
    key is sent back when it is all that was offered; never beside another."""
    if SUBPROTOCOL in offered:
        return SUBPROTOCOL
    is_key_alone = len(offered) == 1 and offered[0].startswith(KEY_PROTOCOL)
    return offered[0] if is_key_alone else None
