"""One sampler per slot: the chain llama-server builds, a grammar, probabilities.

Engine thread only. A chain that would always pick the likeliest token is replaced by `Greedy`, which gives the
same token.

A grammar is asked last: the chain draws, and only when the grammar forbids the token the draw is
repeated among those that it allows (common_sampler_sample).
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from wingman.engine.llama.binding import quick
from wingman.engine.llama.candidates import Candidates, likeliest
from wingman.engine.llama.chain import Chain, Greedy, is_greedy
from wingman.engine.llama.grammar import Grammar
from wingman.engine.llama.parts import LlamaParts
from wingman.engine.llama.trigger import Speller, Trigger
from wingman.engine.runner import SamplerStart
from wingman.engine.types import TokenProb

_LOWEST: Final = float(np.finfo(np.float32).min)
"""The logarithm reported for probability 0, as llama-server does."""


SLOW_DRAW_S: Final = 0.5
MAX_SLOW_DRAWS: Final = 8
"""A grammar that takes longer than this more often holds everybody up: its output ends. A usual one takes
some 10 ms for a whole vocabulary."""
N_LIKELIEST: Final = 256
"""Tokens among which an allowed one is looked for first."""


class Draw(Struct, frozen=True):
    """A sampled token and its probabilities if wanted; token -1: the grammar allows none."""

    token: int
    prob: TokenProb | None = None


class Sampler:
    """Draws tokens for one sequence; `n_ctx` bounds how far penalties look back, in tokens.

    `candidates` is shared by all samplers of an engine.
    """

    def __init__(
        self,
        start: SamplerStart,
        parts: LlamaParts,
        candidates: Candidates,
        vocab: Any,
        tokenizer: Speller,
        n_ctx: int,
    ) -> None:
        self._n_slow = 0
        self._is_closed = False
        self._n_probs = start.n_probs
        self._is_post = start.post_sampling_probs
        self._candidates = candidates
        self._grammar: Grammar | None = None
        self._trigger: Trigger | None = None
        if start.constraint is not None:
            self._grammar = parts.grammar(start.constraint, candidates)
            if start.constraint.is_lazy:
                self._trigger = Trigger(start.constraint, tokenizer)
        self._chain: Chain | Greedy = (
            Greedy(start.params, vocab)
            if is_greedy(start.params)
            else Chain(start.params, start.history, parts, vocab, n_ctx)
        )

    def draw(self, context: Any, index: int) -> Draw:
        """The next token from the logits of batch position `index`; the sampler remembers it."""
        logits = self._logits(context, index)
        token = self._choose(logits)
        grammar = None if self._trigger is not None else self._grammar
        if grammar is not None and not grammar.allows(token):
            started = time.monotonic()
            token = self._choose(self._permitted(logits, grammar))
            self._n_slow += time.monotonic() - started > SLOW_DRAW_S
            if self._n_slow > MAX_SLOW_DRAWS or not grammar.allows(token):
                return Draw(-1)
        prob = self._prob_after(token) if self._is_post else self._prob_before(token, logits)
        self._chain.accept(token)
        if grammar is not None:
            grammar.accept(token)
        elif self._trigger is not None:
            self._await_trigger(token)
        return Draw(token, prob)

    def draw_run(self, context: Any, index: int, draft: Sequence[int]) -> tuple[Draw, ...]:
        """Tokens from batch positions `index`, `index + 1`, ... for as long as each equals the next of
        `draft`: between one and len(draft) + 1 draws, of which only the last may differ from the draft."""
        draws = [self.draw(context, index)]
        for at, token in enumerate(draft, index + 1):
            if draws[-1].token != token:
                break
            draws.append(self.draw(context, at))
        return tuple(draws)

    def _await_trigger(self, token: int) -> None:
        """Once a trigger is complete, bind the output to the grammar; to none if it has strayed already."""
        assert self._trigger is not None
        assert self._grammar is not None
        seen = self._trigger.push(token)
        if seen is None:
            return
        self._trigger = None
        for one in seen:
            if not self._grammar.allows(one):
                seen = []
                break
            self._grammar.accept(one)
        if not seen:
            self._grammar.close()
            self._grammar = None

    def _logits(self, context: Any, index: int) -> npt.NDArray[np.float32]:
        logits = quick.llama_get_logits_ith(context, index)
        address = ctypes.addressof(logits.contents)
        row: Any = (ctypes.c_float * self._candidates.n_vocab).from_address(address)
        return np.frombuffer(row, dtype=np.float32)

    def _choose(self, logits: npt.NDArray[np.float32]) -> int:
        return self._chain.choose(logits, self._candidates)

    def _permitted(self, logits: npt.NDArray[np.float32], grammar: Grammar) -> npt.NDArray[np.float32]:
        """The logits, -inf for what the grammar forbids and for what would not be chosen anyway."""
        allowed = self._likeliest_allowed(logits, grammar)
        if allowed is None:
            allowed = grammar.among_all()
        permitted = np.full_like(logits, -math.inf)
        permitted[allowed] = logits[allowed]
        return permitted

    def _likeliest_allowed(
        self, logits: npt.NDArray[np.float32], grammar: Grammar
    ) -> npt.NDArray[np.int32] | None:
        """Allowed tokens among which the choice is certain to fall; None when that takes all of them, also
        because two are equally likely (`Candidates.has_tie`)."""
        n_few = self._chain.n_few
        if n_few is None:
            return None
        allowed = grammar.among(self._chain.few(logits, max(N_LIKELIEST, 2 * n_few)))
        is_certain = len(allowed) >= n_few and len(np.unique(logits[allowed])) == len(allowed)
        return allowed if is_certain else None

    def _prob_before(self, token: int, logits: npt.NDArray[np.float32]) -> TokenProb | None:
        """Logarithms of the softmax over all raw logits (get_token_probabilities of llama-server)."""
        if not self._n_probs:
            return None
        n_top = min(self._n_probs, self._candidates.n_vocab)
        shifted = logits - logits.max()
        total = np.log(np.exp(shifted).sum())
        top = likeliest(logits, n_top)
        top = top[np.argsort(-logits[top], kind="stable")[:n_top]]
        values = np.maximum(shifted[top] - total, _LOWEST)
        own = max(float(shifted[token] - total), _LOWEST)
        return TokenProb(token, own, tuple(zip(top.tolist(), values.tolist(), strict=True)))

    def _prob_after(self, token: int) -> TokenProb | None:
        """What the samplers left, zeros dropped."""
        if not self._n_probs:
            return None
        if isinstance(self._chain, Greedy):
            return TokenProb(token, 1.0, ((token, 1.0),))
        left = self._candidates.left
        own = float(left["p"][self._candidates.chosen])
        order = np.argsort(-left["p"], kind="stable")[: self._n_probs]
        top = tuple((int(left["id"][i]), float(left["p"][i])) for i in order if left["p"][i] > 0)
        return TokenProb(token, own, top)

    def close(self) -> None:
        """Free the chain and the grammar."""
        if not self._is_closed:
            self._is_closed = True
            self._chain.close()
        if self._grammar is not None:
            self._grammar.close()
            self._grammar = None


def draw_all(context: Any, wanted: Sequence[tuple[Sampler, int, Sequence[int]]]) -> list[tuple[Draw, ...]]:
    """The runs of all sequences of a step, given as (sampler, batch index, draft)."""
    return [sampler.draw_run(context, index, draft) for sampler, index, draft in wanted]
