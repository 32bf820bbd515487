"""The loop's side of an engine: submit jobs, iterate over what becomes of them.

Everything here runs on the event loop. It is the only module that knows both asyncio and the
engine thread; between them pass Commands one way and Messages the other, one wake-up a step.
Tokenising and the like run in a small executor of the engine, which ends before the model does.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

from wingman.config import ContextConfig, ModelConfig
from wingman.engine.admission import Admission
from wingman.engine.runner import Runner, Tokenizer
from wingman.engine.scheduler import Scheduler, SchedulerLimits
from wingman.engine.thread import EngineThread, Loaded, Message, Stopped
from wingman.engine.types import (
    Cancel,
    EndAll,
    Failed,
    FailureKind,
    Finished,
    Job,
    JobEvent,
    ModelInfo,
    Shutdown,
    Snapshot,
    Started,
    Submit,
    TextDelta,
)
from wingman.errors import (
    ContextOverflow,
    EngineFailure,
    InvalidRequest,
    SlowReader,
    Unavailable,
    WingmanError,
)

log = logging.getLogger("wingman.engine")
T = TypeVar("T")

N_WORKERS = 2
"""Threads that tokenise and render; the calls release the GIL or are short."""
BULK_BYTES = 64 * 1024
"""Text work on more than this has a thread of its own: a huge prompt must not delay the small ones."""
END_GRACE_S = 5.0
"""How long ended jobs get to be delivered before the engine is shut down regardless."""


class Engine:
    """A loaded model that takes jobs."""

    def __init__(
        self,
        model: ModelConfig,
        context: ContextConfig,
        make_runner: Callable[[ModelConfig, ContextConfig], Runner] | None = None,
    ) -> None:
        """Nothing is loaded before `load`; `make_runner` is replaced in tests."""
        self._model = model
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._make_runner = make_runner or _make_llama_runner
        self._thread = EngineThread(self._new_runner, self._new_scheduler, self._post)
        self._executor = ThreadPoolExecutor(N_WORKERS, "wingman-text")
        self._bulk_executor = ThreadPoolExecutor(1, "wingman-bulk")
        self._at_work: set[asyncio.Future[Any]] = set()
        self._ids = itertools.count(1)
        self._streams: dict[int, JobStream] = {}
        self._last_jobs: dict[int, Job] = {}
        self._loaded: asyncio.Future[Loaded] = self._loop.create_future()
        self._stopped: asyncio.Future[WingmanError | None] = self._loop.create_future()
        self._no_jobs = asyncio.Event()
        self._no_jobs.set()
        self._is_draining = False
        self._is_closing = False
        self._admission = Admission(context.parallel, context.max_queue, context.max_queue_tokens)
        self.info: ModelInfo
        self.tokenizer: Tokenizer

    # -- life ---------------------------------------------------------------------------------

    async def load(self) -> None:
        """Load the model. Raises ModelLoadFailure."""
        self._thread.start()
        loaded = await self._loaded
        self.info, self.tokenizer = loaded.info, loaded.tokenizer

    async def wait_stopped(self) -> WingmanError | None:
        """Wait until the engine thread has ended; the error it died of, if any."""
        return await asyncio.shield(self._stopped)

    async def drain(self, timeout_s: float) -> None:
        """Take no new job; let running ones finish for `timeout_s`, then end them with what they have."""
        self._is_draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._no_jobs.wait()
        except TimeoutError:
            self._thread.send(EndAll())
            try:
                async with asyncio.timeout(END_GRACE_S):
                    await self._no_jobs.wait()
            except TimeoutError:
                log.warning("%d requests did not end in time", len(self._streams))

    async def close(self) -> bool:
        """Free the model; jobs still there end with an error. False when something native hangs: the
        model stays in memory then, because it is still in use."""
        self._is_draining = self._is_closing = True
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._bulk_executor.shutdown(wait=False, cancel_futures=True)
        if self._at_work:
            await asyncio.wait(self._at_work, timeout=END_GRACE_S)
        if self._at_work:
            log.error("a text of megabytes is still being tokenised")
            return False
        self._thread.send(Shutdown())
        if await asyncio.to_thread(self._thread.join, END_GRACE_S):
            return True
        log.error("the engine thread does not end; a step hangs")
        return False

    def _new_runner(self) -> Runner:
        return self._make_runner(self._model, self._context)

    def _new_scheduler(self, runner: Runner) -> Scheduler:
        return Scheduler(_limits(runner, self._context), runner.tokenizer)

    # -- jobs ---------------------------------------------------------------------------------

    def new_job_id(self) -> int:
        """A job id, unique in this process."""
        return next(self._ids)

    def submit(self, job: Job) -> JobStream:
        """Queue a job and return its events, to be used as `async with`.

        Raises ContextOverflow, InvalidRequest, Overloaded or Unavailable; then nothing was queued.
        """
        if self._is_draining or self._stopped.done():
            raise Unavailable("the server is shutting down", retry_after_s=5)
        if not job.prompt:
            raise InvalidRequest("the prompt is empty", "prompt")
        if len(job.prompt) >= self.info.n_ctx_slot:
            raise ContextOverflow(len(job.prompt), self.info.n_ctx_slot)
        if job.id_slot >= self.info.n_slots:
            raise InvalidRequest(f"there are {self.info.n_slots} slots", "id_slot")
        self._admission.offer(job.id, len(job.prompt))
        stream = JobStream(job, self._context.max_unread, self._forget)
        self._streams[job.id] = stream
        self._no_jobs.clear()
        self._thread.send(Submit(job))
        return stream

    def _forget(self, job_id: int) -> None:
        """Cancel a job whose reader has left, or drop one that ended."""
        if self._streams.pop(job_id, None) is None:
            return
        self._thread.send(Cancel(job_id))
        self._ended(job_id)

    def _ended(self, job_id: int) -> None:
        self._admission.ended(job_id)
        if not self._streams:
            self._no_jobs.set()

    def _post(self, message: Message) -> None:
        """Called on the engine thread; the loop may be gone by then."""
        try:
            self._loop.call_soon_threadsafe(self._deliver, message)
        except RuntimeError:
            log.debug("an engine message came after the end of the loop")

    def _deliver(self, message: Message) -> None:
        if isinstance(message, Loaded):
            self._loaded.set_result(message)
        elif isinstance(message, Stopped):
            self._on_stopped(message)
        else:
            for event in message.events:
                self._deliver_event(event)

    def _deliver_event(self, event: JobEvent) -> None:
        stream = self._streams.get(event.job_id)
        if stream is None:
            return
        if isinstance(event, Started):
            self._admission.started(event.job_id)
            self._last_jobs[event.slot_id] = stream.job
        elif isinstance(event, Finished | Failed):
            del self._streams[event.job_id]
            self._ended(event.job_id)
        stream.deliver(event)

    def _on_stopped(self, message: Stopped) -> None:
        if not self._loaded.done():
            self._loaded.set_exception(message.error or Unavailable("the engine was stopped while loading"))
        for job_id in tuple(self._streams):
            self._deliver_event(Failed(job_id, FailureKind.UNAVAILABLE, "the engine has stopped"))
        if not self._stopped.done():
            self._stopped.set_result(message.error)

    # -- looking in, and text work --------------------------------------------------------------

    async def work(self, n_bytes: int, function: Callable[..., T], *args: Any) -> T:
        """Run a blocking function, such as tokenising `n_bytes` of text, off the loop; raises Unavailable
        once the engine is closing."""
        if self._is_closing:
            raise Unavailable("the server is shutting down", retry_after_s=5)
        executor = self._executor if n_bytes <= BULK_BYTES else self._bulk_executor
        work = self._loop.run_in_executor(executor, function, *args)
        self._at_work.add(work)
        work.add_done_callback(self._at_work.discard)
        return await asyncio.shield(work)  # the thread goes on when the reader leaves; close waits for it

    @property
    def snapshot(self) -> Snapshot:
        """The engine as of its last step; reading it never waits."""
        return self._thread.snapshot

    @property
    def n_waiting(self) -> int:
        """Jobs that wait for a slot."""
        return self._admission.n_waiting

    @property
    def n_running(self) -> int:
        """Jobs that have a slot."""
        return self._admission.n_running

    def last_job(self, slot_id: int) -> Job | None:
        """The job a slot works on or worked on last."""
        return self._last_jobs.get(slot_id)

    @property
    def step_age_s(self) -> float:
        """How long the current step has been running; 0 when none is."""
        started = self._thread.step_started_at
        return 0.0 if started is None else time.monotonic() - started


class JobStream:
    """The events of one job, for one reader. Leaving the `async with` block cancels the job.

    Unread deltas are merged, so the backlog is one event; past `max_unread` bytes of text the job
    is cancelled and the reader gets SlowReader.
    """

    def __init__(self, job: Job, max_unread: int, forget: Callable[[int], None]) -> None:
        self.job = job
        self.slot_id = -1
        self._max_unread = max_unread
        self._forget = forget
        self._pending: list[JobEvent] = []
        self._waiter: asyncio.Future[None] | None = None
        self._error: WingmanError | None = None

    def deliver(self, event: JobEvent) -> None:
        """Take the next event from the engine."""
        if isinstance(event, Started):
            self.slot_id = event.slot_id
            return
        previous = self._pending[-1] if self._pending else None
        if isinstance(event, TextDelta) and isinstance(previous, TextDelta):
            event = _merge(previous, event)
            self._pending[-1] = event
            if len(event.text) > self._max_unread:
                self._overrun()
        else:
            self._pending.append(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _overrun(self) -> None:
        self._error = SlowReader(
            f"more than {self._max_unread} bytes of output were left unread (--max-unread)"
        )
        self._pending.clear()
        self._forget(self.job.id)

    async def __aenter__(self) -> JobStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel the job unless it has ended; harmless when called again."""
        self._forget(self.job.id)

    async def __aiter__(self) -> AsyncIterator[JobEvent]:
        """Progress and TextDelta events, then one Finished. Raises what the job failed of."""
        while True:
            event = await self._next()
            if isinstance(event, Failed):
                raise _failure(event)
            yield event
            if isinstance(event, Finished):
                return

    async def result(self) -> Finished:
        """Wait for the end; for jobs that don't stream."""
        while True:
            event = await self._next()
            if isinstance(event, Failed):
                raise _failure(event)
            if isinstance(event, Finished):
                return event

    async def _next(self) -> JobEvent:
        while not self._pending:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._pending.pop(0)


def _merge(first: TextDelta, second: TextDelta) -> TextDelta:
    return TextDelta(
        first.job_id, first.text + second.text, first.tokens + second.tokens, second.n_decoded, second.timings
    )


def _failure(event: Failed) -> WingmanError:
    if event.kind is FailureKind.INVALID:
        return InvalidRequest(event.message)
    if event.kind is FailureKind.UNAVAILABLE:
        return Unavailable(event.message)
    return EngineFailure(event.message)


def _make_llama_runner(model: ModelConfig, context: ContextConfig) -> Runner:
    from wingman.engine.llama import LlamaRunner

    return LlamaRunner(model, context)


def _limits(runner: Runner, context: ContextConfig) -> SchedulerLimits:
    info = runner.info
    return SchedulerLimits(
        n_slots=info.n_slots,
        n_ctx_slot=info.n_ctx_slot,
        n_ctx_total=runner.n_ctx,
        n_batch=runner.n_batch,
        n_ubatch=runner.n_ubatch,
        max_step_s=context.max_step_ms / 1000,
        similarity=context.slot_prompt_similarity,
        is_unified=context.kv_unified,
        shifts_context=context.context_shift and info.can_shift,
        adds_bos=info.adds_bos,
        can_rollback=runner.can_rollback,
    )
