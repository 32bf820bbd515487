"""How much work may wait: a bound in requests and one in prompt tokens, enforced on the loop.

Pure. Because it counts what was submitted and has not ended, it holds whatever the engine thread
is busy with, and a refusal costs no wait.
"""

from __future__ import annotations

from collections.abc import Mapping

from wingman.errors import Overloaded

RETRY_AFTER_S = 1


class Admission:
    """Requests beyond `n_slots` wait; at most `max_waiting` of them, with at most
    `max_waiting_tokens` prompt tokens together."""

    def __init__(self, n_slots: int, max_waiting: int, max_waiting_tokens: int) -> None:
        self._n_slots = n_slots
        self._max_waiting = max_waiting
        self._max_waiting_tokens = max_waiting_tokens
        self._waiting: dict[int, int] = {}
        self._running: set[int] = set()

    def offer(self, jobs: Mapping[int, int]) -> None:
        """Take in the jobs of a request, id -> prompt tokens; raises Overloaded when they must not wait."""
        n_free = self._n_slots - len(self._waiting) - len(self._running)
        if len(jobs) > n_free + self._max_waiting:
            raise Overloaded(f"{self._max_waiting} requests are waiting already (--max-queue)", RETRY_AFTER_S)
        n_tokens = sum(self._waiting.values()) + sum(jobs.values())
        if n_free <= 0 and n_tokens > self._max_waiting_tokens:
            raise Overloaded(
                f"prompts of {self._max_waiting_tokens} tokens are waiting already (--max-queue-tokens)",
                RETRY_AFTER_S,
            )
        self._waiting.update(jobs)

    def started(self, job_id: int) -> None:
        """The job got a slot."""
        if self._waiting.pop(job_id, None) is not None:
            self._running.add(job_id)

    def ended(self, job_id: int) -> None:
        """The job is over or cancelled."""
        self._waiting.pop(job_id, None)
        self._running.discard(job_id)

    @property
    def n_waiting(self) -> int:
        """Jobs without a slot."""
        return len(self._waiting)

    @property
    def n_running(self) -> int:
        """Jobs with a slot."""
        return len(self._running)
