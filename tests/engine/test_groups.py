"""Jobs that share a prompt, adapters that take turns, and slots that are saved, case by case."""

from __future__ import annotations

import pytest

from tests.support.runner import solo_output
from tests.support.scheduler import Machine
from wingman.engine.types import Failed, FailureKind, Finished, SlotMove, Started

PROMPT = [1, *range(10, 30)]


def add_group(machine: Machine, first_id: int, prompt: list[int], n: int, **fields: object) -> None:
    machine.add(first_id, prompt, **fields)
    for job_id in range(first_id + 1, first_id + n):
        machine.add(job_id, prompt, **(fields | {"fork_of": first_id, "id_slot": -1}))


def test_a_prompt_of_several_answers_is_evaluated_once() -> None:
    machine = Machine(n_slots=4, n_batch=8)
    add_group(machine, 1, PROMPT, 4, n_predict=5)
    machine.run()
    outputs = [list(machine.finished(job_id).tokens) for job_id in range(1, 5)]
    assert outputs == [solo_output(PROMPT, 5, 64)] * 4
    assert machine.runner.n_computed == len(PROMPT) + 4 * 4, "the first token of each comes with the prompt"
    assert [machine.finished(job_id).is_fork for job_id in range(1, 5)] == [False, True, True, True]
    timings = machine.finished(2).timings
    assert (timings.cache_n, timings.prompt_n) == (len(PROMPT), 0)


@pytest.mark.parametrize("when", ["queued", "prefill", "between run and apply"])
@pytest.mark.parametrize("gone", [1, 2])
def test_answers_outlive_one_of_them(when: str, gone: int) -> None:
    machine = Machine(n_slots=3, n_batch=8)
    add_group(machine, 1, PROMPT, 3, n_predict=5)
    if when == "queued":
        machine.scheduler.cancel(gone)
    elif when == "prefill":
        machine.step()
        machine.scheduler.cancel(gone)
    else:
        for _ in range(2):
            machine.step()
        machine.step(cancel=gone)
    machine.run()
    for job_id in {1, 2, 3} - {gone}:
        assert list(machine.finished(job_id).tokens) == solo_output(PROMPT, 5, 64)
    assert not [e for e in machine.events if isinstance(e, Finished) and e.job_id == gone]


def test_a_group_waits_for_slots_together_and_nobody_passes_it() -> None:
    machine = Machine(n_slots=2)
    machine.add(1, [1, 5], n_predict=4)
    machine.step()
    add_group(machine, 2, PROMPT, 2, n_predict=2)
    machine.add(4, [1, 6], n_predict=1)
    machine.run()
    assert [e.job_id for e in machine.events if isinstance(e, Started)] == [1, 2, 3, 4]


def test_a_group_that_asks_for_a_slot_does_not_starve() -> None:
    machine = Machine(n_slots=2)
    machine.add(1, [1, 5], n_predict=4)
    machine.add(2, [1, 6], n_predict=2)
    machine.step()
    add_group(machine, 3, PROMPT, 2, n_predict=2, id_slot=0)
    for job_id in range(5, 40):  # there is always somebody else
        machine.add(job_id, [1, 7], n_predict=3)
        machine.step()
    assert machine.finished(3).slot_id == 0
    assert list(machine.finished(4).tokens) == solo_output(PROMPT, 2, 64)


def test_adapters_take_turns_and_share_no_cache() -> None:
    machine = Machine(n_slots=2)
    scales = {1: (0.0, 1.0), 2: (1.0, 0.0)}
    for job_id, lora in scales.items():
        machine.add(job_id, PROMPT, n_predict=6, lora=lora)
    machine.run()
    for job_id, lora in scales.items():
        assert list(machine.finished(job_id).tokens) == solo_output(PROMPT, 6, 64, lora)
    assert {batch.lora for batch in machine.batches} == set(scales.values())
    machine.add(3, PROMPT, n_predict=1, lora=(0.0, 0.0))
    machine.run()
    assert machine.finished(3).timings.cache_n == 0


def test_a_failed_step_ends_what_generates_with_other_adapters() -> None:
    machine = Machine(n_slots=2)
    machine.add(1, PROMPT, n_predict=30, lora=(1.0,))
    machine.step()
    machine.step()
    machine.add(2, PROMPT, n_predict=30, lora=(2.0,))
    machine.step(fails=True)
    machine.run()
    assert {e.job_id for e in machine.events if isinstance(e, Failed)} == {1, 2}


def test_a_prompt_waits_for_another_adapters_answer_in_a_full_cache() -> None:
    machine = Machine(n_slots=2, n_ctx_slot=64, n_ctx=64, n_batch=32, is_unified=True)
    prompts = {1: [1, *[5] * 30], 2: [1, *[6] * 30]}
    for job_id, prompt in prompts.items():
        machine.add(job_id, prompt, n_predict=12, lora=(float(job_id),))
    machine.run()
    for job_id, prompt in prompts.items():
        assert list(machine.finished(job_id).tokens) == solo_output(prompt, 12, 64, (float(job_id),))


def test_a_group_too_large_for_a_shared_cache_fails_alone() -> None:
    machine = Machine(n_slots=4, n_ctx_slot=64, n_ctx=64, n_batch=32, is_unified=True)
    add_group(machine, 1, [1, *[5] * 30], 3, n_predict=2)
    machine.add(4, [1, 6, 7], n_predict=2)
    machine.step()
    assert [e.job_id for e in machine.events if isinstance(e, Failed)] == [1]
    machine.run()
    assert list(machine.finished(4).tokens) == solo_output([1, 6, 7], 2, 64)


def test_a_restored_slot_saves_the_evaluation() -> None:
    machine = Machine(n_slots=2)
    machine.add(1, PROMPT, n_predict=3, id_slot=0, lora=(1.0,))
    machine.run()
    machine.change(2, 0, SlotMove.SAVE)
    machine.change(3, 0, SlotMove.ERASE)
    machine.step()
    saved = machine.changed(2)
    assert machine.changed(3).tokens == saved.tokens
    machine.change(4, 1, SlotMove.RESTORE, tokens=saved.tokens, state=saved.state, lora=(1.0,))
    machine.add(5, [*saved.tokens, 9], n_predict=3, lora=(1.0,))
    machine.run()
    done = machine.finished(5)
    assert (done.slot_id, done.timings.cache_n) == (1, len(saved.tokens))
    assert list(done.tokens) == solo_output([*saved.tokens, 9], 3, 64, (1.0,))


def test_a_change_waits_for_its_slot_and_keeps_others_out() -> None:
    machine = Machine(n_slots=1)
    machine.add(1, [1, 5], n_predict=4)
    machine.step()
    machine.change(2, 0, SlotMove.ERASE)
    machine.add(3, [1, 5], n_predict=1)
    machine.run()
    assert machine.changed(2).tokens[:2] == (1, 5)
    assert machine.finished(3).timings.cache_n == 0


def test_a_damaged_state_leaves_the_slot_empty() -> None:
    machine = Machine(n_slots=1)
    machine.add(1, PROMPT, n_predict=1)
    machine.run()
    machine.change(2, 0, SlotMove.RESTORE, tokens=(1, 2), state=b"x")
    machine.add(3, PROMPT, n_predict=1)
    machine.run()
    assert Failed(2, FailureKind.INVALID, "damaged") in machine.events
    assert machine.finished(3).timings.cache_n == 0


def test_idle_slots_make_room_for_a_restore_in_a_shared_cache() -> None:
    machine = Machine(n_slots=2, n_ctx_slot=32, n_ctx=32, is_unified=True)
    machine.add(1, PROMPT, n_predict=1, id_slot=0)
    machine.run()
    machine.change(2, 0, SlotMove.SAVE)
    machine.step()
    saved = machine.changed(2)
    machine.change(3, 1, SlotMove.RESTORE, tokens=saved.tokens, state=saved.state)
    machine.run()
    assert machine.changed(3).tokens == saved.tokens
    assert [len(slot.tokens) for slot in machine.scheduler._cache.slots] == [0, len(saved.tokens)]


def test_a_restore_without_room_leaves_the_slot_as_it_was() -> None:
    machine = Machine(n_slots=2, n_ctx_slot=32, n_ctx=32, is_unified=True)
    machine.add(1, [1, 5], n_predict=1, id_slot=1)
    machine.run()
    held = list(machine.scheduler._cache.slots[1].tokens)
    machine.add(2, PROMPT, id_slot=0, n_predict=4)
    machine.step()
    machine.change(3, 1, SlotMove.RESTORE, tokens=tuple(range(1, 31)), state=b"x" * 120)
    machine.step()
    assert Failed(3, FailureKind.UNAVAILABLE, "no room") in machine.events
    assert machine.scheduler._cache.slots[1].tokens == held != []
    machine.run()
    assert list(machine.finished(2).tokens) == solo_output(PROMPT, 4, 32)


def test_the_end_refuses_changes_and_finishes_answers() -> None:
    machine = Machine(n_slots=2, n_batch=32)
    add_group(machine, 1, PROMPT, 2)
    machine.step()
    machine.change(3, 0, SlotMove.SAVE)
    machine.scheduler.end_all()
    machine.collect()
    assert machine.scheduler.is_idle
    assert {e.job_id for e in machine.events if isinstance(e, Finished)} == {1, 2}
    assert [e.kind for e in machine.events if isinstance(e, Failed)] == [FailureKind.UNAVAILABLE]
