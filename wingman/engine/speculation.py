"""Whether drafts pay, and how long they should be. Pure; engine thread only.

A step over n tokens takes t(n), which is learned from the steps that happen. A draft token is worth the
chance that it and all before it are accepted, which each sequence learns by comparing what was drafted
with what was sampled: also where nothing was sent to the model, so text that lookup can't predict costs
nothing to recognise. `choose` then spends draft tokens where they are worth most, as many as maximise
(tokens expected) / (seconds of the step): the sum of t over the pieces that the library cuts it into. Tokens are
accepted only when the sequence's own sampler draws them, so the text is the same with and without drafts
(Leviathan et al. 2023, with certain proposals).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from wingman.engine.drafting import MAX_MATCH, Draft
from wingman.engine.ubatches import even_pieces

MARGIN: Final = 0.1
"""Least expected gain that is worth the trouble; hopes are a little too high where they are highest."""
_LENGTHS: Final = (1, 2, 3, 5, 7, 11, 15)
"""Lengths of drafts that are weighed where all drafts of a step have the same."""
_LEAST_CHANCE: Final = 0.04
"""Below this a draft token is not even considered."""
EDGES: Final = (
    1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96, 128, 192, 256, 384, 512, 768,
    1024, 1536, 2048, 3072, 4096,
)  # fmt: skip
"""Step sizes in tokens whose cost is remembered; between them it is a straight line."""
_TICK_S: Final = 1e-6
_SHAPE_RATE: Final = 0.1
_FALL_RATE: Final = 0.2
"""How far a cost moves towards what was seen, up and down: others can only make a step slower, so that a fast one
tells the truth."""
_LOAD_RATE: Final = 0.05
_MAX_RATIO: Final = (3.0, 1.3)
"""A step is believed to take at most this many times what was expected, while its cost is new and once it has
settled: the machine may have been busy with others for a moment."""
_SETTLED: Final = 4
"""Observations after which a cost has settled, and tells something about the load of the machine."""
_DATED_STEPS: Final = 200
"""Steps after which a cost has to be seen again before drafts are weighed against it."""
_STALE_STEPS: Final = 4000
"""Steps after which a cost that was not seen again is forgotten."""
_GUESSED_SLOPE: Final = 0.1
"""What a token more costs while one size is known, as a share of what its tokens cost."""
_HOPED_SLOPE: Final = 0.5
"""The same beyond the largest size seen, as a share of the mean slope up to there. Both are optimistic, so that
larger steps are tried, once."""


class StepCosts:
    """Seconds of a step by its number of tokens: a slowly learned shape times the load of the machine, so that
    costs which were not seen lately follow those which were."""

    def __init__(self) -> None:
        self.draft_round_s = 0.0
        """Time a draft model takes for one more token of all drafts; 0 for lookup."""
        self._n_steps = 0
        self._load = 1.0
        self._shape = [0.0] * len(EDGES)  # seconds at load 1
        self._n_seen = [0] * len(EDGES)
        self._seen_at = [0] * len(EDGES)
        self._curve: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None = None

    def observe(self, n_tokens: int, seconds: float) -> None:
        """A step took this long, sampling included."""
        index = _nearest_edge(n_tokens)
        seconds = max(seconds, _TICK_S)
        expected = self.seconds(n_tokens) or seconds
        n_seen = 1 if self._is_stale(index) else self._n_seen[index] + 1
        most = _MAX_RATIO[n_seen > _SETTLED]
        ratio = min(seconds / expected, most)
        if n_seen == 1:
            self._shape[index] = ratio * expected / self._load
        else:
            rate = _SHAPE_RATE if ratio > 1 else _FALL_RATE
            self._shape[index] *= 1 + max(rate, 1 / n_seen) * (ratio - 1)
        if n_seen > _SETTLED:
            self._load *= 1 + _LOAD_RATE * (ratio - 1)
        self._n_steps += 1
        self._n_seen[index], self._seen_at[index] = n_seen, self._n_steps
        self._curve = None

    def observe_pieces(self, pieces: Sequence[int], seconds: float) -> None:
        """A step that was cut into pieces of so many tokens took this long."""
        expected = [self.seconds(n_tokens) or n_tokens * _TICK_S for n_tokens in pieces]
        share = seconds / sum(expected) if expected else 0.0
        for n_tokens, each in zip(pieces, expected, strict=True):
            self.observe(n_tokens, each * share)

    def observe_drafting(self, n_rounds: int, seconds: float) -> None:
        """A draft model took this long for drafts of up to `n_rounds` tokens."""
        share = _SHAPE_RATE if self.draft_round_s else 1.0
        self.draft_round_s += share * (seconds / n_rounds - self.draft_round_s)

    def seconds(self, n_tokens: int) -> float:
        """What a step is expected to take; 0.0 while nothing is known."""
        return self.seconds_from(n_tokens, 1)[0]

    def seconds_from(self, n_tokens: int, count: int) -> list[float]:
        """The same for `count` steps, each a token larger than the one before."""
        if self._curve is None:
            self._curve = self._draw_curve()
        found: list[float] = np.interp(np.arange(n_tokens, n_tokens + count), *self._curve).tolist()
        return found

    def _draw_curve(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Known points, sizes and seconds, which never fall, and a guess at the end."""
        known = [i for i, n_seen in enumerate(self._n_seen) if n_seen and not self._is_stale(i)]
        if not known:
            return np.ones(1), np.zeros(1)
        sizes = [EDGES[i] for i in known]
        seconds = [self._shape[i] * self._load for i in known]
        slope = _GUESSED_SLOPE * seconds[0] / sizes[0]
        if len(known) > 1:
            slope = _HOPED_SLOPE * max(0.0, seconds[-1] - seconds[0]) / (sizes[-1] - sizes[0])
        sizes.append(EDGES[-1] + 1)
        seconds.append(seconds[-1] + slope * (sizes[-1] - sizes[-2]))
        # A step that seems dearer than a larger one was delayed when it was seen.
        rising = np.minimum.accumulate(np.array(seconds)[::-1])[::-1]
        return np.array(sizes, np.float64), rising

    def is_dated(self, n_tokens: int) -> bool:
        """Whether a step of this size was not seen for long: drafts that always pay hide what they are compared
        with."""
        index = _nearest_edge(n_tokens)
        return not self._n_seen[index] or self._n_steps - self._seen_at[index] > _DATED_STEPS

    def _is_stale(self, index: int) -> bool:
        return self._n_steps - self._seen_at[index] > _STALE_STEPS


def _nearest_edge(n_tokens: int) -> int:
    index = min(bisect_left(EDGES, n_tokens), len(EDGES) - 1)
    is_nearer_below = index and n_tokens - EDGES[index - 1] < EDGES[index] - n_tokens
    return index - 1 if is_nearer_below else index


_GRADES: Final = (0, 1, 1, 2, 3, 3, 3, 3, 4)
"""Of a length of common past: how sure a draft is. The first is that of draft models."""
_FIRST_RATES: Final = (0.8, 0.3, 0.4, 0.6, 0.8)
"""Chance of a draft token by grade before a sequence has shown its own. Chats, code, edits and summaries by a
small model gave 0.45, 0.53, 0.81, 0.96 for lookup; starting lower lost less where it fails."""
_RATE_SHARE: Final = 0.1
_PROBE_RATE: Final = 0.9
_PATIENCE: Final = (64, 2048)
"""Tokens without a draft of the model after which one is tried again: at first, and at most."""


class SequenceSpeculation:
    """How well the drafts of one sequence turn out."""

    def __init__(self) -> None:
        self._rates = list(_FIRST_RATES)
        self._n_idle = 0
        self._patience = _PATIENCE[0]

    def chances(self, n_match: int, n_tokens: int) -> list[float]:
        """For each token of a draft the chance that it and all before it are accepted. An accepted token
        lengthens the common past of the next one. `n_match` 0 is a draft model, asked again with hope after
        a while without drafts."""
        if not n_match:
            rate = _PROBE_RATE if self._n_idle >= self._patience else self._rates[0]
            return [rate**index for index in range(1, n_tokens + 1)]
        chance, found = 1.0, []
        for length in range(n_match, n_match + n_tokens):
            chance *= self._rates[_GRADES[min(length, MAX_MATCH)]]
            found.append(chance)
        return found

    def observe(self, draft: Draft, sampled: Sequence[int]) -> None:
        """Learn from a draft and the tokens sampled in its place, be they from a step with or without it."""
        n_right = 0
        for guess, token in zip(draft.tokens, sampled, strict=False):
            grade = _GRADES[min(draft.n_match + n_right, MAX_MATCH)] if draft.n_match else 0
            self._rates[grade] += _RATE_SHARE * ((guess == token) - self._rates[grade])
            if guess != token:
                break
            n_right += 1
        self._be_patient(draft, n_right, len(sampled))

    def _be_patient(self, draft: Draft, n_right: int, n_sampled: int) -> None:
        """Wait twice as long after each model draft that was mostly wrong."""
        if draft.n_match or not draft.tokens:
            self._n_idle += n_sampled
            return
        self._n_idle = 0
        is_good = 2 * n_right >= len(draft.tokens)
        self._patience = _PATIENCE[0] if is_good else min(2 * self._patience, _PATIENCE[1])


class Candidate(Struct, frozen=True):
    """A sequence that generates and its draft: `chances` as of SequenceSpeculation, none without a draft; at
    least `n_min` tokens of it are taken or none. A forced one is taken whole."""

    chances: Sequence[float]
    n_min: int = 0
    is_forced: bool = False
    slot_id: int = 0


def choose(
    candidates: Sequence[Candidate], n_most: int, costs: StepCosts, *, is_split: bool = False
) -> list[int]:
    """How many draft tokens to take of each candidate, `n_most` at most in all. Candidates come in order of
    their slots; `is_split`: each slot has a stream of its own."""
    taken = [len(each.chances) if each.is_forced else 0 for each in candidates]
    n_forced = sum(taken)
    if n_forced > n_most:  # each forced one gets the same
        n_each = n_most // sum(each.is_forced for each in candidates)
        taken = [min(n, n_each) for n in taken]
    elif is_split and len(candidates) > 1:
        taken = taken if n_forced else _choose_even(candidates, n_most, costs)
    else:
        value = len(candidates) + sum(sum(each.chances) for each in candidates if each.is_forced)
        offers = _offers(candidates)[: n_most - n_forced]
        for _, index in offers[: _best_count(offers, value, len(candidates) + n_forced, costs)]:
            taken[index] += 1
    return [n if n >= each.n_min else 0 for n, each in zip(taken, candidates, strict=True)]


def _offers(candidates: Sequence[Candidate]) -> list[tuple[float, int]]:
    """Draft tokens that may be taken, as chances with the index of the candidate, best first. Chances fall along
    a draft, so the best of all are the beginnings of drafts."""
    offers = [
        (chance, index)
        for index, each in enumerate(candidates)
        if not each.is_forced
        for chance in each.chances
        if chance > _LEAST_CHANCE
    ]
    offers.sort(reverse=True)
    return offers


def _best_count(offers: Sequence[tuple[float, int]], value: float, n_tokens: int, costs: StepCosts) -> int:
    """How many of the offers make the most tokens a second; `value` are the tokens expected without."""
    if not offers or costs.is_dated(n_tokens):
        return 0
    base_s, *step_s = costs.seconds_from(n_tokens, len(offers) + 1)
    if costs.draft_round_s:
        rounds = _rounds(offers)
        step_s = [s + n * costs.draft_round_s for s, n in zip(step_s, rounds, strict=True)]
    best, best_rate = 0, (1 + MARGIN) * value / base_s
    for count, ((chance, _), seconds) in enumerate(zip(offers, step_s, strict=True), 1):
        value += chance
        if value > best_rate * seconds:
            best, best_rate = count, value / seconds
    return best


def _rounds(offers: Sequence[tuple[float, int]]) -> list[int]:
    """For each number of offers taken the length of the longest draft."""
    lengths: defaultdict[int, int] = defaultdict(int)
    longest, found = 0, []
    for _, index in offers:
        lengths[index] += 1
        longest = max(longest, lengths[index])
        found.append(longest)
    return found


def _choose_even(candidates: Sequence[Candidate], n_most: int, costs: StepCosts) -> list[int]:
    """Drafts of one length for those candidates for whom that is worth most: pieces hold equally many tokens of
    each sequence."""
    slots = [each.slot_id for each in candidates]
    best = [0] * len(candidates)
    plain = even_pieces(((slot, 1) for slot in slots), EDGES[-1])
    if not any(each.chances for each in candidates) or any(map(costs.is_dated, plain)):
        return best
    best_rate = (1 + MARGIN) * len(candidates) / _even_s(slots, best, costs)
    for length in _LENGTHS:
        value, lengths = float(len(candidates)), [0] * len(candidates)
        for gain, index in _gains(candidates, length)[: n_most // length]:
            value += gain
            lengths[index] = length
            rate = value / (_even_s(slots, lengths, costs) + length * costs.draft_round_s)
            if rate > best_rate:
                best, best_rate = list(lengths), rate
    return best


def _gains(candidates: Sequence[Candidate], length: int) -> list[tuple[float, int]]:
    """Tokens expected of drafts of this length, with the index of the candidate, best first."""
    gains = [
        (sum(each.chances[:length]), index)
        for index, each in enumerate(candidates)
        if len(each.chances) >= length >= each.n_min and each.chances[length - 1] > _LEAST_CHANCE
    ]
    return sorted(gains, reverse=True)


def _even_s(slots: Sequence[int], lengths: Sequence[int], costs: StepCosts) -> float:
    """Seconds of a step with a token and so many guesses for each of the slots."""
    steps = ((slot, 1 + length) for slot, length in zip(slots, lengths, strict=True))
    return sum(costs.seconds(piece) for piece in even_pieces(steps, EDGES[-1]))
