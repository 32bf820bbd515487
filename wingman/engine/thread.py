"""The engine thread: drain the inbox, plan, run, apply, post. The only user of threading.

Generation and embeddings get the same time when both have work: a piece of embeddings, then steps for
as long. A long prompt that would hold them up is computed aside, and they have their turns while that pauses.
Each chooses its number of threads before a step and learns from the time it took.

It owns the runner and the scheduler from birth to death. It blocks only on an empty inbox, never
on the loop. What it posts is frozen; `snapshot` and `step_started_at` are single values that it
alone writes and anybody may read.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from typing import TypeVar

from msgspec import Struct, structs

from wingman.engine.cores import CORES
from wingman.engine.embedding import EmbeddingQueue
from wingman.engine.pace import MIN_STRETCH_S, stretch_s
from wingman.engine.runner import (
    MAX_EMBED_INPUTS,
    AsidePiece,
    Batch,
    OnProgress,
    Runner,
    RunnerFailure,
    SamplerParts,
    Samples,
    Tokenizer,
)
from wingman.engine.scheduler import Scheduler
from wingman.engine.threads import ThreadGovernor
from wingman.engine.types import (
    Cancel,
    ChangeSlot,
    Command,
    Embed,
    EndAll,
    FailureKind,
    ModelInfo,
    SlotJob,
    SlotMove,
    Snapshot,
    StepOutput,
    Submit,
    TextDelta,
)
from wingman.errors import ModelLoadFailure, WingmanError

log = logging.getLogger("wingman.engine")
T = TypeVar("T")

SNAPSHOT_INTERVAL_S = 0.05
"""Least time between two snapshots while nothing starts or ends."""
STALL_WAIT_S = 0.02
"""How long to wait for a command when jobs exist but nothing can be computed."""
_DONE = object()
NO_ROOM = "there is no room in the shared context for what is to be restored"
_FAILED_STEP = "the model runtime failed on this request"


class Loaded(Struct, frozen=True):
    """The model is ready."""

    info: ModelInfo
    tokenizer: Tokenizer
    parts: SamplerParts


class Stopped(Struct, frozen=True):
    """The thread is at its end; `error` says why, None when it was asked to."""

    error: WingmanError | None


class Loading(Struct, frozen=True):
    """How much of the model is loaded, 0.0 to 1.0."""

    progress: float


Message = Loading | Loaded | Stopped | StepOutput


class StepThreads:
    """The threads of one kind of steps. A step may be computed in several pieces."""

    def __init__(self, governor: ThreadGovernor, clock: Callable[[], float]) -> None:
        self.governor = governor
        self._clock = clock
        self._n_tokens = self._n_threads = 0
        self.elapsed_s = self._on_core_s = 0.0
        self._resumed = self._resumed_on_core = 0.0

    def begin(self, n_tokens: int) -> None:
        """Choose for the next step."""
        self._n_tokens = n_tokens
        self._n_threads = self.governor.choose(n_tokens, CORES.share)
        self.elapsed_s = self._on_core_s = 0.0

    def run(self, runner: Runner, compute: Callable[[], T]) -> T:
        """Compute a piece of it."""
        runner.set_threads(self._n_threads)
        self.resume()
        result = compute()
        self.pause()
        return result

    def pause(self) -> None:
        """What is done from now on is not part of the step."""
        self._on_core_s += time.thread_time() - self._resumed_on_core
        self.elapsed_s += self._clock() - self._resumed

    def resume(self) -> None:
        """The step goes on."""
        self._resumed, self._resumed_on_core = self._clock(), time.thread_time()

    def end(self) -> None:
        """Learn from the step."""
        if self.elapsed_s > 0:
            share = self._on_core_s / self.elapsed_s
            choice = self.governor.observe(self._n_tokens, self.elapsed_s, self._clock(), share)
            if choice is not None:
                log.debug("%s", choice)


class Stretches:
    """Asked while a prompt is computed aside whether to go on; gives the others a turn now and then."""

    def __init__(
        self,
        take_turn: Callable[[], bool],
        piece: AsidePiece,
        scheduler: Scheduler,
        steps: StepThreads,
        clock: Callable[[], float],
    ) -> None:
        """`take_turn` gives False once the thread is told to shut down; `steps` is what is interrupted."""
        self._take_turn = take_turn
        self._piece = piece
        self._scheduler = scheduler
        self._steps = steps
        self._clock = clock
        self._ends_at = clock() + MIN_STRETCH_S
        self.is_over = False
        """Whether to shut down."""

    def __call__(self) -> bool:
        """Whether to go on."""
        if self._clock() < self._ends_at:
            return True
        self._steps.pause()
        is_wanted = self.interrupt()
        self._steps.resume()
        return is_wanted

    def interrupt(self) -> bool:
        """Give the others a turn; whether the prompt is still wanted then."""
        started = self._clock()
        self.is_over = not self._take_turn()
        ended = self._clock()
        aside, max_step_s = self._scheduler.aside, self._scheduler.max_step_s
        self._ends_at = ended + stretch_s(ended - started, max_step_s, is_busy=aside.has_company)
        return not self.is_over and aside.is_wanted(self._piece)


class EngineThread:
    """Runs one model. `post` is called on this thread with each Message and must not block."""

    def __init__(
        self,
        make_runner: Callable[[OnProgress], Runner],
        make_scheduler: Callable[[Runner], Scheduler],
        post: Callable[[Message], None],
        clock: Callable[[], float] = time.monotonic,
        n_threads: tuple[int, int] = (0, 0),
    ) -> None:
        """`n_threads` for single tokens and for batches, see ThreadGovernor."""
        self._make_runner = make_runner
        self._make_scheduler = make_scheduler
        self._post = post
        self._clock = clock
        self._inbox: SimpleQueue[Command] = SimpleQueue()
        self._thread = threading.Thread(target=self._main, name="wingman-engine", daemon=True)
        self._generation = StepThreads(ThreadGovernor(CORES.n_cores, *n_threads), clock)
        self._embedding = StepThreads(ThreadGovernor(CORES.n_cores, *n_threads), clock)
        self._aside = StepThreads(ThreadGovernor(CORES.n_cores, *n_threads), clock)
        self._embed_work: Iterator[None] = iter(())
        self._owed_s = 0.0
        """Time that generation gets before the next piece of embeddings."""
        self._snapshot_at = 0.0
        self._is_abandoned = False
        self.snapshot = Snapshot()
        self.step_started_at: float | None = None

    def start(self) -> None:
        """Start the thread; it begins with loading the model."""
        self._thread.start()

    def send(self, command: Command) -> None:
        """Put a command into the inbox; never blocks."""
        self._inbox.put(command)

    def abandon_load(self) -> None:
        """Make a load that is going on fail soon; afterwards it does nothing."""
        self._is_abandoned = True

    def _note_progress(self, progress: float) -> bool:
        self._post(Loading(progress))
        return not self._is_abandoned

    def join(self, timeout_s: float) -> bool:
        """Wait for the end of the thread; whether it came. One that never started has ended."""
        if self._thread.ident is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _main(self) -> None:
        try:
            runner = self._make_runner(self._note_progress)
        except WingmanError as error:
            self._post(Stopped(error))
            return
        except Exception:
            log.exception("loading the model failed")
            self._post(Stopped(ModelLoadFailure("the model could not be loaded")))
            return
        cause: WingmanError | None = None
        try:
            self._serve(runner)
        except Exception:
            log.exception("the engine stopped")
            cause = ModelLoadFailure("the engine stopped; see the log")
        finally:
            CORES.leave(self)
            self._embed_work = iter(())
            runner.close()
            self._post(Stopped(cause))

    def _serve(self, runner: Runner) -> None:
        scheduler = self._make_scheduler(runner)
        embeddings = EmbeddingQueue(runner.info.embedding.n_max, MAX_EMBED_INPUTS, scheduler.max_step_s)
        self._publish(scheduler, self._clock())
        self._post(Loaded(runner.info, runner.tokenizer, runner.parts))
        parts = runner, scheduler, embeddings
        while self._await_work(*parts) and self._take_turn(*parts) and self._compute_aside(*parts):
            pass

    def _await_work(self, runner: Runner, scheduler: Scheduler, embeddings: EmbeddingQueue) -> bool:
        """Wait while there is nothing to do. False once told to shut down."""
        if not scheduler.is_idle or not embeddings.is_idle:
            return True
        self._flush(scheduler, embeddings)
        while self._inbox.empty() and runner.tidy():
            pass
        return self._drain(scheduler, embeddings, wait=True)

    def _take_turn(self, runner: Runner, scheduler: Scheduler, embeddings: EmbeddingQueue) -> bool:
        """Obey what came, then a step and perhaps a piece of embeddings; never waits long. False once told to shut
        down."""
        if not self._drain(scheduler, embeddings, wait=False):
            return False
        self._change_slots(runner, scheduler)
        batch = scheduler.plan(self._clock())
        if batch is None:
            self._flush(scheduler, embeddings)
        else:
            samples = self._compute(runner, scheduler, embeddings, batch)
            self._owed_s -= self._clock() - batch.planned_at
            if not self._drain(scheduler, embeddings, wait=False):
                return False
            if samples is not None:
                scheduler.apply(batch, samples, self._clock())
        if embeddings.is_idle:
            self._embed_work = iter(())  # whoever wanted it has gone
            if batch is None and scheduler.aside.is_idle and not scheduler.is_idle:
                time.sleep(STALL_WAIT_S)
        elif self._owed_s <= 0 or batch is None:
            self._flush(scheduler, embeddings)
            started = self._clock()
            if next(self._embed_work, _DONE) is _DONE:
                self._embed_work = self._embed(runner, embeddings, is_alone=scheduler.is_idle)
            self._owed_s = self._clock() - started
        return True

    def _compute_aside(self, runner: Runner, scheduler: Scheduler, embeddings: EmbeddingQueue) -> bool:
        """Compute the next piece of a long prompt, if there is one, with turns of the others in between. False once
        told to shut down."""
        piece = scheduler.aside.plan()
        if piece is None:
            return True
        self._flush(scheduler, embeddings)

        def take_turn() -> bool:
            is_up = self._take_turn(runner, scheduler, embeddings)
            self._flush(scheduler, embeddings)  # the next step is far
            self.step_started_at = self._clock()
            return is_up

        stretches = Stretches(take_turn, piece, scheduler, self._aside, self._clock)
        self.step_started_at = self._clock()
        try:
            self._run_aside(runner, piece, stretches)
        except RunnerFailure as error:
            scheduler.aside.fail(str(error))
        else:
            scheduler.apply_aside(piece, self._clock())
        finally:
            self.step_started_at = None
        return not stretches.is_over

    def _run_aside(self, runner: Runner, piece: AsidePiece, stretches: Stretches) -> None:
        """Compute a piece, and let the prompt land after the last. Raises RunnerFailure."""
        if piece.is_first:
            runner.begin_aside(piece)
        self._aside.begin(len(piece.tokens))
        if not self._aside.run(runner, lambda: runner.run_aside(piece, stretches)):
            return
        self._aside.end()
        # Before it is moved, which takes time too, the others have another turn.
        if piece.is_last and stretches.interrupt():
            runner.land_aside(piece.slot_id)

    def _drain(self, scheduler: Scheduler, embeddings: EmbeddingQueue, *, wait: bool) -> bool:
        """Obey everything in the inbox; False once told to shut down."""
        try:
            if wait:
                CORES.leave(self)
            command = self._inbox.get(block=wait)
            CORES.enter(self)
            while True:
                match command:
                    case Submit(jobs):
                        for job in jobs:
                            scheduler.add(job, self._clock())
                    case Embed(job):
                        embeddings.add(job)
                    case ChangeSlot(job):
                        scheduler.slot_jobs.add(job)
                    case Cancel(job_id):
                        scheduler.cancel(job_id)
                        embeddings.cancel(job_id)
                    case EndAll():
                        scheduler.end_all()
                        embeddings.end_all()
                    case _:
                        return False
                command = self._inbox.get_nowait()
        except Empty:
            return True

    def _compute(
        self, runner: Runner, scheduler: Scheduler, embeddings: EmbeddingQueue, batch: Batch
    ) -> Samples | None:
        """Run one batch; None when it failed, which ends its jobs. What happened before is posted at the last
        moment, so that the loop works on it while the step is computed and keeps nobody from the interpreter."""
        self.step_started_at = batch.planned_at
        try:
            runner.prepare(batch)
            self._flush(scheduler, embeddings)
            self._generation.begin(batch.n_tokens)
            samples = self._generation.run(runner, lambda: runner.run(batch))
        except RunnerFailure as error:
            log.error("a step failed: %s", error)
        except Exception:
            log.exception("a step failed")
        else:
            self._generation.end()
            return samples
        finally:
            self.step_started_at = None
        scheduler.fail_batch(batch, _FAILED_STEP)
        self._post(StepOutput(scheduler.take_events()))  # rebuilding the context may take long
        runner.reset()
        return None

    def _embed(self, runner: Runner, embeddings: EmbeddingQueue, *, is_alone: bool) -> Iterator[None]:
        """Run one batch of embeddings, a piece at each `next`."""
        batch = embeddings.plan(is_alone=is_alone)
        if not batch:
            return
        steps = self._embedding
        steps.begin(sum(len(item.tokens) for item in batch))
        try:
            n_piece = embeddings.piece_tokens(is_alone=is_alone)
            pieces = runner.embed([item.tokens for item in batch], n_piece)
            vectors: list[bytes] = []
            while not vectors:
                self.step_started_at = self._clock()
                vectors = steps.run(runner, lambda: next(pieces))
                self.step_started_at = None
                if not vectors:
                    yield
                    if not embeddings.is_wanted(batch):
                        return
            steps.end()
            embeddings.apply(batch, vectors, steps.elapsed_s)
        except Exception as error:
            log.error("embedding failed: %s", error, exc_info=not isinstance(error, RunnerFailure))
            embeddings.fail(batch, _FAILED_STEP)
        finally:
            self.step_started_at = None

    def _change_slots(self, runner: Runner, scheduler: Scheduler) -> None:
        """Save, restore and erase what is idle."""
        while (job := scheduler.slot_jobs.next()) is not None:
            try:
                self._change_slot(job, runner, scheduler)
            except Exception:
                log.exception("slot %d could not be changed", job.slot_id)
                scheduler.post(scheduler.slot_jobs.refuse(job, FailureKind.ENGINE, _FAILED_STEP))

    def _change_slot(self, job: SlotJob, runner: Runner, scheduler: Scheduler) -> None:
        if not scheduler.slot_jobs.has_room(job):
            scheduler.post(scheduler.slot_jobs.refuse(job, FailureKind.UNAVAILABLE, NO_ROOM))
        elif job.move is SlotMove.SAVE:
            scheduler.post(scheduler.slot_jobs.finish(job, runner.save_slot(job.slot_id)))
        elif job.move is SlotMove.RESTORE and not runner.restore_slot(
            job.slot_id, job.state, len(job.tokens)
        ):
            message = "the file was saved from another model or is damaged; the slot is empty now"
            scheduler.post(scheduler.slot_jobs.refuse(job, FailureKind.INVALID, message))
        else:
            scheduler.post(scheduler.slot_jobs.finish(job))

    def _flush(self, scheduler: Scheduler, embeddings: EmbeddingQueue) -> None:
        """Post what happened: one wake-up of the loop, none when nothing did."""
        events = scheduler.take_events() + embeddings.take_events()
        now = self._clock()
        is_due = now - self._snapshot_at >= SNAPSHOT_INTERVAL_S
        if is_due or scheduler.is_idle or not all(isinstance(event, TextDelta) for event in events):
            self._publish(scheduler, now)
        if events:
            self._post(StepOutput(events))

    def _publish(self, scheduler: Scheduler, now: float) -> None:
        steps, aside, embedding = (each.governor for each in (self._generation, self._aside, self._embedding))
        counts = (
            ("decode", steps.n_decode),
            ("prefill", steps.n_prefill),
            ("aside", aside.n_latest),
            ("embedding", embedding.n_latest),
        )
        n_changes = steps.n_changes + aside.n_changes + embedding.n_changes
        self.snapshot = structs.replace(scheduler.snapshot(), threads=counts, thread_changes_total=n_changes)
        self._snapshot_at = now
