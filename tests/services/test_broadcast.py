"""Broadcast: order and completeness for who keeps up, bounds for who lags, replay for who comes back."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.sinks import FakeSocket, settle
from wingman.errors import InvalidRequest, Overloaded
from wingman.services.broadcast import MAX_PENDING, RESERVED, SLICE, Bounds, Broadcast, Filter

ALL = Filter()


def numbers(socket: FakeSocket) -> list[int]:
    return [message["n"] for message in socket.messages]


async def test_messages_carry_event_number_and_payload() -> None:
    broadcast, socket = Broadcast(seq=41), FakeSocket()
    broadcast.subscribe(socket, ALL)
    broadcast.publish("status", {"a": [1, "x"]}, latest="status")
    assert socket.messages == [{"event": "status", "seq": 42, "a": [1, "x"]}]


async def test_frames_are_encoded_once_for_all() -> None:
    broadcast, sockets = Broadcast(), [FakeSocket(), FakeSocket()]
    for socket in sockets:
        broadcast.subscribe(socket, ALL)
    broadcast.publish("a", {})
    assert sockets[0].frames[0] is sockets[1].frames[0]


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        (Filter(), [0, 1, 2, 3]),
        (Filter(frozenset({"metrics"})), [0, 1]),
        (Filter(alias="x"), [0, 2, 3]),
        (Filter(frozenset({"metrics", "status"}), "y"), [1, 2]),
        (Filter(frozenset()), []),
    ],
)
async def test_filters_pick_events_and_models(what: Filter, expected: list[int]) -> None:
    broadcast, socket = Broadcast(), FakeSocket()
    broadcast.subscribe(socket, what)
    for n, (event, alias) in enumerate(
        [("metrics", "x"), ("metrics", "y"), ("status", None), ("custom", None)]
    ):
        broadcast.publish(event, {"n": n} | ({"alias": alias} if alias else {}))
    assert numbers(socket) == expected


async def test_many_subscribers_are_served_in_slices_and_in_order() -> None:
    broadcast, sockets = Broadcast(), [FakeSocket() for _ in range(3 * SLICE + 5)]
    for socket in sockets:
        broadcast.subscribe(socket, ALL)
    for n in range(4):
        broadcast.publish("a", {"n": n})
    assert sum(len(socket.frames) for socket in sockets) == SLICE
    await settle()
    assert all(numbers(socket) == [0, 1, 2, 3] for socket in sockets)


async def test_who_subscribes_or_leaves_during_a_round_gets_no_part_of_it() -> None:
    broadcast, sockets = Broadcast(), [FakeSocket() for _ in range(2 * SLICE)]
    subscribers = [broadcast.subscribe(socket, ALL) for socket in sockets]
    broadcast.publish("a", {"n": 0})
    broadcast.publish("a", {"n": 1})
    late = FakeSocket()
    broadcast.subscribe(late, ALL)
    broadcast.unsubscribe(subscribers[-1])
    await settle()
    broadcast.publish("a", {"n": 2})
    await settle()
    assert numbers(late) == [2]
    assert numbers(sockets[-1]) == []
    assert numbers(sockets[-2]) == [0, 1, 2]
    assert broadcast.n_subscribers == 2 * SLICE


async def test_a_lagging_subscriber_gets_the_newest_state_and_all_events() -> None:
    broadcast, slow, quick = Broadcast(), FakeSocket(room=1), FakeSocket()
    broadcast.subscribe(slow, ALL)
    broadcast.subscribe(quick, ALL)
    for n in range(6):
        broadcast.publish("download_status", {"n": n})
        broadcast.publish("metrics", {"n": 10 + n, "alias": "x"}, latest="x")
        broadcast.publish("metrics", {"n": 20 + n, "alias": "y"}, latest="y")
    await settle()
    assert len(quick.frames) == 18
    slow.let_go()
    await settle()
    assert numbers(slow) == [0, 1, 2, 3, 4, 5, 15, 25]
    broadcast.publish("a", {"n": 99})
    assert numbers(slow)[-1] == 99


async def test_numbers_only_grow_also_when_messages_are_replaced() -> None:
    broadcast, slow = Broadcast(), FakeSocket(room=1)
    broadcast.subscribe(slow, ALL)
    for latest in (None, "k", None, "k", None):
        broadcast.publish("a", {}, latest=latest)
    slow.let_go()
    await settle()
    assert [message["seq"] for message in slow.messages] == [1, 3, 4, 5]


@pytest.mark.parametrize(("bounds", "n_taken"), [(Bounds(3, 10**6), 4), (Bounds(100, 60), 3)])
async def test_lagging_too_far_ends_one_connection_only(bounds: Bounds, n_taken: int) -> None:
    broadcast, slow, quick = Broadcast(backlog=bounds), FakeSocket(room=1), FakeSocket()
    subscriber = broadcast.subscribe(slow, ALL)
    broadcast.subscribe(quick, ALL)
    for n in range(n_taken):
        broadcast.publish("a", {"n": n, "pad": "x" * 10})
    assert slow.closed is None
    broadcast.publish("a", {"n": n_taken, "pad": ""})
    assert slow.closed is not None
    assert slow.closed[0] == 1013
    slow.let_go()
    await settle()
    broadcast.publish("a", {"n": 100, "pad": ""})
    assert numbers(slow) == [0]
    assert numbers(quick)[-1] == 100
    broadcast.unsubscribe(subscriber)
    assert broadcast.n_subscribers == 1


async def test_a_failing_sink_is_left_out_and_the_others_get_everything(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broadcast, bad, good = Broadcast(), FakeSocket(), FakeSocket()
    broadcast.subscribe(bad, ALL)
    broadcast.subscribe(good, ALL)
    bad.push = lambda frame: 1 / 0 > 0  # type: ignore[method-assign]
    broadcast.publish("a", {"n": 0})
    broadcast.publish("a", {"n": 1})
    assert numbers(good) == [0, 1]
    assert broadcast.n_subscribers == 1
    assert "subscriber 1 failed" in caplog.text


async def test_state_alone_never_ends_a_connection() -> None:
    broadcast, slow = Broadcast(backlog=Bounds(3, 1000)), FakeSocket(room=1)
    broadcast.subscribe(slow, ALL)
    for n in range(1000):
        broadcast.publish("status", {"n": n}, latest="status")
    assert slow.closed is None
    slow.let_go(room=2)
    await settle()
    assert numbers(slow) == [0, 999]


async def test_messages_to_one_keep_their_place_and_take_no_number() -> None:
    broadcast, slow, other = Broadcast(), FakeSocket(room=1), FakeSocket()
    subscriber = broadcast.subscribe(slow, Filter(frozenset({"a"})))
    broadcast.subscribe(other, ALL)
    broadcast.publish("a", {})
    broadcast.publish("a", {})
    broadcast.send_to(subscriber, "pong", {})
    broadcast.publish("a", {})
    slow.let_go()
    await settle()
    assert [(m["event"], m["seq"]) for m in slow.messages] == [("a", 1), ("a", 2), ("pong", 2), ("a", 3)]
    assert other.events == ["a", "a", "a"]


# -- coming back ----------------------------------------------------------------------------------


async def returned(broadcast: Broadcast, since: int | None, what: Filter = ALL) -> FakeSocket:
    socket = FakeSocket()
    subscriber = broadcast.subscribe(socket, what, since)
    broadcast.send_to(subscriber, "welcome", {})
    broadcast.replay(subscriber)
    await settle()
    return socket


async def test_what_was_missed_is_sent_once_and_before_what_comes() -> None:
    broadcast, crowd = Broadcast(), [FakeSocket() for _ in range(2 * SLICE)]
    for other in crowd:
        broadcast.subscribe(other, ALL)
    for n in range(5):
        broadcast.publish("a", {"n": n})  # still being given out when the next one subscribes
    socket = FakeSocket()
    broadcast.replay(broadcast.subscribe(socket, ALL, since=2))
    broadcast.publish("a", {"n": 5})
    await settle()
    assert [message["seq"] for message in socket.messages] == [3, 4, 5, 6]


async def test_without_a_number_nothing_is_replayed() -> None:
    broadcast = Broadcast()
    broadcast.publish("a", {})
    assert (await returned(broadcast, None)).events == ["welcome"]


async def test_replay_respects_the_filter_and_leaves_states_out() -> None:
    broadcast = Broadcast()
    broadcast.publish("a", {})
    broadcast.publish("status", {}, latest="status")
    broadcast.publish("b", {})
    socket = await returned(broadcast, 0, Filter(frozenset({"b", "status"})))
    assert socket.events == ["welcome", "b"]


@pytest.mark.parametrize("bounds", [Bounds(2, 10**6), Bounds(100, 2 * 31)])
async def test_a_gap_is_told(bounds: Bounds) -> None:
    broadcast = Broadcast(history=bounds, seq=100)
    for n in range(5):
        broadcast.publish("a", {"n": n})
    assert [(m["event"], m["seq"]) for m in (await returned(broadcast, 103)).messages] == [
        ("welcome", 103), ("a", 104), ("a", 105),
    ]  # fmt: skip
    messages = (await returned(broadcast, 101)).messages
    assert [message["event"] for message in messages] == ["welcome", "gap", "a", "a"]
    assert messages[1] == {"event": "gap", "seq": 103, "from": 102, "to": 103}


async def test_a_number_of_another_run_brings_a_gap_and_all_there_is() -> None:
    broadcast = Broadcast(seq=1000)
    broadcast.publish("a", {})
    assert (await returned(broadcast, 7)).events == ["welcome", "gap", "a"]
    assert (await returned(broadcast, 99_999)).events == ["welcome", "gap", "a"]


async def test_a_long_replay_to_a_slow_client_is_no_lagging() -> None:
    broadcast = Broadcast(backlog=Bounds(3, 1000))
    for n in range(200):
        broadcast.publish("a", {"n": n})
    socket = FakeSocket(room=1)
    broadcast.replay(broadcast.subscribe(socket, ALL, since=0))
    for n in range(200, 203):
        broadcast.publish("a", {"n": n})
    for _ in range(203):
        await settle(5)
        socket.let_go(room=1)
    assert socket.closed is None
    assert numbers(socket) == list(range(203))


# -- custom messages ------------------------------------------------------------------------------


async def test_custom_messages_reach_the_others_and_the_handlers() -> None:
    broadcast, sender, other = Broadcast(), FakeSocket(), FakeSocket()
    me = broadcast.subscribe(sender, ALL)
    broadcast.subscribe(other, Filter(frozenset({"chat"})))
    heard: list[tuple[Any, str]] = []
    broadcast.on("chat", lambda data, sender_id: 1 / 0)  # type: ignore[arg-type]
    stop = broadcast.on("chat", lambda data, sender_id: heard.append((data, sender_id)))
    broadcast.relay("chat", b'{"a": [1]}', me.id)
    stop()
    broadcast.relay("chat", b"2", me.id)
    broadcast.send("chat", 3)
    assert heard == [({"a": [1]}, me.id)]
    assert [(m["data"], m["sender"]) for m in other.messages] == [
        ({"a": [1]}, me.id),
        (2, me.id),
        (3, "server"),
    ]
    assert [m["data"] for m in sender.messages] == [3]


@pytest.mark.parametrize("name", [*sorted(RESERVED), "", "a" * 65, "a b", "\u00e4", "a\n"])
async def test_custom_names_are_checked(name: str) -> None:
    broadcast = Broadcast()
    for call in (
        lambda: broadcast.relay(name, b"1", "1"),
        lambda: broadcast.send(name, 1),
        lambda: broadcast.on(name, lambda data, sender: None),
    ):
        with pytest.raises(InvalidRequest) as caught:
            call()
        assert caught.value.field == "event"


async def test_custom_messages_are_refused_while_too_many_are_under_way() -> None:
    broadcast = Broadcast()
    for _ in range(SLICE + 1):
        broadcast.subscribe(FakeSocket(), ALL)
    for _ in range(MAX_PENDING):
        broadcast.relay("a", b"1", "x")
    with pytest.raises(Overloaded):
        broadcast.relay("a", b"1", "x")
    broadcast.publish("download_status", {})
    await settle()
    broadcast.relay("a", b"1", "x")


async def test_data_that_python_cannot_read_is_refused_where_a_handler_wants_it() -> None:
    broadcast, other = Broadcast(), FakeSocket()
    broadcast.subscribe(other, ALL)
    broadcast.relay("a", b"1e999", "x")
    assert b'"data":1e999' in other.texts[0]
    broadcast.on("a", lambda data, sender: None)
    with pytest.raises(InvalidRequest):
        broadcast.relay("a", b"1e999", "x")
    assert len(other.frames) == 1


# -- anything in any order ------------------------------------------------------------------------

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("event"), st.integers(1, 3)),
        st.tuples(st.just("state"), st.sampled_from("xy")),
        st.tuples(st.just("let go"), st.integers(1, 5)),
        st.tuples(st.just("run"), st.integers(1, 5)),
    ),
    max_size=60,
)


@given(STEPS, st.integers(1, 4))
def test_whatever_happens_events_arrive_complete_and_in_order(steps: list[Any], room: int) -> None:
    async def scenario() -> None:
        broadcast, socket = Broadcast(), FakeSocket(room)
        broadcast.subscribe(socket, ALL)
        expected: list[int] = []
        newest: dict[str, int] = {}
        for step, value in steps:
            if step == "event":
                for _ in range(value):
                    broadcast.publish("e", {})
                    expected.append(broadcast.seq)
            elif step == "state":
                broadcast.publish("s", {"key": value}, latest=value)
                newest[value] = broadcast.seq
            elif step == "let go":
                socket.let_go(value)
            else:
                await settle(value)
        for _ in range(200):
            socket.let_go(5)
            await settle(3)
        assert socket.closed is None
        messages = socket.messages
        sequence = [message["seq"] for message in messages]
        assert sequence == sorted(set(sequence))
        assert [message["seq"] for message in messages if message["event"] == "e"] == expected
        last = {message["key"]: message["seq"] for message in messages if message["event"] == "s"}
        assert last == newest

    asyncio.run(scenario())
