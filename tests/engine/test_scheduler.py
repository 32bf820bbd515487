"""The scheduler against a scripted runner, case by case; any order of everything is in test_any_order."""

from __future__ import annotations

import pytest

from tests.support.runner import EOS, next_token, solo_output
from tests.support.scheduler import Machine
from wingman.engine.runner import KvRemove, KvShift
from wingman.engine.types import Failed, FailureKind, Finished, Progress, Started, StopType


def test_a_job_alone_gets_its_tokens() -> None:
    machine = Machine()
    prompt = [1, 20, 30]
    machine.add(1, prompt, n_predict=10)
    machine.run()
    done = machine.finished(1)
    assert list(done.tokens) == solo_output(prompt, 10, 64)
    assert done.n_prompt == 3
    assert done.timings.prompt_n == 3
    assert done.timings.predicted_n == len(done.tokens)
    assert done.n_held == 3 + len(done.tokens) - 1


def test_neighbours_share_a_batch_and_do_not_change_each_other() -> None:
    machine = Machine()
    prompts = {1: [1, 40], 2: [1, 50, 60], 3: [1, 70]}
    for job_id, prompt in prompts.items():
        machine.add(job_id, prompt, n_predict=8)
    machine.run()
    for job_id, prompt in prompts.items():
        assert list(machine.finished(job_id).tokens) == solo_output(prompt, 8, 64)
    assert any(len(batch.chunks) == 2 for batch in machine.batches)


def test_a_long_prompt_never_stops_a_generation() -> None:
    machine = Machine(n_ctx_slot=256, n_batch=32)
    machine.add(1, [1, 5], n_predict=40)
    machine.step()
    machine.add(2, [1, *range(4, 204)], n_predict=1)
    while machine.scheduler.snapshot().slots[1].n_decoded == 0 and not machine.scheduler.is_idle:
        batch = machine.step()
        assert batch is not None
        assert batch.n_tokens <= 32
        if any(chunk.job_id == 1 for chunk in machine.batches[-2].chunks) and 1 in machine.scheduler._jobs:
            assert any(chunk.job_id == 1 for chunk in batch.chunks)


def prompt_steps(machine: Machine) -> dict[int, int]:
    """In which step the prompt of each job was complete."""
    return {
        chunk.job_id: index
        for index, batch in enumerate(machine.batches)
        for start in batch.samplers
        for chunk in batch.chunks
        if chunk.slot_id == start.slot_id
    }


def test_short_prompts_wait_a_step_for_slots_that_become_free() -> None:
    machine = Machine(n_slots=2)
    machine.add(1, [1, 5], n_predict=4)
    machine.step()
    machine.add(2, [1, 6], n_predict=4)  # one step behind
    machine.add(3, [1, 7], n_predict=4)
    machine.add(4, [1, 8], n_predict=4)
    machine.run()
    steps = prompt_steps(machine)
    assert steps[2] == steps[1] + 1
    assert steps[3] == steps[4], "the slot of 2 becomes free a step after that of 1"


def test_a_prompt_waits_for_others_only_once() -> None:
    machine = Machine(n_slots=3)
    machine.add(1, [1, 5], n_predict=4)
    machine.step()
    machine.add(2, [1, 6], n_predict=4)
    machine.step()
    machine.add(3, [1, 7], n_predict=4)
    for job_id in (4, 5, 6):
        machine.add(job_id, [1, 8 + job_id], n_predict=4)
    machine.run()
    steps = prompt_steps(machine)
    assert steps[1] + 1 == steps[2] == steps[3] - 1
    assert steps[4] == steps[5] == steps[6] - 1


@pytest.mark.parametrize("when", ["queued", "prefill", "between run and apply", "decode"])
def test_cancel_frees_the_slot_within_one_step(when: str) -> None:
    machine = Machine(n_slots=1, n_batch=4)
    machine.add(1, [1, 8], n_predict=5)
    neighbour = [1, 9, 9]
    if when == "queued":
        machine.step()
        machine.add(2, [1, *[50] * 10], n_predict=5)
        machine.scheduler.cancel(2)
    else:
        machine.run()
        machine.add(2, [1, *[50] * 10], n_predict=50)
        machine.step()
        if when == "decode":
            machine.step()
            machine.step()
        if when == "between run and apply":
            machine.step(cancel=2)
        else:
            machine.scheduler.cancel(2)
    machine.add(3, neighbour, n_predict=5)
    machine.run()
    assert list(machine.finished(3).tokens) == solo_output(neighbour, 5, 64)
    assert not [e for e in machine.events if isinstance(e, Finished | Failed) and e.job_id == 2]


def test_prefix_reuse_evaluates_only_the_rest() -> None:
    machine = Machine()
    prompt = [1, *range(10, 20)]
    machine.add(1, prompt, n_predict=2)
    machine.run()
    machine.add(2, [*prompt, 99], n_predict=2)
    machine.run()
    done = machine.finished(2)
    assert done.slot_id == machine.finished(1).slot_id
    assert (done.timings.cache_n, done.timings.prompt_n) == (11, 1)
    machine.add(3, prompt, n_predict=2)
    machine.run()
    assert machine.finished(3).timings.prompt_n == 1
    machine.add(4, prompt, n_predict=2, cache_prompt=False)
    machine.run()
    assert machine.finished(4).timings.cache_n == 0


def test_a_cache_that_cannot_roll_back_is_reused_only_whole() -> None:
    machine = Machine(n_slots=1, can_rollback=False)
    machine.add(1, [1, 10, 11], n_predict=3)
    machine.run()
    held = [1, 10, 11, *machine.finished(1).tokens[:-1]]
    machine.add(2, [*held, 77], n_predict=1)
    machine.run()
    assert machine.finished(2).timings.cache_n == len(held)
    machine.add(3, [1, 10, 12], n_predict=1)
    machine.run()
    assert machine.finished(3).timings.cache_n == 0


def test_id_slot_waits_for_its_slot_and_lets_others_by() -> None:
    machine = Machine()
    machine.add(1, [1, 5], n_predict=3, id_slot=0)
    machine.step()
    machine.add(2, [1, 6], n_predict=3, id_slot=0)
    machine.add(3, [1, 7], n_predict=3)
    machine.step()
    started = [(e.job_id, e.slot_id) for e in machine.events if isinstance(e, Started)]
    assert started == [(1, 0), (3, 1)]
    machine.run()
    assert machine.finished(2).slot_id == 0


def test_context_full_ends_with_limit() -> None:
    machine = Machine(n_ctx_slot=16)
    prompt = [1, 4, 4, 4]
    expected = solo_output(prompt, -1, 16)
    assert len(expected) == 12, "the scripted text must not end by itself"
    machine.add(1, prompt)
    machine.run()
    done = machine.finished(1)
    assert done.n_prompt + len(done.tokens) == 16
    assert (done.stop_type, done.truncated) == (StopType.LIMIT, True)


def test_context_shift_goes_on() -> None:
    machine = Machine(n_ctx_slot=16, shifts_context=True, adds_bos=True)
    machine.add(1, [1, 4, 4, 4], n_predict=40, n_keep=2)
    machine.run()
    done = machine.finished(1)
    assert done.truncated or done.stop_type is StopType.EOS
    ops = [op for batch in machine.batches for op in batch.kv]
    assert KvRemove(0, 3, 9) in ops
    assert KvShift(0, 9, 15, -6) in ops


def test_n_predict_zero_caches_the_prompt_and_generates_nothing() -> None:
    machine = Machine()
    machine.add(1, [1, 5, 6], n_predict=0, stream=True)
    machine.run()
    done = machine.finished(1)
    assert (done.tokens, done.text, done.stop_type, done.n_held) == ((), "", StopType.LIMIT, 3)
    assert done.timings.to_dict()["predicted_per_second"] == 0.0


def test_progress_counts_from_the_reused_tokens() -> None:
    machine = Machine(n_batch=4)
    machine.add(1, [1, *range(10, 19)], n_predict=1, stream=True, return_progress=True)
    machine.run()
    assert [(e.processed, e.total) for e in machine.events if isinstance(e, Progress)] == [
        (0, 10), (4, 10), (8, 10), (10, 10),
    ]  # fmt: skip


def test_a_failed_step_ends_its_jobs_and_nothing_else() -> None:
    machine = Machine(n_slots=3, n_batch=4)
    machine.add(1, [1, 5], n_predict=30)
    machine.add(2, [1, *[9] * 12], n_predict=3)
    machine.add(3, [1, *[8] * 12], n_predict=3)
    machine.step()
    batch = machine.scheduler.plan(5.0)
    assert batch is not None
    in_batch = {chunk.job_id for chunk in batch.chunks}
    assert in_batch < {1, 2, 3}
    machine.runner.reset()
    machine.scheduler.fail_batch(batch, "broken")
    machine.run()
    failed = {e.job_id for e in machine.events if isinstance(e, Failed)}
    assert failed == in_batch
    for job_id in {1, 2, 3} - in_batch:
        prompt = [1, *[9 if job_id == 2 else 8] * 12]
        assert list(machine.finished(job_id).tokens) == solo_output(prompt, 3, 64)


def test_end_all_finishes_what_runs_and_fails_what_waits() -> None:
    machine = Machine(n_slots=1)
    machine.add(1, [1, 5], n_predict=50, stream=True)
    machine.add(2, [1, 6], n_predict=50)
    machine.step()
    machine.step()
    machine.scheduler.end_all()
    machine.events += machine.scheduler.take_events()
    assert machine.finished(1).stop_type is StopType.LIMIT
    assert Failed(2, FailureKind.UNAVAILABLE, "the model is being stopped") in machine.events
    assert machine.scheduler.is_idle


def test_unified_cache_ends_one_job_when_full_never_all() -> None:
    machine = Machine(n_slots=2, n_ctx_slot=24, n_ctx=24, is_unified=True)
    machine.add(1, [1, 4, 4, 4])
    machine.add(2, [1, 5, 5, 5], n_predict=14)
    machine.run()
    assert list(machine.finished(2).tokens) == solo_output([1, 5, 5, 5], 14, 24)
    assert (machine.finished(1).truncated, machine.finished(2).truncated) == (True, False)


def test_in_a_unified_cache_a_newcomer_waits_rather_than_cut_a_neighbour_off() -> None:
    machine = Machine(n_slots=2, n_ctx_slot=128, n_ctx=128, n_batch=64, is_unified=True)
    running = [1, 4, 4, 4]
    expected = solo_output(running, 40, 128)
    newcomer = [1, *[9] * 100]
    assert len(running) + len(expected) + len(newcomer) > 128, "both at once must not fit"
    machine.add(1, running, n_predict=40)
    machine.step()
    machine.add(2, newcomer, n_predict=3)
    machine.run()
    assert list(machine.finished(1).tokens) == expected
    assert not machine.finished(1).truncated
    assert list(machine.finished(2).tokens) == solo_output(newcomer, 3, 128)


def test_prompts_that_fit_alone_take_turns_in_a_unified_cache() -> None:
    machine = Machine(n_slots=4, n_ctx_slot=128, n_ctx=128, n_batch=32, is_unified=True)
    prompts = {job_id: [1, *[10 + job_id] * 99] for job_id in range(1, 5)}
    for job_id, prompt in prompts.items():
        machine.add(job_id, prompt, n_predict=5)
    machine.run()
    for job_id, prompt in prompts.items():
        assert list(machine.finished(job_id).tokens) == solo_output(prompt, 5, 128)


def test_the_scripted_text_ends_now_and_then() -> None:
    ends = sum(next_token([1, a, b]) == EOS for a in range(3, 60) for b in range(3, 60))
    assert 0 < ends < 57 * 57
