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
            if sequence.awaited is not None:
                continue
            if not self._has_room_again(sequence):
                break  # who comes later must not take the room that it waits for
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
        best, n_shared = None, self._limits.min_shared - 1
        for other in older:
            n_common = min(common_prefix(other.prompt, sequence.prompt), len(sequence.prompt) - 1)
            if n_common > n_shared and other.shares_soon(n_common):
                best, n_shared = other, n_common
            if n_shared == len(sequence.prompt) - 1:
                break
        if best is None:
            return None
        n_held = self._cache.n_obtainable(sequence.prompt, job.lora)
        return (best, n_shared) if n_shared >= n_held + self._limits.min_shared else None

    def _has_room_again(self, sequence: Sequence) -> bool:
        """Make room for a preempted sequence, beside what the others may still need; one that is alone takes
        what there is."""
        if not sequence.is_preempted:
            return True
        n_wanted = len(sequence.prompt) + (self.n_generating + 1) * UNIFIED_RESERVE_TOKENS
        if self._cache.make_room(n_wanted):
            return True
        return not self._holding() and self._cache.make_room(len(sequence.prompt) + 1)

    def _holding(self) -> list[Sequence]:
        """Sequences that hold tokens of their own."""
        sequences = (slot.sequence for slot in self._cache.slots if slot.tokens)
        return [sequence for sequence in sequences if sequence is not None and sequence.is_settled]

    def victim(self, asking: Sequence | None = None) -> Sequence | None:
        """The youngest sequence that holds tokens; None if there is no other than the one that asks for room,
        by default the only one there is."""
        holding = self._holding()
        others = [sequence for sequence in holding if sequence is not asking]
        if not others or (asking is None and len(holding) == 1):
            return None
        return max(holding, key=lambda sequence: sequence.job.id)

    def preempt(self, sequence: Sequence) -> None:
        """Take the cache of a sequence away; what it held is parked if there is room."""
        slot = self._cache.slots[sequence.slot_id]
        log.debug("job %d makes room: %d tokens", sequence.job.id, len(slot.tokens))
        sequence.preempt(slot.tokens)
        self._cache.release(slot)
        self.n_preemptions += 1
