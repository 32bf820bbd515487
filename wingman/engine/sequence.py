"""A job while the engine works on it: its tokens, its text, its clock, and when it ends.

Mutable, engine thread only. `take` is the whole of llama-server's process_token: it turns a
sampled token into text and decides whether generation goes on.
"""

from __future__ import annotations

from collections.abc import Iterable

from wingman.engine.detokenizer import Detokenizer
from wingman.engine.lifecycle import JobMove, JobState, advance
from wingman.engine.runner import Vocabulary
from wingman.engine.types import Finished, Job, Progress, StopType, TextDelta, Timings, TokenProb


class Sequence:
    """One job's progress. Positions and counts are in tokens, times in seconds of the engine's clock."""

    def __init__(self, job: Job, queued_at: float) -> None:
        self.job = job
        self.state = JobState.QUEUED
        self.queued_at = queued_at
        self.started_at = 0.0
        self.first_token_at = 0.0
        self.last_token_at = 0.0
        self.slot_id = -1
        self.prompt = job.prompt
        """What must be in the cache before a token is sampled: after a preemption all that was there."""
        self.n_filled = 0
        """How much of `prompt` is there."""
        self.is_aside = False
        """Whether the prompt is, or will be, computed outside its slot, which holds the first `n_filled` tokens."""
        self.n_aside = 0
        """Tokens behind those that are computed there."""
        self.stays_in_steps = False
        """Whether that failed once."""
        self.is_preempted = False
        self.is_settled = False
        """Whether it has taken over the longest cached prefix; until then its slot holds something else."""
        self.has_waited = False
        """Whether it let a step pass already, to be evaluated together with others."""
        self.awaited: tuple[Sequence, int] | None = None
        """Who is about to compute so many tokens that begin this prompt too."""
        self.n_processed = 0
        """Tokens of the job's prompt in the cache, the reused ones included."""
        self.n_cached = 0
        self.n_drafted = 0
        self.n_accepted = 0
        self.leader: Sequence | None = None
        """The sequence whose prompt evaluation this one waits for and then copies."""
        self.forks: list[Sequence] = []
        """Those that wait for this one."""
        self.output: list[int] = []
        self.probs: list[TokenProb] = []
        self.next_token = -1
        """Sampled, but not yet in the cache."""
        self.stop_type = StopType.NONE
        self.stopping_word = ""
        self.truncated = False
        self.has_new_line = False
        self._detokenizer = Detokenizer(job.stop, drops_partial=job.drops_partial_char)
        self._text: list[str] = []
        self._line_indent: int | None = None

    def move(self, what: JobMove) -> None:
        """Advance the state by its table."""
        self.state = advance(self.state, what)

    def place(self, slot_id: int, now: float) -> None:
        """A slot was found."""
        self.move(JobMove.PLACE)
        self.slot_id = slot_id
        self.started_at = now

    def settle(self, n_cached: int) -> None:
        """The slot holds the first `n_cached` tokens of the prompt and nothing else."""
        self.is_settled = True
        self.is_preempted = False
        self.awaited = None
        self.n_filled = n_cached
        if not self.output:
            self.n_cached = self.n_processed = n_cached

    def fill(self, n_tokens: int) -> None:
        """So many more tokens of the prompt are in the cache."""
        self.n_filled += n_tokens
        if not self.output:
            self.n_processed += n_tokens

    def go_aside(self) -> None:
        """Let the prompt be computed outside its slot."""
        self.is_aside = True

    def fill_aside(self, n_tokens: int) -> None:
        """So many more tokens are computed there."""
        self.n_aside += n_tokens
        self.n_processed += n_tokens

    def land(self) -> None:
        """What was computed there is in the slot now."""
        self.n_filled += self.n_aside
        self.n_aside = 0
        self.is_aside = False

    def give_up_aside(self) -> None:
        """What was computed there is lost."""
        self.n_processed -= self.n_aside
        self.n_aside = 0
        self.is_aside = False

    def preempt(self, held: Iterable[int]) -> None:
        """The cache is taken from it; it held `held`."""
        if self.state is JobState.DECODE:
            self.prompt = tuple(held)
        self.move(JobMove.PREEMPT)
        self.is_preempted = True
        self.unsettle()

    def unsettle(self) -> None:
        """Nothing of the prompt is in the cache any more."""
        self.give_up_aside()
        self.is_settled = False
        self.awaited = None
        self.n_filled = 0
        if not self.output:
            self.n_processed = self.n_cached = 0

    @property
    def is_awaiting(self) -> bool:
        """Whether another sequence is still computing what this one will take over."""
        if self.awaited is None:
            return False
        other, n_tokens = self.awaited
        return other.state is JobState.PREFILL and other.n_filled < n_tokens and other.shares_soon(n_tokens)

    def shares_soon(self, n_tokens: int) -> bool:
        """Whether others get the first tokens of the prompt about when they are computed: what is computed aside
        is there only at the end."""
        return not self.is_aside or 2 * n_tokens >= len(self.prompt)

    @property
    def n_prompt_left(self) -> int:
        """Tokens still to be evaluated before the next is sampled."""
        return len(self.prompt) - self.n_filled

    @property
    def has_work(self) -> bool:
        """Whether the steps of all have something to compute for it: it has a slot and its prefix, and waits for
        nobody."""
        is_prompt = self.state is JobState.PREFILL and self.is_settled and not self.is_aside
        return (is_prompt or self.state is JobState.DECODE) and self.leader is None

    @property
    def is_at_last_token(self) -> bool:
        """Whether the next token is the last that was asked for."""
        return len(self.output) == self.job.n_predict - 1

    def follow(self, leader: Sequence) -> None:
        """Wait for `leader` to evaluate the prompt that both have."""
        self.leader = leader
        leader.forks.append(self)

    def part(self) -> None:
        """Depend on no other sequence any more, and let none depend on this one."""
        if self.leader is not None:
            self.leader.forks.remove(self)
            self.leader = None
        for fork in self.forks:
            fork.leader = None
            if fork.state is JobState.PREFILL and not fork.n_filled:
                fork.unsettle()
        self.forks.clear()

    def take(
        self, token: int, prob: TokenProb | None, vocabulary: Vocabulary, n_ctx_left: int, now: float
    ) -> TextDelta:
        """Account for a sampled token; `stop_type` says afterwards whether this was the last.

        `n_ctx_left` is how many more tokens the slot's context takes, or a huge number when it
        shifts.
        """
        job = self.job
        if prob is not None and not job.stream:
            self.probs.append(prob)
        self.output.append(token)
        self.next_token = token
        if len(self.output) == 1:
            self.first_token_at = now
        self.last_token_at = now
        is_eog = vocabulary.is_eog(token)
        data = vocabulary.piece(token, token in job.preserved_tokens)
        piece = self._detokenizer.push(data)
        text = piece.text
        if piece.stopping_word is not None:
            self._stop(StopType.WORD)
            self.stopping_word = piece.stopping_word
        elif is_eog:
            self._stop(StopType.EOS)
        elif n_ctx_left <= 0:
            self.truncated = True
            self._stop(StopType.LIMIT)
        elif 0 <= job.n_predict <= len(self.output):
            self._stop(StopType.LIMIT)
        text = self._cut_at_indent(text)
        if "\n" in text:
            self.has_new_line = True
            elapsed_ms = (now - self.first_token_at) * 1000
            if 0 < job.t_max_predict_ms < elapsed_ms:
                self._stop(StopType.LIMIT)
        if self.stop_type in (StopType.EOS, StopType.LIMIT):
            text += self._detokenizer.finish()
        if text:
            self._text.append(text)
        timings = self.timings() if job.timings_per_token else None
        return TextDelta(job.id, text, (token,), len(self.output), timings, (prob,) if prob else ())

    def _stop(self, stop_type: StopType) -> None:
        if self.stop_type is StopType.NONE:
            self.stop_type = stop_type

    def _cut_at_indent(self, text: str) -> str:
        """End at the first line that is indented by less than n_indent, an empty one included; keep its
        blanks, not its text."""
        if self.job.n_indent <= 0:
            return text
        for position, char in enumerate(text):
            if self._line_indent is not None and char in " \t":
                self._line_indent += 1
                continue
            if self._line_indent is not None and self._line_indent < self.job.n_indent:
                self._stop(StopType.LIMIT)
                self._detokenizer.finish()
                return text[:position]
            self._line_indent = 0 if char == "\n" else None
        return text

    def end_now(self, truncated: bool = False) -> str:
        """End at a limit that is not the token's own; returns the text that was still held back."""
        self._stop(StopType.LIMIT)
        self.truncated = self.truncated or truncated
        text = self._detokenizer.finish()
        if text:
            self._text.append(text)
        return text

    def timings(self) -> Timings:
        """Durations so far; the prompt's end is the first token's time."""
        prompt_s = (self.first_token_at or self.last_token_at or self.started_at) - self.started_at
        predicted_s = self.last_token_at - self.first_token_at if self.output else 0.0
        if self.output:  # as llama-server: the first token may land in the same microsecond
            predicted_s = max(predicted_s, 1e-6)
        return Timings(
            cache_n=self.n_cached,
            prompt_n=self.n_processed - self.n_cached,
            prompt_ms=prompt_s * 1000,
            predicted_n=len(self.output),
            predicted_ms=predicted_s * 1000,
            draft_n=self.n_drafted,
            draft_n_accepted=self.n_accepted,
        )

    def progress(self, now: float) -> Progress:
        """How much of the prompt is evaluated."""
        elapsed_ms = (now - self.started_at) * 1000
        return Progress(self.job.id, len(self.job.prompt), self.n_cached, self.n_processed, elapsed_ms)

    def finished(self, n_held: int) -> Finished:
        """The job's last event; `n_held` tokens stay in its slot."""
        return Finished(
            job_id=self.job.id,
            slot_id=self.slot_id,
            text="".join(self._text),
            tokens=tuple(self.output),
            n_prompt=len(self.job.prompt),
            n_held=n_held,
            stop_type=self.stop_type,
            stopping_word=self.stopping_word,
            truncated=self.truncated,
            has_new_line=self.has_new_line,
            timings=self.timings(),
            probs=tuple(self.probs),
            is_fork=self.job.fork_of is not None,
        )

    def __repr__(self) -> str:
        return f"<Sequence job={self.job.id} {self.state.name} slot={self.slot_id} out={len(self.output)}>"
