"""The events of a request's jobs, for one reader on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Final

from wingman.engine.types import Failed, FailureKind, Finished, Job, JobEvent, Started, TextDelta
from wingman.errors import EngineFailure, InvalidRequest, SlowReader, Unavailable, WingmanError

_ALTERNATIVE_BYTES: Final = 8
"""What an unread alternative of a token counts: its id and its value."""


class JobStream:
    """The events of jobs that were submitted together. Leaving the `async with` block cancels them.

    Unread deltas of a job are merged, so the backlog is one event a job; past `max_unread` bytes of
    text and probabilities the jobs are cancelled and the reader gets SlowReader.
    """

    def __init__(self, jobs: tuple[Job, ...], max_unread: int, forget: Callable[[int], None]) -> None:
        self.jobs = jobs
        self.slot_ids: dict[int, int] = {}
        """Job id -> slot, for those that have started."""
        self._max_unread = max_unread
        self._forget = forget
        self._n_running = len(jobs)
        self._n_unread = 0
        self._pending: list[JobEvent] = []
        self._open: dict[int, int] = {}
        """Job id -> place in `_pending` of its last event, when that is a delta."""
        self._waiter: asyncio.Future[None] | None = None
        self._error: WingmanError | None = None

    def deliver(self, event: JobEvent) -> None:
        """Take the next event from the engine; after an error nothing counts any more."""
        if self._error is not None:
            return
        if isinstance(event, TextDelta):
            self._add_delta(event)
        elif isinstance(event, Started):
            self.slot_ids[event.job_id] = event.slot_id
            return
        elif isinstance(event, Failed):
            self._error = failure(event)
        else:
            self._open.pop(event.job_id, None)
            self._pending.append(event)
            self._n_running -= isinstance(event, Finished)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _add_delta(self, event: TextDelta) -> None:
        place = self._open.get(event.job_id)
        if place is None:
            self._open[event.job_id] = len(self._pending)
            self._pending.append(event)
        else:
            previous = self._pending[place]
            assert isinstance(previous, TextDelta)
            self._pending[place] = _merge(previous, event)
        self._n_unread += len(event.text)
        if event.probs:
            self._n_unread += sum(_ALTERNATIVE_BYTES * len(prob.top) for prob in event.probs)
        if self._n_unread > self._max_unread:
            self._overrun()

    def _overrun(self) -> None:
        self._error = SlowReader(
            f"more than {self._max_unread} bytes of output were left unread (--max-unread)"
        )
        self._pending.clear()
        self._open.clear()
        self.close()

    async def __aenter__(self) -> JobStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel the jobs that have not ended; harmless when called again."""
        for job in self.jobs:
            self._forget(job.id)

    async def steps(self) -> AsyncIterator[list[JobEvent]]:
        """What has happened since the last look, again and again until every job is Finished. Raises what a
        job failed of."""
        while self._n_running or self._pending:
            yield await self._next()

    async def __aiter__(self) -> AsyncIterator[JobEvent]:
        """Progress and TextDelta events and one Finished of each job. Raises what a job failed of."""
        async for events in self.steps():
            for event in events:
                yield event

    async def results(self) -> list[Finished]:
        """Wait for the end of all; for jobs that don't stream. In order of the jobs."""
        finished = {event.job_id: event async for event in self if isinstance(event, Finished)}
        return [finished[job.id] for job in self.jobs]

    async def _next(self) -> list[JobEvent]:
        while not self._pending:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        events, self._pending = self._pending, []
        self._open.clear()
        self._n_unread = 0
        return events


def _merge(first: TextDelta, second: TextDelta) -> TextDelta:
    return TextDelta(
        first.job_id,
        first.text + second.text,
        first.tokens + second.tokens,
        second.n_decoded,
        second.timings,
        first.probs + second.probs,
    )


def failure(event: Failed) -> WingmanError:
    """The error a failed job stands for."""
    if event.kind is FailureKind.INVALID:
        return InvalidRequest(event.message)
    if event.kind is FailureKind.UNAVAILABLE:
        return Unavailable(event.message)
    return EngineFailure(event.message)
