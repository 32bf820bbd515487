"""What to compute next and what became of it: continuous batching as a pure state machine.

A step is `plan` -> (someone runs the batch) -> `apply`. Between steps jobs join with `add` and
leave with `cancel`. A plan takes one token from each generating sequence first, then prompt
tokens, oldest job first, up to a budget: one ubatch, or, while others generate, as many as keep
the step near `max_step_s` at the measured speed; what would have to be cut for that is computed outside
the steps where that is possible (`aside`). So a long prompt never stalls a neighbour and cancelling bites
within one step.

A job that got a slot settles there: it takes over the longest prefix of its prompt that the cache
holds, or waits while an older job is about to compute a longer one. When a pool that all slots
share runs out, the youngest sequence gives its room to the others and is evaluated again later.

Engine thread only; the clock is passed in; nothing blocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TypeGuard

from wingman.engine.aside import Aside
from wingman.engine.cache import KvCache
from wingman.engine.drafts import AskModel, Drafts, Opening
from wingman.engine.lifecycle import JobMove, JobState
from wingman.engine.limits import SchedulerLimits
from wingman.engine.occupancy import UNIFIED_RESERVE_TOKENS, Occupancy
from wingman.engine.pace import PrefillPace, piece_of
from wingman.engine.runner import AsidePiece, Batch, Chunk, Fork, SamplerStart, Samples, Vocabulary
from wingman.engine.sequence import Sequence
from wingman.engine.slotjobs import SlotJobs
from wingman.engine.slots import Slot
from wingman.engine.stats import EngineStats
from wingman.engine.types import (
    Failed,
    FailureKind,
    Job,
    JobEvent,
    Snapshot,
    Started,
    StopType,
    TextDelta,
    TokenProb,
)
from wingman.engine.ubatches import even_pieces, full_pieces
from wingman.engine.views import snapshot_of

_ENDLESS = 1 << 40


class Scheduler:
    """Jobs, slots and the queue of one model. `slot_bytes` gives the serialised size of a slot,
    `ask_draft_model` the guesses of a draft model."""

    def __init__(
        self,
        limits: SchedulerLimits,
        vocabulary: Vocabulary,
        slot_bytes: Callable[[int], int] = lambda _: 0,
        ask_draft_model: AskModel | None = None,
    ) -> None:
        self._limits = limits
        self._vocabulary = vocabulary
        self._cache = KvCache(limits.cache, slot_bytes)
        self._drafts = Drafts(ask_draft_model, is_split=not limits.is_unified)
        self.slot_jobs = SlotJobs(self._cache)
        self._queue: deque[Sequence] = deque()
        self._jobs: dict[int, Sequence] = {}
        self._events: list[JobEvent] = []
        self._occupancy = Occupancy(limits, self._cache, self._jobs)
        self._lora: tuple[float, ...] = ()
        self._pace = PrefillPace(limits.n_batch, limits.n_ubatch, limits.max_step_s)
        self.aside = Aside(limits, self._cache, self._jobs, self._pace)
        self.stats = EngineStats()

    @property
    def max_step_s(self) -> float:
        """How long a step may take while text is generated, in seconds."""
        return self._limits.max_step_s

    # -- jobs come and go -------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to compute."""
        return not self._jobs and not self.slot_jobs

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
        self.slot_jobs.cancel(job_id)
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
        self._cache.clear()
        for slot in self._cache.slots:
            sequence = slot.sequence
            if sequence is not None and sequence.output:  # it waited for its adapters' turn, or for room
                self.fail(sequence.job.id, FailureKind.ENGINE, message)
            elif sequence is not None and sequence.leader is None:
                sequence.unsettle()

    def end_all(self) -> None:
        """Finish what generates with what it has; fail what has generated nothing yet."""
        self._events += self.slot_jobs.refuse_all(FailureKind.UNAVAILABLE, "the model is being stopped")
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
        self._drafts.forget(sequence.job.id)
        del self._jobs[sequence.job.id]
        if sequence.slot_id < 0:
            self._queue.remove(sequence)
            return
        slot = self._cache.slots[sequence.slot_id]
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
        slot = self._cache.slots[sequence.slot_id]
        self._retire(sequence)
        self._events.append(sequence.finished(len(slot.tokens)))

    def post(self, event: JobEvent) -> None:
        """Add an event of the caller's own, in order with the others."""
        self._events.append(event)

    def held_tokens(self, slot_id: int) -> tuple[int, ...]:
        """The tokens whose cache a slot holds."""
        return tuple(self._cache.slots[slot_id].tokens)

    # -- plan ---------------------------------------------------------------------------------

    def plan(self, now: float) -> Batch | None:
        """The next batch, or None when there is nothing to compute."""
        self._admit(now)
        for sequence in self._occupancy.settle_all():
            self._report_progress(sequence, now)
        self.aside.choose(self._occupancy.n_generating)
        self._choose_lora()
        chunks: list[Chunk] = []
        self._plan_decodes(self._decoding(), chunks)
        samplers, forks = self._plan_prefill(chunks)
        if not chunks and not self._cache.has_ops:
            return None
        chunks.sort(key=lambda chunk: chunk.slot_id)  # neighbours are computed together
        kv = self._cache.take_ops()
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
            slots = self._cache.choose(prompt, job.id_slot, len(sequence.forks))
            if slots is not None:
                for member, slot in zip((sequence, *sequence.forks), slots, strict=True):
                    self._place(member, slot, now)
            elif job.id_slot < 0 or self._cache.slots[job.id_slot].is_idle:  # its forks wait for slots
                break

    def _place(self, sequence: Sequence, slot: Slot, now: float) -> None:
        self._queue.remove(sequence)
        slot.sequence = slot.last_sequence = sequence
        slot.last_used = now
        sequence.place(slot.id, now)
        if sequence.leader is not None:  # its slot is filled with its leader's
            self._cache.release(slot)
            slot.lora = sequence.job.lora
            sequence.settle(0)
        self.stats.queue_wait.observe(now - sequence.queued_at)
        self._events.append(Started(sequence.job.id, slot.id))

    def _choose_lora(self) -> None:
        """A step has one set of adapter scales; jobs that want different ones take turns."""
        wanted = sorted({sequence.job.lora for sequence in self._jobs.values() if sequence.has_work})
        if wanted:
            self._lora = next((lora for lora in wanted if lora > self._lora), wanted[0])

    def _is_due(self, sequence: Sequence | None, state: JobState) -> TypeGuard[Sequence]:
        return (
            sequence is not None
            and sequence.state is state
            and sequence.has_work
            and sequence.job.lora == self._lora
        )

    def _decoding(self) -> list[Sequence]:
        """The sequences that add a token in this step, by slot; those that find no room are preempted."""
        while True:
            due = [
                slot.sequence for slot in self._cache.slots if self._is_due(slot.sequence, JobState.DECODE)
            ]
            victim = None if self._cache.make_room(len(due)) else self._occupancy.victim()
            if victim is None:
                return due
            self._occupancy.preempt(victim)

    def _plan_decodes(self, due: list[Sequence], chunks: list[Chunk]) -> None:
        """Add the last token of each sequence and, where it pays, guesses of the next ones."""
        for sequence in due:
            slot = self._cache.slots[sequence.slot_id]
            if self._limits.shifts_context and len(slot.tokens) + 1 >= self._limits.n_ctx_slot:
                self._shift(slot, sequence)
        for sequence, draft in zip(due, self._guesses(due), strict=True):
            slot = self._cache.slots[sequence.slot_id]
            if not self._cache.make_room(1 + len(draft)):  # nobody else is there to make room
                self._end_early(sequence, truncated=True)
                continue
            tokens = (sequence.next_token, *draft)
            position = len(slot.tokens)
            chunks.append(Chunk(slot.id, sequence.job.id, tokens, position, True, len(draft)))
            slot.tokens.extend(tokens)

    def _guesses(self, due: list[Sequence]) -> list[list[int]]:
        """Guesses for each sequence; none while prompts are evaluated, which fill the step, or wait aside for its
        end."""
        is_filled = any(self._is_due(each, JobState.PREFILL) for each in self._jobs.values())
        is_filled = is_filled or not self.aside.is_idle
        n_most = min(self._limits.n_ubatch, self._limits.n_batch) - len(due)
        if self._limits.is_unified:
            n_most = min(n_most, self._limits.n_ctx_total - self._cache.n_held - len(due))
        if is_filled or not due or n_most <= 0:
            return [[] for _ in due]
        return self._drafts.plan(list(map(self._opening, due)), n_most)

    def _opening(self, sequence: Sequence) -> Opening:
        held = self._cache.slots[sequence.slot_id].tokens
        n_most = self._limits.n_ctx_slot - len(held) - 2
        if sequence.job.n_predict >= 0:
            n_most = min(n_most, sequence.job.n_predict - len(sequence.output) - 1)
        if not self._limits.can_rollback:  # while it is short enough
            n_most = min(n_most, self._limits.n_window - len(held) - 1)
        return Opening(sequence, held, n_most)

    def _shift(self, slot: Slot, sequence: Sequence) -> None:
        """Forget n_discard tokens after the first n_keep (pre_decode of llama-server)."""
        job = sequence.job
        n_keep = len(job.prompt) if job.n_keep < 0 else job.n_keep
        n_keep = min(n_keep + self._limits.adds_bos, self._limits.n_ctx_slot - 4)
        n_left = len(slot.tokens) - n_keep
        n_discard = max(1, min(job.n_discard or n_left // 2, n_left - 1))
        self._cache.shift(slot, n_keep, n_keep + n_discard)
        sequence.truncated = True

    def _plan_prefill(self, chunks: list[Chunk]) -> tuple[tuple[SamplerStart, ...], tuple[Fork, ...]]:
        samplers: list[SamplerStart] = []
        forks: list[Fork] = []
        budget = self._pace.budget(sum(len(chunk.tokens) for chunk in chunks))
        n_generating = self._occupancy.n_generating
        n_reserved = n_generating * UNIFIED_RESERVE_TOKENS
        due = [sequence for sequence in self._jobs.values() if self._is_due(sequence, JobState.PREFILL)]
        if self._gathers(due, chunks, budget):
            return (), ()
        for n_planned, sequence in enumerate(due):  # in order of arrival
            if budget <= 0:
                break
            n_reserved += sequence.n_prompt_left + len(sequence.forks) * len(sequence.prompt)
            if not self._cache.make_room(n_reserved):  # nobody passes it, or it would wait for ever
                if not chunks and not n_generating:
                    self._give_way(sequence)
                break
            n_tokens = piece_of(sequence.n_prompt_left, budget, is_first=not n_planned)
            if not n_tokens:
                break
            chunk = self._plan_prompt(sequence, n_tokens)
            chunks.append(chunk)
            budget -= len(chunk.tokens)
            if not sequence.n_prompt_left - len(chunk.tokens):
                group = (sequence, *sequence.forks)
                forks += self._plan_forks(sequence)
                if chunk.wants_sample:
                    samplers += map(_sampler_start, group)
        return tuple(samplers), tuple(forks)

    def _gathers(self, due: list[Sequence], chunks: list[Chunk], budget: int) -> bool:
        """Whether short prompts let this step pass, once, because slots become free in it for queued ones:
        together they cost little more than apart, and who starts together ends together."""
        if not self._queue or not due or any(sequence.has_waited for sequence in due):
            return False
        if 2 * sum(sequence.n_prompt_left for sequence in due) > budget:
            return False
        if not any(self._jobs[chunk.job_id].is_at_last_token for chunk in chunks):
            return False
        for sequence in due:
            sequence.has_waited = True
        return True

    def _plan_prompt(self, sequence: Sequence, n_tokens: int) -> Chunk:
        """The next tokens of a prompt; after the last a token is sampled, unless that was done before a
        preemption or none is wanted."""
        slot = self._cache.slots[sequence.slot_id]
        start = sequence.n_filled
        tokens = sequence.prompt[start : start + n_tokens]
        is_last = len(tokens) == sequence.n_prompt_left
        wants_sample = is_last and sequence.job.n_predict != 0 and not sequence.output
        chunk = Chunk(slot.id, sequence.job.id, tokens, len(slot.tokens), wants_sample)
        slot.tokens.extend(tokens)
        return chunk

    def _give_way(self, sequence: Sequence) -> None:
        """Nothing generates and a prompt does not fit beside others that are on their way: the youngest
        waits. One that does not fit alone never will."""
        victim = self._occupancy.victim(sequence)
        if victim is not None:
            self._occupancy.preempt(victim)
        elif not sequence.output:
            self.fail(sequence.job.id, FailureKind.ENGINE, "the shared context is full")
        else:
            self._end_early(sequence, truncated=True)

    def _plan_forks(self, leader: Sequence) -> list[Fork]:
        """Copies of a prompt that is complete after this step; the sequences go their own ways then."""
        slot = self._cache.slots[leader.slot_id]
        forks = [Fork(slot.id, fork.slot_id, fork.job.id) for fork in leader.forks]
        for fork in forks:
            self._cache.slots[fork.target].tokens[:] = slot.tokens
        leader.part()
        return forks

    # -- apply --------------------------------------------------------------------------------

    def apply(self, batch: Batch, samples: Samples, now: float) -> None:
        """Account for a computed batch. Chunks of jobs cancelled meanwhile are passed over."""
        elapsed = now - batch.planned_at
        self._pace.observe(batch.n_tokens, self._drafts.observe(self._pieces(batch), elapsed))
        self.stats.sample_seconds += samples.sample_s
        for chunk in batch.chunks:
            sequence = self._jobs.get(chunk.job_id)
            if sequence is None:
                continue
            if sequence.state is JobState.PREFILL:
                sequence.fill(len(chunk.tokens))
                self._report_progress(sequence, now)
                if not sequence.n_prompt_left:
                    self._begin(sequence, samples, now)
            else:
                self._take(sequence, samples, now, chunk.n_draft)
        for fork in batch.forks:
            sequence = self._jobs.get(fork.job_id)
            if sequence is not None:
                sequence.settle(len(sequence.prompt))
                self._report_progress(sequence, now)
                self._begin(sequence, samples, now)
        for slot in self._cache.slots:
            self.stats.n_tokens_max = max(self.stats.n_tokens_max, len(slot.tokens))

    def apply_aside(self, piece: AsidePiece, now: float) -> None:
        """Account for a piece that was computed aside, or was not wanted any more."""
        sequence = self.aside.apply(piece)
        if sequence is not None:
            self._report_progress(sequence, now)

    def _pieces(self, batch: Batch) -> tuple[int, ...]:
        """Tokens of each piece in which the batch was computed."""
        if self._limits.is_unified:
            return full_pieces(batch.n_tokens, self._limits.n_ubatch)
        lengths = ((chunk.slot_id, len(chunk.tokens)) for chunk in batch.chunks)
        return even_pieces(lengths, self._limits.n_ubatch)

    def _begin(self, sequence: Sequence, samples: Samples, now: float) -> None:
        """The prompt is evaluated: take the first token, unless none is wanted."""
        if sequence.job.n_predict == 0:  # the prompt is cached, nothing is generated
            sequence.last_token_at = now
            self._end_early(sequence, truncated=False)
            return
        sequence.move(JobMove.SAMPLE)
        if not sequence.output:  # else it goes on with the token it had
            self._take(sequence, samples, now)

    def _take(self, sequence: Sequence, samples: Samples, now: float, n_draft: int = 0) -> None:
        """Account for the tokens sampled for a sequence and cut the guesses that were wrong."""
        slot = self._cache.slots[sequence.slot_id]
        slot.last_used = now
        n_held = len(slot.tokens) - n_draft
        tokens, probs = samples.tokens.get(slot.id, ()), samples.probs.get(slot.id, ())
        n_taken = 0
        for index, token in enumerate(tokens):
            prob = probs[index] if probs else None
            self._take_one(sequence, token, prob, n_held + index, now)
            n_taken += 1
            if sequence.stop_type is not StopType.NONE:
                break
        self._cache.forget(slot, n_held + max(n_taken - 1, 0))
        if n_draft:
            self._count_draft(sequence, n_draft, max(0, n_taken - (slot.id not in samples.stuck)))
        if sequence.stop_type is not StopType.NONE:
            self._finish(sequence)
        elif slot.id in samples.stuck:  # its grammar leaves nothing to say
            sequence.last_token_at = sequence.last_token_at or now
            self._end_early(sequence, truncated=False)

    def _take_one(
        self, sequence: Sequence, token: int, prob: TokenProb | None, n_held: int, now: float
    ) -> None:
        if sequence.output:
            self.stats.token_gap.observe(now - sequence.last_token_at)
        else:
            self.stats.first_token.observe(now - sequence.queued_at)
        n_ctx_left = _ENDLESS if self._limits.shifts_context else self._limits.n_ctx_slot - n_held - 1
        delta = sequence.take(token, prob, self._vocabulary, n_ctx_left, now)
        if sequence.job.stream:
            self._events.append(delta)

    def _count_draft(self, sequence: Sequence, n_draft: int, n_accepted: int) -> None:
        sequence.n_drafted += n_draft
        sequence.n_accepted += n_accepted
        self.stats.n_drafts += 1
        self.stats.draft_tokens += n_draft
        self.stats.draft_tokens_accepted += n_accepted

    def _report_progress(self, sequence: Sequence, now: float) -> None:
        if sequence.job.return_progress and sequence.job.stream and not sequence.output:
            self._events.append(sequence.progress(now))

    # -- looking in ---------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """A frozen view for monitoring; a few microseconds."""
        return snapshot_of(self._cache, self._occupancy, len(self._queue), self.stats)

    def check_integrity(self) -> None:
        """Assert what must hold between steps; used by tests after every move."""
        owned = [slot for slot in self._cache.slots if slot.sequence is not None]
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
            assert self._cache.n_held <= self._limits.n_ctx_total


def _sampler_start(sequence: Sequence) -> SamplerStart:
    job = sequence.job
    return SamplerStart(
        sequence.slot_id, job.sampling, job.prompt, job.constraint, job.n_probs, job.post_sampling_probs
    )
