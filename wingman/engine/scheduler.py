"""What to compute next and what became of it: continuous batching as a pure state machine.

A step is `plan` -> (someone runs the batch) -> `apply`. Between steps jobs join with `add` and
leave with `cancel`. A plan takes one token from each generating sequence first, then prompt
tokens, oldest job first, up to a budget: one ubatch, or, while others generate, as many as keep
the step near `max_step_s` at the measured speed. So a long prompt never stalls a neighbour and
cancelling bites within one step. Engine thread only; the clock is passed in; nothing blocks.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TypeGuard

from wingman.engine.lifecycle import JobMove, JobState
from wingman.engine.runner import (
    TO_END,
    Batch,
    Chunk,
    Fork,
    KvOp,
    KvRemove,
    KvShift,
    SamplerStart,
    Samples,
    Vocabulary,
)
from wingman.engine.sequence import Sequence
from wingman.engine.slots import Slot, SlotPool, common_prefix
from wingman.engine.stats import EngineStats
from wingman.engine.types import (
    Failed,
    FailureKind,
    Job,
    JobEvent,
    Progress,
    SlotChanged,
    SlotJob,
    SlotMove,
    Snapshot,
    Started,
    StopType,
    TextDelta,
)
from wingman.engine.views import snapshot_of

MIN_PREFILL_TOKENS = 32
"""Least prompt tokens a step takes beside running generations, so that prompts always advance."""
UNMEASURED_PREFILL_TOKENS = 64
"""The same until the first prompt has shown how fast this machine is."""
UNIFIED_RESERVE_TOKENS = 32
"""Room that each running generation keeps when a prompt enters a unified cache: a newcomer waits rather
than cut a neighbour off."""
_ENDLESS = 1 << 40


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Sizes in tokens. `n_ctx_slot` bounds one sequence, `n_ctx_total` all of them when unified."""

    n_slots: int
    n_ctx_slot: int
    n_ctx_total: int
    n_batch: int
    n_ubatch: int
    max_step_s: float = 0.25
    similarity: float = 0.1
    is_unified: bool = False
    shifts_context: bool = False
    adds_bos: bool = False
    can_rollback: bool = True
    """Whether the cache can forget its last tokens (recurrent and sliding-window models can't)."""


class Scheduler:
    """Jobs, slots and the queue of one model."""

    def __init__(self, limits: SchedulerLimits, vocabulary: Vocabulary) -> None:
        self._limits = limits
        self._vocabulary = vocabulary
        self._pool = SlotPool(limits.n_slots, limits.similarity)
        self._queue: deque[Sequence] = deque()
        self._jobs: dict[int, Sequence] = {}
        self._events: list[JobEvent] = []
        self._kv: list[KvOp] = []
        self._slot_jobs: deque[SlotJob] = deque()
        self._lora: tuple[float, ...] = ()
        self._prefill_rate = 0.0
        self.stats = EngineStats()

    @property
    def max_step_s(self) -> float:
        """How long a step may take while text is generated, in seconds."""
        return self._limits.max_step_s

    # -- jobs come and go -------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to compute."""
        return not self._jobs and not self._slot_jobs

    def add(self, job: Job, now: float) -> None:
        """Queue a job. The caller has checked that its prompt fits a slot."""
        sequence = Sequence(job, now)
        leader = None if job.fork_of is None else self._jobs.get(job.fork_of)
        if leader is not None and leader.state is JobState.QUEUED:
            sequence.follow(leader)
        self._jobs[job.id] = sequence
        self._queue.append(sequence)

    def cancel(self, job_id: int) -> None:
        """Forget a job at once; its slot is free for the next plan. Unknown ids are ignored."""
        for slot_job in tuple(self._slot_jobs):
            if slot_job.id == job_id:
                self._drop_slot_job(slot_job)
        sequence = self._jobs.get(job_id)
        if sequence is not None:
            sequence.move(JobMove.CANCEL)
            self._retire(sequence)

    def fail(self, job_id: int, kind: FailureKind, message: str) -> None:
        """End a job without a result. Unknown ids are ignored."""
        sequence = self._jobs.get(job_id)
        if sequence is not None:
            sequence.move(JobMove.FAIL)
            self._retire(sequence)
            self._events.append(Failed(job_id, kind, message))

    def fail_batch(self, batch: Batch, message: str) -> None:
        """A batch could not be computed and the cache was rebuilt empty: its jobs fail, as does whatever
        generates; prompts that were not in it begin again."""
        for chunk in batch.chunks:
            self.fail(chunk.job_id, FailureKind.ENGINE, message)
        self._kv.clear()
        for slot in self._pool.slots:
            slot.tokens.clear()
            sequence = slot.sequence
            if sequence is not None and sequence.output:  # it waited for its adapters' turn
                self.fail(sequence.job.id, FailureKind.ENGINE, message)
            elif sequence is not None:
                sequence.n_processed = sequence.n_cached = 0

    def end_all(self) -> None:
        """Finish what generates with what it has; fail what has generated nothing yet."""
        for slot_job in tuple(self._slot_jobs):
            self.refuse_slot_job(slot_job, FailureKind.UNAVAILABLE, "the model is being stopped")
        for sequence in tuple(self._jobs.values()):
            if not sequence.output:
                self.fail(sequence.job.id, FailureKind.UNAVAILABLE, "the model is being stopped")
            else:
                self._end_early(sequence, truncated=False)

    def take_events(self) -> tuple[JobEvent, ...]:
        """Events since the last call, in order."""
        events = tuple(self._events)
        self._events.clear()
        return events

    def _retire(self, sequence: Sequence) -> None:
        sequence.part()
        del self._jobs[sequence.job.id]
        if sequence.slot_id < 0:
            self._queue.remove(sequence)
            return
        slot = self._pool.slots[sequence.slot_id]
        slot.sequence = None
        self._count(sequence)

    def _count(self, sequence: Sequence) -> None:
        timings = sequence.timings()
        self.stats.prompt_tokens += timings.prompt_n
        self.stats.prompt_tokens_cached += timings.cache_n
        self.stats.prompt_seconds += timings.prompt_ms / 1000
        self.stats.predicted_tokens += timings.predicted_n
        self.stats.predicted_seconds += timings.predicted_ms / 1000

    def _end_early(self, sequence: Sequence, *, truncated: bool) -> None:
        text = sequence.end_now(truncated)
        if text and sequence.job.stream:
            self._events.append(TextDelta(sequence.job.id, text, (), len(sequence.output)))
        self._finish(sequence)

    def _finish(self, sequence: Sequence) -> None:
        sequence.move(JobMove.FINISH)
        slot = self._pool.slots[sequence.slot_id]
        self._retire(sequence)
        self._events.append(sequence.finished(len(slot.tokens)))

    # -- slots saved, restored and erased -----------------------------------------------------

    def add_slot_job(self, job: SlotJob) -> None:
        """Queue a change of a slot; no other job enters the slot before it is done."""
        self._slot_jobs.append(job)
        self._pool.slots[job.slot_id].is_reserved = True

    def next_slot_job(self) -> SlotJob | None:
        """The first change whose slot is idle and as the cache is; the caller does it and reports."""
        job = next((job for job in self._slot_jobs if self._pool.slots[job.slot_id].is_idle), None)
        if job is not None and job.move is SlotMove.RESTORE:
            self._make_room(len(job.tokens) - len(self._pool.slots[job.slot_id].tokens))
        return None if self._kv else job

    def held_tokens(self, slot_id: int) -> tuple[int, ...]:
        """The tokens whose cache a slot holds."""
        return tuple(self._pool.slots[slot_id].tokens)

    def finish_slot_job(self, job: SlotJob, state: bytes = b"") -> None:
        """The change is done; a restored slot holds the job's tokens, an erased one none."""
        slot = self._pool.slots[job.slot_id]
        tokens = tuple(slot.tokens)
        if job.move is SlotMove.ERASE:
            self._forget(slot, 0)
        elif job.move is SlotMove.RESTORE:
            tokens = job.tokens
            slot.tokens[:] = tokens
            slot.lora = job.lora
        self._drop_slot_job(job)
        self._events.append(SlotChanged(job.id, tokens, state, slot.lora))

    def refuse_slot_job(self, job: SlotJob, kind: FailureKind, message: str) -> None:
        """The change can't be done; a slot that was to be restored is empty."""
        if job.move is SlotMove.RESTORE:
            self._forget(self._pool.slots[job.slot_id], 0)
        self._drop_slot_job(job)
        self._events.append(Failed(job.id, kind, message))

    def _drop_slot_job(self, job: SlotJob) -> None:
        self._slot_jobs.remove(job)
        is_reserved = any(other.slot_id == job.slot_id for other in self._slot_jobs)
        self._pool.slots[job.slot_id].is_reserved = is_reserved

    # -- plan ---------------------------------------------------------------------------------

    def plan(self, now: float) -> Batch | None:
        """The next batch, or None when there is nothing to compute."""
        self._admit(now)
        self._choose_lora()
        chunks: list[Chunk] = []
        for slot in self._pool.slots:
            if self._is_due(slot.sequence, JobState.DECODE):
                self._plan_decode(slot, slot.sequence, chunks)
        samplers, forks = self._plan_prefill(chunks)
        if not chunks and not self._kv:
            return None
        kv, self._kv = tuple(self._kv), []
        self.stats.n_steps += 1
        self.stats.n_busy_slots_total += len(chunks)
        return Batch(kv, samplers, tuple(chunks), now, forks, self._lora)

    def _admit(self, now: float) -> None:
        """Place queued jobs, first come first served; one that waits for its own slot lets others by."""
        for sequence in tuple(self._queue):
            if sequence.leader is not None:  # placed with its leader
                continue
            job = sequence.job
            prompt = job.prompt if job.cache_prompt else ()
            slots = self._pool.choose_group(prompt, job.id_slot, len(sequence.forks))
            if slots is not None:
                for member, slot in zip((sequence, *sequence.forks), slots, strict=True):
                    self._place(member, slot, now)
            elif job.id_slot < 0 or self._pool.slots[job.id_slot].is_idle:  # its forks wait for slots
                break

    def _place(self, sequence: Sequence, slot: Slot, now: float) -> None:
        job = sequence.job
        self._queue.remove(sequence)
        n_reused = 0 if sequence.leader is not None else self._n_reusable(job, slot)
        self._forget(slot, n_reused)
        slot.sequence = slot.last_sequence = sequence
        slot.last_used = now
        slot.lora = job.lora
        sequence.place(slot.id, n_reused, now)
        self.stats.queue_wait.observe(now - sequence.queued_at)
        self._events.append(Started(job.id, slot.id))
        self._report_progress(sequence, now)

    def _n_reusable(self, job: Job, slot: Slot) -> int:
        """Prompt tokens that the slot's cache already holds; at least one is always left to evaluate."""
        if not job.cache_prompt or slot.lora != job.lora:
            return 0
        n_common = min(common_prefix(slot.tokens, job.prompt), len(job.prompt) - 1)
        if n_common < len(slot.tokens) and not self._limits.can_rollback:
            return 0
        return n_common

    def _choose_lora(self) -> None:
        """A step has one set of adapter scales; jobs that want different ones take turns."""
        wanted = sorted({slot.sequence.job.lora for slot in self._pool.slots if slot.sequence is not None})
        if wanted:
            self._lora = next((lora for lora in wanted if lora > self._lora), wanted[0])

    def _is_due(self, sequence: Sequence | None, state: JobState) -> TypeGuard[Sequence]:
        return (
            sequence is not None
            and sequence.state is state
            and sequence.leader is None
            and sequence.job.lora == self._lora
        )

    def _forget(self, slot: Slot, n_kept: int) -> None:
        if n_kept < len(slot.tokens):
            self._kv.append(KvRemove(slot.id, n_kept, TO_END))
            del slot.tokens[n_kept:]

    def _plan_decode(self, slot: Slot, sequence: Sequence, chunks: list[Chunk]) -> None:
        if self._limits.shifts_context and len(slot.tokens) + 1 >= self._limits.n_ctx_slot:
            self._shift(slot, sequence)
        if not self._make_room(1):
            self._end_early(sequence, truncated=True)
            return
        token = sequence.next_token
        chunks.append(Chunk(slot.id, sequence.job.id, (token,), len(slot.tokens), wants_sample=True))
        slot.tokens.append(token)

    def _shift(self, slot: Slot, sequence: Sequence) -> None:
        """Forget n_discard tokens after the first n_keep (pre_decode of llama-server)."""
        job = sequence.job
        n_keep = len(job.prompt) if job.n_keep < 0 else job.n_keep
        n_keep = min(n_keep + self._limits.adds_bos, self._limits.n_ctx_slot - 4)
        n_left = len(slot.tokens) - n_keep
        n_discard = max(1, min(job.n_discard or n_left // 2, n_left - 1))
        end = n_keep + n_discard
        self._kv.append(KvRemove(slot.id, n_keep, end))
        self._kv.append(KvShift(slot.id, end, len(slot.tokens), -n_discard))
        del slot.tokens[n_keep:end]
        sequence.truncated = True

    def _plan_prefill(self, chunks: list[Chunk]) -> tuple[tuple[SamplerStart, ...], tuple[Fork, ...]]:
        samplers: list[SamplerStart] = []
        forks: list[Fork] = []
        budget = self._prefill_budget(len(chunks))
        n_generating = self._n_generating()
        n_reserved = n_generating * UNIFIED_RESERVE_TOKENS
        due = [sequence for sequence in self._jobs.values() if self._is_due(sequence, JobState.PREFILL)]
        for sequence in due:  # in order of arrival
            if budget <= 0:
                break
            slot = self._pool.slots[sequence.slot_id]
            n_wanted = sequence.n_prompt_left + len(sequence.forks) * len(sequence.job.prompt)
            n_reserved += n_wanted
            if not self._make_room(n_reserved):
                if not chunks and not n_generating:
                    n_reserved -= n_wanted
                    self.fail(sequence.job.id, FailureKind.ENGINE, "the shared context is full")
                continue
            n_tokens = min(budget, sequence.n_prompt_left)
            budget -= n_tokens
            start = sequence.n_processed
            tokens = sequence.job.prompt[start : start + n_tokens]
            is_last = n_tokens == sequence.n_prompt_left
            wants_sample = is_last and sequence.job.n_predict != 0
            chunks.append(Chunk(slot.id, sequence.job.id, tokens, len(slot.tokens), wants_sample))
            slot.tokens.extend(tokens)
            if is_last:
                group = (sequence, *sequence.forks)
                forks += self._plan_forks(sequence, slot)
                if wants_sample:
                    samplers += map(_sampler_start, group)
        return tuple(samplers), tuple(forks)

    def _n_generating(self) -> int:
        """Sequences that will end by themselves and give room, whosever turn it is."""
        return sum(slot.sequence is not None and bool(slot.sequence.output) for slot in self._pool.slots)

    def _plan_forks(self, leader: Sequence, slot: Slot) -> list[Fork]:
        """Copies of a prompt that is complete after this step; the sequences go their own ways then."""
        forks = [Fork(slot.id, fork.slot_id, fork.job.id) for fork in leader.forks]
        for fork in forks:
            self._pool.slots[fork.target].tokens[:] = slot.tokens
        leader.part()
        return forks

    def _prefill_budget(self, n_decoding: int) -> int:
        most = min(self._limits.n_ubatch, self._limits.n_batch - n_decoding)
        if not n_decoding:
            return most
        if not self._prefill_rate:
            return min(UNMEASURED_PREFILL_TOKENS, most)
        affordable = int(self._prefill_rate * self._limits.max_step_s) - n_decoding
        return min(max(affordable, MIN_PREFILL_TOKENS), most)

    def _make_room(self, n_tokens: int) -> bool:
        """Evict idle slots until `n_tokens` fit. When they don't, the one that asked ends; its slot
        is idle then and makes room for the others."""
        if not self._limits.is_unified:
            return True
        while self._pool.n_held + n_tokens > self._limits.n_ctx_total:
            idle = self._pool.idle_holding()
            if idle:
                self._forget(idle[0], 0)
                continue
            return False
        return True

    # -- apply --------------------------------------------------------------------------------

    def apply(self, batch: Batch, samples: Samples, now: float) -> None:
        """Account for a computed batch. Chunks of jobs cancelled meanwhile are passed over."""
        self._measure(batch, now)
        self.stats.sample_seconds += samples.sample_s
        for chunk in batch.chunks:
            sequence = self._jobs.get(chunk.job_id)
            if sequence is None:
                continue
            if sequence.state is JobState.PREFILL:
                sequence.n_processed += len(chunk.tokens)
                self._report_progress(sequence, now)
                if not sequence.n_prompt_left:
                    self._begin(sequence, samples, now)
            else:
                self._take(sequence, samples, now)
        for fork in batch.forks:
            sequence = self._jobs.get(fork.job_id)
            if sequence is not None:
                sequence.n_processed = sequence.n_cached = len(sequence.job.prompt)
                self._report_progress(sequence, now)
                self._begin(sequence, samples, now)
        for slot in self._pool.slots:
            self.stats.n_tokens_max = max(self.stats.n_tokens_max, len(slot.tokens))

    def _begin(self, sequence: Sequence, samples: Samples, now: float) -> None:
        """The prompt is evaluated: take the first token, unless none is wanted."""
        if sequence.job.n_predict == 0:  # the prompt is cached, nothing is generated
            sequence.last_token_at = now
            self._end_early(sequence, truncated=False)
            return
        sequence.move(JobMove.SAMPLE)
        self._take(sequence, samples, now)

    def _measure(self, batch: Batch, now: float) -> None:
        """Follow the speed of prompt evaluation, in tokens per second."""
        n_tokens = batch.n_tokens
        elapsed = now - batch.planned_at
        if n_tokens >= MIN_PREFILL_TOKENS and elapsed > 0:
            rate = n_tokens / elapsed
            self._prefill_rate = rate if not self._prefill_rate else 0.8 * self._prefill_rate + 0.2 * rate

    def _take(self, sequence: Sequence, samples: Samples, now: float) -> None:
        slot = self._pool.slots[sequence.slot_id]
        slot.last_used = now
        if slot.id in samples.stuck:  # its grammar leaves nothing to say
            sequence.last_token_at = sequence.last_token_at or now
            self._end_early(sequence, truncated=False)
            return
        token, prob = samples.tokens[slot.id], samples.probs.get(slot.id)
        if sequence.output:
            self.stats.token_gap.observe(now - sequence.last_token_at)
        else:
            self.stats.first_token.observe(now - sequence.queued_at)
        n_ctx_left = _ENDLESS
        if not self._limits.shifts_context:
            n_ctx_left = self._limits.n_ctx_slot - len(slot.tokens) - 1
        delta = sequence.take(token, prob, self._vocabulary, n_ctx_left, now)
        if sequence.job.stream:
            self._events.append(delta)
        if sequence.stop_type is not StopType.NONE:
            self._finish(sequence)

    def _report_progress(self, sequence: Sequence, now: float) -> None:
        job = sequence.job
        if job.return_progress and job.stream:
            elapsed_ms = (now - sequence.started_at) * 1000
            progress = Progress(job.id, len(job.prompt), sequence.n_cached, sequence.n_processed, elapsed_ms)
            self._events.append(progress)

    # -- looking in ---------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """A frozen view for monitoring; a few microseconds."""
        return snapshot_of(self._pool.slots, len(self._queue), self.stats)

    def check_integrity(self) -> None:
        """Assert what must hold between steps; used by tests after every move."""
        owned = [slot for slot in self._pool.slots if slot.sequence is not None]
        assert len(owned) + len(self._queue) == len(self._jobs)
        for slot in owned:
            sequence = slot.sequence
            assert sequence is not None
            assert self._jobs[sequence.job.id] is sequence
            assert sequence.slot_id == slot.id
            assert sequence.state in (JobState.PREFILL, JobState.DECODE)
            assert len(slot.tokens) <= self._limits.n_ctx_slot
            assert all(fork.leader is sequence for fork in sequence.forks)
        if self._limits.is_unified:
            assert self._pool.n_held <= self._limits.n_ctx_total


def _sampler_start(sequence: Sequence) -> SamplerStart:
    job = sequence.job
    return SamplerStart(
        sequence.slot_id, job.sampling, job.prompt, job.constraint, job.n_probs, job.post_sampling_probs
    )
