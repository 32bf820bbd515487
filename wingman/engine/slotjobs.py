"""Slots saved, restored and erased on request: who waits for which slot, in order.

Pure; engine thread. The scheduler owns it; the engine thread carries the changes out.
"""

from __future__ import annotations

from collections import deque

from wingman.engine.cache import KvCache
from wingman.engine.types import Failed, FailureKind, JobEvent, SlotChanged, SlotJob, SlotMove


class SlotJobs:
    """The queue of changes. A slot somebody waits for is entered by no job."""

    def __init__(self, cache: KvCache) -> None:
        self._cache = cache
        self._queue: deque[SlotJob] = deque()

    def __bool__(self) -> bool:
        return bool(self._queue)

    def add(self, job: SlotJob) -> None:
        """Queue a change."""
        self._queue.append(job)
        self._cache.slots[job.slot_id].is_reserved = True

    def next(self) -> SlotJob | None:
        """The first change whose slot is idle and as the cache is; the caller does it and reports."""
        job = next((job for job in self._queue if self._cache.slots[job.slot_id].is_idle), None)
        if job is not None:
            self.has_room(job)
        return None if self._cache.has_ops else job

    def has_room(self, job: SlotJob) -> bool:
        """Whether the cache can take what is to be restored; what idle slots hold makes way for it."""
        n_held = len(self._cache.slots[job.slot_id].tokens)
        return job.move is not SlotMove.RESTORE or self._cache.make_room(len(job.tokens) - n_held)

    def finish(self, job: SlotJob, state: bytes = b"") -> SlotChanged:
        """The change is done; a restored slot holds the job's tokens, an erased one none."""
        slot = self._cache.slots[job.slot_id]
        tokens = tuple(slot.tokens)
        if job.move is SlotMove.ERASE:
            self._cache.forget(slot, 0)
        elif job.move is SlotMove.RESTORE:
            tokens = job.tokens
            slot.tokens[:] = tokens
            slot.lora = job.lora
        self._drop(job)
        return SlotChanged(job.id, tokens, state, slot.lora)

    def refuse(self, job: SlotJob, kind: FailureKind, message: str) -> Failed:
        """The change can't be done; a slot that was to be restored is empty, or as it was when it was not tried
        (UNAVAILABLE)."""
        if job.move is SlotMove.RESTORE and kind is not FailureKind.UNAVAILABLE:
            self._cache.forget(self._cache.slots[job.slot_id], 0)
        self._drop(job)
        return Failed(job.id, kind, message)

    def cancel(self, job_id: int) -> None:
        """Forget a change; unknown ids are ignored."""
        for job in tuple(self._queue):
            if job.id == job_id:
                self._drop(job)

    def refuse_all(self, kind: FailureKind, message: str) -> list[JobEvent]:
        """Give all up."""
        return [self.refuse(job, kind, message) for job in tuple(self._queue)]

    def _drop(self, job: SlotJob) -> None:
        self._queue.remove(job)
        is_reserved = any(other.slot_id == job.slot_id for other in self._queue)
        self._cache.slots[job.slot_id].is_reserved = is_reserved
