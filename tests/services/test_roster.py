"""The table of models: what is decided in each situation."""

from __future__ import annotations

import pytest

from wingman.services.roster import (
    TRANSITIONS,
    Action,
    Keep,
    Load,
    Move,
    Refuse,
    Resident,
    Roster,
    State,
    Unload,
)

ROOM = 100


def test_every_state_is_reached_and_left() -> None:
    assert {state for state, _ in TRANSITIONS} == set(State)
    assert set(TRANSITIONS.values()) == set(State)
    assert {move for _, move in TRANSITIONS} == set(Move)


@pytest.mark.parametrize("state", State)
def test_anything_may_be_wanted_and_stopped_at_any_time(state: State) -> None:
    assert (state, Move.WANT) in TRANSITIONS
    assert (state, Move.STOP) in TRANSITIONS


class Table:
    """A roster whose loads and unloads end when a test says so."""

    def __init__(self, n_max: int = 2, capacity: int = ROOM, idle_unload_s: float = 0.0) -> None:
        self.roster = Roster(n_max, idle_unload_s)
        self.capacity = capacity
        self.now = 0.0

    def decide(self) -> list[Action]:
        self.now += 1.0
        return self.roster.decide(self.now, self.capacity)

    def want(self, name: str, need: int = 1, **how: bool) -> list[Action]:
        self.roster.want(name, need, **how)
        return self.decide()

    def ask(self, name: str, need: int = 1) -> list[Action]:
        """A request that has to wait."""
        actions = self.want(name, need, is_started=False)
        self.roster.wait(name)
        return actions

    def loaded(self, name: str) -> list[Action]:
        assert self.roster.loaded(name, self.now)
        return self.decide()

    def load(self, name: str, need: int = 1) -> None:
        assert self.want(name, need) == [Load(name)]
        assert self.loaded(name) == []

    def unloaded(self, name: str) -> list[Action]:
        self.roster.unloaded(name)
        return self.decide()

    def lease(self, name: str) -> int:
        self.now += 1.0
        return self.roster.lease(name, self.now)

    def release(self, name: str, n_load: int) -> list[Action]:
        self.now += 1.0
        self.roster.release(name, n_load, self.now)
        return self.decide()

    def resident(self, name: str) -> Resident:
        found = self.roster.get(name)
        assert found is not None
        return found


def test_one_loads_at_a_time_in_the_order_they_were_wanted() -> None:
    table = Table(n_max=3)
    assert table.want("a") == [Load("a")]
    assert table.want("b") == table.want("c") == table.want("b") == []
    assert table.loaded("a") == [Load("b")]
    assert table.loaded("b") == [Load("c")]


def test_the_idle_one_used_least_recently_makes_room() -> None:
    table = Table(n_max=2)
    table.load("a")
    table.load("b")
    table.release("a", table.lease("a"))
    assert table.want("c") == [Unload("b")]
    assert table.roster.state("a") is State.READY
    assert table.unloaded("b") == [Load("c")]


def test_an_idle_one_makes_room_before_a_busy_one() -> None:
    table = Table(n_max=2)
    table.load("a")
    n_load = table.lease("a")
    table.load("b")
    assert table.want("c") == [Unload("b")]
    assert table.roster.state("a") is State.READY
    table.release("a", n_load)


def test_a_busy_one_is_drained_and_unloaded_when_it_is_done() -> None:
    table = Table(n_max=1)
    table.load("a")
    first, second = table.lease("a"), table.lease("a")
    assert table.ask("b") == []
    assert table.roster.state("a") is State.DRAINING
    assert table.release("a", first) == []
    assert table.release("a", second) == [Unload("a")]
    assert table.unloaded("a") == [Load("b")]
    assert table.loaded("b") == []
    assert table.resident("b").n_leases == 1


def test_of_busy_ones_that_used_least_recently_is_drained_and_goes_on_being_drained() -> None:
    table = Table(n_max=2)
    for name in "ab":
        table.load(name)
        table.lease(name)
    n_load = table.lease("b")
    table.lease("a")
    table.want("c")
    assert table.roster.state("b") is State.DRAINING
    assert table.release("b", n_load) == []  # now it is the one used last
    assert [table.roster.state(name) for name in "ab"] == [State.READY, State.DRAINING]


def test_a_request_for_one_that_is_drained_waits_behind_the_one_that_drains_it() -> None:
    table = Table(n_max=1)
    table.load("a")
    n_load = table.lease("a")
    table.ask("b")
    assert table.ask("a") == []
    assert table.release("a", n_load) == [Unload("a")]
    assert table.unloaded("a") == [Load("b")]
    assert table.loaded("b") == []  # busy with the request that waited
    assert table.roster.state("b") is State.DRAINING
    assert table.release("b", table.resident("b").load_number) == [Unload("b")]
    assert table.unloaded("b") == [Load("a")]
    table.loaded("a")
    assert table.resident("a").n_leases == 1


def test_a_drained_one_is_kept_when_the_one_that_needs_room_leaves() -> None:
    table = Table(n_max=1)
    table.load("a")
    table.lease("a")
    table.ask("b")
    table.ask("a")
    table.roster.give_up("b")
    assert table.decide() == [Keep("a")]
    assert (table.resident("a").n_leases, table.resident("a").n_waiting) == (2, 0)
    assert table.roster.state("b") is State.ABSENT


def test_no_more_are_drained_than_needed() -> None:
    table = Table(n_max=5, capacity=10)
    for name in "abc":
        table.load(name, 3)
        table.lease(name)
    assert table.want("d", 4) == []
    states = [table.roster.state(name) for name in "abc"]
    assert states == [State.DRAINING, State.READY, State.READY]


def test_a_drained_one_is_kept_when_another_left_by_itself() -> None:
    table = Table(n_max=5, capacity=10)
    table.load("a", 5)
    table.lease("a")
    table.load("b", 5)
    n_load = table.lease("b")
    table.want("c", 5)
    assert table.roster.state("a") is State.DRAINING
    assert table.release("b", n_load) == [Unload("b"), Keep("a")]


def test_a_drained_one_is_kept_once_the_other_fits_without_it() -> None:
    table = Table(n_max=5, capacity=5)
    table.load("a", 5)
    table.lease("a")
    table.want("b", 5)
    table.want("c", 5)
    table.capacity = 10
    assert table.decide() == [Load("b"), Keep("a")]


def test_what_never_fits_is_refused_and_the_next_goes_on() -> None:
    table = Table(capacity=5)
    table.load("a", 5)
    assert table.ask("b", 6) == [Refuse("b", 6, 5)]
    assert table.roster.state("a") is State.READY
    assert table.want("c", 5) == [Unload("a")]


def test_force_loads_what_does_not_fit() -> None:
    table = Table(n_max=2, capacity=5)
    table.load("a", 5)
    assert table.want("b", 50, is_forced=True) == [Load("b")]
    table.loaded("b")
    assert table.want("c", 5) == [Unload("a"), Unload("b")]  # it counts once it is in memory


def test_a_failed_load_is_over_for_all_who_wait() -> None:
    table = Table()
    table.ask("a")
    table.ask("a")
    assert not table.roster.failed("a")
    assert table.resident("a").n_waiting == 0
    assert table.want("a") == [Load("a")]


def test_a_load_that_nobody_waits_for_is_taken_back_before_it_begins() -> None:
    table = Table()
    table.want("a")
    table.ask("b")
    table.roster.give_up("b")
    assert table.roster.state("b") is State.ABSENT
    assert table.loaded("a") == []


def test_a_load_that_was_started_stays_when_its_requests_leave() -> None:
    table = Table()
    table.want("a")
    table.ask("b")
    table.want("b")
    table.roster.give_up("b")
    assert table.loaded("a") == [Load("b")]


def test_a_load_that_has_begun_goes_on_without_requests() -> None:
    table = Table()
    table.ask("a")
    table.roster.give_up("a")
    table.loaded("a")
    assert table.roster.state("a") is State.READY


def test_an_abandoned_load_that_succeeds_is_freed() -> None:
    table = Table()
    table.want("a")
    assert not table.roster.stop("a")
    assert table.roster.state("a") is State.ABANDONED
    assert not table.roster.loaded("a", table.now)
    assert table.roster.state("a") is State.UNLOADING
    table.unloaded("a")
    assert table.roster.state("a") is State.ABSENT


def test_what_is_wanted_again_while_its_load_is_abandoned_is_loaded_anew() -> None:
    table = Table()
    table.want("a")
    table.roster.stop("a")
    assert table.ask("a") == []
    assert table.roster.failed("a")
    assert table.resident("a").n_waiting == 1
    assert table.decide() == [Load("a")]


def test_what_is_wanted_again_while_it_is_unloaded_is_loaded_anew() -> None:
    table = Table()
    table.load("a")
    assert table.roster.stop("a")
    table.ask("a")
    assert table.unloaded("a") == [Load("a")]
    table.loaded("a")
    assert table.resident("a").n_leases == 1


def test_a_lease_of_an_earlier_load_means_nothing() -> None:
    table = Table()
    table.load("a")
    old = table.lease("a")
    table.roster.stop("a")
    table.unloaded("a")
    table.load("a")
    table.lease("a")
    table.release("a", old)
    assert table.resident("a").n_leases == 1


def test_a_lease_from_before_a_model_was_forgotten_means_nothing() -> None:
    table = Table()
    table.load("a")
    old = table.lease("a")
    table.roster.stop("a")
    table.unloaded("a")
    table.roster.forget("a")
    table.load("a")
    table.lease("a")
    table.release("a", old)
    assert table.resident("a").n_leases == 1


def test_an_idle_one_is_unloaded_at_its_deadline_and_a_busy_one_is_not() -> None:
    table = Table(idle_unload_s=10.0)
    assert table.roster.next_deadline() is None
    table.load("a")
    n_load = table.lease("a")
    assert table.roster.next_deadline() is None
    table.now = 100.0
    assert table.decide() == []
    table.release("a", n_load)
    deadline = table.roster.next_deadline()
    assert deadline is not None
    assert table.roster.decide(deadline - 0.001, ROOM) == []
    assert table.roster.decide(deadline, ROOM) == [Unload("a")]
    assert table.roster.next_deadline() is None


def test_only_what_is_absent_is_forgotten() -> None:
    table = Table()
    table.load("a")
    table.roster.forget("a")
    assert table.roster.state("a") is State.READY
    table.roster.stop("a")
    table.unloaded("a")
    table.roster.forget("a")
    assert table.roster.get("a") is None
    table.roster.forget("a")
    assert not table.roster.stop("a")
