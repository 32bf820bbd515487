"""Inputs waiting to be embedded, from all requests, and how they are put into batches.

Pure; engine thread. A batch takes whole inputs, oldest first, from as many requests as fit; while text
is generated too, no more than what keeps the batch near `max_step_s` at the measured speed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from wingman.engine.types import Embedded, EmbedJob, Failed, FailureKind

MIN_PIECE_TOKENS: Final = 32
MAX_PIECE_TOKENS: Final = 256
"""Tokens computed between two looks at what else there is to do, by models that can stop in between."""


class EmbedItem(Struct, frozen=True):
    """Input `index` of a job, as token ids."""

    job_id: int
    index: int
    tokens: tuple[int, ...]


class EmbeddingQueue:
    """Batches hold at most `n_max` tokens and `n_inputs` inputs; no input is longer than `n_max`."""

    def __init__(self, n_max: int, n_inputs: int, max_step_s: float) -> None:
        self._n_max = n_max
        self._n_inputs = n_inputs
        self._max_step_s = max_step_s
        self._tokens_per_s = 0.0
        self._waiting: deque[EmbedItem] = deque()
        self._vectors: dict[int, dict[int, bytes]] = {}
        self._n_inputs_of: dict[int, int] = {}
        self._events: list[Embedded | Failed] = []

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to compute."""
        return not self._vectors

    def add(self, job: EmbedJob) -> None:
        """Queue all inputs of a job, of which there is at least one."""
        self._vectors[job.id] = {}
        self._n_inputs_of[job.id] = len(job.inputs)
        self._waiting.extend(EmbedItem(job.id, index, tokens) for index, tokens in enumerate(job.inputs))

    def cancel(self, job_id: int) -> None:
        """Forget a job. Unknown ids are ignored."""
        if self._vectors.pop(job_id, None) is not None:
            del self._n_inputs_of[job_id]
            self._waiting = deque(item for item in self._waiting if item.job_id != job_id)

    def plan(self, *, is_alone: bool) -> list[EmbedItem]:
        """The next batch; empty when nothing waits. `is_alone`: nothing else waits for the engine."""
        batch: list[EmbedItem] = []
        n_most, n_tokens = self._n_max, 0
        if not is_alone:
            n_most = min(n_most, int(self._tokens_per_s * self._max_step_s))
        while self._waiting and len(batch) < self._n_inputs:
            n_tokens += len(self._waiting[0].tokens)
            if batch and n_tokens > n_most:
                break
            batch.append(self._waiting.popleft())
        return batch

    def is_wanted(self, batch: Sequence[EmbedItem]) -> bool:
        """Whether anybody still waits for a part of it."""
        return any(item.job_id in self._vectors for item in batch)

    def piece_tokens(self, *, is_alone: bool) -> int:
        """How many tokens to compute at once."""
        if is_alone:
            return MAX_PIECE_TOKENS
        affordable = int(self._tokens_per_s * self._max_step_s)
        return min(max(affordable, MIN_PIECE_TOKENS), MAX_PIECE_TOKENS)

    def apply(self, batch: Sequence[EmbedItem], vectors: Sequence[bytes], elapsed_s: float) -> None:
        """Keep the vectors of a batch that took `elapsed_s`; jobs that are complete with it end."""
        if elapsed_s > 0:
            self._tokens_per_s = sum(len(item.tokens) for item in batch) / elapsed_s
        for item, vector in zip(batch, vectors, strict=True):
            found = self._vectors.get(item.job_id)
            if found is not None:
                found[item.index] = vector
                if len(found) == self._n_inputs_of[item.job_id]:
                    del self._vectors[item.job_id], self._n_inputs_of[item.job_id]
                    self._events.append(Embedded(item.job_id, tuple(found[i] for i in range(len(found)))))

    def fail(self, batch: Sequence[EmbedItem], message: str) -> None:
        """The batch could not be computed: its jobs end."""
        for job_id in {item.job_id for item in batch}:
            self._fail(job_id, FailureKind.ENGINE, message)

    def end_all(self) -> None:
        """Fail everything that waits."""
        for job_id in tuple(self._vectors):
            self._fail(job_id, FailureKind.UNAVAILABLE, "the model is being stopped")

    def _fail(self, job_id: int, kind: FailureKind, message: str) -> None:
        if job_id in self._vectors:
            self.cancel(job_id)
            self._events.append(Failed(job_id, kind, message))

    def take_events(self) -> tuple[Embedded | Failed, ...]:
        """Events since the last call, in order."""
        events = tuple(self._events)
        self._events.clear()
        return events
