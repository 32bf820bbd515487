"""The engine thread: drain the inbox, plan, run, apply, post. The only user of threading.

It owns the runner and the scheduler from birth to death. It blocks only on an empty inbox, never
on the loop. What it posts is frozen; `snapshot` and `step_started_at` are single values that it
alone writes and anybody may read.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from wingman.engine.runner import Batch, Runner, RunnerFailure, Tokenizer
from wingman.engine.scheduler import Scheduler
from wingman.engine.types import (
    Cancel,
    Command,
    EndAll,
    ModelInfo,
    Shutdown,
    Snapshot,
    StepOutput,
    Submit,
    TextDelta,
)
from wingman.errors import ModelLoadFailure, WingmanError

log = logging.getLogger("wingman.engine")

SNAPSHOT_INTERVAL_S = 0.05
"""Least time between two snapshots while nothing starts or ends."""
STALL_WAIT_S = 0.02
"""How long to wait for a command when jobs exist but nothing can be computed."""
_FAILED_STEP = "the model runtime failed on this request"


@dataclass(frozen=True, slots=True)
class Loaded:
    """The model is ready."""

    info: ModelInfo
    tokenizer: Tokenizer


@dataclass(frozen=True, slots=True)
class Stopped:
    """The thread is at its end; `error` says why, None when it was asked to."""

    error: WingmanError | None


Message = Loaded | Stopped | StepOutput


class EngineThread:
    """Runs one model. `post` is called on this thread with each Message and must not block."""

    def __init__(
        self,
        make_runner: Callable[[], Runner],
        make_scheduler: Callable[[Runner], Scheduler],
        post: Callable[[Message], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._make_runner = make_runner
        self._make_scheduler = make_scheduler
        self._post = post
        self._clock = clock
        self._inbox: SimpleQueue[Command] = SimpleQueue()
        self._thread = threading.Thread(target=self._main, name="wingman-engine", daemon=True)
        self._snapshot_at = 0.0
        self.snapshot = Snapshot()
        self.step_started_at: float | None = None

    def start(self) -> None:
        """Start the thread; it begins with loading the model."""
        self._thread.start()

    def send(self, command: Command) -> None:
        """Put a command into the inbox; never blocks."""
        self._inbox.put(command)

    def join(self, timeout_s: float) -> bool:
        """Wait for the end of the thread; whether it came. One that never started has ended."""
        if self._thread.ident is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _main(self) -> None:
        try:
            runner = self._make_runner()
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
            runner.close()
            self._post(Stopped(cause))

    def _serve(self, runner: Runner) -> None:
        scheduler = self._make_scheduler(runner)
        self._publish(scheduler, self._clock())
        self._post(Loaded(runner.info, runner.tokenizer))
        while self._drain(scheduler, wait=scheduler.is_idle):
            batch = scheduler.plan(self._clock())
            if batch is not None:
                if not self._compute(runner, scheduler, batch):
                    return
            elif not scheduler.is_idle:
                time.sleep(STALL_WAIT_S)
            self._flush(scheduler)

    def _drain(self, scheduler: Scheduler, *, wait: bool) -> bool:
        """Obey everything in the inbox; False once told to shut down."""
        try:
            command = self._inbox.get(block=wait)
            while True:
                if isinstance(command, Submit):
                    scheduler.add(command.job, self._clock())
                elif isinstance(command, Cancel):
                    scheduler.cancel(command.job_id)
                elif isinstance(command, EndAll):
                    scheduler.end_all()
                else:
                    assert isinstance(command, Shutdown)
                    return False
                command = self._inbox.get_nowait()
        except Empty:
            return True

    def _compute(self, runner: Runner, scheduler: Scheduler, batch: Batch) -> bool:
        """Run one batch; False when told to shut down meanwhile."""
        self.step_started_at = batch.planned_at
        try:
            samples = runner.run(batch)
        except RunnerFailure as error:
            log.error("a step failed: %s", error)
            self._recover(runner, scheduler, batch)
            return True
        except Exception:
            log.exception("a step failed")
            self._recover(runner, scheduler, batch)
            return True
        finally:
            self.step_started_at = None
        goes_on = self._drain(scheduler, wait=False)
        scheduler.apply(batch, samples, self._clock())
        return goes_on

    def _recover(self, runner: Runner, scheduler: Scheduler, batch: Batch) -> None:
        """End the jobs of a failed step and go on with a fresh context."""
        scheduler.fail_batch(batch, _FAILED_STEP)
        self._flush(scheduler)
        runner.reset()

    def _flush(self, scheduler: Scheduler) -> None:
        """Post what happened: one wake-up of the loop, none when nothing did."""
        events = scheduler.take_events()
        now = self._clock()
        is_due = now - self._snapshot_at >= SNAPSHOT_INTERVAL_S
        if is_due or scheduler.is_idle or not all(isinstance(event, TextDelta) for event in events):
            self._publish(scheduler, now)
        if events:
            self._post(StepOutput(events))

    def _publish(self, scheduler: Scheduler, now: float) -> None:
        self.snapshot = scheduler.snapshot()
        self._snapshot_at = now
