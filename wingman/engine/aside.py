"""A long prompt evaluated aside, while others generate: which one, how far it is, when it lands in its slot.

In the steps of all, a prompt holds up those who generate for as long as its smallest worthwhile piece takes.
Aside it is computed in a context of its own, in pieces of full size, and whoever computes it stops every few
milliseconds to let the others have a step. All but its last token is computed so; then its cache is moved into
its slot, and the last token joins a step as any other does. One prompt at a time, first come first served; but one
that is far shorter than what is left of the present one is cut into the steps, rather than wait for that.

Part of the scheduler, which owns the jobs; pure; engine thread only.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from wingman.engine.cache import KvCache
from wingman.engine.lifecycle import JobState
from wingman.engine.limits import SchedulerLimits
from wingman.engine.pace import PrefillPace
from wingman.engine.runner import AsidePiece
from wingman.engine.sequence import Sequence

PATIENCE = 4
"""A prompt waits for another that has at most so many times its tokens left."""
MAX_HELD_SHARE = 32
"""Nor is it computed aside if its slot holds more than so many times what is left: that would have to be moved there
and back, which takes about a hundredth of computing it."""
MAX_PIECE_TOKENS = 512
MAX_FAILURES = 3
"""After so many all prompts are computed in the steps."""

log = logging.getLogger("wingman.engine")


class Aside:
    """The prompt that is computed aside, if any, and those that wait for that."""

    def __init__(
        self, limits: SchedulerLimits, cache: KvCache, jobs: Mapping[int, Sequence], pace: PrefillPace
    ) -> None:
        """`jobs` are all there are, in order of arrival."""
        self._limits = limits
        self._cache = cache
        self._jobs = jobs
        self._pace = pace
        self._sequence: Sequence | None = None
        self._piece: AsidePiece | None = None
        """What is being computed; of a sequence that is gone until whoever computes it has noticed."""
        self._n_failures = 0

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to compute aside."""
        return self._current() is None

    def _current(self) -> Sequence | None:
        """The sequence, unless its job has ended or its slot was emptied meanwhile."""
        return self._sequence if self._sequence is not None and _is_aside(self._sequence) else None

    def choose(self, n_generating: int) -> None:
        """Take prompts out of the steps that would have to be cut there, while so many generate."""
        if not self._limits.can_compute_aside or self._n_failures >= MAX_FAILURES:
            return
        current = self._current()
        if n_generating or current is not None:
            n_most = self._pace.budget(max(n_generating, 1))
            n_waited_for = 0 if current is None else current.n_prompt_left - current.n_aside
            for each in self._in_steps():
                n_left = each.n_prompt_left
                is_worth_moving = n_left * MAX_HELD_SHARE >= each.n_filled and not each.stays_in_steps
                if is_worth_moving and n_left > max(n_most, n_waited_for // PATIENCE, 1):
                    each.go_aside()
                    log.debug("job %d: %d tokens aside", each.job.id, n_left)
        if current is None and self._piece is None:
            self._sequence = next(filter(_is_aside, self._jobs.values()), None)

    def _in_steps(self) -> list[Sequence]:
        """The prompts that are computed in the steps."""
        return [each for each in self._jobs.values() if each.state is JobState.PREFILL and each.has_work]

    @property
    def has_company(self) -> bool:
        """Whether the steps of the others evaluate prompts too."""
        return bool(self._in_steps())

    def plan(self) -> AsidePiece | None:
        """The next piece, None when there is none. Every piece is followed by `apply` or `fail`."""
        sequence = self._current()
        if sequence is None:
            return None
        start = sequence.n_filled + sequence.n_aside
        end = min(start + self._limits.n_ubatch, start + MAX_PIECE_TOKENS, len(sequence.prompt) - 1)
        self._piece = AsidePiece(
            sequence.slot_id,
            sequence.job.id,
            sequence.prompt[start:end],
            start,
            len(sequence.prompt),
            sequence.job.lora,
            is_first=not sequence.n_aside,
        )
        return self._piece

    def is_wanted(self, piece: AsidePiece) -> bool:
        """Whether a piece that is being computed is still of use."""
        sequence = self._current()
        return sequence is not None and self._piece is piece

    def apply(self, piece: AsidePiece) -> Sequence | None:
        """A piece is computed, and in the slot with all others if it is the last; or it was given up because it was
        not wanted. Its sequence, if that is still there."""
        sequence = self._current()
        self._piece = None
        if sequence is None:
            return None
        sequence.fill_aside(len(piece.tokens))
        if piece.is_last:
            self._cache.slots[sequence.slot_id].tokens[:] = sequence.prompt[:-1]
            sequence.land()
        return sequence

    def fail(self, reason: str) -> None:
        """A piece could not be computed or landed: its prompt begins again, in the steps."""
        log.warning("a long prompt could not be computed outside the steps: %s", reason)
        self._n_failures += 1
        sequence = self._current()
        self._piece = None
        if sequence is not None:
            sequence.stays_in_steps = True
            sequence.unsettle()
            self._cache.empty(self._cache.slots[sequence.slot_id])
        if self._n_failures >= MAX_FAILURES:
            for each in filter(_is_aside, self._jobs.values()):
                each.give_up_aside()


def _is_aside(sequence: Sequence) -> bool:
    return sequence.is_aside and sequence.state is JobState.PREFILL
