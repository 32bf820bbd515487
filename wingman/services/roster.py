"""Which models are loaded, which are wanted, and what to do about it: a state table, pure.

`Residency` tells the roster what happens (a start, a request, a load that ended) and asks `decide` what
to do. One model loads at a time, in the order they were wanted. When memory or `n_max` stands in the way,
the least recently used model is drained: it takes no new request, and is unloaded once nothing of it is
running. Requests for it wait until it is loaded again, behind those that came before: so none starves,
and no model is taken from under an answer. Times are of any one clock, in seconds; memory is in bytes.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterator
from typing import Final

from msgspec import Struct


class State(enum.Enum):
    """Where a model is."""

    ABSENT = enum.auto()
    QUEUED = enum.auto()
    LOADING = enum.auto()
    ABANDONED = enum.auto()
    """Loading, but no longer wanted."""
    READY = enum.auto()
    DRAINING = enum.auto()
    """Takes no new request and waits for the running ones, to make room."""
    UNLOADING = enum.auto()


class Move(enum.Enum):
    """What can happen to it."""

    WANT = enum.auto()
    LOAD = enum.auto()
    LOADED = enum.auto()
    FAIL = enum.auto()
    DRAIN = enum.auto()
    KEEP = enum.auto()
    STOP = enum.auto()
    UNLOAD = enum.auto()
    UNLOADED = enum.auto()


TRANSITIONS: Final = {
    (State.ABSENT, Move.WANT): State.QUEUED,
    (State.ABSENT, Move.STOP): State.ABSENT,
    (State.QUEUED, Move.WANT): State.QUEUED,
    (State.QUEUED, Move.LOAD): State.LOADING,
    (State.QUEUED, Move.FAIL): State.ABSENT,
    (State.QUEUED, Move.STOP): State.ABSENT,
    (State.LOADING, Move.WANT): State.LOADING,
    (State.LOADING, Move.LOADED): State.READY,
    (State.LOADING, Move.FAIL): State.ABSENT,
    (State.LOADING, Move.STOP): State.ABANDONED,
    (State.ABANDONED, Move.WANT): State.ABANDONED,
    (State.ABANDONED, Move.STOP): State.ABANDONED,
    (State.ABANDONED, Move.LOADED): State.UNLOADING,
    (State.ABANDONED, Move.FAIL): State.ABSENT,
    (State.READY, Move.WANT): State.READY,
    (State.READY, Move.DRAIN): State.DRAINING,
    (State.READY, Move.STOP): State.UNLOADING,
    (State.READY, Move.UNLOAD): State.UNLOADING,
    (State.DRAINING, Move.WANT): State.DRAINING,
    (State.DRAINING, Move.KEEP): State.READY,
    (State.DRAINING, Move.STOP): State.UNLOADING,
    (State.DRAINING, Move.UNLOAD): State.UNLOADING,
    (State.UNLOADING, Move.WANT): State.UNLOADING,
    (State.UNLOADING, Move.STOP): State.UNLOADING,
    (State.UNLOADING, Move.UNLOADED): State.ABSENT,
}
IN_MEMORY: Final = frozenset({State.LOADING, State.ABANDONED, State.READY, State.DRAINING, State.UNLOADING})


class Load(Struct, frozen=True):
    """Begin to load a model."""

    name: str


class Unload(Struct, frozen=True):
    """End what runs on a model and free it."""

    name: str


class Refuse(Struct, frozen=True):
    """A model can't be loaded: it needs more memory than there could be."""

    name: str
    need_bytes: int
    capacity_bytes: int


class Keep(Struct, frozen=True):
    """A model that was being drained is needed no less than others: serve it again."""

    name: str


Action = Load | Unload | Refuse | Keep


class Resident(Struct):
    """One known model."""

    name: str
    state: State = State.ABSENT
    need_bytes: int = 0
    is_forced: bool = False
    """Loaded whatever memory there is."""
    is_started: bool = False
    """Wanted by somebody who does not wait; else it is given up when the last waiting request leaves."""
    wants_again: bool = False
    """Wanted while it was on its way out."""
    n_leases: int = 0
    """Requests that use it."""
    n_waiting: int = 0
    """Requests that wait for it."""
    used_at: float = 0.0
    turn: int = 0
    """Place in the queue of loads."""
    load_number: int = 0
    """Tells leases of this load from those of any other, one before it was forgotten too."""


class Roster:
    """All known models and their states."""

    def __init__(self, n_max: int, idle_unload_s: float = 0.0) -> None:
        """At most `n_max` models in memory; one that nobody used for `idle_unload_s` is unloaded, 0: never."""
        self._n_max = n_max
        self._idle_unload_s = idle_unload_s
        self._residents: dict[str, Resident] = {}
        self._turns = itertools.count(1)
        self._load_numbers = itertools.count(1)

    def __iter__(self) -> Iterator[Resident]:
        return iter(self._residents.values())

    def state(self, name: str) -> State:
        """Where a model is; ABSENT also for one never heard of."""
        resident = self._residents.get(name)
        return State.ABSENT if resident is None else resident.state

    def get(self, name: str) -> Resident | None:
        """What is known of a model."""
        return self._residents.get(name)

    def _move(self, resident: Resident, what: Move) -> None:
        resident.state = TRANSITIONS[resident.state, what]

    # -- what happens -----------------------------------------------------------------------------

    def want(self, name: str, need_bytes: int, *, is_forced: bool = False, is_started: bool = True) -> None:
        """Somebody wants a model loaded; nothing changes for one that is."""
        resident = self._residents.setdefault(name, Resident(name))
        if resident.state is State.ABSENT:
            resident.need_bytes, resident.is_forced = need_bytes, is_forced
            resident.is_started, resident.wants_again = is_started, False
            resident.turn = next(self._turns)
        elif (
            resident.state in (State.ABANDONED, State.UNLOADING, State.DRAINING) and not resident.wants_again
        ):
            resident.wants_again, resident.is_started = True, is_started
            resident.turn = next(self._turns)
        else:
            resident.is_started |= is_started
        self._move(resident, Move.WANT)

    def wait(self, name: str) -> None:
        """A request waits for a model that is wanted."""
        self._residents[name].n_waiting += 1

    def give_up(self, name: str) -> None:
        """A waiting request has left; a load that only it wanted is taken back if it has not begun."""
        resident = self._residents[name]
        resident.n_waiting -= 1
        if resident.n_waiting == 0 and not resident.is_started:
            resident.wants_again = False
            if resident.state is State.QUEUED:
                self._move(resident, Move.STOP)

    def lease(self, name: str, now: float) -> int:
        """A request begins to use a model that is READY; the number of the load, for `release`."""
        resident = self._residents[name]
        assert resident.state is State.READY, resident.state
        resident.n_leases += 1
        resident.used_at = now
        return resident.load_number

    def release(self, name: str, n_load: int, now: float) -> None:
        """It is done with it; means nothing once that load was freed."""
        resident = self._residents.get(name)
        if resident is not None and resident.load_number == n_load and resident.n_leases:
            resident.n_leases -= 1
            resident.used_at = now

    def loaded(self, name: str, now: float) -> bool:
        """A load succeeded. True when it is READY: then all that wait have leases from now on; False when
        nobody wants it any more: then it is UNLOADING and the caller unloads it."""
        resident = self._residents[name]
        self._move(resident, Move.LOADED)
        resident.load_number = next(self._load_numbers)
        if resident.state is not State.READY:
            return False
        resident.n_leases, resident.n_waiting = resident.n_waiting, 0
        resident.used_at = now
        return True

    def failed(self, name: str) -> bool:
        """A load failed or is refused; none waits for it any more. True when it was abandoned and is wanted
        anew: then it is queued again, and those who wait go on waiting."""
        resident = self._residents[name]
        self._move(resident, Move.FAIL)
        return self._absent(resident)

    def unloaded(self, name: str) -> bool:
        """A model was freed; whether it is wanted again already, and queued."""
        resident = self._residents[name]
        self._move(resident, Move.UNLOADED)
        resident.n_leases = 0
        resident.load_number = next(self._load_numbers)
        return self._absent(resident)

    def _absent(self, resident: Resident) -> bool:
        is_wanted, resident.wants_again = resident.wants_again, False
        if is_wanted:
            self._move(resident, Move.WANT)
        else:
            resident.n_waiting = 0
            resident.is_started = False
        return is_wanted

    def stop(self, name: str) -> bool:
        """A model is not to run any more. True when the caller has to unload it; whoever waits is refused."""
        resident = self._residents.get(name)
        if resident is None:
            return False
        was_in_use = resident.state in (State.READY, State.DRAINING)
        self._move(resident, Move.STOP)
        resident.wants_again = resident.is_started = False
        resident.n_waiting = 0
        return was_in_use

    def forget(self, name: str) -> None:
        """Drop a model that is ABSENT."""
        if self.state(name) is State.ABSENT:
            self._residents.pop(name, None)

    # -- what to do -------------------------------------------------------------------------------

    def decide(self, now: float, capacity_bytes: int) -> list[Action]:
        """What to do now, done in the table already: the caller carries it out. `capacity_bytes` is the
        memory that models may take, those in memory included."""
        actions: list[Action] = [
            self._unload(resident) for resident in self._residents.values() if self._is_stale(resident, now)
        ]
        head = self._head()
        is_loading = any(r.state in (State.LOADING, State.ABANDONED) for r in self)
        while head is not None and not is_loading:
            if head.need_bytes > capacity_bytes and not head.is_forced:
                actions.append(Refuse(head.name, head.need_bytes, capacity_bytes))
                self.failed(head.name)
            elif self._fits(head, capacity_bytes):
                self._move(head, Move.LOAD)
                actions.append(Load(head.name))
                is_loading = True
            else:
                actions += self._make_room(head, capacity_bytes)
                return actions
            head = self._head()
        if head is None or is_loading:
            actions += self._keep_drained()
        return actions

    def next_deadline(self) -> float | None:
        """When `decide` has to be asked again though nothing happens."""
        if self._idle_unload_s <= 0:
            return None
        idle = [r.used_at for r in self if r.state is State.READY and not r.n_leases]
        return min(idle) + self._idle_unload_s if idle else None

    def _head(self) -> Resident | None:
        queued = [resident for resident in self if resident.state is State.QUEUED]
        return min(queued, key=lambda resident: resident.turn, default=None)

    def _is_stale(self, resident: Resident, now: float) -> bool:
        is_idle = resident.state is State.READY and not resident.n_leases
        return is_idle and 0 < self._idle_unload_s <= now - resident.used_at

    def _unload(self, resident: Resident) -> Action:
        self._move(resident, Move.UNLOAD)
        return Unload(resident.name)

    def _fits(self, wanted: Resident, capacity_bytes: int, without: frozenset[str] = frozenset()) -> bool:
        held = [r for r in self if r.state in IN_MEMORY and r.name not in without]
        has_room = wanted.is_forced or sum(r.need_bytes for r in held) + wanted.need_bytes <= capacity_bytes
        return has_room and len(held) < self._n_max

    def _make_room(self, wanted: Resident, capacity_bytes: int) -> list[Action]:
        """Unload idle models and drain busy ones, least recently used first, idle ones before busy ones; no
        more of them than needed."""
        leaving = frozenset(r.name for r in self if r.state is State.UNLOADING)
        actions: list[Action] = []
        candidates = sorted(
            (r for r in self if r.state in (State.READY, State.DRAINING)),
            key=lambda r: (r.n_leases > 0, r.state is State.READY, r.used_at),
        )
        for resident in candidates:
            if self._fits(wanted, capacity_bytes, leaving):
                if resident.state is State.DRAINING:
                    actions.append(self._keep(resident))
                continue
            leaving |= {resident.name}
            if not resident.n_leases:
                actions.append(self._unload(resident))
            elif resident.state is State.READY:
                self._move(resident, Move.DRAIN)
        return actions

    def _keep_drained(self) -> list[Action]:
        """Models that were to make room for one that nobody wants any more."""
        return [self._keep(resident) for resident in self if resident.state is State.DRAINING]

    def _keep(self, resident: Resident) -> Action:
        self._move(resident, Move.KEEP)
        resident.wants_again = False
        resident.n_leases += resident.n_waiting
        resident.n_waiting = 0
        return Keep(resident.name)
