"""The scheduler against a scripted runner: cases one by one, then any order of everything."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.support.runner import EOS, ScriptedRunner, next_token, solo_output
from wingman.config import SamplingParams
from wingman.engine.runner import Batch, KvRemove, KvShift
from wingman.engine.scheduler import Scheduler, SchedulerLimits
from wingman.engine.types import (
    Failed,
    FailureKind,
    Finished,
    Job,
    JobEvent,
    Progress,
    Started,
    StopType,
    TextDelta,
)

GREEDY = SamplingParams(temperature=0.0)


class Machine:
    """A scheduler with its runner and a clock that ticks a second a step."""

    def __init__(self, n_slots: int = 2, n_ctx_slot: int = 64, n_batch: int = 16, **limits: object) -> None:
        n_ctx = limits.pop("n_ctx", None)
        self.runner = ScriptedRunner(n_slots, n_ctx_slot, n_ctx, n_batch)  # type: ignore[arg-type]
        fields = {
            "n_slots": n_slots, "n_ctx_slot": n_ctx_slot, "n_ctx_total": self.runner.n_ctx,
            "n_batch": n_batch, "n_ubatch": n_batch, **limits,
        }  # fmt: skip
        self.scheduler = Scheduler(SchedulerLimits(**fields), self.runner.tokenizer)  # type: ignore[arg-type]
        self.now = 0.0
        self.events: list[JobEvent] = []
        self.batches: list[Batch] = []

    def add(self, job_id: int, prompt: list[int], **fields: object) -> Job:
        job = Job(id=job_id, prompt=tuple(prompt), sampling=GREEDY, **fields)  # type: ignore[arg-type]
        self.scheduler.add(job, self.now)
        return job

    def step(self, cancel: int | None = None) -> Batch | None:
        """Plan, run, perhaps cancel in between, apply."""
        self.now += 1.0
        batch = self.scheduler.plan(self.now)
        if batch is not None:
            self.batches.append(batch)
            samples = self.runner.run(batch)
            if cancel is not None:
                self.scheduler.cancel(cancel)
            self.scheduler.apply(batch, samples, self.now + 0.5)
        self.scheduler.check_integrity()
        self.events += self.scheduler.take_events()
        return batch

    def run(self) -> None:
        for _ in range(1000):
            if self.scheduler.is_idle:
                return
            self.step()
        raise AssertionError("the scheduler does not come to an end")

    def finished(self, job_id: int) -> Finished:
        (event,) = (e for e in self.events if isinstance(e, Finished) and e.job_id == job_id)
        return event


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
    assert Failed(2, FailureKind.UNAVAILABLE, "the server is shutting down") in machine.events
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


class AnyOrder(RuleBasedStateMachine):
    """Jobs come, run and go in any order; each must get exactly what it would get alone."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = Machine(n_slots=3, n_ctx_slot=48, n_batch=8)
        self.jobs: dict[int, Job] = {}
        self.cancelled: set[int] = set()

    @rule(
        prompt=st.lists(st.integers(3, 9), min_size=1, max_size=20),
        n_predict=st.integers(-1, 12),
        stream=st.booleans(),
        cache=st.booleans(),
        id_slot=st.integers(-1, 2),
    )
    def add(self, prompt: list[int], n_predict: int, stream: bool, cache: bool, id_slot: int) -> None:
        job_id = len(self.jobs) + 1
        fields = {"n_predict": n_predict, "stream": stream, "cache_prompt": cache, "id_slot": id_slot}
        self.jobs[job_id] = self.machine.add(job_id, [1, *prompt], **fields)

    @rule()
    def step(self) -> None:
        self.machine.step()

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.jobs)))
        if job_id not in self._ended():
            self.cancelled.add(job_id)
        self.machine.scheduler.cancel(job_id)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel_during_the_step(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.jobs)))
        ended = self._ended()
        if self.machine.step(cancel=job_id) is not None and job_id not in ended:
            self.cancelled.add(job_id)

    def _ended(self) -> set[int]:
        return {e.job_id for e in self.machine.events if isinstance(e, Finished | Failed)}

    @invariant()
    def slots_and_jobs_agree(self) -> None:
        self.machine.scheduler.check_integrity()

    def teardown(self) -> None:
        self.machine.run()
        ends = [e for e in self.machine.events if isinstance(e, Finished | Failed)]
        assert sorted(e.job_id for e in ends) == sorted(set(self.jobs) - self.cancelled)
        for end in ends:
            assert isinstance(end, Finished)
            job = self.jobs[end.job_id]
            assert list(end.tokens) == solo_output(job.prompt, job.n_predict, 48)
            if job.stream:
                deltas = [e for e in self.machine.events if isinstance(e, TextDelta) and e.job_id == job.id]
                assert "".join(delta.text for delta in deltas) == end.text
                assert [token for delta in deltas for token in delta.tokens] == list(end.tokens)
        assert all(not slot.is_busy for slot in self.machine.scheduler.snapshot().slots)


AnyOrder.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase


def test_the_scripted_text_ends_now_and_then() -> None:
    ends = sum(next_token([1, a, b]) == EOS for a in range(3, 60) for b in range(3, 60))
    assert 0 < ends < 57 * 57
