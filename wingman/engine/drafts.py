"""The drafts of all sequences that generate in a step: who guesses, how far, and how it turned out.

Guesses come from the text itself or, where there is one, from a draft model. How many are sent to the model
is decided by what steps cost and how often a sequence's guesses are right, so a text that can't be guessed
is left alone. Engine thread only; asking the draft model takes its time, the rest is pure.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from msgspec import Struct

from wingman.engine.drafting import NO_DRAFT, Draft, DraftRequest, NgramDrafter
from wingman.engine.runner import RunnerFailure
from wingman.engine.sequence import Sequence as Generating
from wingman.engine.speculation import Candidate, SequenceSpeculation, StepCosts, choose
from wingman.engine.types import DraftKind

log = logging.getLogger("wingman.engine")
AskModel = Callable[[Sequence[DraftRequest]], list[Draft]]


class Opening(Struct, frozen=True):
    """A generating sequence and how many guesses it may get in this step."""

    sequence: Generating
    held: Sequence[int]
    """What its slot holds; its last token is yet to come."""
    n_most: int


class _Guesser:
    """What is known of one sequence."""

    __slots__ = ("draft", "lookup", "n_seen", "record")

    def __init__(self, prompt: Sequence[int]) -> None:
        self.lookup = NgramDrafter()
        self.lookup.extend(prompt)
        self.record = SequenceSpeculation()
        self.draft = NO_DRAFT
        self.n_seen = 0
        """Output tokens that it has learned from."""

    def learn(self, output: Sequence[int]) -> None:
        """Compare the last draft with what came, and add that to what can be looked up."""
        sampled = output[self.n_seen :]
        if self.n_seen:
            self.record.observe(self.draft, sampled)
        self.lookup.extend(sampled)
        self.n_seen = len(output)


class Drafts:
    """Guesses for the sequences of one engine. `ask_model` drafts with a second model, if there is one;
    `is_split`: each sequence has a stream of its own."""

    def __init__(self, ask_model: AskModel | None = None, *, is_split: bool = False) -> None:
        self._ask_model = ask_model
        self._is_split = is_split
        self._guessers: dict[int, _Guesser] = {}
        self._costs = StepCosts()
        self._asking_s = 0.0

    def observe(self, pieces: Sequence[int], seconds: float) -> float:
        """A step, computed in pieces of so many tokens, took so long, guesses included; how long without
        them."""
        seconds = max(seconds - self._asking_s, 0.0)
        self._asking_s = 0.0
        self._costs.observe_pieces(pieces, seconds)
        return seconds

    def forget(self, job_id: int) -> None:
        """A job has ended; unknown ids are ignored."""
        self._guessers.pop(job_id, None)

    def plan(self, openings: Sequence[Opening], n_most: int) -> list[list[int]]:
        """Guesses for each opening, `n_most` at most in all; openings come in order of their slots."""
        candidates = [self._candidate(opening) for opening in openings]
        lengths = choose(candidates, n_most, self._costs, is_split=self._is_split)
        if self._ask_model is not None and any(lengths):
            self._ask(self._ask_model, openings, lengths)
        return [
            self._guessers[opening.sequence.job.id].draft.tokens[:length] if length else []
            for opening, length in zip(openings, lengths, strict=True)
        ]

    def _candidate(self, opening: Opening) -> Candidate:
        """How likely guesses are; those by lookup are made now, a model is asked for those that are wanted."""
        job, slot_id = opening.sequence.job, opening.sequence.slot_id
        wish = job.drafting
        n_most = min(opening.n_most, wish.n_max)
        is_model = self._ask_model is not None and wish.kind is not DraftKind.LOOKUP
        is_off = wish.kind is DraftKind.NONE or (wish.kind is DraftKind.MODEL and not is_model)
        if is_off or n_most <= 0:
            return Candidate((), slot_id=slot_id)
        guesser = self._guessers.get(job.id)
        if guesser is None:
            guesser = self._guessers[job.id] = _Guesser(job.prompt)
        guesser.learn(opening.sequence.output)
        is_forced = wish.kind is not DraftKind.AUTO
        if is_model:
            guesser.draft = NO_DRAFT
            return Candidate(guesser.record.chances(0, n_most), wish.n_min, is_forced, slot_id)
        guesser.draft = guesser.lookup.draft(n_most)
        chances = guesser.record.chances(guesser.draft.n_match, len(guesser.draft.tokens))
        return Candidate(chances if guesser.draft.tokens else (), wish.n_min, is_forced, slot_id)

    def _ask(self, ask_model: AskModel, openings: Sequence[Opening], lengths: Sequence[int]) -> None:
        """Let the model guess for those that get guesses of it."""
        asking = [
            (opening, length)
            for opening, length in zip(openings, lengths, strict=True)
            if length and not self._guessers[opening.sequence.job.id].draft.tokens
        ]
        requests = [
            DraftRequest(
                each.sequence.slot_id,
                [*each.held, each.sequence.next_token],
                length,
                each.sequence.job.drafting.p_min,
            )
            for each, length in asking
        ]
        started = time.perf_counter()
        try:
            drafts = ask_model(requests) if requests else []
        except RunnerFailure as error:
            log.warning("the draft model failed: %s", error)
            drafts = [NO_DRAFT] * len(requests)
        self._asking_s = time.perf_counter() - started
        n_rounds = max((len(draft.tokens) for draft in drafts), default=0)
        if n_rounds:
            self._costs.observe_drafting(n_rounds, self._asking_s)
        for (opening, _), draft in zip(asking, drafts, strict=True):
            wish = opening.sequence.job.drafting
            is_long_enough = len(draft.tokens) >= wish.n_min
            self._guessers[opening.sequence.job.id].draft = draft if is_long_enough else NO_DRAFT
