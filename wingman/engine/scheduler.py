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

from wingman.engine.lifecycle import JobMove, JobState
from wingman.engine.runner import (
    TO_END,
    Batch,
    Chunk,
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
    SlotView,
    Snapshot,
    Started,
    StopType,
    TextDelta,
)

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
        self._prefill_rate = 0.0
        self.stats = EngineStats()

    # -- jobs come and go -------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to compute."""
        return not self._jobs

    def add(self, job: Job, now: float) -> None:
        """Queue a job. The caller has checked that its prompt fits a slot."""
        sequence = Sequence(job, now)
        self._jobs[job.id] = sequence
        self._queue.append(sequence)

    def cancel(self, job_id: int) -> None:
        """Forget a job at once; its slot is free for the next plan. Unknown ids are ignored."""
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
        """A batch could not be computed and the cache was rebuilt empty: its jobs fail; prompts that
        were not in it begin again."""
        for chunk in batch.chunks:
            self.fail(chunk.job_id, FailureKind.ENGINE, message)
        self._kv.clear()
        for slot in self._pool.slots:
            slot.tokens.clear()
            if slot.sequence is not None:
                slot.sequence.n_processed = slot.sequence.n_cached = 0

    def end_all(self) -> None:
        """Finish what generates with what it has; fail what has generated nothing yet."""
        for sequence in tuple(self._jobs.values()):
            if not sequence.output:
                self.fail(sequence.job.id, FailureKind.UNAVAILABLE, "the server is shutting down")
            else:
                self._end_early(sequence, truncated=False)

    def take_events(self) -> tuple[JobEvent, ...]:
        """Events since the last call, in order."""
        events = tuple(self._events)
        self._events.clear()
        return events

    def _retire(self, sequence: Sequence) -> None:
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

    # -- plan ---------------------------------------------------------------------------------

    def plan(self, now: float) -> Batch | None:
        """The next batch, or None when there is nothing to compute."""
        self._admit(now)
        chunks: list[Chunk] = []
        for slot in self._pool.slots:
            if slot.sequence is not None and slot.sequence.state is JobState.DECODE:
                self._plan_decode(slot, slot.sequence, chunks)
        samplers = self._plan_prefill(chunks)
        if not chunks and not self._kv:
            return None
        kv, self._kv = tuple(self._kv), []
        self.stats.n_steps += 1
        self.stats.n_busy_slots_total += len(chunks)
        return Batch(kv, samplers, tuple(chunks), now)

    def _admit(self, now: float) -> None:
        """Place queued jobs, first come first served; one that waits for its own slot lets others by."""
        for sequence in tuple(self._queue):
            job = sequence.job
            slot = self._pool.choose(job.prompt if job.cache_prompt else (), job.id_slot)
            if slot is not None:
                self._queue.remove(sequence)
                self._place(sequence, slot, now)
            elif job.id_slot < 0:
                break

    def _place(self, sequence: Sequence, slot: Slot, now: float) -> None:
        job = sequence.job
        n_reused = self._n_reusable(job, slot)
        self._forget(slot, n_reused)
        slot.sequence = slot.last_sequence = sequence
        slot.last_used = now
        sequence.place(slot.id, n_reused, now)
        self.stats.queue_wait.observe(now - sequence.queued_at)
        self._events.append(Started(job.id, slot.id))
        self._report_progress(sequence, now)

    def _n_reusable(self, job: Job, slot: Slot) -> int:
        """Prompt tokens that the slot's cache already holds; at least one is always left to evaluate."""
        if not job.cache_prompt:
            return 0
        n_common = min(common_prefix(slot.tokens, job.prompt), len(job.prompt) - 1)
        if n_common < len(slot.tokens) and not self._limits.can_rollback:
            return 0
        return n_common

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

    def _plan_prefill(self, chunks: list[Chunk]) -> tuple[SamplerStart, ...]:
        samplers = []
        budget = self._prefill_budget(len(chunks))
        n_reserved = len(chunks) * UNIFIED_RESERVE_TOKENS
        for sequence in tuple(self._jobs.values()):  # in order of arrival
            if budget <= 0:
                break
            if sequence.state is not JobState.PREFILL:
                continue
            slot = self._pool.slots[sequence.slot_id]
            n_reserved += sequence.n_prompt_left
            if not self._make_room(n_reserved):
                if not chunks:
                    self.fail(sequence.job.id, FailureKind.ENGINE, "the shared context is full")
                continue
            n_tokens = min(budget, sequence.n_prompt_left)
            budget -= n_tokens
            start = sequence.n_processed
            tokens = sequence.job.prompt[start : start + n_tokens]
            is_last = n_tokens == sequence.n_prompt_left
            wants_sample = is_last and sequence.job.n_predict != 0
            if wants_sample:
                samplers.append(SamplerStart(slot.id, sequence.job.sampling, sequence.job.prompt))
            chunks.append(Chunk(slot.id, sequence.job.id, tokens, len(slot.tokens), wants_sample))
            slot.tokens.extend(tokens)
        return tuple(samplers)

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
        for chunk in batch.chunks:
            sequence = self._jobs.get(chunk.job_id)
            if sequence is None:
                continue
            if sequence.state is JobState.PREFILL:
                sequence.n_processed += len(chunk.tokens)
                self._report_progress(sequence, now)
                if sequence.n_prompt_left:
                    continue
                if not chunk.wants_sample:  # n_predict 0: the prompt is cached, nothing is generated
                    sequence.last_token_at = now
                    self._end_early(sequence, truncated=False)
                    continue
                sequence.move(JobMove.SAMPLE)
            self._take(sequence, samples[chunk.slot_id], now)
        for slot in self._pool.slots:
            self.stats.n_tokens_max = max(self.stats.n_tokens_max, len(slot.tokens))

    def _measure(self, batch: Batch, now: float) -> None:
        """Follow the speed of prompt evaluation, in tokens per second."""
        n_tokens = batch.n_tokens
        elapsed = now - batch.planned_at
        if n_tokens >= MIN_PREFILL_TOKENS and elapsed > 0:
            rate = n_tokens / elapsed
            self._prefill_rate = rate if not self._prefill_rate else 0.8 * self._prefill_rate + 0.2 * rate

    def _take(self, sequence: Sequence, token: int, now: float) -> None:
        slot = self._pool.slots[sequence.slot_id]
        slot.last_used = now
        if sequence.output:
            self.stats.token_gap.observe(now - sequence.last_token_at)
        else:
            self.stats.first_token.observe(now - sequence.queued_at)
        n_ctx_left = _ENDLESS
        if not self._limits.shifts_context:
            n_ctx_left = self._limits.n_ctx_slot - len(slot.tokens) - 1
        delta = sequence.take(token, self._vocabulary, n_ctx_left, now)
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
        stats = self.stats
        return Snapshot(
            slots=tuple(_view(slot) for slot in self._pool.slots),
            n_waiting=len(self._queue),
            n_steps=stats.n_steps,
            n_busy_slots_total=stats.n_busy_slots_total,
            prompt_tokens_total=stats.prompt_tokens,
            prompt_tokens_cached_total=stats.prompt_tokens_cached,
            prompt_seconds_total=stats.prompt_seconds,
            predicted_tokens_total=stats.predicted_tokens,
            predicted_seconds_total=stats.predicted_seconds,
            n_tokens_max=stats.n_tokens_max,
            first_token=stats.first_token.view(),
            token_gap=stats.token_gap.view(),
            queue_wait=stats.queue_wait.view(),
        )

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
        if self._limits.is_unified:
            assert self._pool.n_held <= self._limits.n_ctx_total


def _view(slot: Slot) -> SlotView:
    sequence = slot.last_sequence
    if sequence is None:
        return SlotView(slot.id, None, is_busy=False)
    return SlotView(
        id=slot.id,
        job_id=sequence.job.id,
        is_busy=not slot.is_idle,
        n_prompt=len(sequence.job.prompt),
        n_processed=sequence.n_processed - sequence.n_cached,
        n_cached=sequence.n_cached,
        n_decoded=len(sequence.output),
        n_held=len(slot.tokens),
        has_new_line=sequence.has_new_line,
        stop_type=sequence.stop_type,
        stopping_word=sequence.stopping_word,
    )
