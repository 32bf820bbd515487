"""A scheduler over a scripted runner, driven step by step as the engine thread drives it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tests.support.runner import ScriptedRunner, compute, next_token
from wingman.config import SamplingParams
from wingman.engine.drafting import Draft, DraftRequest
from wingman.engine.limits import SchedulerLimits
from wingman.engine.runner import AsidePiece, Batch, RunnerFailure
from wingman.engine.scheduler import Scheduler
from wingman.engine.types import FailureKind, Finished, Job, JobEvent, SlotChanged, SlotJob, SlotMove

GREEDY = SamplingParams(temperature=0.0)


def half_right(requests: Sequence[DraftRequest]) -> list[Draft]:
    """A draft model that is right for a while: how long depends on the text."""
    drafts = []
    for request in requests:
        held, guesses = list(request.tokens), []
        for _ in range(sum(held) % (request.n_max + 1)):
            guesses.append(next_token(held))
            held.append(guesses[-1])
        drafts.append(Draft([*guesses, 5][: request.n_max], 0))
    return drafts


class Machine:
    """A scheduler with its runner and a clock that ticks a second a step."""

    def __init__(self, n_slots: int = 2, n_ctx_slot: int = 64, n_batch: int = 16, **limits: object) -> None:
        n_ctx = limits.pop("n_ctx", None)
        self.runner = ScriptedRunner(n_slots, n_ctx_slot, n_ctx, n_batch)  # type: ignore[arg-type]
        fields = {
            "n_slots": n_slots, "n_ctx_slot": n_ctx_slot, "n_ctx_total": self.runner.n_ctx,
            "n_batch": n_batch, "n_ubatch": n_batch, **limits,
        }  # fmt: skip
        self.runner.can_rollback = bool(limits.get("can_rollback", True))
        self.runner.n_window = int(limits.get("n_window", 0))  # type: ignore[call-overload]
        self.scheduler = Scheduler(
            SchedulerLimits(**fields),  # type: ignore[arg-type]
            self.runner.tokenizer,
            self.runner.slot_bytes,
            half_right,
        )
        self.now = 0.0
        self.events: list[JobEvent] = []
        self.batches: list[Batch] = []
        self.pieces: list[AsidePiece] = []
        self._computing: Iterator[None] | None = None
        """The last piece, as far as it is computed."""

    def add(self, job_id: int, prompt: list[int], **fields: object) -> Job:
        job = Job(id=job_id, prompt=tuple(prompt), sampling=GREEDY, **fields)  # type: ignore[arg-type]
        self.scheduler.add(job, self.now)
        return job

    def change(self, job_id: int, slot_id: int, move: SlotMove, **fields: object) -> SlotJob:
        job = SlotJob(job_id, slot_id, move, **fields)  # type: ignore[arg-type]
        self.scheduler.slot_jobs.add(job)
        return job

    def step(self, cancel: int | None = None, fails: bool = False) -> Batch | None:
        """Change slots, plan, run, perhaps cancel in between, apply; then a little of what is computed aside."""
        self.now += 1.0
        self._change_slots()
        batch = self.scheduler.plan(self.now)
        if batch is not None:
            self.batches.append(batch)
            if fails:
                self.runner.fail_at.add(self.runner.n_steps + 1)
            self._run(batch, cancel)
        self._compute_aside()
        self.collect()
        return batch

    def _compute_aside(self) -> None:
        aside = self.scheduler.aside
        if self._computing is None:
            piece = aside.plan()
            if piece is not None:
                self.pieces.append(piece)
                if piece.is_first:
                    self.runner.begin_aside(piece)
                self._computing = self.runner.computing_aside(piece)
                next(self._computing)
            return
        piece = self.pieces[-1]
        is_wanted = aside.is_wanted(piece)
        if is_wanted and next(self._computing, self) is not self:
            return
        if is_wanted and piece.is_last:
            self.runner.land_aside(piece.slot_id)
        self.scheduler.apply_aside(piece, self.now + 0.5)
        self._computing = None

    def fail_aside(self) -> None:
        """What is being computed aside fails, and leaves nothing in its slot that is of use."""
        if self._computing is not None:
            if self.scheduler.aside.is_wanted(self.pieces[-1]):
                self.runner.cache[self.pieces[-1].slot_id] = []
            self.scheduler.aside.fail("scripted")
            self._computing = None

    def collect(self) -> None:
        """Take what the scheduler has to say."""
        self.scheduler.check_integrity()
        self.events += self.scheduler.take_events()

    def _change_slots(self) -> None:
        jobs = self.scheduler.slot_jobs
        while (job := jobs.next()) is not None:
            if not jobs.has_room(job):
                self.scheduler.post(jobs.refuse(job, FailureKind.UNAVAILABLE, "no room"))
            elif job.move is SlotMove.SAVE:
                self.scheduler.post(jobs.finish(job, self.runner.save_slot(job.slot_id)))
            elif job.move is SlotMove.RESTORE and not self.runner.restore_slot(
                job.slot_id, job.state, len(job.tokens)
            ):
                self.scheduler.post(jobs.refuse(job, FailureKind.INVALID, "damaged"))
            else:
                self.scheduler.post(jobs.finish(job))

    def _run(self, batch: Batch, cancel: int | None) -> None:
        try:
            samples = compute(self.runner, batch)
        except RunnerFailure as error:
            self.scheduler.fail_batch(batch, str(error))
            self.runner.reset()
            return
        if cancel is not None:
            self.scheduler.cancel(cancel)
        self.scheduler.apply(batch, samples, self.now + 0.5)

    def run(self) -> None:
        for _ in range(1000):
            if self.scheduler.is_idle:
                return
            self.step()
        raise AssertionError("the scheduler does not come to an end")

    def finished(self, job_id: int) -> Finished:
        (event,) = (e for e in self.events if isinstance(e, Finished) and e.job_id == job_id)
        return event

    def changed(self, job_id: int) -> SlotChanged:
        (event,) = (e for e in self.events if isinstance(e, SlotChanged) and e.job_id == job_id)
        return event

    def n_evaluated(self, job_id: int, n_prompt: int) -> int:
        """Prompt tokens that were computed for a job in the steps of all."""
        chunks = [chunk for batch in self.batches for chunk in batch.chunks if chunk.job_id == job_id]
        return sum(len(chunk.tokens) for chunk in chunks if chunk.position < n_prompt)
