"""Who holds how much of the cache: jobs settle in their slots, wait for each other's prefixes, make room.

A job that got a slot settles there: it takes over the longest prefix of its prompt that the cache holds, or
waits while an older job is about to compute a longer one. When a pool that all slots share runs out, the
youngest sequence gives its room to the others and is evaluated again later, from host memory if it was
parked there. Part of the scheduler, which owns the jobs; pure.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from wingman.engine.cache import KvCache
from wingman.engine.lifecycle import JobState
from wingman.engine.limits import SchedulerLimits
from wingman.engine.sequence import Sequence
from wingman.engine.slots import common_prefix

UNIFIED_RESERVE_TOKENS = 32
"""Room that each running generation keeps when a prompt enters a unified cache: a newcomer waits rather
than cut a neighbour off."""

log = logging.getLogger("wingman.engine")


class Occupancy:
    """Decides over the cache for `jobs`, which are in order of arrival."""

    def __init__(self, limits: SchedulerLimits, cache: KvCache, jobs: Mapping[int, Sequence]) -> None:
        self._limits = limits
        self._cache = cache
        self._jobs = jobs
        self.n_preemptions = 0

    @property
    def n_generating(self) -> int:
        """Sequences that will end by themselves and give room, whosever turn it is."""
        return sum(
            slot.sequence is not None and slot.sequence.state is JobState.DECODE for slot in self._cache.slots
        )

    def settle_all(self) -> list[Sequence]:
        """Let jobs that have just got a slot take over what is cached of their prompts, oldest first; those
        that did."""
        settled = []
        for sequence in tuple(self._jobs.values()):
            if sequence.state is not JobState.PREFILL or sequence.is_settled or sequence.is_awaiting:
                continue
            sequence.awaited = self._longer_prefix(sequence)
            if sequence.awaited is None and self._has_room_again(sequence):
                self._settle(sequence)
                settled.append(sequence)
        return settled

    def _settle(self, sequence: Sequence) -> None:
        job, slot = sequence.job, self._cache.slots[sequence.slot_id]
        if job.cache_prompt or sequence.output:
            reuse = self._cache.reuse(slot, sequence.prompt, job.lora)
            n_cached, reason = reuse.n_tokens, reuse.reason
        else:
            self._cache.release(slot)
            slot.lora = job.lora
            n_cached, reason = 0, "cache_prompt is false"
        sequence.settle(n_cached)
        log.debug("job %d: %d of %d tokens cached: %s", job.id, n_cached, len(sequence.prompt), reason)

    def _longer_prefix(self, sequence: Sequence) -> tuple[Sequence, int] | None:
        """An older job that is computing a longer prefix of this prompt than anybody holds yet, and how long."""
        job = sequence.job
        if not job.cache_prompt or not self._limits.can_rollback:
            return None
        older = [
            other
            for other in self._jobs.values()
            if other.state is JobState.PREFILL and other.job.id < job.id and other.job.lora == job.lora
        ]
        if not older:
            return None
        n_common = {other.job.id: common_prefix(other.prompt, sequence.prompt) for other in older}
        best = max(older, key=lambda other: n_common[other.job.id])
        n_shared = min(n_common[best.job.id], len(sequence.prompt) - 1)
        n_held = self._cache.n_obtainable(sequence.prompt, job.lora)
        return (best, n_shared) if n_shared >= n_held + self._limits.min_shared else None

    def _has_room_again(self, sequence: Sequence) -> bool:
        """Whether a preempted sequence fits the shared pool now; one that is alone and does not fit ends."""
        if not sequence.is_preempted:
            return True
        n_wanted = len(sequence.prompt) + (self.n_generating + 1) * UNIFIED_RESERVE_TOKENS
        if self._cache.make_room(n_wanted):
            return True
        is_alone = not any(slot.sequence is not None and slot.tokens for slot in self._cache.slots)
        return is_alone and self._cache.make_room(len(sequence.prompt) + 1)

    def victim(self) -> Sequence | None:
        """The youngest sequence that holds tokens, unless it is the only one."""
        holding = [slot.sequence for slot in self._cache.slots if slot.sequence is not None and slot.tokens]
        return max(holding, key=lambda sequence: sequence.job.id) if len(holding) > 1 else None

    def preempt(self, sequence: Sequence) -> None:
        """Take the cache of a sequence away; what it held is parked if there is room."""
        slot = self._cache.slots[sequence.slot_id]
        log.debug("job %d makes room: %d tokens", sequence.job.id, len(slot.tokens))
        sequence.preempt(slot.tokens)
        self._cache.release(slot)
        self.n_preemptions += 1
