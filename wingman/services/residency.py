"""Owner of the engines: carries out what the roster decides, and lends models to requests.

`acquire` gives a request a lease on a model; it waits while the model is loaded, and others are unloaded
for it. A model with a lease is never unloaded to make room. Every change is told to `on_change`, in
order. All on the loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from msgspec import Struct, field

from wingman.engine.client import MakeRunner
from wingman.errors import (
    InsufficientRoom,
    ModelLoadFailure,
    Overloaded,
    Unavailable,
    WingmanError,
)
from wingman.services.deployments import Deployment
from wingman.services.roster import Action, Keep, Load, Refuse, Roster, State, Unload
from wingman.services.served import Loader, ServedModel

log = logging.getLogger("wingman.residency")

_SHUTTING_DOWN = "the server is shutting down"
_LOADING = "Loading model"


class Change(Struct, frozen=True):
    """A model has come into a state; `error` says why it left the one before, `progress` how far a load is."""

    name: str
    state: State
    error: str = ""
    progress: float | None = None


class Lease:
    """A request's hold on a model; `release` may be called more than once."""

    __slots__ = ("_release", "served")

    def __init__(self, served: ServedModel, release: Callable[[], None]) -> None:
        self.served = served
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """The request is done with the model."""
        if self._release is not None:
            self._release()
            self._release = None


class _Entry(Struct):
    """What is kept of one name."""

    deployment: Deployment
    served: ServedModel | None = None
    loader: Loader | None = None
    waiters: list[asyncio.Future[Lease]] = field(default_factory=list)
    error: WingmanError | None = None
    is_failed: bool = False
    """The engine died by itself."""
    gone: asyncio.Event = field(default_factory=asyncio.Event)


class Residency:
    """All models of this server."""

    def __init__(
        self,
        *,
        n_max: int = 1,
        idle_unload_s: float = 0.0,
        drain_timeout_s: float = 15.0,
        max_waiting: int = 64,
        capacity: Callable[[int], int] = lambda _: 2**63,
        refresh: Callable[[], Awaitable[object]] | None = None,
        on_change: Callable[[Change], None] = lambda _: None,
        make_runner: MakeRunner | None = None,
    ) -> None:
        """`capacity` tells the bytes that models may take in all, given those they are estimated to take, and
        `refresh` looks at the machine again for that; `max_waiting` requests may wait for one model."""
        self._roster = Roster(n_max, idle_unload_s)
        self._drain_timeout_s = drain_timeout_s
        self._max_waiting = max_waiting
        self._capacity = capacity
        self._refresh = refresh
        self._on_change = on_change
        self._make_runner = make_runner
        self._entries: dict[str, _Entry] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        """Loads and unloads: they end."""
        self._watchers: set[asyncio.Task[None]] = set()
        """One of each engine: it ends with it, never if that hangs."""
        self._timer: asyncio.TimerHandle | None = None
        self._is_draining = False
        self.is_hung = False
        """A model could not be freed: something native hangs."""

    # -- looking in -----------------------------------------------------------------------------------

    @property
    def capacity_bytes(self) -> int:
        """What models may take in all: what is free, and what those in memory take and could give back."""
        held = sum(r.need_bytes for r in self._roster if self._entries[r.name].served is not None)
        return self._capacity(held)

    def state(self, name: str) -> State:
        """Where a model is."""
        return self._roster.state(name)

    @property
    def loaded(self) -> list[ServedModel]:
        """Models that answer requests now, those on their way out included."""
        return [entry.served for entry in self._entries.values() if entry.served is not None]

    @property
    def deployed(self) -> list[tuple[Deployment, ServedModel]]:
        """What is in memory, with what it was loaded for."""
        return [
            (entry.deployment, entry.served) for entry in self._entries.values() if entry.served is not None
        ]

    def peek(self, name: str) -> ServedModel:
        """A loaded model, to look at without using it; raises Unavailable with the reason while it is not
        there."""
        entry = self._entries.get(name)
        if entry is not None and entry.served is not None and not entry.is_failed:
            return entry.served
        raise Unavailable(self._why_not(name), retry_after_s=2)

    def _why_not(self, name: str) -> str:
        entry = self._entries.get(name)
        if self._is_draining:
            return _SHUTTING_DOWN
        if self.state(name) in (State.QUEUED, State.LOADING):
            return _LOADING
        if entry is not None and (entry.is_failed or entry.error is not None):
            return "the model failed; see the log"
        return "the model is not loaded"

    def readiness(self, name: str) -> str | None:
        """None when requests to a model will be served; else why not."""
        if self._is_draining:
            return _SHUTTING_DOWN
        try:
            served = self.peek(name)
        except Unavailable as error:
            return error.message
        age_s = served.engine.step_age_s
        if age_s > served.config.context.step_timeout:
            return f"a step has been running for {age_s:.0f} s (--step-timeout)"
        return None

    def is_known(self, name: str) -> bool:
        """Whether a deployment was ever wanted under this name."""
        return name in self._entries

    # -- loading and lending --------------------------------------------------------------------------

    def want(self, deployment: Deployment, *, is_started: bool = True) -> None:
        """Load a model as soon as there is room. Raises Unavailable while the server stops."""
        if self._is_draining:
            raise Unavailable(_SHUTTING_DOWN, retry_after_s=5)
        name = deployment.name
        before = self._roster.state(name)
        entry = self._entries.get(name)
        if entry is None:
            entry = self._entries[name] = _Entry(deployment)
        elif before is State.ABSENT:
            entry.deployment, entry.error, entry.is_failed = deployment, None, False
        entry.gone.clear()
        self._roster.want(name, deployment.need_bytes, is_forced=deployment.is_forced, is_started=is_started)
        if before is State.ABSENT:
            self._tell(name)
        self._drive()

    async def acquire(self, deployment: Deployment) -> Lease:
        """A lease on a model, which is loaded if it is not. Raises what made loading it fail, Overloaded, or
        Unavailable while the server stops."""
        name = deployment.name
        entry = self._entries.get(name)
        if entry is not None and entry.served is not None and self._roster.state(name) is State.READY:
            return self._lease(name, entry.served)
        if entry is not None and len(entry.waiters) >= self._max_waiting:
            raise Overloaded("too many requests wait for this model to load (--max-queue)", 5)
        self.want(deployment, is_started=False)
        entry = self._entries[name]
        if entry.served is not None and self._roster.state(name) is State.READY:
            return self._lease(name, entry.served)
        if self._roster.state(name) is State.ABSENT:  # refused at once
            raise entry.error or Unavailable(self._why_not(name))
        return await self._wait(name, entry)

    async def join(self, name: str) -> Lease:
        """A lease on a model that is wanted already, once it is there. Raises as `acquire`."""
        return await self.acquire(self._entries[name].deployment)

    async def _wait(self, name: str, entry: _Entry) -> Lease:
        waiter: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        entry.waiters.append(waiter)
        self._roster.wait(name)
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter in entry.waiters:
                entry.waiters.remove(waiter)
                self._roster.give_up(name)
                self._note_absent(name)
                self._drive()
            elif not waiter.cancelled() and waiter.exception() is None:
                waiter.result().release()
            raise

    def _lease(self, name: str, served: ServedModel) -> Lease:
        n_load = self._roster.lease(name, time.monotonic())
        return Lease(served, lambda: self._release(name, n_load))

    def _release(self, name: str, n_load: int) -> None:
        self._roster.release(name, n_load, time.monotonic())
        self._drive()

    async def stop(self, name: str) -> None:
        """End what runs on a model, within the drain time-out, and unload it; returns once it is gone."""
        entry = self._entries.get(name)
        if entry is None or self._roster.state(name) is State.ABSENT:
            return
        if self._roster.stop(name):
            self._start(self._unload(name))
        elif entry.loader is not None:
            entry.loader.abandon()
        self._refuse_waiters(entry, Unavailable("the model was stopped", retry_after_s=5))
        self._note_absent(name)
        if self._roster.state(name) is not State.ABSENT:
            self._tell(name)
        self._drive()
        await entry.gone.wait()

    def forget(self, name: str) -> None:
        """Drop what is kept of a model that is not loaded."""
        if self._roster.state(name) is State.ABSENT:
            self._roster.forget(name)
            self._entries.pop(name, None)

    # -- carrying out ---------------------------------------------------------------------------------

    def _drive(self) -> None:
        """Ask the roster what to do, and begin it."""
        for action in self._roster.decide(time.monotonic(), self.capacity_bytes):
            self._carry_out(action)
        self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self._roster.next_deadline()
        if deadline is not None and not self._is_draining:
            delay = max(0.0, deadline - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay + 0.001, self._drive)

    def _carry_out(self, action: Action) -> None:
        match action:
            case Load(name):
                self._tell(name, progress=0.0)
                self._start(self._load(name))
            case Unload(name):
                log.info("unloading %s", name)
                self._tell(name)
                self._start(self._unload(name))
            case Keep(name):
                self._wake(self._entries[name], name)
            case Refuse(name, need, capacity):
                message = (
                    f"{name} needs about {need / 1e9:.1f} GB of memory and {capacity / 1e9:.1f} GB can be "
                    "had; start it with force=true to try nevertheless"
                )
                self._fail(name, InsufficientRoom(message))

    def _start(self, work: Coroutine[Any, Any, None], among: set[asyncio.Task[None]] | None = None) -> None:
        tasks = self._tasks if among is None else among
        task = asyncio.get_running_loop().create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def _load(self, name: str) -> None:
        entry = self._entries[name]
        deployment = entry.deployment
        entry.loader = Loader(
            deployment.config,
            deployment.aliases,
            lambda progress: self._tell(name, progress=progress),
            self._make_runner,
            deployment.n_layers,
            needs_draft=deployment.needs_draft,
        )
        if self._roster.state(name) is State.ABANDONED:  # stopped before this began
            entry.loader.abandon()
        try:
            served = await entry.loader.load()
        except WingmanError as error:
            self._end_load(name, error)
            return
        except Exception:
            log.exception("loading %s failed", name)
            self._end_load(name, ModelLoadFailure("the model could not be loaded; see the log"))
            return
        finally:
            entry.loader = None
        entry.error, entry.is_failed = None, False
        entry.served = served
        await self._look_again()
        if self._roster.loaded(name, time.monotonic()):
            self._start(self._watch(name, served), self._watchers)
            self._tell(name)
            self._wake(entry, name)
        else:
            await self._unload(name)
        self._drive()

    async def _look_again(self) -> None:
        """See how much memory the load has left, before the next one is decided on."""
        try:
            if self._refresh is not None:
                await self._refresh()
        except Exception:
            log.exception("the machine could not be looked at")

    def _end_load(self, name: str, error: WingmanError) -> None:
        """A load failed, or has ended because it was to end."""
        was_stopped = self._roster.state(name) is State.ABANDONED
        is_wanted = self._roster.failed(name)
        if was_stopped:
            self._note_gone(name, is_wanted=is_wanted)
        else:
            self._fail(name, error)
        self._drive()

    def _wake(self, entry: _Entry, name: str) -> None:
        """Give everybody who waits the lease that the roster has counted for them."""
        assert entry.served is not None
        resident = self._roster.get(name)
        assert resident is not None
        n_load = resident.load_number
        waiters, entry.waiters = entry.waiters, []
        for waiter in waiters:
            lease = Lease(entry.served, lambda: self._release(name, n_load))
            if waiter.done():  # its request left meanwhile
                lease.release()
            else:
                waiter.set_result(lease)

    def _fail(self, name: str, error: WingmanError) -> None:
        entry = self._entries[name]
        entry.error = error
        log.error("%s: %s", name, error)
        self._refuse_waiters(entry, error)
        self._note_absent(name, error.message)

    def _refuse_waiters(self, entry: _Entry, error: WingmanError) -> None:
        waiters, entry.waiters = entry.waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(error)

    async def _watch(self, name: str, served: ServedModel) -> None:
        """Unload a model whose engine dies by itself."""
        error = await served.engine.wait_stopped()
        entry = self._entries.get(name)
        if error is None or entry is None or entry.served is not served:
            return
        log.error("the engine of %s died: %s", name, error)
        entry.is_failed, entry.error = True, error
        if self._roster.stop(name):
            self._refuse_waiters(entry, error)
            self._start(self._unload(name))

    async def _unload(self, name: str) -> None:
        """Free a model that is UNLOADING."""
        entry = self._entries[name]
        served = entry.served
        assert served is not None
        if not entry.is_failed:
            await served.engine.drain(self._drain_timeout_s)
        if not await served.engine.close():
            self.is_hung = True
        entry.served = None
        error = entry.error.message if entry.is_failed and entry.error else ""
        self._note_gone(name, error, is_wanted=self._roster.unloaded(name))
        self._drive()

    def _note_gone(self, name: str, error: str = "", *, is_wanted: bool) -> None:
        """A model has left memory: whoever waited for that goes on, even if it is wanted again already."""
        if is_wanted:
            gone = self._entries[name].gone
            gone.set()
            gone.clear()
            self._tell(name)
        else:
            self._note_absent(name, error)

    def _note_absent(self, name: str, error: str = "") -> None:
        entry = self._entries[name]
        if self._roster.state(name) is State.ABSENT and not entry.gone.is_set():
            entry.gone.set()
            self._tell(name, error)

    def _tell(self, name: str, error: str = "", progress: float | None = None) -> None:
        self._on_change(Change(name, self._roster.state(name), error, progress))

    # -- the end --------------------------------------------------------------------------------------

    async def close(self) -> bool:
        """Take no new request, let what runs finish within the drain time-out, unload everything; False when
        a model hangs and could not be freed."""
        self._is_draining = True
        names = [resident.name for resident in self._roster]
        await asyncio.gather(*(self.stop(name) for name in names))
        while self._tasks:
            await asyncio.wait(self._tasks)
        for watcher in self._watchers:
            watcher.cancel()
        if self._timer is not None:
            self._timer.cancel()
        return not self.is_hung
