"""Draft lengths: learned costs and chances, and simulated runs against none and against the best fixed length.

The cost tables are of a 135M model on two cores, in milliseconds by tokens in a step, and made up for a
GPU, where a token more costs next to nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wingman.engine.drafting import NO_DRAFT, Draft, NgramDrafter
from wingman.engine.speculation import Candidate, SequenceSpeculation, StepCosts, choose
from wingman.engine.ubatches import even_pieces

Table = Mapping[int, float]

Q4_1: Table = {
    1: 5.8,
    2: 12.0,
    3: 14.8,
    4: 18.1,
    5: 21.5,
    6: 24.4,
    8: 26.5,
    16: 45,
    32: 94,
    64: 160,
    200: 500,
}
Q4_0: Table = {
    1: 4.6,
    2: 7.5,
    3: 9.7,
    4: 9.2,
    5: 12.0,
    6: 13.5,
    8: 13.5,
    12: 18,
    16: 20,
    24: 28,
    32: 41,
    200: 210,
}
GPU: Table = {1: 5.0, 8: 5.2, 16: 5.6, 32: 6.0, 64: 7.0, 200: 12.0}
TABLES = {"Q4_1": Q4_1, "Q4_0": Q4_0, "GPU": GPU}
N_MAX = 16
N_OUTPUT = 1000

Source = Callable[[Sequence[int], int], Draft]
"""A draft of what stands at an index of a text."""


def step_s(table: Table, n_tokens: int) -> float:
    return float(np.interp(n_tokens, list(table), list(table.values()))) / 1000


def learned(table: Table) -> StepCosts:
    costs = StepCosts()
    for n_tokens in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 64):
        for _ in range(5):
            costs.observe(n_tokens, step_s(table, n_tokens))
    return costs


# -- simulated runs -------------------------------------------------------------------------------


def random_text(length: int, n_vocab: int = 49_000, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(n_vocab) for _ in range(length)]


def oracle(share_right: float, seed: int = 0, n_match: int = 5) -> Source:
    """Drafts whose tokens are right with this chance each."""
    rng = random.Random(seed)

    def draft(text: Sequence[int], index: int) -> Draft:
        following = text[index : index + N_MAX]
        return Draft([token if rng.random() < share_right else -1 for token in following], n_match)

    return draft


def lookup(prompt: Sequence[int] = ()) -> Source:
    drafter = NgramDrafter()
    drafter.extend(prompt)
    n_known = 0

    def draft(text: Sequence[int], index: int) -> Draft:
        nonlocal n_known
        drafter.extend(text[n_known:index])
        n_known = index
        return drafter.draft(min(N_MAX, len(text) - index))

    return draft


@dataclass
class Writer:
    """A sequence that writes a given text."""

    text: Sequence[int]
    source: Source
    speculation: SequenceSpeculation
    n_done: int = 0

    def advance(self, draft: Draft, n_taken: int) -> None:
        n_right = 0
        while n_right < n_taken and draft.tokens[n_right] == self.text[self.n_done + n_right]:
            n_right += 1
        sampled = self.text[self.n_done : self.n_done + n_right + 1]
        self.speculation.observe(draft, sampled)
        self.n_done += len(sampled)


@dataclass
class Race:
    """Writers that share steps until the first is done; `fixed` drafts are taken whatever they cost."""

    table: Table
    writers: list[Writer]
    costs: StepCosts
    fixed: int | None = None
    load: Callable[[int], float] = lambda _: 1.0
    n_steps: int = 0
    spent_s: float = 0.0
    plain_s: float = 0.0

    def run(self) -> float:
        """How much faster than without drafts."""
        rng = random.Random(1)
        while all(writer.n_done < len(writer.text) for writer in self.writers):
            self.step(rng)
        n_tokens = sum(writer.n_done for writer in self.writers)
        return n_tokens / len(self.writers) * self.plain_s / self.n_steps / self.spent_s

    def step(self, rng: random.Random) -> None:
        drafts = [writer.source(writer.text, writer.n_done) for writer in self.writers]
        lengths = self.choose(drafts)
        n_tokens = len(lengths) + sum(lengths)
        load = self.load(self.n_steps)
        delay = 3.0 if rng.random() < 0.01 else 1.0
        self.costs.observe(n_tokens, step_s(self.table, n_tokens) * load * delay * rng.uniform(0.9, 1.1))
        self.spent_s += step_s(self.table, n_tokens) * load
        self.plain_s += step_s(self.table, len(lengths)) * load
        self.n_steps += 1
        for writer, draft, length in zip(self.writers, drafts, lengths, strict=True):
            writer.advance(draft, length)

    def choose(self, drafts: list[Draft]) -> list[int]:
        if self.fixed is not None:
            return [min(self.fixed, len(draft.tokens)) for draft in drafts]
        chances = [
            writer.speculation.chances(draft.n_match, len(draft.tokens))
            for writer, draft in zip(self.writers, drafts, strict=True)
        ]
        return choose([Candidate(each) for each in chances], 512, self.costs)


def race(table: Table, texts: list[list[int]], sources: list[Source], **options: object) -> Race:
    writers = [
        Writer(text, source, SequenceSpeculation()) for text, source in zip(texts, sources, strict=True)
    ]
    return Race(table, writers, **({"costs": StepCosts()} | options))  # type: ignore[arg-type]


def oracle_race(table: Table, n: int, share_right: float, **options: object) -> Race:
    texts = [random_text(N_OUTPUT, seed=seed) for seed in range(n)]
    return race(table, texts, [oracle(share_right, seed) for seed in range(n)], **options)


@pytest.mark.parametrize("n", [1, 4, 8])
@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("share_right", [0.0, 0.3, 0.6, 0.9, 1.0])
def test_near_the_best_fixed_length(name: str, n: int, share_right: float) -> None:
    table = TABLES[name]
    found = oracle_race(table, n, share_right).run()
    best = max(oracle_race(table, n, share_right, fixed=length).run() for length in (0, 3, 7, 15, 16))
    assert found >= 0.99
    assert found >= 0.85 * best


@pytest.mark.parametrize("n", [1, 4, 8])
@pytest.mark.parametrize("name", TABLES)
def test_text_without_repeats_costs_nothing(name: str, n: int) -> None:
    texts = [random_text(N_OUTPUT, seed=seed) for seed in range(n)]
    found = race(TABLES[name], texts, [lookup() for _ in texts]).run()
    assert found >= 0.999


@pytest.mark.parametrize("name", TABLES)
def test_misleading_repeats_cost_little(name: str) -> None:
    """Four kinds of tokens: there is always a match, and it never means anything."""
    found = race(TABLES[name], [random_text(N_OUTPUT, n_vocab=4)], [lookup()]).run()
    assert found >= 0.99


@pytest.mark.parametrize(("name", "least"), [("Q4_1", 1.8), ("Q4_0", 3), ("GPU", 6)])
def test_copying_gains(name: str, least: float) -> None:
    prompt = random_text(N_OUTPUT)
    text = [token if index % 200 else -1 for index, token in enumerate(prompt)]
    assert race(TABLES[name], [text], [lookup(prompt)]).run() >= least


@pytest.mark.parametrize("name", TABLES)
def test_mixed_text_gains(name: str) -> None:
    """New passages and copied ones take turns."""
    prompt = random_text(N_OUTPUT)
    fresh = random_text(N_OUTPUT, seed=1)
    text = [prompt[index] if index // 100 % 2 else fresh[index] for index in range(N_OUTPUT)]
    assert race(TABLES[name], [text], [lookup(prompt)]).run() >= 1.25


@pytest.mark.parametrize(
    "load", [lambda n: 1 + n // 300 % 2, lambda n: 1 + n / 500, lambda n: 3 / (1 + n / 200)]
)
def test_load_that_changes(load: Callable[[int], float]) -> None:
    assert oracle_race(Q4_1, 1, 0.3, load=load).run() >= 0.98
    assert oracle_race(Q4_1, 1, 0.95, load=load).run() >= 1.3


def test_one_writer_that_repeats_among_others() -> None:
    texts = [random_text(N_OUTPUT, seed=seed) for seed in range(3)]
    found = race(Q4_0, [*texts, [7, 8, 9] * 500], [lookup() for _ in range(4)])
    assert found.run() > 1.1
    assert [writer.n_done == len(writer.text) for writer in found.writers] == [False] * 3 + [True]


# -- the parts ------------------------------------------------------------------------------------


def test_costs_unknown_at_first() -> None:
    costs = StepCosts()
    assert costs.seconds(5) == 0.0
    assert choose([Candidate([1.0, 1.0])], 8, costs) == [0]


def test_costs_between_and_beyond() -> None:
    costs = StepCosts()
    costs.observe(8, 0.020)
    costs.observe(16, 0.028)
    assert costs.seconds(1) == pytest.approx(0.020)
    assert costs.seconds(12) == pytest.approx(0.024)
    assert costs.seconds_from(16, 3) == sorted(costs.seconds_from(16, 3))
    assert costs.seconds(100_000) >= costs.seconds(4096) > 0.028


def test_a_delayed_step_does_not_hide_a_length() -> None:
    costs = learned(Q4_0)
    slow = StepCosts()
    slow.observe(1, 0.0046)
    slow.observe(6, 1.0)
    slow.observe(8, 0.0135)
    assert slow.seconds(6) == slow.seconds(8) < 2 * costs.seconds(8)


def test_one_slow_step_moves_little() -> None:
    costs = learned(Q4_1)
    costs.observe(4, 10.0)
    assert costs.seconds(4) == pytest.approx(0.0181, rel=0.07)
    fresh = StepCosts()
    fresh.observe(1, 0.0058)
    fresh.observe(8, 10.0)
    assert fresh.seconds(8) < 0.04


def test_what_drafts_are_compared_with_is_seen_again() -> None:
    costs = learned(Q4_0)
    plain = 0
    for _ in range(1000):
        length = choose([Candidate([1.0] * 7)], 16, costs)[0]
        costs.observe(1 + length, step_s(Q4_0, 1 + length))
        plain += not length
    assert 4 <= plain <= 6


def test_load_moves_costs_that_are_not_seen() -> None:
    costs = learned(Q4_1)
    for _ in range(60):
        costs.observe(1, 2 * 0.0058)
    assert costs.seconds(1) == pytest.approx(2 * 0.0058, rel=0.05)
    assert costs.seconds(8) > 1.2 * 0.0265


def test_stale_costs_are_forgotten() -> None:
    costs = StepCosts()
    costs.observe(1, 0.005)
    costs.observe(8, 0.015)
    for _ in range(5000):
        costs.observe(1, 0.005)
    assert costs.seconds(8) < 0.009
    costs.observe(8, 0.012)
    assert costs.seconds(8) == pytest.approx(0.012)


@given(st.lists(st.tuples(st.integers(1, 5000), st.floats(1e-6, 1e3)), max_size=40))
def test_costs_never_fall_with_size(steps: list[tuple[int, float]]) -> None:
    costs = StepCosts()
    for n_tokens, seconds in steps:
        costs.observe(n_tokens, seconds)
    curve = costs.seconds_from(1, 5000)
    assert curve == sorted(curve)
    assert (curve[0] > 0) == bool(steps)


def test_chances_fall_along_a_draft() -> None:
    chances = SequenceSpeculation().chances(2, 12)
    assert len(chances) == 12
    assert chances == sorted(chances, reverse=True)
    assert SequenceSpeculation().chances(8, 1) > SequenceSpeculation().chances(2, 1)


def test_unsent_drafts_teach() -> None:
    speculation = SequenceSpeculation()
    for _ in range(30):
        speculation.observe(Draft([1, 2, 3], 8), [1])
    assert speculation.chances(8, 1)[0] > 0.95
    for _ in range(30):
        speculation.observe(Draft([1, 2, 3], 8), [9])
    assert speculation.chances(8, 1)[0] < 0.1


def test_a_bad_draft_model_is_asked_ever_less() -> None:
    speculation, costs = SequenceSpeculation(), learned(Q4_0)
    costs.observe_drafting(8, 0.008)
    asked = []
    for index in range(6000):
        length = choose([Candidate(speculation.chances(0, 8))], 64, costs)[0]
        speculation.observe(Draft([1] * length, 0) if length else NO_DRAFT, [2])
        asked += [index] * bool(length)
    assert 4 <= len(asked) <= 20
    assert asked[-1] - asked[-2] >= 1000


def test_a_draft_model_that_recovers_is_used_again() -> None:
    speculation, costs = SequenceSpeculation(), learned(Q4_0)
    n_drafted = 0
    for index in range(3000):
        right = 1 if index > 500 else 2
        length = choose([Candidate(speculation.chances(0, 8))], 64, costs)[0]
        speculation.observe(Draft([1] * length, 0) if length else NO_DRAFT, [right] * (length + 1))
        n_drafted += length if index > 2000 else 0
    assert n_drafted > 4000


def test_slow_draft_models_are_not_used() -> None:
    costs = learned(Q4_0)
    assert choose([Candidate([0.9] * 8)], 8, costs) == [8]
    costs.observe_drafting(1, 0.5)
    assert choose([Candidate([0.9] * 8)], 8, costs) == [0]


def test_one_token_is_a_bad_deal_and_seven_a_good_one() -> None:
    costs = learned(Q4_1)
    assert choose([Candidate([0.99])], 16, costs) == [0]
    assert choose([Candidate([0.97**index for index in range(1, 8)])], 16, costs) == [7]


def test_forced_drafts_are_taken_whole() -> None:
    costs = learned(Q4_1)
    candidates = [Candidate([0.01, 0.0], is_forced=True), Candidate([]), Candidate([0.1])]
    assert choose(candidates, 16, costs) == [2, 0, 0]
    assert choose(candidates, 1, costs) == [1, 0, 0]


def test_short_drafts_are_dropped() -> None:
    chances = [1.0] * 3 + [0.0] * 5
    assert choose([Candidate(chances, n_min=3)], 16, learned(GPU)) == [3]
    assert choose([Candidate(chances, n_min=4)], 16, learned(GPU)) == [0]


@given(
    st.lists(st.lists(st.floats(0, 1), max_size=10), min_size=1, max_size=8),
    st.integers(0, 40),
    st.sampled_from(list(TABLES)),
)
def test_choices_keep_their_bounds(rates: list[list[float]], n_most: int, name: str) -> None:
    chances = [list(np.cumprod(each)) for each in rates]
    costs = learned(TABLES[name])
    lengths = choose([Candidate(each) for each in chances], n_most, costs)
    assert all(0 <= length <= len(each) for length, each in zip(lengths, chances, strict=True))
    assert sum(lengths) <= n_most
    if any(lengths):
        hoped = len(chances) + sum(sum(each[:n]) for n, each in zip(lengths, chances, strict=True))
        plain_s = costs.seconds(len(chances))
        assert hoped / costs.seconds(len(chances) + sum(lengths)) > len(chances) / plain_s


def test_a_small_step_is_believed_after_a_large_one() -> None:
    """The first step of a request is its prompt, which says little about single tokens."""
    costs = StepCosts()
    costs.observe(152, 0.35)
    for _ in range(12):
        costs.observe(1, 0.007)
    assert costs.seconds(1) == pytest.approx(0.007, rel=0.1)


# -- a stream for each slot -----------------------------------------------------------------------


def in_slots(*slots: int, sure: Collection[int], n_tokens: int = 16) -> list[Candidate]:
    """Candidates of which some are nearly sure of their drafts, the others have none."""
    return [
        Candidate([0.99**n for n in range(1, n_tokens + 1)] if slot in sure else (), slot_id=slot)
        for slot in slots
    ]


def test_all_that_repeat_get_drafts_of_one_length() -> None:
    lengths = choose(in_slots(0, 1, 2, 3, sure=range(4)), 512, learned(Q4_1), is_split=True)
    assert len(set(lengths)) == 1
    assert lengths[0] > 0


def test_a_draft_that_takes_a_pass_of_its_own_does_not_pay() -> None:
    costs = learned(GPU)
    assert any(choose(in_slots(0, 1, 2, 3, sure={1}, n_tokens=1), 512, costs))
    assert not any(choose(in_slots(0, 1, 2, 3, sure={1}, n_tokens=1), 512, costs, is_split=True))
    assert any(choose(in_slots(0, 1, 2, 3, sure={0, 1, 2, 3}, n_tokens=1), 512, costs, is_split=True))


def test_neighbours_share_a_pass() -> None:
    costs = learned(GPU)
    near = choose(in_slots(0, 1, 2, 3, sure={1, 2}, n_tokens=4), 512, costs, is_split=True)
    far = choose(in_slots(0, 1, 2, 3, sure={0, 3}, n_tokens=4), 512, costs, is_split=True)
    assert sum(near) > sum(far)


@given(
    st.lists(st.tuples(st.integers(0, 15), st.lists(st.floats(0, 1), max_size=10)), min_size=2, max_size=8),
    st.integers(0, 40),
    st.sampled_from(list(TABLES)),
)
def test_even_choices_keep_their_bounds(
    drafts: list[tuple[int, list[float]]], n_most: int, name: str
) -> None:
    chances = {slot: list(np.cumprod(rates)) for slot, rates in sorted(drafts)}
    candidates = [Candidate(each, slot_id=slot) for slot, each in chances.items()]
    costs = learned(TABLES[name])
    lengths = choose(candidates, n_most, costs, is_split=True)
    assert sum(lengths) <= n_most
    assert all(0 <= n <= len(each.chances) for n, each in zip(lengths, candidates, strict=True))
    if any(lengths) and len(candidates) > 1:
        assert len(set(lengths) - {0}) == 1
        pieces = even_pieces(
            ((each.slot_id, 1 + n) for each, n in zip(candidates, lengths, strict=True)), 512
        )
        plain = even_pieces(((each.slot_id, 1) for each in candidates), 512)
        hoped = len(chances) + sum(sum(each.chances[:n]) for each, n in zip(candidates, lengths, strict=True))
        seconds, plain_s = (sum(map(costs.seconds, each)) for each in (pieces, plain))
        assert hoped / seconds > len(chances) / plain_s


def test_pieces_share_the_seconds_of_a_step() -> None:
    costs = learned(Q4_1)
    for _ in range(30):
        costs.observe_pieces((8, 16), step_s(Q4_1, 8) + step_s(Q4_1, 16))
    assert costs.seconds(8) == pytest.approx(step_s(Q4_1, 8), rel=0.1)
    assert costs.seconds(16) == pytest.approx(step_s(Q4_1, 16), rel=0.1)
    for _ in range(30):
        costs.observe_pieces((8, 16), 3 * (step_s(Q4_1, 8) + step_s(Q4_1, 16)))
    assert costs.seconds(8) > 1.5 * step_s(Q4_1, 8)


@pytest.mark.parametrize("slots", [(0, 2), (0, 1, 3), (0, 1)])
def test_drafts_stay_where_slots_have_gaps(slots: tuple[int, ...]) -> None:
    """Steps without drafts come in pieces, whose costs have to be known, not that of a step as a whole."""
    costs = learned(Q4_1)
    pieces = even_pieces(((slot, 1) for slot in slots), 512)
    for _ in range(300):
        costs.observe_pieces(pieces, sum(step_s(Q4_1, piece) for piece in pieces))
    assert any(choose(in_slots(*slots, sure=slots), 512, costs, is_split=True))
