"""The table of models: no request lost, no deadlock, no double load, whatever happens in whatever order."""

from __future__ import annotations

import itertools
from collections import defaultdict

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from wingman.services.roster import IN_MEMORY, Action, Keep, Load, Refuse, Roster, State, Unload

NEEDS = {"a": 1, "b": 2, "c": 3, "d": 5}
NAMES = st.sampled_from(sorted(NEEDS))


class Requests(RuleBasedStateMachine):
    """Requests, starts and stops, driven as Residency drives it: after everything that
    happens it is asked what to do, and that is begun at once and ends any time later."""

    @initialize(n_max=st.integers(1, 3), capacity=st.integers(4, 10), idle_s=st.sampled_from([0.0, 0.0, 3.0]))
    def begin(self, n_max: int, capacity: int, idle_s: float) -> None:
        self.n_max, self.capacity, self.idle_s = n_max, capacity, idle_s
        self.roster = Roster(n_max, idle_s)
        self.now = 0.0
        self.ids = itertools.count()
        self.order = itertools.count()
        self.waiting: dict[str, list[int]] = defaultdict(list)
        self.leases: dict[int, tuple[str, int]] = {}
        """Request -> model and number of its load."""
        self.served: set[int] = set()
        self.refused: set[int] = set()
        self.left: set[int] = set()
        self.wanted: dict[str, int] = {}
        """When each model that is to be loaded was first wanted."""
        self.started: set[str] = set()
        """Those of them that stay wanted without a request."""
        self.loading: str | None = None
        self.unloading: set[str] = set()

    # -- what happens ------------------------------------------------------------------------------

    @rule(names=st.lists(NAMES, min_size=1, max_size=4))
    def requests(self, names: list[str]) -> None:
        for name in names:
            self.request(name)

    def request(self, name: str) -> None:
        number = next(self.ids)
        if self.roster.state(name) is State.READY:
            self.grant(number, name)
            return
        self.want(name, is_started=False)
        state = self.roster.state(name)
        if state is State.READY:
            self.grant(number, name)
        elif state is State.ABSENT:
            self.refused.add(number)
        else:
            self.roster.wait(name)
            self.waiting[name].append(number)

    @rule(name=NAMES, is_forced=st.booleans())
    def start(self, name: str, is_forced: bool) -> None:
        self.want(name, is_started=True, is_forced=is_forced)

    def want(self, name: str, **how: bool) -> None:
        state = self.roster.state(name)
        if state not in (State.LOADING, State.READY):
            self.wanted.setdefault(name, next(self.order))
            if how["is_started"]:
                self.started.add(name)
        self.roster.want(name, NEEDS[name], **how)
        self.drive()

    def grant(self, number: int, name: str) -> None:
        self.leases[number] = (name, self.roster.lease(name, self.now))
        self.served.add(number)

    @precondition(lambda self: any(self.waiting.values()))
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(name for name, all_ in self.waiting.items() if all_)))
        number = data.draw(st.sampled_from(self.waiting[name]))
        self.waiting[name].remove(number)
        self.left.add(number)
        self.roster.give_up(name)
        if not self.waiting[name] and name not in self.started:
            self.wanted.pop(name, None)
        self.drive()

    @precondition(lambda self: len(self.leases) > 2)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(sorted(self.leases))))

    def end(self, number: int) -> None:
        name, n_load = self.leases.pop(number)
        self.roster.release(name, n_load, self.now)
        self.drive()

    @precondition(lambda self: self.loading is not None)
    @rule()
    def load_succeeds(self) -> None:
        name, self.loading = self.loading, None
        assert name is not None
        if self.roster.loaded(name, self.now):
            self.lend(name)
        else:
            self.unloading.add(name)
        self.drive()

    @precondition(lambda self: self.loading is not None)
    @rule()
    def load_fails(self) -> None:
        name, self.loading = self.loading, None
        assert name is not None
        was_wanted = self.is_queued_again(name)
        assert self.roster.failed(name) == was_wanted
        if not was_wanted:
            self.refuse(name)
        self.drive()

    @precondition(lambda self: self.unloading)
    @rule(data=st.data())
    def unload_ends(self, data: st.DataObject) -> None:
        self.free(data.draw(st.sampled_from(sorted(self.unloading))))

    def free(self, name: str) -> None:
        self.unloading.remove(name)
        was_wanted = self.is_queued_again(name)
        assert self.roster.unloaded(name) == was_wanted
        if not was_wanted:
            assert not self.waiting[name], "a request is lost"
        self.drive()

    def is_queued_again(self, name: str) -> bool:
        return name in self.wanted

    @rule(name=NAMES)
    def stop(self, name: str) -> None:
        if self.roster.stop(name):
            self.unloading.add(name)
        self.refuse(name)
        self.drive()

    @rule(seconds=st.sampled_from([0.5, 2.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.drive()

    @rule(capacity=st.integers(2, 10), name=NAMES)
    def memory_changes(self, capacity: int, name: str) -> None:
        self.capacity = capacity
        self.drive()
        self.roster.forget(name)

    # -- carrying out ------------------------------------------------------------------------------

    def drive(self) -> None:
        before = {r.name: (r.state, r.used_at) for r in self.roster}
        actions = self.roster.decide(self.now, self.capacity)
        for action in actions:
            match action:
                case Load(name):
                    self.check_load(name)
                    self.loading = name
                    del self.wanted[name]
                    self.started.discard(name)
                case Unload(name):
                    assert self.n_leases(name) == 0, "unloaded under a request"
                    self.unloading.add(name)
                case Keep(name):
                    self.wanted.pop(name, None)
                    self.started.discard(name)
                    self.lend(name)
                case Refuse(name, need, capacity):
                    assert need == NEEDS[name] > capacity == self.capacity
                    self.refuse(name)
        self.check_least_recent_first(before, actions)
        self.check_progress()
        assert self.roster.decide(self.now, self.capacity) == [], "asked again it wants more"

    def check_load(self, name: str) -> None:
        assert self.loading is None, "two loads at once"
        first = min(self.wanted[r.name] for r in self.roster if r.state is State.QUEUED or r.name == name)
        assert self.wanted[name] == first, "not in the order they were wanted"
        resident = self.roster.get(name)
        assert resident is not None
        held = sum(r.need_bytes for r in self.roster if r.state in IN_MEMORY)
        assert held <= self.capacity or resident.is_forced

    def check_least_recent_first(self, before: dict[str, tuple[State, float]], actions: list[Action]) -> None:
        """Of those that were idle and ready, what stays was used after what goes."""
        gone = [
            before[action.name][1]
            for action in actions
            if isinstance(action, Unload) and before[action.name][0] is State.READY
        ]
        stays = [r.used_at for r in self.roster if r.state is State.READY and not self.n_leases(r.name)]
        assert not gone or not stays or max(gone) <= min(stays)

    def check_progress(self) -> None:
        """Whoever is first in the queue waits for something that ends, and what is drained makes room for it."""
        queued = [r for r in self.roster if r.state is State.QUEUED]
        draining = [r for r in self.roster if r.state is State.DRAINING]
        assert all(r.n_leases for r in draining), "drained and idle, and not unloaded"
        assert not draining or (queued and self.loading is None), "drained for nobody"
        if queued:
            assert self.loading is not None or self.unloading or draining, "deadlock"
        if self.idle_s:
            idle = [r for r in self.roster if r.state is State.READY and not r.n_leases]
            assert all(self.now - r.used_at < self.idle_s for r in idle)

    def lend(self, name: str) -> None:
        """All that wait have leases."""
        resident = self.roster.get(name)
        assert resident is not None
        assert resident.state is State.READY
        for number in self.waiting.pop(name, []):
            self.leases[number] = (name, resident.load_number)
            self.served.add(number)

    def refuse(self, name: str) -> None:
        self.refused.update(self.waiting.pop(name, []))
        self.wanted.pop(name, None)
        self.started.discard(name)

    def n_leases(self, name: str) -> int:
        resident = self.roster.get(name)
        return sum(1 for lease in self.leases.values() if resident and lease == (name, resident.load_number))

    # -- what always holds -------------------------------------------------------------------------

    @invariant()
    def the_table_agrees_with_what_happened(self) -> None:
        for resident in self.roster:
            assert resident.n_waiting == len(self.waiting[resident.name])
            assert resident.n_leases == self.n_leases(resident.name)
            if resident.n_leases:
                assert resident.state in (State.READY, State.DRAINING, State.UNLOADING)
            is_loading = resident.state in (State.LOADING, State.ABANDONED)
            assert is_loading == (resident.name == self.loading)
            assert (resident.state is State.UNLOADING) == (resident.name in self.unloading)
            is_wanted = resident.state is State.QUEUED or resident.wants_again
            assert is_wanted == (resident.name in self.wanted)

    @invariant()
    def no_more_than_the_maximum_are_in_memory(self) -> None:
        assert sum(r.state in IN_MEMORY for r in self.roster) <= self.n_max

    def teardown(self) -> None:
        """When all that runs ends, everybody was served or refused."""
        if not hasattr(self, "roster"):
            return
        for _ in range(200):
            if self.loading is not None:
                self.load_succeeds()
            elif self.unloading:
                self.free(min(self.unloading))
            elif self.leases:
                self.end(min(self.leases))
            else:
                break
            self.the_table_agrees_with_what_happened()
        else:
            raise AssertionError("it never comes to rest")
        assert not any(self.waiting.values()), "somebody waits for ever"
        assert {r.state for r in self.roster} <= {State.ABSENT, State.READY}
        assert self.served | self.refused | self.left == set(range(next(self.ids)))


TestRequests = Requests.TestCase
TestRequests.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None, report_multiple_bugs=False
)
