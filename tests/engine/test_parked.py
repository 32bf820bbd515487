"""The books of parked sequences against a plain list in order of use."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from wingman.engine.parked import Parked, ParkedSequences

SEQUENCES = st.lists(st.integers(0, 1), max_size=6).map(tuple)
LORAS = st.sampled_from([(), (1.0,), (0.5,)])


def n_shared(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


class Books(RuleBasedStateMachine):
    """Whatever is parked, used and dropped: within the budget, least recently used first out."""

    @initialize(budget=st.just(0) | st.integers(12, 40), can_cut=st.booleans())
    def begin(self, budget: int, can_cut: bool) -> None:
        self.parked = ParkedSequences(budget)
        self.can_cut = can_cut
        self.held: list[Parked] = []
        """In order of use."""
        self.n_hits = self.n_evictions = 0
        self.seen: set[int] = set()

    def evicted_for(self, n_bytes: int, held: list[Parked]) -> list[int]:
        """Keys of the fewest first entries without which `n_bytes` fit."""
        n_out = 0
        while sum(entry.n_bytes for entry in held[n_out:]) + n_bytes > self.parked.budget_bytes:
            n_out += 1
        return [entry.key for entry in held[:n_out]]

    @rule(tokens=SEQUENCES.filter(bool), lora=LORAS, n_bytes=st.integers(0, 12))
    def parks(self, tokens: tuple[int, ...], lora: tuple[float, ...], n_bytes: int) -> None:
        room = self.parked.room_for(n_bytes)
        if not 0 < n_bytes <= self.parked.budget_bytes:
            assert room is None
            with pytest.raises(ValueError):
                self.parked.add(tokens, lora, n_bytes, self.can_cut)
            return
        assert room == self.evicted_for(n_bytes, self.held)
        useless = {
            entry.key
            for entry in self.held
            if entry.lora == lora
            and entry.tokens == tokens[: len(entry.tokens)]
            and (self.can_cut or entry.tokens == tokens)
        }
        others = [entry for entry in self.held if entry.key not in useless]
        evicted = self.evicted_for(n_bytes, others)
        entry, dropped = self.parked.add(tokens, lora, n_bytes, self.can_cut)
        assert (entry.tokens, entry.lora, entry.n_bytes) == (tokens, lora, n_bytes)
        assert entry.key not in self.seen, "a key is never given twice"
        assert set(dropped[: len(useless)]) == useless
        assert dropped[len(useless) :] == evicted
        self.seen.add(entry.key)
        self.held = [*others[len(evicted) :], entry]
        self.n_evictions += len(evicted)

    @rule(prompt=SEQUENCES, lora=LORAS)
    def asks(self, prompt: tuple[int, ...], lora: tuple[float, ...]) -> None:
        lengths = {
            entry.key: n_shared(entry.tokens, prompt)
            for entry in self.held
            if entry.lora == lora and (self.can_cut or entry.tokens == prompt[: len(entry.tokens)])
        }
        n_tokens, entry = self.parked.find(prompt, lora, self.can_cut)
        assert n_tokens == max(lengths.values(), default=0)
        assert entry in self.held if n_tokens else entry is None
        assert entry is None or lengths[entry.key] == n_tokens

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def uses(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.held))
        self.parked.touch(entry.key)
        self.held.remove(entry)
        self.held.append(entry)
        self.n_hits += 1

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def drops(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.held))
        self.parked.drop(entry.key)
        self.held.remove(entry)
        for forgotten in (self.parked.drop, self.parked.touch):
            with pytest.raises(KeyError):
                forgotten(entry.key)

    @precondition(lambda self: len(self.held) > 5)
    @rule()
    def clears(self) -> None:
        self.parked.clear()
        self.held.clear()

    @invariant()
    def books_are_right(self) -> None:
        assert self.parked.n_entries == len(self.held)
        assert self.parked.n_bytes == sum(entry.n_bytes for entry in self.held) <= self.parked.budget_bytes
        assert (self.parked.n_hits, self.parked.n_evictions) == (self.n_hits, self.n_evictions)
        assert set(self.parked._indexes) == {entry.lora for entry in self.held}, "no index is left empty"


TestBooks = Books.TestCase


def test_a_budget_of_nothing_takes_nothing() -> None:
    parked = ParkedSequences(0)
    assert [parked.room_for(n_bytes) for n_bytes in (0, 1, 1 << 40)] == [None, None, None]
    with pytest.raises(ValueError):
        parked.add((1, 2), (), 0, can_cut=True)
    assert parked.find((1, 2), (), can_cut=True) == (0, None)
    assert parked.n_entries == 0


def test_the_least_recently_used_goes_first() -> None:
    parked = ParkedSequences(3)
    first, second, third = (parked.add((token,), (), 1, can_cut=True)[0].key for token in range(3))
    parked.touch(first)
    assert parked.room_for(2) == [second, third]
    assert parked.add((3,), (), 1, can_cut=True)[1] == [second]
    assert parked.room_for(2) == [third, first]
    assert (parked.n_hits, parked.n_evictions) == (1, 1)


def test_a_talk_that_went_on_replaces_its_past_before_others_go() -> None:
    parked = ParkedSequences(10)
    other, _ = parked.add((9, 9), (), 4, can_cut=True)
    past, _ = parked.add((1, 2), (), 6, can_cut=True)
    assert parked.room_for(6) == [other.key, past.key]
    entry, dropped = parked.add((1, 2, 3), (), 6, can_cut=True)
    assert dropped == [past.key]
    assert parked.find((1, 2, 5), (), can_cut=True) == (2, entry)
    assert parked.n_evictions == 0


def test_where_the_cache_cannot_be_cut_the_past_stays() -> None:
    parked = ParkedSequences(10)
    past, _ = parked.add((1, 2), (), 3, can_cut=False)
    longer, dropped = parked.add((1, 2, 3), (), 3, can_cut=False)
    assert dropped == []
    assert parked.find((1, 2, 5), (), can_cut=False) == (2, past)
    assert parked.find((1, 2, 3, 4), (), can_cut=False) == (3, longer)
    assert parked.find((1,), (), can_cut=False) == (0, None)


def test_no_tokens_are_refused_and_cost_nobody_anything() -> None:
    parked = ParkedSequences(4)
    entry, _ = parked.add((1,), (), 4, can_cut=True)
    with pytest.raises(ValueError):
        parked.add((), (), 4, can_cut=True)
    assert parked.find((1,), (), can_cut=True) == (1, entry)


def test_adapters_do_not_match_each_other() -> None:
    parked = ParkedSequences(10)
    plain, _ = parked.add((1, 2), (), 3, can_cut=True)
    tuned, dropped = parked.add((1, 2, 3), (0.5,), 3, can_cut=True)
    assert dropped == []
    assert parked.find((1, 2, 3), (), can_cut=True) == (2, plain)
    assert parked.find((1, 2, 3), (0.5,), can_cut=True) == (3, tuned)
    assert parked.find((1, 2, 3), (1.0,), can_cut=True) == (0, None)
