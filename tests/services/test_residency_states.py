"""Requests, starts and stops of several models in any order: each request ends, and nothing is loaded twice."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fleet import ENOUGH_S, Fleet, deployment, endless
from wingman.errors import ModelLoadFailure, Unavailable, WingmanError
from wingman.services.residency import Residency
from wingman.services.roster import State
from wingman.services.served import ServedModel

CAPACITY = 6
NEEDS = {"a": 1, "b": 2, "c": 4, "d": CAPACITY + 1}
MODELS = {name: deployment(name, need) for name, need in NEEDS.items()}
NAMES = st.sampled_from(sorted(NEEDS))
TURNS = st.integers(0, 12)
"""How long something waits; a load takes some too."""
TURN_S = 0.0004


@dataclass(frozen=True)
class Request:
    """Comes after some turns, uses its model for some, and may leave after some."""

    name: str
    comes: int
    uses: int
    leaves: int | None
    has_job: bool


@dataclass(frozen=True)
class Command:
    """Something that happens to a model after some turns."""

    what: str
    name: str
    comes: int


REQUESTS = st.builds(Request, NAMES, TURNS, TURNS, st.none() | TURNS, st.booleans())
COMMANDS = st.builds(Command, st.sampled_from(["start", "stop", "fail", "mend"]), NAMES, TURNS)


async def pause(n_turns: int) -> None:
    await asyncio.sleep(n_turns * TURN_S)


class World:
    """A Residency and all that is done to it; `ends` tells how each request ended."""

    def __init__(self, n_max: int, idle_unload_s: float) -> None:
        self.fleet = Fleet(n_max)
        self.residency = Residency(
            n_max=n_max,
            idle_unload_s=idle_unload_s,
            drain_timeout_s=0.0,
            capacity=lambda _: CAPACITY,
            make_runner=self.fleet,
        )
        self.ends: list[str] = []

    async def request(self, request: Request) -> None:
        await pause(request.comes)
        task = asyncio.create_task(self.use(request))
        if request.leaves is not None:
            await pause(request.leaves)
            task.cancel()
        await asyncio.wait((task,))
        self.ends.append("left" if task.cancelled() else task.result())

    async def use(self, request: Request) -> str:
        try:
            lease = await self.residency.acquire(MODELS[request.name])
        except WingmanError:
            return "refused"
        try:
            assert lease.served.name == request.name
            await pause(request.uses)
            if request.has_job:
                await run_job(lease.served)
        except Unavailable:
            return "stopped"
        finally:
            lease.release()
        return "served"

    async def command(self, command: Command) -> None:
        await pause(command.comes)
        match command.what:
            case "start":
                self.residency.want(MODELS[command.name])
            case "stop":
                await self.residency.stop(command.name)
            case "fail":
                self.fleet.failures[command.name] = ModelLoadFailure("no such weights")
            case _:
                self.fleet.failures.pop(command.name, None)

    async def close(self, comes: int | None) -> None:
        if comes is not None:
            await pause(comes)
            assert await self.residency.close()


async def run_job(served: ServedModel) -> None:
    """Read the beginning of an answer and leave."""
    async with served.engine.submit(endless(served)) as stream:
        await anext(aiter(stream))


async def live(world: World, requests: list[Request], commands: list[Command], closes: int | None) -> None:
    doings = [*map(world.request, requests), *map(world.command, commands), world.close(closes)]
    async with asyncio.timeout(ENOUGH_S):
        errors = await asyncio.gather(*doings, return_exceptions=True)
        assert all(
            error is None or (closes is not None and isinstance(error, Unavailable)) for error in errors
        )
        assert await world.residency.close()
    assert {world.residency.state(name) for name in NEEDS} == {State.ABSENT}


@settings(max_examples=80, deadline=None)
@given(
    requests=st.lists(REQUESTS, min_size=1, max_size=12),
    commands=st.lists(COMMANDS, max_size=5),
    n_max=st.integers(1, 3),
    idle_unload_s=st.sampled_from([0.0, 0.001]),
    closes=st.none() | st.integers(0, 40),
)
def test_every_request_ends(
    requests: list[Request], commands: list[Command], n_max: int, idle_unload_s: float, closes: int | None
) -> None:
    async def main() -> World:
        world = World(n_max, idle_unload_s)
        await live(world, requests, commands, closes)
        return world

    world = asyncio.run(main())
    assert world.fleet.faults == []
    assert world.fleet.in_memory == []
    assert "d" not in world.fleet.loads, "it does not fit"
    assert len(world.ends) == len(requests)
    if not commands and closes is None:
        fit = [request for request in requests if request.name != "d" and request.leaves is None]
        assert world.ends.count("served") >= len(fit)
