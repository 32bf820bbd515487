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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from msgspec import structs

from wingman.config import ContextConfig, ModelConfig
from wingman.engine.admission import Admission
from wingman.engine.limits import SchedulerLimits
from wingman.engine.runner import OnProgress, Runner, SamplerParts, Tokenizer
from wingman.engine.scheduler import Scheduler
from wingman.engine.stream import JobStream, failure
from wingman.engine.thread import EngineThread, Loaded, Loading, Message, Stopped
from wingman.engine.types import (
    Cancel,
    ChangeSlot,
    Command,
    Embed,
    Embedded,
    EmbedJob,
    EndAll,
    Failed,
    FailureKind,
    Finished,
    Job,
    JobEvent,
    ModelInfo,
    Shutdown,
    SlotChanged,
    SlotJob,
    Snapshot,
    Started,
    Submit,
)
from wingman.errors import (
    ContextOverflow,
    InvalidRequest,
    NotSupported,
    Overloaded,
    Unavailable,
    WingmanError,
)

log = logging.getLogger("wingman.engine")
T = TypeVar("T")
MakeRunner = Callable[[ModelConfig, ContextConfig, OnProgress], Runner]

N_WORKERS = 2
"""Threads that tokenise and render; the calls release the GIL or are short."""
BULK_BYTES = 64 * 1024
"""Text work on more than this has a thread of its own: a huge prompt must not delay the small ones."""
_NO_LIMIT = 1 << 62
END_GRACE_S = 5.0
"""How long ended jobs get to be delivered before the engine is shut down regardless."""


class Engine:
    """A loaded model that takes jobs."""

    def __init__(
        self,
        model: ModelConfig,
        context: ContextConfig,
        make_runner: MakeRunner | None = None,
    ) -> None:
        """Nothing is loaded before `load`; `make_runner` is replaced in tests."""
        self._model = model
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._make_runner = make_runner or _make_llama_runner
        n_threads = (context.threads, context.threads_batch)
        self._thread = EngineThread(self._new_runner, self._new_scheduler, self._post, n_threads=n_threads)
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
        self._answers: dict[int, asyncio.Future[Any]] = {}
        """Who waits for an Embedded or a SlotChanged, by job id."""
        self._embed_admission = Admission(1, context.max_queue, context.max_queue_tokens)
        self._on_progress: Callable[[float], None] = lambda _: None
        self.info: ModelInfo
        self.tokenizer: Tokenizer
        self.parts: SamplerParts
        self.lora_scales: tuple[float, ...] = ()
        """Scale of each loaded adapter for jobs that don't say."""

    # -- life ---------------------------------------------------------------------------------

    async def load(self, on_progress: Callable[[float], None] = lambda _: None) -> None:
        """Load the model; `on_progress` is told the share that is loaded. Raises ModelLoadFailure."""
        self._on_progress = on_progress
        self._thread.start()
        loaded = await self._loaded
        self.info, self.tokenizer, self.parts = loaded.info, loaded.tokenizer, loaded.parts
        self.lora_scales = tuple(lora.scale for lora in loaded.info.loras)

    def abandon_load(self) -> None:
        """Make a load that is going on fail soon."""
        self._thread.abandon_load()

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

    def _new_runner(self, on_progress: OnProgress) -> Runner:
        return self._make_runner(self._model, self._context, on_progress)

    def _new_scheduler(self, runner: Runner) -> Scheduler:
        limits = _limits(runner, self._context)
        return Scheduler(limits, runner.tokenizer, runner.slot_bytes, runner.draft_model)

    # -- jobs ---------------------------------------------------------------------------------

    def new_job_id(self) -> int:
        """A job id, unique in this process."""
        return next(self._ids)

    def submit(self, *jobs: Job) -> JobStream:
        """Queue the jobs of a request and return their events, to be used as `async with`. A fork follows
        the job it shares its prompt with.

        Raises ContextOverflow, InvalidRequest, NotSupported, Overloaded or Unavailable; then nothing was
        queued.
        """
        self._refuse_while_closing()
        if not self.info.can_generate:
            raise NotSupported("this model does not generate text; it only embeds")
        for job in jobs:
            self._check(job)
        self.check_count(len(jobs))
        self._admission.offer({job.id: len(job.prompt) for job in jobs})
        stream = JobStream(jobs, self._context.max_unread, self._forget)
        for job in jobs:
            self._streams[job.id] = stream
        self._no_jobs.clear()
        self._thread.send(Submit(jobs))
        return stream

    def check_count(self, n_jobs: int) -> None:
        """Raise InvalidRequest when a request asks for more completions than may ever wait."""
        n_at_most = self.info.n_slots + self._context.max_queue
        if n_jobs > n_at_most:
            raise InvalidRequest(f"a request may ask for {n_at_most} completions (--parallel, --max-queue)")

    def _check(self, job: Job) -> None:
        if not job.prompt:
            raise InvalidRequest("the prompt is empty", "prompt")
        if len(job.prompt) >= self.info.n_ctx_slot:
            raise ContextOverflow(len(job.prompt), self.info.n_ctx_slot)
        if job.id_slot >= self.info.n_slots:
            raise InvalidRequest(f"there are {self.info.n_slots} slots", "id_slot")

    async def embed(self, inputs: tuple[tuple[int, ...], ...]) -> tuple[bytes, ...]:
        """The vectors of inputs as float32 bytes, see Embedded; none is empty or longer than
        `info.embedding.n_max`. Raises EngineFailure, Overloaded or Unavailable."""
        job = EmbedJob(self.new_job_id(), inputs)
        self._embed_admission.offer({job.id: sum(map(len, inputs))})
        try:
            answer = await self._ask(job.id, Embed(job))
        finally:
            self._embed_admission.ended(job.id)
        assert isinstance(answer, Embedded)
        return answer.vectors

    async def change_slot(self, job: SlotJob) -> SlotChanged:
        """Save, restore or erase a slot once it is idle; what is restored counts as computed with the default
        adapter scales. Raises EngineFailure, InvalidRequest for a state that does not fit, NotSupported,
        Overloaded or Unavailable."""
        if not self.info.can_generate:
            raise NotSupported("this model has no slots to save; it only embeds")
        if not 0 <= job.slot_id < self.info.n_slots:
            raise InvalidRequest(f"there are {self.info.n_slots} slots", "id_slot")
        if len(self._answers) > self._context.max_queue + self.info.n_slots:
            raise Overloaded("too many requests wait for slots (--max-queue)", 1)
        job = structs.replace(job, lora=self.lora_scales)
        answer = await self._ask(job.id, ChangeSlot(job))
        assert isinstance(answer, SlotChanged)
        return answer

    async def _ask(self, job_id: int, command: Command) -> Embedded | SlotChanged:
        """Send a command that is answered by one event; leaving takes it back."""
        self._refuse_while_closing()
        answer = self._answers[job_id] = self._loop.create_future()
        self._no_jobs.clear()
        self._thread.send(command)
        try:
            event: Embedded | SlotChanged = await answer
            return event
        finally:
            if self._answers.pop(job_id, None) is not None:
                self._thread.send(Cancel(job_id))
            self._note_idle()

    def _refuse_while_closing(self) -> None:
        if self._is_draining or self._stopped.done():
            raise Unavailable("the model is being stopped", retry_after_s=5)

    def _forget(self, job_id: int) -> None:
        """Cancel a job whose reader has left, or drop one that ended."""
        if self._streams.pop(job_id, None) is None:
            return
        self._thread.send(Cancel(job_id))
        self._ended(job_id)

    def _ended(self, job_id: int) -> None:
        self._admission.ended(job_id)
        self._note_idle()

    def _note_idle(self) -> None:
        if not self._streams and not self._answers:
            self._no_jobs.set()

    def _post(self, message: Message) -> None:
        """Called on the engine thread; the loop may be gone by then."""
        try:
            self._loop.call_soon_threadsafe(self._deliver, message)
        except RuntimeError:
            log.debug("an engine message came after the end of the loop")

    def _deliver(self, message: Message) -> None:
        if isinstance(message, Loading):
            self._on_progress(message.progress)
        elif isinstance(message, Loaded):
            self._loaded.set_result(message)
        elif isinstance(message, Stopped):
            self._on_stopped(message)
        else:
            for event in message.events:
                self._deliver_event(event)

    def _deliver_event(self, event: JobEvent) -> None:
        answer = self._answers.get(event.job_id)
        if answer is not None and not answer.done():
            del self._answers[event.job_id]
            if isinstance(event, Failed):
                answer.set_exception(failure(event))
            else:
                answer.set_result(event)
            return
        stream = self._streams.get(event.job_id)
        if stream is None:
            return
        if isinstance(event, Started):
            self._admission.started(event.job_id)
            self._last_jobs[event.slot_id] = next(job for job in stream.jobs if job.id == event.job_id)
        elif isinstance(event, Finished | Failed):
            del self._streams[event.job_id]
            self._ended(event.job_id)
        stream.deliver(event)

    def _on_stopped(self, message: Stopped) -> None:
        if not self._loaded.done():
            self._loaded.set_exception(message.error or Unavailable("the engine was stopped while loading"))
        for job_id in (*self._streams, *self._answers):
            self._deliver_event(Failed(job_id, FailureKind.UNAVAILABLE, "the engine has stopped"))
        if not self._stopped.done():
            self._stopped.set_result(message.error)

    # -- looking in, and text work --------------------------------------------------------------

    async def work(self, n_bytes: int, function: Callable[..., T], *args: Any) -> T:
        """Run a blocking function, such as tokenising `n_bytes` of text, off the loop; raises Unavailable
        once the engine is closing."""
        if self._is_closing:
            raise Unavailable("the model is being stopped", retry_after_s=5)
        executor = self._executor if n_bytes <= BULK_BYTES else self._bulk_executor
        work = self._loop.run_in_executor(executor, function, *args)
        self._at_work.add(work)
        work.add_done_callback(self._at_work.discard)
        work.add_done_callback(_mark_seen)
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


def _mark_seen(work: asyncio.Future[Any]) -> None:
    """What fails after its reader has left is told to nobody else."""
    error = None if work.cancelled() else work.exception()
    if error is not None and not isinstance(error, WingmanError):
        log.debug("text work failed", exc_info=error)


def _make_llama_runner(model: ModelConfig, context: ContextConfig, on_progress: OnProgress) -> Runner:
    from wingman.engine.llama.runner import LlamaRunner

    return LlamaRunner(model, context, on_progress)


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
        n_window=runner.n_window,
        parked_bytes=_cache_ram_bytes(context),
        can_compute_aside=runner.can_compute_aside,
    )


def _cache_ram_bytes(context: ContextConfig) -> int:
    """Budget of what is parked; who wants a default fills it in."""
    n_mib = context.cache_ram or 0
    return _NO_LIMIT if n_mib < 0 else n_mib << 20
