"""Many scripted models: what is loaded and when that ends is a test's to say, and what is in memory is watched."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from msgspec import structs

from tests.support.runner import ScriptedRunner
from wingman.config import Config, ContextConfig, ModelConfig, SamplingParams
from wingman.engine.runner import Batch, OnProgress, Samples
from wingman.engine.types import Job
from wingman.errors import ModelLoadFailure
from wingman.services.deployments import Deployment
from wingman.services.residency import Change
from wingman.services.roster import State
from wingman.services.served import ServedModel

ENOUGH_S = 10.0
"""Nothing in these tests takes nearly as long; what does, hangs."""


class FleetRunner(ScriptedRunner):
    """Never comes to an end of a text by itself; dies of the next step once told to."""

    def __init__(self, fleet: Fleet, name: str) -> None:
        super().__init__(n_ctx_slot=2**20)
        self.info = structs.replace(self.info, path=f"{name}.gguf")
        self._fleet = fleet
        self.name = name
        self.is_dying = False
        self.has_begun = threading.Event()
        """A step has."""

    def run(self, batch: Batch) -> Samples:
        self.has_begun.set()
        self._fleet.steps.wait(ENOUGH_S)
        if self.is_dying:
            raise RuntimeError("out of order")
        return super().run(batch)

    def choose(self, slot_id: int, held: Sequence[int]) -> int:
        return 3 + ord("x")

    def reset(self) -> None:
        if self.is_dying:
            raise RuntimeError("out of order")
        super().reset()

    def close(self) -> None:
        super().close()
        self._fleet.note_closed(self)


class Fleet:
    """To be used as `make_runner`. Notes in `faults` what must never be: two loads at once, or a model twice."""

    def __init__(self, n_max: int = 1000) -> None:
        self.n_max = n_max
        self.gates: dict[str, threading.Event] = {}
        """A model with a gate is not loaded before it is set."""
        self.failures: dict[str, Exception] = {}
        self.steps = threading.Event()
        """Unset, a step hangs."""
        self.steps.set()
        self.loads: list[str] = []
        """In the order they began."""
        self.loaded: list[FleetRunner] = []
        """All there ever were."""
        self.in_memory: list[str] = []
        self.faults: list[str] = []
        self._loading: str | None = None
        self._lock = threading.Lock()

    def __call__(self, model: ModelConfig, _: ContextConfig, on_progress: OnProgress) -> FleetRunner:
        assert model.model is not None
        name = model.model.stem
        self._begin(name)
        try:
            gate = self.gates.get(name)
            while gate is not None and not gate.wait(0.001):
                if not on_progress(0.5):
                    raise ModelLoadFailure("the load was cancelled")
            if name in self.failures:
                raise self.failures[name]
        except BaseException:
            with self._lock:
                self.in_memory.remove(name)
            raise
        finally:
            self._loading = None
        runner = FleetRunner(self, name)
        self.loaded.append(runner)
        return runner

    def _begin(self, name: str) -> None:
        with self._lock:
            if self._loading is not None:
                self.faults.append(f"{name} and {self._loading} load at once")
            if name in self.in_memory:
                self.faults.append(f"{name} is loaded twice")
            self._loading = name
            self.loads.append(name)
            self.in_memory.append(name)
            if len(self.in_memory) > self.n_max:
                self.faults.append(f"{self.in_memory} are in memory")

    def note_closed(self, runner: FleetRunner) -> None:
        with self._lock:
            self.in_memory.remove(runner.name)

    def hold(self, name: str) -> threading.Event:
        """Let the next loads of a model hang until the event is set."""
        gate = self.gates[name] = threading.Event()
        return gate


def deployment(name: str, need_bytes: int = 1, *, is_forced: bool = False, **model: Any) -> Deployment:
    """A model of a Fleet."""
    config = Config(
        model=ModelConfig(model=Path(f"{name}.gguf"), alias=(name,), **model),
        context=ContextConfig(parallel=2),
    )
    return Deployment(name, config, (name,), need_bytes, is_forced=is_forced)


class Changes:
    """What Residency told, and a way to wait for it."""

    def __init__(self) -> None:
        self.all: list[Change] = []
        self.hooks: list[Callable[[Change], None]] = []
        self._news = asyncio.Event()

    def __call__(self, change: Change) -> None:
        self.all.append(change)
        self._news.set()
        for hook in self.hooks:
            hook(change)

    def states(self, name: str) -> list[State]:
        """Those that a model came through, progress left out."""
        seen = [change.state for change in self.all if change.name == name]
        return [state for index, state in enumerate(seen) if index == 0 or seen[index - 1] is not state]

    async def until(self, name: str, *states: State) -> Change:
        """The next change of a model into one of the states; one that it is in already does not count."""
        n_seen = len(self.all)
        async with asyncio.timeout(ENOUGH_S):
            while True:
                for change in self.all[n_seen:]:
                    if change.name == name and change.state in states:
                        return change
                n_seen = len(self.all)
                self._news.clear()
                await self._news.wait()


def endless(served: ServedModel) -> Job:
    """A job that goes on until it is ended."""
    return Job(served.engine.new_job_id(), (1, 2, 3), SamplingParams(), stream=True)
