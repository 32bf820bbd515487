"""Models come and go while requests wait for them, use them and leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from tests.support.fleet import ENOUGH_S, Changes, Fleet, deployment, endless
from wingman.engine import client
from wingman.engine.types import Finished, StopType, TextDelta
from wingman.errors import InsufficientRoom, ModelLoadFailure, Overloaded, Unavailable
from wingman.services.residency import Change, Lease, Residency
from wingman.services.roster import State

A, B, C = deployment("a"), deployment("b"), deployment("c")
Make = Callable[..., Residency]


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


@pytest.fixture
async def changes() -> Changes:
    return Changes()


@pytest.fixture
async def make(fleet: Fleet, changes: Changes) -> AsyncIterator[Make]:
    made: list[Residency] = []

    def build(**options: Any) -> Residency:
        fleet.n_max = options.get("n_max", 1)
        options.setdefault("drain_timeout_s", ENOUGH_S)
        made.append(Residency(make_runner=fleet, on_change=changes, **options))
        return made[-1]

    yield build
    for gate in (*fleet.gates.values(), fleet.steps):
        gate.set()
    async with asyncio.timeout(ENOUGH_S):
        for residency in made:
            await residency.close()
    assert fleet.faults == []
    assert fleet.in_memory == []


async def ask(residency: Residency, *wanted: Any) -> list[asyncio.Task[Lease]]:
    """Requests, each of which has got as far as it can."""
    tasks = [asyncio.create_task(residency.acquire(one)) for one in wanted]
    await asyncio.sleep(0)
    return tasks


async def within(*tasks: asyncio.Task[Lease]) -> list[Lease]:
    async with asyncio.timeout(ENOUGH_S):
        return await asyncio.gather(*tasks)


# -- loading --------------------------------------------------------------------------------------


async def test_requests_share_a_load(make: Make, fleet: Fleet, changes: Changes) -> None:
    residency = make()
    first, *others = await within(*await ask(residency, A, A, A))
    assert all(lease.served is first.served for lease in others)
    assert fleet.loads == ["a"]
    assert changes.states("a") == [State.QUEUED, State.LOADING, State.READY]
    assert residency.loaded == [first.served] == [residency.peek("a")]
    assert residency.deployed == [(A, first.served)]


async def test_progress_is_told_while_it_loads(make: Make, fleet: Fleet, changes: Changes) -> None:
    residency = make()
    gate = fleet.hold("a")
    changes.hooks.append(lambda change: gate.set() if change.progress else None)
    await within(*await ask(residency, A))
    loading = [change.progress for change in changes.all if change.state is State.LOADING]
    assert loading[0] == 0.0
    assert set(loading[1:]) == {0.5}


async def test_a_failure_reaches_all_who_wait_and_is_not_for_ever(
    make: Make, fleet: Fleet, changes: Changes
) -> None:
    residency = make()
    fleet.failures["a"] = ModelLoadFailure("no such weights")
    results = await asyncio.gather(*await ask(residency, A, A), return_exceptions=True)
    assert [str(error) for error in results] == ["no such weights"] * 2
    assert changes.all[-1] == Change("a", State.ABSENT, "no such weights")
    with pytest.raises(Unavailable, match="the model failed"):
        residency.peek("a")
    del fleet.failures["a"]
    await within(*await ask(residency, A))
    assert residency.readiness("a") is None


async def test_what_a_library_says_stays_in_the_log(make: Make, fleet: Fleet) -> None:
    residency = make()
    fleet.failures["a"] = RuntimeError("ggml: secret path")
    with pytest.raises(ModelLoadFailure) as error:
        await residency.acquire(A)
    assert "secret" not in error.value.message


async def test_the_next_is_loaded_after_a_failure(make: Make, fleet: Fleet) -> None:
    residency = make()
    fleet.failures["a"] = ModelLoadFailure("no such weights")
    failed, fine = await ask(residency, A, B)
    with pytest.raises(ModelLoadFailure):
        await failed
    await within(fine)


async def test_it_says_why_a_model_is_not_there(make: Make, fleet: Fleet) -> None:
    residency = make()
    assert residency.readiness("a") == "the model is not loaded"
    fleet.hold("a")
    residency.want(A)
    residency.want(B)
    assert residency.readiness("a") == residency.readiness("b") == "Loading model"
    with pytest.raises(Unavailable, match="Loading model"):
        residency.peek("a")


async def test_only_so_many_may_wait(make: Make, fleet: Fleet) -> None:
    residency = make(max_waiting=2)
    gate = fleet.hold("a")
    tasks = await ask(residency, A, A)
    with pytest.raises(Overloaded, match="--max-queue"):
        await residency.acquire(A)
    gate.set()
    await within(*tasks)
    await residency.acquire(A)


async def test_one_that_leaves_takes_nothing_from_the_others(make: Make, fleet: Fleet) -> None:
    residency = make()
    gate = fleet.hold("a")
    leaves, stays = await ask(residency, A, A)
    leaves.cancel()
    await asyncio.wait((leaves,))
    gate.set()
    (lease,) = await within(stays)
    lease.release()
    await within(*await ask(residency, B))  # nothing is left that would hold `a`


async def test_a_load_that_nobody_waits_for_any_more_does_not_begin(
    make: Make, fleet: Fleet, changes: Changes
) -> None:
    residency = make(n_max=2)
    gate = fleet.hold("a")
    loads, leaves = await ask(residency, A, B)
    leaves.cancel()
    await asyncio.wait((leaves,))
    assert changes.states("b") == [State.QUEUED, State.ABSENT]
    gate.set()
    await within(loads)
    assert fleet.loads == ["a"]


@pytest.mark.parametrize("is_early", [True, False])
async def test_one_that_leaves_while_it_is_served_leaves_no_lease(
    make: Make, changes: Changes, is_early: bool
) -> None:
    residency = make()
    (task,) = await ask(residency, A)

    def leave(change: Change) -> None:
        if change.state is State.READY and is_early:
            task.cancel()
        elif change.state is State.READY:
            asyncio.get_running_loop().call_soon(task.cancel)

    changes.hooks.append(leave)
    await asyncio.wait((task,))
    assert task.cancelled()
    changes.hooks.clear()
    await within(*await ask(residency, B))


async def test_a_lease_counts_once(make: Make) -> None:
    residency = make()
    first, second = await within(*await ask(residency, A, A))
    first.release()
    first.release()
    (waits,) = await ask(residency, B)
    assert residency.state("a") is State.DRAINING
    second.release()
    await within(waits)


# -- making room ----------------------------------------------------------------------------------


async def test_a_model_in_use_stays_until_its_requests_are_done(make: Make, fleet: Fleet) -> None:
    residency = make()
    first, second = await within(*await ask(residency, A, A))
    (swap,) = await ask(residency, B)
    first.release()
    await asyncio.sleep(0)
    assert not swap.done()
    assert residency.peek("a") is second.served
    second.release()
    await within(swap)
    assert fleet.in_memory == ["b"]


async def test_requests_for_two_models_take_turns(make: Make, fleet: Fleet) -> None:
    residency = make()

    async def use(wanted: Any) -> None:
        (await residency.acquire(wanted)).release()

    async with asyncio.timeout(ENOUGH_S):
        await asyncio.gather(*(use(one) for one in (A, B, A, C, B, A)))
    assert fleet.loads[:3] == ["a", "b", "c"]


async def test_the_one_that_was_to_make_room_goes_on_when_that_is_not_needed(
    make: Make, fleet: Fleet
) -> None:
    residency = make()
    (lease,) = await within(*await ask(residency, A))
    swap, again = await ask(residency, B, A)
    assert not again.done()
    swap.cancel()
    await asyncio.wait((swap,))
    (other,) = await within(again)
    assert other.served is lease.served
    assert fleet.loads == ["a"]


async def test_memory_makes_room_too_and_is_told_what_is_held(make: Make, fleet: Fleet) -> None:
    held: list[int] = []

    def capacity(n_bytes: int) -> int:
        held.append(n_bytes)
        return 10

    residency = make(n_max=9, capacity=capacity)
    for wanted in (deployment("a", 4), deployment("b", 5), deployment("c", 6)):
        (await residency.acquire(wanted)).release()
    assert fleet.in_memory == ["c"]
    assert {4, 9} <= set(held)
    assert max(held) <= 10


async def test_what_can_not_fit_is_refused_unless_it_is_forced(make: Make, fleet: Fleet) -> None:
    residency = make(n_max=2, capacity=lambda _: 10)
    big = deployment("b", 11)
    (lease,) = await within(*await ask(residency, A))
    for _ in range(2):
        with pytest.raises(InsufficientRoom, match="force=true"):
            await residency.acquire(big)
    assert residency.state("b") is State.ABSENT
    assert residency.peek("a") is lease.served
    await residency.acquire(deployment("b", 11, is_forced=True))
    assert fleet.loads == ["a", "b"]


async def test_a_model_is_unloaded_after_a_while_without_requests(
    make: Make, changes: Changes, fleet: Fleet
) -> None:
    residency = make(n_max=2, idle_unload_s=0.02)
    (busy, idle) = await within(*await ask(residency, A, B))
    idle.release()
    await changes.until("b", State.ABSENT)
    assert residency.loaded == [busy.served]
    await within(*await ask(residency, B))
    assert fleet.loads == ["a", "b", "b"]


# -- stopping -------------------------------------------------------------------------------------


async def test_a_stop_ends_a_load(make: Make, fleet: Fleet, changes: Changes) -> None:
    residency = make()
    fleet.hold("a")
    (task,) = await ask(residency, A)
    await changes.until("a", State.LOADING)
    async with asyncio.timeout(ENOUGH_S):
        await residency.stop("a")
    with pytest.raises(Unavailable, match="the model was stopped"):
        await task
    assert changes.states("a")[-3:] == [State.LOADING, State.ABANDONED, State.ABSENT]
    assert changes.all[-1].error == ""
    assert residency.readiness("a") == "the model is not loaded"


async def test_a_stop_before_a_load_begins_leaves_it_out(make: Make, fleet: Fleet) -> None:
    residency = make()
    fleet.hold("a")
    residency.want(A)
    async with asyncio.timeout(ENOUGH_S):
        await residency.stop("a")
    assert residency.state("a") is State.ABSENT
    assert fleet.loads == []


async def test_a_stop_takes_one_out_of_the_queue(make: Make, fleet: Fleet, changes: Changes) -> None:
    residency = make()
    fleet.hold("a")
    residency.want(A)
    residency.want(B)
    await residency.stop("b")
    assert changes.states("b") == [State.QUEUED, State.ABSENT]


@pytest.mark.parametrize("name", ["a", "z"])
async def test_a_stop_of_nothing_is_no_error(make: Make, name: str) -> None:
    residency = make()
    await residency.acquire(A)
    await residency.stop("a")
    await residency.stop(name)


async def test_a_stop_ends_what_runs_properly(make: Make, changes: Changes) -> None:
    residency = make(drain_timeout_s=0.0)
    lease = await residency.acquire(A)
    async with lease.served.engine.submit(endless(lease.served)) as stream:
        events = aiter(stream)
        assert isinstance(await anext(events), TextDelta)
        async with asyncio.timeout(ENOUGH_S):
            await residency.stop("a")
            (*_, end) = [event async for event in events]
    assert isinstance(end, Finished)
    assert end.stop_type is StopType.LIMIT
    assert changes.states("a")[-3:] == [State.READY, State.UNLOADING, State.ABSENT]
    lease.release()


async def test_a_stop_lets_a_request_finish_within_the_time_for_it(
    make: Make, fleet: Fleet, changes: Changes
) -> None:
    residency = make()
    lease = await residency.acquire(A)
    fleet.steps.clear()
    async with lease.served.engine.submit(endless(lease.served)) as stream:
        stop = asyncio.create_task(residency.stop("a"))
        await changes.until("a", State.UNLOADING)
        fleet.steps.set()
        stream.close()
        async with asyncio.timeout(ENOUGH_S):
            await stop


async def test_what_is_wanted_while_it_is_unloaded_comes_back_and_the_stop_returns(
    make: Make, fleet: Fleet, changes: Changes
) -> None:
    residency = make()
    lease = await residency.acquire(A)
    stop = asyncio.create_task(residency.stop("a"))
    await changes.until("a", State.UNLOADING)
    gate = fleet.hold("a")
    (task,) = await ask(residency, A)
    async with asyncio.timeout(ENOUGH_S):
        await stop  # the model that was to be stopped is gone, though another is on its way
    assert fleet.loaded[0].is_closed
    gate.set()
    (again,) = await within(task)
    assert again.served is not lease.served
    assert residency.readiness("a") is None


async def test_what_is_wanted_while_its_load_is_abandoned_is_loaded_anew(
    make: Make, fleet: Fleet, changes: Changes
) -> None:
    residency = make()
    fleet.hold("a")
    residency.want(A)
    await changes.until("a", State.LOADING)
    stop = asyncio.create_task(residency.stop("a"))
    await changes.until("a", State.ABANDONED)
    (task,) = await ask(residency, A)
    del fleet.gates["a"]
    async with asyncio.timeout(ENOUGH_S):
        await stop
    await within(task)
    assert fleet.loads == ["a", "a"]


async def test_stops_at_the_same_time_all_return(make: Make) -> None:
    residency = make(drain_timeout_s=0.0)
    await residency.acquire(A)
    async with asyncio.timeout(ENOUGH_S):
        await asyncio.gather(*(residency.stop("a") for _ in range(3)))
    assert residency.state("a") is State.ABSENT


async def test_what_is_forgotten_may_be_wanted_again(make: Make, fleet: Fleet) -> None:
    residency = make()
    await residency.acquire(A)
    residency.forget("a")
    assert residency.is_known("a")  # it is in memory
    await residency.stop("a")
    residency.forget("a")
    assert not residency.is_known("a")
    await residency.acquire(A)
    assert fleet.loads == ["a", "a"]


# -- engines that die -------------------------------------------------------------------------------


async def die(fleet: Fleet, lease: Lease) -> None:
    """Make the engine of a lease's model end by itself."""
    fleet.loaded[-1].is_dying = True
    async with lease.served.engine.submit(endless(lease.served)) as stream:
        with pytest.raises(Exception, match="the model runtime failed"):
            await stream.results()


async def test_a_dead_engine_is_told_and_may_be_started_again(
    make: Make, fleet: Fleet, changes: Changes
) -> None:
    residency = make()
    lease = await residency.acquire(A)
    gone = asyncio.create_task(changes.until("a", State.ABSENT))
    await die(fleet, lease)
    assert "engine stopped" in (await gone).error
    assert residency.readiness("a") == "the model failed; see the log"
    lease.release()
    again = await residency.acquire(A)
    assert residency.peek("a") is again.served


async def test_a_request_that_comes_while_a_dead_engine_is_freed_gets_a_live_one(
    make: Make, fleet: Fleet, changes: Changes
) -> None:
    residency = make()
    lease = await residency.acquire(A)
    await die(fleet, lease)
    async with asyncio.timeout(ENOUGH_S):
        while residency.state("a") is not State.UNLOADING:  # noqa: ASYNC110 - it lasts a few turns of the loop
            await asyncio.sleep(0)
    (again,) = await within(*await ask(residency, A))
    assert State.ABSENT not in changes.states("a")
    assert residency.peek("a") is again.served
    assert residency.readiness("a") is None


async def test_whoever_waits_for_a_model_that_dies_is_told(
    make: Make, fleet: Fleet, changes: Changes
) -> None:
    residency = make()
    lease = await residency.acquire(A)
    swap, waits = await ask(residency, B, A)
    await die(fleet, lease)
    with pytest.raises(ModelLoadFailure, match="engine stopped"):
        await waits
    await within(swap)
    assert changes.states("a")[-1] is State.ABSENT


async def test_a_model_that_hangs_is_given_up(
    make: Make, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "END_GRACE_S", 0.05)
    residency = make(drain_timeout_s=0.0)
    lease = await residency.acquire(A)
    fleet.steps.clear()
    async with lease.served.engine.submit(endless(lease.served)):
        assert await asyncio.to_thread(fleet.loaded[0].has_begun.wait, ENOUGH_S)
        async with asyncio.timeout(ENOUGH_S):
            await residency.stop("a")
    assert residency.is_hung
    async with asyncio.timeout(ENOUGH_S / 2):
        assert not await residency.close()
    fleet.steps.set()
    await asyncio.to_thread(lease.served.engine._thread.join, ENOUGH_S)


# -- the end --------------------------------------------------------------------------------------


async def test_the_end_is_the_end_of_everything(make: Make, fleet: Fleet) -> None:
    residency = make(n_max=3)
    await residency.acquire(A)
    fleet.hold("b")
    tasks = await ask(residency, B, C)
    assert residency.state("b") is State.LOADING
    async with asyncio.timeout(ENOUGH_S):
        assert await residency.close()
    for task in tasks:
        with pytest.raises(Unavailable):
            await task
    assert fleet.in_memory == []
    for call in (lambda: residency.want(A), lambda: residency.peek("a")):
        with pytest.raises(Unavailable, match="shutting down"):
            call()
    with pytest.raises(Unavailable, match="shutting down"):
        await residency.acquire(A)
    assert residency.readiness("a") == "the server is shutting down"
    assert await residency.close()
