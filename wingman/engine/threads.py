"""How many threads a step gets, found out from how long steps take. Pure; a governor belongs to one engine
and is used on its thread.

The threads of a step wait for each other hundreds of times, so one that has to share its core with a
neighbour holds up all of them: a step can take twenty times as long as with one thread less. Neighbours
are not announced. They show in steps that take far longer than those before, or in the engine's thread
being off its core for much of a step, asleep until the others are done. Two such steps out of three begin
a search: lower counts are tried for a few steps each, and the fastest stays. From then on the next higher
count is tried now and then, at a pace that bounds what the tries cost, and kept if it is faster: so the
count comes back when the neighbour leaves. On a quiet machine nothing is ever tried.

Costs are relative to other steps of the same size, and what is usual moves along: a context that grows
makes steps slower too. Generation and prompts suffer differently, so each has its own search, and so has
each limit, which moves when several engines share the cores.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from statistics import fmean
from typing import Final

from msgspec import Struct

PREFILL_TOKENS: Final = 32
"""Steps of at least so many tokens count as prompts."""
SLOW: Final = 1.6
"""A step that costs so many times what is usual is slow; on a quiet machine they spread by 20%."""
LOW_SHARE: Final = 0.75
"""So is one for less of which the thread was on its core: alone it is nearly always, with a neighbour half
the time."""
N_ALARM: Final = 2
N_WATCHED: Final = 3
"""So many slow steps out of so many begin a search."""
TRIAL_STEPS: Final = 2
"""Steps that a lower count is tried for."""
WORSE: Final = 1.2
"""A search ends with a count that costs so many times the best one, and has its cores to itself."""
NEAR: Final = 1.05
"""Of counts that cost nearly the same, the highest is taken."""
PROBE_STEPS: Final = 3
"""Steps that a higher count is tried for; the first also starts threads and is only a veto."""
FASTER: Final = 0.97
"""A higher count is kept if it costs at most so many times the present one."""
PAUSE_S: Final = 1.0
MAX_PAUSE_S: Final = 30.0
"""Least and most time between two tries."""
PAUSE_PER_LOSS: Final = 30.0
"""Pause after a higher count was tried in vain, per second lost by it: tries take at most 3% of the time."""
RELAPSE_S: Final = 5.0
"""A higher count that lasts no longer was no success: a neighbour that comes and goes all the time."""
RELAPSE_PAUSE_S: Final = 8.0
"""The pause doubles with each such relapse, up to this."""
FALL: Final = 0.3
RISE: Final = 0.1
"""How far the usual cost moves towards that of a step, down and up."""
MAX_COST: Final = 1e3
"""Costs are cut to this, and to its reciprocal: one odd measurement must not drown all others."""
MIN_STEP_S: Final = 1e-6
"""A shorter step computed nothing."""
DRIFT: Final = 0.05
"""How far a known size of step moves relative to the others."""


class ThreadChoice(Struct, frozen=True):
    """The end of a search: the count before, the best other one tried, the count from now on, and what steps
    like the last one take with the first two."""

    is_prefill: bool
    reason: str
    n_before: int
    n_tried: int
    n_after: int
    before_s: float
    tried_s: float

    def __str__(self) -> str:
        """The line of the log."""
        phase = "prompts" if self.is_prefill else "generation"
        return (
            f"threads for {phase} {self.n_before} -> {self.n_after}: {self.reason}; a step takes "
            f"{self.before_s * 1e3:.1f} ms with {self.n_before}, {self.tried_s * 1e3:.1f} with {self.n_tried}"
        )


class ThreadGovernor:
    """Chooses counts up to `n_max`; a count given for single tokens or for batches is fixed, 0 is not."""

    def __init__(self, n_max: int, n_fixed: int = 0, n_fixed_batch: int = 0) -> None:
        self._n_max = n_max
        self._n_fixed = n_fixed
        self._n_fixed_batch = n_fixed_batch or n_fixed
        self._searches: dict[tuple[bool, int], _Search] = {}
        self._active: _Search | None = None
        self.n_decode = n_fixed or n_max
        """Count of the last step that generated; at first, of the one to come."""
        self.n_prefill = self.n_latest = self._n_fixed_batch or n_max
        """The same for prompts and for any step."""
        self.n_changes = 0
        """Searches that ended with another count."""

    def choose(self, n_tokens: int, n_limit: int | None = None) -> int:
        """Threads for the next step, at most `n_limit` unless fixed."""
        is_prefill = n_tokens >= PREFILL_TOKENS
        count = self._n_fixed_batch if n_tokens > 1 else self._n_fixed
        self._active = None
        if not count:
            self._active = self._search(is_prefill, max(1, min(n_limit or self._n_max, self._n_max)))
            count = self._active.count
        self.n_latest = count
        if is_prefill:
            self.n_prefill = count
        else:
            self.n_decode = count
        return count

    def _search(self, is_prefill: bool, n_limit: int) -> _Search:
        key = (is_prefill, n_limit)
        if key not in self._searches:
            self._searches[key] = _Search(is_prefill, n_limit)
        return self._searches[key]

    def observe(self, n_tokens: int, elapsed_s: float, now: float, share: float = 1.0) -> ThreadChoice | None:
        """Learn from the step chosen for last, which ended `now`; the thread was on a core for `share` of it.
        Returns the end of a search."""
        if self._active is None or n_tokens < 1 or elapsed_s < MIN_STEP_S:
            return None
        choice = self._active.observe(_Step(n_tokens, elapsed_s, now, share))
        if choice is not None:
            self.n_changes += choice.n_before != choice.n_after
        return choice


class _Step(Struct, frozen=True):
    n_tokens: int
    elapsed_s: float
    ended_at: float
    share: float


class _Costs:
    """What steps cost: seconds per token relative to others of their size, and what is usual at present."""

    def __init__(self) -> None:
        self.usual = 1.0
        self._units: dict[int, tuple[float, int]] = {}
        """Seconds per token at cost 1 and steps seen, by size; the sizes are few (`_size`)."""

    def of(self, step: _Step) -> float:
        """The cost of a step; the first one of its size is usual."""
        per_token = step.elapsed_s / step.n_tokens
        unit, _ = self._units.setdefault(_size(step.n_tokens), (per_token / self.usual, 0))
        return min(max(per_token / unit, 1 / MAX_COST), MAX_COST)

    def learn(self, step: _Step) -> None:
        """Move towards a step."""
        excess = self.of(step) / self.usual - 1
        self.usual *= 1 + excess * (FALL if excess < 0 else RISE)
        unit, n_seen = self._units[_size(step.n_tokens)]
        weight = max(DRIFT, 1 / (2 + n_seen))
        self._units[_size(step.n_tokens)] = (unit * (1 + excess * weight), n_seen + 1)

    def seconds(self, cost: float, step: _Step) -> float:
        """How long a step like this one takes at a cost."""
        return step.elapsed_s * cost / self.of(step)


def _size(n_tokens: int) -> int:
    """Its leading three bits and how many follow: sizes that differ by less than a quarter."""
    n_dropped = max(0, n_tokens.bit_length() - 3)
    return n_dropped << 3 | n_tokens >> n_dropped


def _counts(n_limit: int) -> list[int]:
    """Counts that are tried, highest first: 1, 2, 4 .. fewer than the limit, below half of it halves."""
    counts, n_fewer = [n_limit], 1
    while counts[-1] > 1:
        counts.append(max(n_limit - n_fewer, counts[-1] // 2))
        n_fewer *= 2
    return counts


class _Search:
    """The count for one kind of steps under one limit; `count` is that of the next step."""

    def __init__(self, is_prefill: bool, n_limit: int) -> None:
        self._is_prefill = is_prefill
        self._counts = _counts(n_limit)
        self._at = 0
        self._costs = _Costs()
        self._watched: deque[tuple[bool, float]] = deque(maxlen=N_WATCHED)
        self._next_down = self._next_up = 0.0
        self._raised_at = -RELAPSE_S
        self._down_pause_s = self._up_pause_s = PAUSE_S
        self.count = n_limit
        self._steps = self._run()
        next(self._steps)

    def observe(self, step: _Step) -> ThreadChoice | None:
        """Learn from a step with `count` threads."""
        return self._steps.send(step)

    def _run(self) -> Generator[ThreadChoice | None, _Step, None]:
        """Is sent each step, and yields what it ended."""
        choice: ThreadChoice | None = None
        while True:
            step = yield choice
            choice = None
            if self._is_alarmed(step):
                choice = yield from self._descend(step)
            elif self._at and not self._watched and step.ended_at >= self._next_up:
                choice = yield from self._climb()

    def _is_alarmed(self, step: _Step) -> bool:
        """Watch a step; whether those that were slow are reason to search now."""
        cost = self._costs.of(step)
        is_slow = cost > SLOW * self._costs.usual or step.share < LOW_SHARE
        if is_slow or self._watched:
            self._watched.append((is_slow, cost))
        if not is_slow:
            self._costs.learn(step)
        n_slow = sum(slow for slow, _ in self._watched)
        if not n_slow or (len(self._watched) == N_WATCHED and n_slow < N_ALARM):
            self._watched.clear()
        if n_slow < N_ALARM:
            return False
        if self._at + 1 < len(self._counts) and step.ended_at >= self._next_down:
            return True
        self._accept()
        return False

    def _accept(self) -> None:
        """Take the watched steps for usual."""
        self._costs.usual = fmean(cost for _, cost in self._watched)
        self._watched.clear()

    def _descend(self, step: _Step) -> Generator[ThreadChoice | None, _Step, ThreadChoice]:
        """Try lower counts until it gets worse, then stay with the best."""
        before = self._at
        self._accept()
        tried = {before: self._costs.usual}
        for rung in range(before + 1, len(self._counts)):
            self.count = self._counts[rung]
            costs, is_free = [], True
            for _ in range(TRIAL_STEPS):
                step = yield None
                costs.append(self._costs.of(step))
                is_free = is_free and step.share >= LOW_SHARE
            tried[rung] = fmean(costs)
            if is_free and tried[rung] > WORSE * min(tried.values()):
                break
        best = min(rung for rung, cost in tried.items() if cost <= NEAR * min(tried.values()))
        other = best if best != before else min(tried.keys() - {before}, key=tried.__getitem__)
        is_in_vain = best == before
        is_relapse = step.ended_at - self._raised_at < RELAPSE_S
        self._down_pause_s = min(2 * self._down_pause_s, MAX_PAUSE_S) if is_in_vain else PAUSE_S
        self._up_pause_s = min(2 * self._up_pause_s, RELAPSE_PAUSE_S) if is_relapse else PAUSE_S
        self._next_down = step.ended_at + self._down_pause_s
        self._next_up = step.ended_at + self._up_pause_s
        reason = "slow steps, but not for the number of threads" if is_in_vain else "slow steps"
        return self._settle(best, reason, step, (before, tried[before]), (other, tried[other]))

    def _climb(self) -> Generator[ThreadChoice | None, _Step, ThreadChoice]:
        """Try the next higher count; give up at the first slow step."""
        before, rung, usual = self._at, self._at - 1, self._costs.usual
        self.count = self._counts[rung]
        costs: list[float] = []
        lost_s = 0.0
        while len(costs) < PROBE_STEPS and (not costs or costs[-1] <= SLOW * usual):
            step = yield None
            costs.append(self._costs.of(step))
            lost_s += step.elapsed_s - self._costs.seconds(usual, step)
        cost = fmean(costs[1:] or costs)
        is_faster = len(costs) == PROBE_STEPS and cost <= FASTER * usual
        if is_faster:
            self._next_up = self._raised_at = step.ended_at
        else:
            pause_s = max(self._up_pause_s, PAUSE_PER_LOSS * lost_s)
            self._next_up = step.ended_at + min(pause_s, MAX_PAUSE_S)
        reason = "more are faster" if is_faster else "more are no faster"
        return self._settle(rung if is_faster else before, reason, step, (before, usual), (rung, cost))

    def _settle(
        self, rung: int, reason: str, step: _Step, before: tuple[int, float], tried: tuple[int, float]
    ) -> ThreadChoice:
        """Stay with a count, whose cost is usual now."""
        self._at = rung
        self.count = self._counts[rung]
        self._costs.usual = dict((before, tried))[rung]
        return ThreadChoice(
            self._is_prefill,
            reason,
            n_before=self._counts[before[0]],
            n_tried=self._counts[tried[0]],
            n_after=self.count,
            before_s=self._costs.seconds(before[1], step),
            tried_s=self._costs.seconds(tried[1], step),
        )
