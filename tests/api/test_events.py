"""The WebSocket endpoint: the handshake's query, what clients may say, and what comes of anything else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets import ConnectionClosedError, ConnectionClosedOK, InvalidStatus, Subprotocol, connect

from protocol import Headers, parse_target
from tests.support.sinks import FakeSocket, settle
from tests.support.watched import WatchedEngine, watched
from wingman.api.errors import error_response, protocol_error_response
from wingman.api.events import EventLimits, EventsEndpoint, choose_subprotocol
from wingman.errors import InvalidRequest, Unavailable
from wingman.http.connection import ConnectionLimits
from wingman.http.messages import Answer, Request, Response, Upgrade
from wingman.http.server import Server
from wingman.services.broadcast import Broadcast
from wingman.services.monitor import Monitor


def request(target: str = "/", offered: str = "") -> Request:
    headers = Headers([(b"sec-websocket-protocol", offered.encode())] if offered else [])
    return Request("GET", parse_target(target.encode()), headers, "id", "test")


class Hall:
    """The endpoint and its clients; `now` is the clock of their allowances."""

    def __init__(self, **limits: Any) -> None:
        self.now = 0.0
        self.n_shutdowns = 0
        self.broadcast = Broadcast()
        self.monitor = Monitor(
            self.broadcast,
            models=lambda: [watched(WatchedEngine())],
            items=list,
            downloads=list,
            hardware=dict,
        )
        self.endpoint = EventsEndpoint(
            self.broadcast, self.monitor, self._shutdown, EventLimits(**limits), lambda: self.now
        )
        self.tasks: list[asyncio.Task[None]] = []

    def connect(self, asked: Request, *, may_shutdown: bool = True) -> Upgrade:
        return self.endpoint.connect(asked, may_shutdown=may_shutdown)

    def _shutdown(self) -> None:
        self.n_shutdowns += 1

    async def enter(self, target: str = "/?events=custom", **options: Any) -> FakeSocket:
        """A client that has been greeted."""
        socket = FakeSocket()
        upgrade = self.connect(request(target), **options)

        async def serve() -> None:
            await upgrade.serve(socket)

        self.tasks.append(asyncio.create_task(serve()))
        await settle()
        return socket


async def say(socket: FakeSocket, *texts: str) -> list[dict[str, Any]]:
    """What the client gets while these are handled."""
    n_before = len(socket.frames)
    for text in texts:
        socket.inbox.put_nowait(text)
    await settle(20 + 5 * len(texts))
    return socket.messages[n_before:]


# -- coming in ------------------------------------------------------------------------------------


async def test_a_client_is_welcomed_and_told_how_things_are() -> None:
    hall = Hall()
    socket = await hall.enter("/")
    assert socket.events == ["welcome", "status", "metrics"]
    assert socket.messages[0] == {"event": "welcome", "seq": 0, "id": "1"}


async def test_the_query_filters() -> None:
    hall = Hall()
    assert (await hall.enter("/?events=metrics,chat&alias=tiny")).events == ["welcome", "metrics"]
    assert (await hall.enter("/?alias=other")).events == ["welcome", "status"]
    assert (await hall.enter("/?alias=&events=")).events == ["welcome", "status", "metrics"]


async def test_what_was_missed_comes_behind_the_greeting() -> None:
    hall = Hall()
    for n in range(3):
        hall.broadcast.publish("custom", {"n": n})
    socket = await hall.enter("/?events=custom,status&since=1")
    assert [(m["event"], m["seq"]) for m in socket.messages] == [
        ("welcome", 1), ("status", 1), ("custom", 2), ("custom", 3),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("since=", "since"),
        ("since=-1", "since"),
        ("since=1.5", "since"),
        ("since=\u0661", "since"),
        ("since=" + "1" * 17, "since"),
        ("events=a,,b", "events"),
        ("events=a%20b", "events"),
        ("events=" + ",".join(["a"] * 65), "events"),
        ("alias=" + "a" * 257, "alias"),
    ],
)
async def test_a_bad_query_is_refused_before_the_handshake(query: str, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Hall().connect(request("/?" + query))
    assert caught.value.field == field


async def test_there_is_room_for_so_many_and_again_when_one_leaves() -> None:
    hall = Hall(max_monitors=2)
    first, _ = await hall.enter(), await hall.enter()
    with pytest.raises(Unavailable):
        hall.connect(request())
    first.close(1000)
    await settle()
    assert hall.broadcast.n_subscribers == 1
    early, late = hall.connect(request()), hall.connect(request())
    sockets = FakeSocket(), FakeSocket()
    hall.tasks.append(asyncio.ensure_future(early.serve(sockets[0])))
    await settle()
    await late.serve(sockets[1])
    assert sockets[0].closed is None
    assert sockets[1].closed is not None
    assert sockets[1].closed[0] == 1013


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        ((), None),
        (("wingman",), "wingman"),
        (("wingman.key.abc", "wingman"), "wingman"),
        (("wingman.key.abc",), "wingman.key.abc"),
        (("wingman.key.abc", "chat"), None),
        (("chat",), None),
    ],
)
def test_the_subprotocol(offered: tuple[str, ...], chosen: str | None) -> None:
    assert choose_subprotocol(offered) == chosen
    if offered:
        assert Hall().connect(request("/", ", ".join(offered))).subprotocol == chosen


# -- what clients say -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["shutdown", " shutdown\n", '{"event":"shutdown"}', '{"event":"shutdown","data":1}']
)
async def test_shutdown(text: str) -> None:
    hall = Hall()
    socket = await hall.enter()
    socket.inbox.put_nowait(text)
    await settle()
    assert socket.texts[-1] == b"Shutting down"
    assert socket.closed == (1000, "")
    assert hall.n_shutdowns == 1
    assert hall.broadcast.n_subscribers == 0


async def test_shutdown_needs_the_right() -> None:
    hall = Hall()
    socket = await hall.enter(may_shutdown=False)
    answers = await say(socket, "shutdown", '{"event":"shutdown"}')
    assert [answer["event"] for answer in answers] == ["error", "error"]
    assert "admin key" in answers[0]["message"]
    assert (hall.n_shutdowns, socket.closed) == (0, None)


async def test_ping() -> None:
    (answer,) = await say(await Hall().enter(), '{"event": "ping"}')
    assert answer == {"event": "pong", "seq": 0}


async def test_subscribe_changes_the_filter_and_greets_again() -> None:
    hall = Hall()
    socket = await hall.enter("/?events=none")
    answers = await say(socket, '{"event":"subscribe","events":["metrics","a"],"alias":"tiny"}')
    assert [answer["event"] for answer in answers] == ["metrics"]
    hall.broadcast.publish("a", {})
    hall.broadcast.publish("b", {})
    assert socket.events[-1] == "a"
    answers = await say(socket, '{"event":"subscribe","events":null}')
    assert [answer["event"] for answer in answers] == ["status", "metrics"]
    hall.broadcast.publish("b", {})
    assert socket.events[-1] == "b"
    await say(socket, '{"event":"subscribe","events":[]}')
    hall.broadcast.publish("b", {})
    assert socket.events[-2:] == ["metrics", "b"]


async def test_custom_messages_go_to_the_others_as_they_are() -> None:
    hall = Hall()
    heard: list[tuple[Any, str]] = []
    hall.broadcast.on("custom", lambda data, sender: heard.append((data, sender)))
    sender, other, deaf = await hall.enter(), await hall.enter(), await hall.enter("/?events=metrics")
    assert await say(sender, '{"event":"custom","data": {"b": 1.50, "a": [] } }', '{"event":"custom"}') == []
    assert other.texts[1:] == [
        b'{"event":"custom","seq":1,"data":{"b": 1.50, "a": [] },"sender":"1"}',
        b'{"event":"custom","seq":2,"data":null,"sender":"1"}',
    ]
    assert deaf.events == ["welcome", "metrics"]
    assert heard == [({"b": 1.5, "a": []}, "1"), (None, "1")]


@pytest.mark.parametrize(
    ("text", "param"),
    [
        ("", None),
        ("Shutdown", None),
        ("{", None),
        ("[]", None),
        ("{}", None),
        ("null", None),
        ('{"event": 5}', "event"),
        ('{"event": null}', "event"),
        ('{"event": "metrics"}', "event"),
        ('{"event": "welcome", "data": 1}', "event"),
        ('{"event": ""}', "event"),
        ('{"event": "a b"}', "event"),
        ('{"event": "%s"}' % ("a" * 65), "event"),
        ('{"event": "a", "data": {1: 2}}', None),
        ('{"event": "a", "data": "\\ud800"}', None),
        ('{"event": "a", "data": %s}' % ("[" * 9999 + "]" * 9999), None),
        ('{"event": "subscribe", "events": "a"}', "events"),
        ('{"event": "subscribe", "events": [1]}', "events[0]"),
        ('{"event": "subscribe", "events": ["a b"]}', "events"),
        ('{"event": "subscribe", "alias": 7}', "alias"),
        ('{"event": "subscribe", "events": [' + '"a",' * 64 + '"a"]}', "events"),
    ],
)
async def test_a_bad_message_is_answered_to_its_sender_alone(text: str, param: str | None) -> None:
    hall = Hall()
    socket, other = await hall.enter(), await hall.enter("/")
    n_others = len(other.frames)
    (answer,) = await say(socket, text)
    assert answer["event"] == "error"
    assert answer["param"] == param
    assert 0 < len(answer["message"]) < 200
    assert (await say(socket, '{"event":"ping"}'))[0]["event"] == "pong"
    assert len(other.frames) == n_others


def _is_json(value: Any) -> bool:
    try:
        orjson.dumps(value)
    except TypeError:  # integers beyond 64 bits, lone surrogates
        return False
    return True


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
EVENTS = st.sampled_from(["ping", "subscribe", "custom", "metrics", "shut down"])
MESSAGES = st.fixed_dictionaries(
    {}, optional={"event": EVENTS | JSON, "data": JSON, "events": JSON, "alias": JSON}
)


TEXTS = st.text() | MESSAGES.filter(_is_json).map(lambda value: orjson.dumps(value).decode())


@given(st.lists(TEXTS, max_size=10))
def test_nothing_a_client_says_ends_anything(texts: list[str]) -> None:
    async def scenario() -> None:
        hall = Hall()
        socket, other = await hall.enter(), await hall.enter("/?events=custom")
        for text in texts:
            if text.strip() != "shutdown":
                socket.inbox.put_nowait(text)
        await settle()
        answers = await say(socket, '{"event":"ping"}')
        assert answers[-1]["event"] == "pong"
        assert all(message["event"] in ("welcome", "custom") for message in other.messages)
        assert socket.closed is other.closed is None
        assert not any(task.done() for task in hall.tasks)
        for task in hall.tasks:
            task.cancel()
        await asyncio.gather(*hall.tasks, return_exceptions=True)
        assert hall.broadcast.n_subscribers == 0

    asyncio.run(scenario())


async def test_too_many_messages_end_the_connection_of_who_sends_them() -> None:
    hall = Hall(messages_per_s=10, burst=5)
    socket, other = await hall.enter(), await hall.enter()
    ping = '{"event":"ping"}'
    assert len(await say(socket, *[ping] * 5)) == 5
    hall.now += 0.2
    assert len(await say(socket, *[ping] * 2)) == 2
    assert socket.closed is None
    assert len(await say(socket, *[ping] * 2)) == 0
    assert socket.closed is not None
    assert socket.closed[0] == 1008
    assert (await say(other, ping))[0]["event"] == "pong"


async def test_long_messages_count_for_more() -> None:
    hall = Hall(messages_per_s=1, burst=5)
    socket = await hall.enter()
    await say(socket, '{"event":"custom","data":"%s"}' % ("x" * 16_000))
    assert socket.closed is None
    await say(socket, '{"event":"custom","data":"%s"}' % ("x" * 16_000))
    assert socket.closed is not None


# -- on a real socket -----------------------------------------------------------------------------


class EventsApp:
    """Every path is the socket."""

    is_draining = False

    def __init__(self, hall: Hall) -> None:
        self._hall = hall

    def screen(self, request: Request) -> Response | None:
        return None

    async def handle(self, request: Request) -> Answer:
        try:
            return self._hall.connect(request)
        except (InvalidRequest, Unavailable) as error:
            return error_response(error)

    def refuse(self, status: int, message: str) -> Response:
        return protocol_error_response(status, message)

    def request_id(self, offered: str | None) -> str:
        return "id"


@asynccontextmanager
async def open_house(hall: Hall) -> AsyncIterator[str]:
    server = Server(EventsApp(hall), ConnectionLimits(), max_connections=9)
    await server.listen("127.0.0.1", 0)
    try:
        yield f"ws://{server.addresses[0]}"
    finally:
        await server.aclose(grace_s=0)


async def test_a_stranger_connects_watches_talks_and_shuts_down() -> None:
    hall = Hall()
    offered = [Subprotocol("wingman.key.abc"), Subprotocol("wingman")]
    async with open_house(hall) as url, connect(f"{url}/ws?events=custom", subprotocols=offered) as first:
        assert first.subprotocol == "wingman"
        async with connect(url) as second:
            assert [orjson.loads(await second.recv())["event"] for _ in range(3)] == [
                "welcome",
                "status",
                "metrics",
            ]
            assert orjson.loads(await first.recv())["event"] == "welcome"
            await second.send('{"event":"custom","data":"\u00e9"}')
            assert orjson.loads(await first.recv())["data"] == "\u00e9"
        await first.send("shutdown")
        assert await first.recv() == "Shutting down"
        with pytest.raises(ConnectionClosedOK):
            await first.recv()
        assert hall.n_shutdowns == 1


async def test_a_bad_query_is_an_http_answer() -> None:
    async with open_house(Hall()) as url:
        with pytest.raises(InvalidStatus) as caught:
            await connect(f"{url}/?since=x")
        assert caught.value.response.status_code == 400
        assert orjson.loads(caught.value.response.body or b"")["error"]["param"] == "since"


async def test_who_reads_nothing_is_closed_and_the_others_get_everything() -> None:
    hall = Hall()
    async with (
        open_house(hall) as url,
        connect(f"{url}/?events=custom") as good,
        connect(f"{url}/?events=custom", max_queue=1) as bad,
    ):
        await good.recv()
        for n in range(300):  # beyond what the buffers of two systems and the backlog take
            hall.broadcast.publish("custom", {"n": n, "pad": "x" * 60_000})
            assert orjson.loads(await good.recv())["n"] == n
        await bad.recv()
        received = []
        with suppress(ConnectionClosedError):
            while True:
                received.append(orjson.loads(await bad.recv())["n"])
        assert received == list(range(len(received)))
        assert 0 < len(received) < 300
        assert bad.close_code == 1013
