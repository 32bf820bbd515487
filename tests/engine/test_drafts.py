"""Who guesses for which sequence, how far, what is counted, and that nobody reads another text for it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.support.runner import solo_output
from tests.support.scheduler import GREEDY, Machine
from wingman.engine.drafting import Draft, DraftRequest
from wingman.engine.drafts import Drafts, Opening
from wingman.engine.runner import RunnerFailure
from wingman.engine.sequence import Sequence as Generating
from wingman.engine.types import Drafting, DraftKind, Job

MODEL, LOOKUP, AUTO = DraftKind.MODEL, DraftKind.LOOKUP, DraftKind.AUTO
LOOP = [1, 5, 6, 7, 8, 5, 6, 7, 8, 5, 6]


class Oracle:
    """A draft model that says 40, 41, 42, ..., at most `n_says` of them, and writes down what it was asked."""

    def __init__(self, n_says: int = 100) -> None:
        self.asked: list[DraftRequest] = []
        self._n_says = n_says

    def __call__(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        self.asked += requests
        return [Draft(list(range(40, 40 + min(each.n_max, self._n_says))), 0) for each in requests]


def opening(drafting: Drafting, prompt: Sequence[int] = LOOP, job_id: int = 1, n_most: int = 50) -> Opening:
    """A sequence that has said its first token."""
    sequence = Generating(Job(job_id, tuple(prompt[:-1]), GREEDY, drafting=drafting), 0.0)
    sequence.slot_id = job_id
    sequence.output.append(prompt[-1])
    return Opening(sequence, list(prompt), n_most)


def plan(drafts: Drafts, *openings: Opening, n_most: int = 100) -> list[list[int]]:
    return drafts.plan(openings, n_most)


def with_costs(ask_model: Oracle | None, slope: float) -> Drafts:
    """Steps of n tokens take 1 + slope * (n - 1) seconds."""
    drafts = Drafts(ask_model)
    for n_tokens in (1, 2, 4, 8, 16, 32) * 3:
        drafts.observe([n_tokens], 1 + slope * (n_tokens - 1))
    return drafts


def test_lookup_goes_on_as_the_text_did() -> None:
    assert plan(Drafts(), opening(Drafting(LOOKUP, n_max=6))) == [[7, 8, 5, 6, 7, 8]]
    assert plan(Drafts(), opening(Drafting(LOOKUP), [1, 5, 6, 7, 8])) == [[]], "nothing came twice"


def test_model_is_asked_for_what_is_wanted() -> None:
    oracle = Oracle()
    first, second = Drafting(MODEL, n_max=3, p_min=0.5), Drafting(MODEL, n_max=9)
    guesses = plan(Drafts(oracle), opening(first), opening(second, job_id=2, n_most=4))
    assert guesses == [[40, 41, 42], [40, 41, 42, 43]]
    text = [*LOOP, -1]  # what the slots hold, and the token to come
    assert oracle.asked == [DraftRequest(1, text, 3, 0.5), DraftRequest(2, text, 4, 0.0)]


@pytest.mark.parametrize(
    ("kind", "has_model", "guesses", "n_asked"),
    [
        (DraftKind.NONE, True, [], 0),
        (MODEL, False, [], 0),
        (MODEL, True, [40, 41], 1),
        (LOOKUP, True, [7, 8], 0),
        (LOOKUP, False, [7, 8], 0),
        (AUTO, True, [40, 41], 1),
        (AUTO, False, [7, 8], 0),
    ],
)
def test_kinds(kind: DraftKind, has_model: bool, guesses: list[int], n_asked: int) -> None:
    oracle = Oracle()
    drafts = with_costs(oracle if has_model else None, slope=0.01)
    assert plan(drafts, opening(Drafting(kind, n_max=2))) == [guesses]
    assert len(oracle.asked) == n_asked


@pytest.mark.parametrize("kind", [LOOKUP, MODEL, AUTO])
@pytest.mark.parametrize(("drafting", "n_most"), [({"n_max": 0}, 9), ({}, 0), ({}, -3)])
def test_no_room_for_guesses(kind: DraftKind, drafting: dict[str, int], n_most: int) -> None:
    oracle = Oracle()
    assert plan(Drafts(oracle), opening(Drafting(kind, **drafting), n_most=n_most)) == [[]]
    assert not oracle.asked


def test_shorter_than_wanted_is_not_used() -> None:
    for n_says, guesses in ((3, []), (4, [40, 41, 42, 43])):
        assert plan(Drafts(Oracle(n_says)), opening(Drafting(MODEL, n_max=8, n_min=4))) == [guesses]
    assert plan(Drafts(), opening(Drafting(LOOKUP, n_max=8, n_min=9))) == [[]]


def test_auto_leaves_alone_what_does_not_pay() -> None:
    assert plan(with_costs(None, slope=1.0), opening(Drafting(AUTO))) == [[]]
    assert plan(Drafts(), opening(Drafting(AUTO))) == [[]], "nothing is known of the costs"
    assert plan(with_costs(None, slope=1.0), opening(Drafting(LOOKUP, n_max=2))) == [[7, 8]], "it is forced"


def test_guesses_share_what_room_there_is() -> None:
    wishes = [opening(Drafting(LOOKUP, n_max=6), job_id=job_id) for job_id in (1, 2)]
    assert plan(Drafts(), *wishes, n_most=11) == [[7, 8, 5, 6, 7]] * 2, "forced ones share equally"
    drafts = with_costs(None, slope=0.001)
    wishes = [opening(Drafting(AUTO, n_max=6), job_id=job_id) for job_id in (1, 2)]
    assert sum(map(len, plan(drafts, *wishes, n_most=5))) == 5


def test_wrong_guesses_end_them() -> None:
    drafts, one = with_costs(None, slope=0.3), opening(Drafting(AUTO, n_max=4))
    assert plan(drafts, one)[0]
    for new in range(100, 140):  # it says something else each time
        one.sequence.output.extend((new, 5, 6))
        guesses = plan(drafts, one)[0]
    assert guesses == []


def test_an_ended_job_is_forgotten() -> None:
    drafts, one = Drafts(), opening(Drafting(LOOKUP, n_max=2))
    plan(drafts, one)
    drafts.forget(1)
    drafts.forget(1)
    assert plan(drafts, opening(Drafting(LOOKUP, n_max=2), [1, 9, 8, 9])) == [[]]


# -- in the scheduler ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(DraftKind))
def test_text_is_the_same_and_counts_are_true(kind: DraftKind) -> None:
    machine = Machine(n_slots=2)
    prompts = {1: [1, 9, 30], 2: [1, 8, 9, 8, 9]}
    for job_id, prompt in prompts.items():
        machine.add(job_id, prompt, n_predict=20, drafting=Drafting(kind, n_max=5))
    machine.run()
    n_drafted = n_accepted = 0
    for job_id, prompt in prompts.items():
        end = machine.finished(job_id)
        assert list(end.tokens) == solo_output(prompt, 20, 64)
        assert end.timings.draft_n == sum(
            chunk.n_draft for batch in machine.batches for chunk in batch.chunks if chunk.job_id == job_id
        )
        n_steps = sum(chunk.job_id == job_id and chunk.position >= len(prompt)
                      for batch in machine.batches for chunk in batch.chunks)  # fmt: skip
        assert end.timings.predicted_n == 1 + n_steps + end.timings.draft_n_accepted
        n_drafted, n_accepted = n_drafted + end.timings.draft_n, n_accepted + end.timings.draft_n_accepted
    view = machine.scheduler.snapshot()
    assert (view.draft_tokens_total, view.draft_tokens_accepted_total) == (n_drafted, n_accepted)
    assert (n_accepted > 0) is (kind in (MODEL, AUTO)), (
        "the model is right for a while, the text repeats nothing"
    )


@pytest.mark.parametrize("n_predict", [1, 2, 3, 7])
def test_no_guess_beyond_the_last_token(n_predict: int) -> None:
    machine = Machine()
    machine.runner.choose = lambda slot_id, held: LOOP[1 + (held[-1] - 4) % 4]  # type: ignore[method-assign]
    machine.add(1, LOOP, n_predict=n_predict, drafting=Drafting(LOOKUP))
    machine.run()
    end = machine.finished(1)
    assert list(end.tokens) == [7, 8, 5, 6, 7, 8, 5][:n_predict]
    assert end.timings.draft_n == end.timings.draft_n_accepted == max(n_predict - 2, 0)
    assert end.n_held == len(LOOP) + n_predict - 1


def test_full_context_ends_it_with_and_without_guesses() -> None:
    ends = []
    for kind in (DraftKind.NONE, LOOKUP):
        machine = Machine(n_ctx_slot=32)
        machine.runner.choose = lambda slot_id, held: LOOP[1 + (held[-1] - 4) % 4]  # type: ignore[method-assign]
        machine.add(1, LOOP, drafting=Drafting(kind))
        machine.run()
        ends.append((machine.finished(1).tokens, machine.finished(1).n_held, machine.finished(1).truncated))
    assert ends[0] == ends[1]


def test_prompts_go_before_guesses() -> None:
    machine = Machine(n_batch=16)
    machine.runner.choose = lambda slot_id, held: LOOP[1 + (held[-1] - 4) % 4]  # type: ignore[method-assign]
    machine.add(1, LOOP, n_predict=20, drafting=Drafting(LOOKUP))
    machine.step()
    machine.add(2, [1, *range(10, 60)], n_predict=1)
    machine.run()
    mixed = [batch for batch in machine.batches if {chunk.job_id for chunk in batch.chunks} == {1, 2}]
    assert mixed
    assert not any(chunk.n_draft for batch in mixed for chunk in batch.chunks)


def test_a_draft_model_that_fails_costs_only_its_guesses() -> None:
    def fail(_: object) -> list[Draft]:
        raise RunnerFailure("scripted")

    assert plan(Drafts(fail), opening(Drafting(MODEL, n_max=3))) == [[]]
