"""Messages to everybody who watches: encoded once, numbered, kept a while, and sent so that nobody waits.

Every message is a JSON object with `event` and `seq`. Events are sent in order; a message with a
`latest` key says how something is now, so that while a subscriber lags only the last one of a key is kept
for it, and none is ever replayed. A subscriber that lags too far is closed with 1013. The last `seq` that
a client has seen is the one to come back with: what it gets never goes back in numbers, and messages
to it alone, which answer or describe, carry the number of the last one before them.

Everything runs on the loop. With many subscribers a message goes out in slices, one in a turn of the
loop; a task exists only for a subscriber that lags.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Protocol

import orjson
from msgspec import Struct

from protocol import CloseCode, text_frame
from wingman.errors import InvalidRequest, Overloaded

log = logging.getLogger("wingman.broadcast")

SLICE: Final = 32
"""Subscribers served in one turn of the loop: below a millisecond also when each costs a system call."""
MAX_PENDING: Final = 64
"""Messages still being given out above which custom ones are refused."""
RESERVED: Final = frozenset(
    "metrics status download_status inference_status ping pong subscribe shutdown error welcome gap".split()
)
"""Event names that no custom message may have."""
_NAME: Final = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
PROCESS: Final = "server"
"""Sender id of messages from this process."""

Handler = Callable[[Any, str], None]
"""Called with the data of a custom message and its sender's id; must return at once."""


class Sink(Protocol):
    """The part of `wingman.http.messages.Socket` that a subscriber is written to."""

    def push(self, frame: bytes) -> bool:
        """Take a frame; False: wait for `drain` before the next."""

    async def drain(self) -> None:
        """Wait until more can be taken, or nobody is there any more."""

    def close(self, code: int, reason: str = "") -> None:
        """End the connection."""


class Filter(Struct, frozen=True):
    """What a subscriber wants: events of these names (None: all), and of those that concern one model only
    the ones of `alias` (None: any)."""

    events: frozenset[str] | None = None
    alias: str | None = None

    def takes(self, event: str, alias: str | None = None) -> bool:
        """Whether a message passes; `alias` is the model it concerns, if it concerns one."""
        is_named = self.events is None or event in self.events
        return is_named and (self.alias is None or alias is None or alias == self.alias)


class Bounds(Struct, frozen=True):
    """How much a queue may hold."""

    n_messages: int
    n_bytes: int


HISTORY: Final = Bounds(512, 4 * 1024**2)
"""What is kept for those who come back."""
BACKLOG: Final = Bounds(256, 1024**2)
"""What may wait for one subscriber."""


class Message(Struct, frozen=True, eq=False):
    """An encoded message. Equal by identity."""

    seq: int
    event: str
    frame: bytes
    alias: str | None = None
    latest: str | None = None
    sender: str = ""


class Subscriber:
    """One client: its filter, how far it is, and what waits for it."""

    __slots__ = ("_backlog", "_bounds", "_flushing", "_is_open", "_n_bytes", "_sink", "filter", "id", "seq")

    def __init__(self, subscriber_id: str, sink: Sink, what: Filter, seq: int, bounds: Bounds) -> None:
        self.id = subscriber_id
        self.filter = what
        self.seq = seq
        """Of the last message it was sent or did not want."""
        self._sink = sink
        self._bounds = bounds
        self._backlog: dict[object, Message] = {}
        self._n_bytes = 0
        self._flushing: asyncio.Task[None] | None = None
        self._is_open = True

    def offer(self, message: Message) -> None:
        """Send a broadcast message, if it is wanted."""
        if message.seq <= self.seq:  # it came while this one subscribed
            return
        self.seq = message.seq
        if message.sender != self.id and self.filter.takes(message.event, message.alias):
            self.give(message)

    def give(self, message: Message) -> None:
        """Send a message now, or queue it behind others. Too many there end the connection."""
        if not self._is_open:
            return
        if self._flushing is None:
            if not self._sink.push(message.frame):
                self._start_flushing()
        elif len(self._backlog) < self._bounds.n_messages and self._n_bytes < self._bounds.n_bytes:
            self._queue(message)
        else:
            self.stop()
            self._sink.close(CloseCode.TRY_AGAIN_LATER, "too slow")

    def owe(self, messages: list[Message]) -> None:
        """Send messages of the past without hurry; they don't count as lagging."""
        for message in messages:
            self._queue(message)
        self._bounds = Bounds(self._bounds.n_messages + len(messages), self._bounds.n_bytes + self._n_bytes)
        if messages and self._flushing is None:
            self._start_flushing()

    def stop(self) -> None:
        """Send nothing any more."""
        self._is_open = False
        self._backlog.clear()
        if self._flushing is not None:
            self._flushing.cancel()

    def _queue(self, message: Message) -> None:
        key = message if message.latest is None else (message.event, message.latest)
        previous = self._backlog.pop(key, None)  # the new one goes to the end: numbers only grow
        self._n_bytes += len(message.frame) - (len(previous.frame) if previous else 0)
        self._backlog[key] = message

    def _start_flushing(self) -> None:
        self._flushing = asyncio.get_running_loop().create_task(self._flush())

    async def _flush(self) -> None:
        """Send the backlog as the client takes it, a slice in a turn of the loop."""
        await self._sink.drain()
        while self._backlog:
            for key in tuple(itertools.islice(self._backlog, SLICE)):
                message = self._backlog.pop(key)
                self._n_bytes -= len(message.frame)
                if not self._sink.push(message.frame):
                    await self._sink.drain()
                    break
            await asyncio.sleep(0)
        self._flushing = None


class History:
    """The last events, for those who come back."""

    def __init__(self, bounds: Bounds, seq: int) -> None:
        self._bounds = bounds
        self._messages: deque[Message] = deque()
        self._n_bytes = 0
        self.forgotten = seq
        """Number of the last message that can't be had any more."""

    def add(self, message: Message) -> None:
        """Keep a message, and forget the oldest above the bounds."""
        self._messages.append(message)
        self._n_bytes += len(message.frame)
        while len(self._messages) > self._bounds.n_messages or self._n_bytes > self._bounds.n_bytes:
            oldest = self._messages.popleft()
            self._n_bytes -= len(oldest.frame)
            self.forgotten = oldest.seq

    def after(self, seq: int) -> Iterator[Message]:
        """What is kept of the messages after number `seq`, in order."""
        return (message for message in self._messages if message.seq > seq)


class Broadcast:
    """All subscribers, and what they are sent."""

    def __init__(
        self,
        history: Bounds = HISTORY,
        backlog: Bounds = BACKLOG,
        seq: int = 0,
    ) -> None:
        """Numbers begin after `seq`: given the milliseconds since 1970, those of an earlier run stay below."""
        self._backlog = backlog
        self._history = History(history, seq)
        self._seq = seq
        self._ids = itertools.count(1)
        self._subscribers: dict[str, Subscriber] = {}
        self._handlers: dict[str, list[Handler]] = {}
        self._pending: deque[Message] = deque()
        """What is being given out: the first one to the rest of its round."""
        self._round: Iterator[Subscriber] | None = None

    @property
    def seq(self) -> int:
        """Number of the last message."""
        return self._seq

    @property
    def n_subscribers(self) -> int:
        """How many there are."""
        return len(self._subscribers)

    def has_audience(self, event: str, alias: str | None = None) -> bool:
        """Whether anybody would get a message."""
        return any(one.filter.takes(event, alias) for one in self._subscribers.values())

    # -- sending --------------------------------------------------------------------------------

    def publish(self, event: str, payload: Mapping[str, Any], *, latest: str | None = None) -> None:
        """Send a message to all who want it. `payload` is what orjson takes, Fragments included, and its
        `alias` is the model it concerns. With `latest` it replaces those of the same event and key that
        have not been sent yet; without, it is kept for those who come back."""
        self._publish(event, payload, latest=latest)

    def send(self, name: str, data: Any) -> None:
        """Send a custom message of this process. Raises InvalidRequest for a bad name, TypeError for data that
        is no JSON, Overloaded."""
        self._send_custom(name, orjson.dumps(data), PROCESS)

    def relay(self, name: str, data: bytes, sender: str) -> None:
        """Send a subscriber's custom message, `data` being JSON, to the others and to the handlers of its
        name. Raises InvalidRequest for a bad name, Overloaded."""
        handlers = tuple(self._handlers.get(name, ()))
        value = _decode(data) if handlers else None
        self._send_custom(name, data, sender)
        for handler in handlers:
            try:
                handler(value, sender)
            except Exception:
                log.exception("a handler of %s failed", name)

    def on(self, name: str, handler: Handler) -> Callable[[], None]:
        """Call `handler` for each custom message of that name from a client, until the function that is
        returned is called. Raises InvalidRequest for a bad name."""
        check_custom_name(name)
        handlers = self._handlers.setdefault(name, [])
        handlers.append(handler)
        return lambda: handlers.remove(handler)

    def _send_custom(self, name: str, data: bytes, sender: str) -> None:
        check_custom_name(name)
        if len(self._pending) >= MAX_PENDING:
            raise Overloaded("too many messages are being sent", retry_after_s=1)
        self._publish(name, {"data": orjson.Fragment(data), "sender": sender}, sender=sender)

    def _publish(
        self, event: str, payload: Mapping[str, Any], latest: str | None = None, sender: str = ""
    ) -> None:
        frame = _encode(event, self._seq + 1, payload)
        self._seq += 1
        message = Message(self._seq, event, frame, payload.get("alias"), latest, sender)
        if latest is None:
            self._history.add(message)
        self._pending.append(message)
        if len(self._pending) == 1:  # else a later turn of the loop gets to it
            self._give_out()

    def _give_out(self) -> None:
        """Offer what is pending to one slice of the subscribers."""
        n_left = SLICE
        while self._pending and n_left:
            if self._round is None:
                self._round = iter(tuple(self._subscribers.values()))
            some = tuple(itertools.islice(self._round, n_left))
            for subscriber in some:
                self._offer(self._pending[0], subscriber)
            n_left -= len(some)
            if n_left:
                self._round = None
                self._pending.popleft()
        if self._pending:
            asyncio.get_running_loop().call_soon(self._give_out)

    def _offer(self, message: Message, subscriber: Subscriber) -> None:
        try:
            subscriber.offer(message)
        except Exception:  # a sink of an embedding program; the others must not miss anything by it
            log.exception("subscriber %s failed", subscriber.id)
            self.unsubscribe(subscriber)

    # -- subscribers ----------------------------------------------------------------------------

    def subscribe(self, sink: Sink, what: Filter, since: int | None = None) -> Subscriber:
        """Send to `sink` from now on. With `since`, the last number that the client saw, call `replay`
        before anything else is awaited. A number from the future is one of another run: as 0."""
        seq = self._seq if since is None else since if since <= self._seq else 0
        subscriber = Subscriber(str(next(self._ids)), sink, what, seq, self._backlog)
        self._subscribers[subscriber.id] = subscriber
        return subscriber

    def replay(self, subscriber: Subscriber) -> None:
        """Send what a subscriber has missed, behind a `gap` with the first and last number of what is
        lost, if something is."""
        if subscriber.seq < self._history.forgotten:
            gap = {"from": subscriber.seq + 1, "to": self._history.forgotten}
            subscriber.seq = self._history.forgotten
            self.send_to(subscriber, "gap", gap)
        takes = subscriber.filter.takes
        missed = self._history.after(subscriber.seq)
        subscriber.owe([message for message in missed if takes(message.event, message.alias)])
        subscriber.seq = self._seq

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Send nothing more to a subscriber; for ever."""
        subscriber.stop()
        self._subscribers.pop(subscriber.id, None)

    def send_to(
        self, subscriber: Subscriber, event: str, payload: Mapping[str, Any], *, latest: str | None = None
    ) -> None:
        """Send a message to one subscriber, whatever its filter."""
        frame = _encode(event, subscriber.seq, payload)
        subscriber.give(Message(subscriber.seq, event, frame, latest=latest))


def check_custom_name(name: str) -> None:
    """Raises InvalidRequest unless custom messages may have this name."""
    if name in RESERVED:
        raise InvalidRequest(f"Field 'event': clients can't send {name} messages", "event")
    check_event_name(name, "event")


def check_event_name(name: str, field: str) -> None:
    """Raises InvalidRequest unless a message could have this name."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(f"Field '{field}': a name is 1 to 64 of A-Z a-z 0-9 _ . : -", field)


def _decode(data: bytes) -> Any:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:  # valid, but a number beyond all bounds or the like
        raise InvalidRequest("Field 'data': can't be read", "data") from None


def _encode(event: str, seq: int, payload: Mapping[str, Any]) -> bytes:
    return text_frame(orjson.dumps({"event": event, "seq": seq, **payload}))
