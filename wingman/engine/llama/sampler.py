"""One sampler per slot: the chain llama-server builds (common_sampler_init), a grammar, probabilities.

Engine thread only. With the same parameters and seed the chain draws the same tokens as
llama-server's. A chain that would always pick the likeliest token is replaced by an argmax over
the logits, which gives the same token and is twenty times cheaper at a large vocabulary.

A grammar is asked last: the chain draws, and only when the grammar forbids the token the draw is
repeated with the grammar in front (common_sampler_sample). A token the grammar has not been
asked about must never be accepted by it: that aborts the process.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from wingman.config import SamplingParams
from wingman.engine.llama.binding import lib
from wingman.engine.llama.parts import LlamaParts, uses_dry
from wingman.engine.llama.trigger import Speller, Trigger
from wingman.engine.runner import SamplerStart
from wingman.engine.types import TokenProb

MIROSTAT_M = 100
"""Tokens Mirostat 1 estimates from, as in llama-server."""


def is_greedy(params: SamplingParams, *, has_suppressed: bool) -> bool:
    """Whether the chain is certain to pick the largest raw logit."""
    return (
        params.temperature <= 0
        and params.dynatemp_range <= 0
        and params.mirostat == 0
        and "temperature" in params.samplers
        and "adaptive_p" not in params.samplers
        and "infill" not in params.samplers
        and not params.logit_bias
        and not has_suppressed
        and not _penalises(params)
        and not (params.typical_p < 1 and "typ_p" in params.samplers)
        and not (params.xtc_probability > 0 and "xtc" in params.samplers)
    )


def _penalises(params: SamplingParams) -> bool:
    is_penalised = (
        params.repeat_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0
    ) and params.repeat_last_n != 0
    return (is_penalised and "penalties" in params.samplers) or uses_dry(params)


_CANDIDATE: Final = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""llama_token_data."""
_LOWEST: Final = float(np.finfo(np.float32).min)
"""The logarithm reported for probability 0, as llama-server does."""


SLOW_DRAW_S: Final = 0.5
MAX_SLOW_DRAWS: Final = 8
"""A grammar that takes longer than this more often holds everybody up: its output ends. A usual one takes
some 10 ms for a whole vocabulary."""
N_LIKELIEST: Final = 256
"""Tokens among which an allowed one is looked for first."""


class Candidates:
    """A llama_token_data_array over the whole vocabulary, allocated once and filled for each draw."""

    def __init__(self, n_vocab: int) -> None:
        self._ids = np.arange(n_vocab, dtype=np.int32)
        self._data = np.zeros(n_vocab, _CANDIDATE)
        self._pointer = ctypes.cast(self._data.ctypes.data, lib.llama_token_data_p)
        self._array: Any = lib.llama_token_data_array(data=self._pointer, size=0, selected=-1, sorted=False)

    @property
    def n_vocab(self) -> int:
        """Tokens of the vocabulary."""
        return len(self._ids)

    def fill(self, logits: npt.NDArray[np.float32]) -> None:
        """Start over from logits, shape (n_vocab,)."""
        self._start(self._ids, logits)

    def fill_likeliest(self, logits: npt.NDArray[np.float32]) -> None:
        """Start over from the N_LIKELIEST tokens only."""
        n_kept = min(N_LIKELIEST, self.n_vocab)
        ids = np.argpartition(logits, -n_kept)[-n_kept:]
        self._start(ids, logits[ids])

    def _start(self, ids: npt.NDArray[Any], logits: npt.NDArray[np.float32]) -> None:
        size = len(ids)
        self._data["id"][:size] = ids
        self._data["logit"][:size] = logits
        self._data["p"][:size] = 0
        array = self._array
        array.data, array.size, array.selected, array.sorted = self._pointer, size, -1, False

    def apply(self, sampler: Any) -> None:
        """Let a sampler narrow or choose."""
        lib.llama_sampler_apply(sampler, ctypes.byref(self._array))

    @property
    def left(self) -> npt.NDArray[Any]:
        """The candidates that samplers have left; some (XTC) move the start instead of the items."""
        address = ctypes.addressof(self._array.data.contents)
        start = (address - self._data.ctypes.data) // self._data.itemsize
        return self._data[start : start + self._array.size]

    @property
    def chosen(self) -> int:
        """Where in `left` a chain has chosen."""
        return int(self._array.selected)


@dataclass(frozen=True, slots=True)
class Draw:
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
        self._n_probs = start.n_probs
        self._is_post = start.post_sampling_probs
        self._candidates = candidates
        self._n_vocab = candidates.n_vocab
        self._grammar: Any = None if start.constraint is None else parts.grammar(start.constraint)
        self._trigger: Trigger | None = None
        if start.constraint is not None and start.constraint.is_lazy:
            self._trigger = Trigger(start.constraint, tokenizer)
        self._chain: Any = None
        params = start.params
        suppressed = _suppressed(vocab)
        if is_greedy(params, has_suppressed=bool(suppressed)):
            return
        self._chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        for link in _links(params, suppressed, parts, vocab, self._n_vocab, n_ctx):
            lib.llama_sampler_chain_add(self._chain, link)
        if _penalises(params) and params.mirostat == 0:
            for token in start.history[-n_ctx:]:
                lib.llama_sampler_accept(self._chain, token)

    def draw(self, context: Any, index: int) -> Draw:
        """The next token from the logits of batch position `index`; the sampler remembers it."""
        if self._chain is not None and self._grammar is None and not (self._n_probs and self._is_post):
            token = int(lib.llama_sampler_sample(self._chain, context, index))
            if not self._n_probs:
                return Draw(token)
            return Draw(token, self._prob_before(token, self._logits(context, index)))
        logits = self._logits(context, index)
        token = self._choose(logits)
        is_bound = self._grammar is not None and self._trigger is None
        if is_bound and not self._is_allowed(token):
            started = time.monotonic()
            token = self._choose(logits, self._grammar)
            self._n_slow += time.monotonic() - started > SLOW_DRAW_S
            if self._n_slow > MAX_SLOW_DRAWS or not self._is_allowed(token):
                return Draw(-1)
        prob = self._prob_after(token) if self._is_post else self._prob_before(token, logits)
        if self._chain is not None:
            lib.llama_sampler_accept(self._chain, token)
        if is_bound:
            lib.llama_sampler_accept(self._grammar, token)
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
        seen = self._trigger.push(token)
        if seen is None:
            return
        self._trigger = None
        for one in seen:
            if not self._is_allowed(one):
                seen = []
                break
            lib.llama_sampler_accept(self._grammar, one)
        if not seen:
            lib.llama_sampler_free(self._grammar)
            self._grammar = None

    def _logits(self, context: Any, index: int) -> npt.NDArray[np.float32]:
        logits = lib.llama_get_logits_ith(context, index)
        address = ctypes.addressof(logits.contents)
        row: Any = (ctypes.c_float * self._n_vocab).from_address(address)
        return np.frombuffer(row, dtype=np.float32)

    def _choose(self, logits: npt.NDArray[np.float32], grammar: Any = None) -> int:
        """Run the chain, after the grammar if one is given."""
        if self._chain is None:
            return int(logits.argmax()) if grammar is None else self._likeliest_allowed(logits, grammar)
        self._candidates.fill(logits)
        if grammar is not None:
            self._candidates.apply(grammar)
        self._candidates.apply(self._chain)
        return int(self._candidates.left["id"][self._candidates.chosen])

    def _likeliest_allowed(self, logits: npt.NDArray[np.float32], grammar: Any) -> int:
        """The allowed token with the largest logit, looked for among the likeliest first: a grammar takes 10
        to 50 times longer over a whole vocabulary."""
        for fill in (self._candidates.fill_likeliest, self._candidates.fill):
            fill(logits)
            self._candidates.apply(grammar)
            left = self._candidates.left
            best = left[left["logit"].argmax()]
            if best["logit"] != -math.inf:
                break
        return int(best["id"])

    def _is_allowed(self, token: int) -> bool:
        one = lib.llama_token_data(id=token, logit=1.0, p=0.0)
        array = lib.llama_token_data_array(data=ctypes.pointer(one), size=1, selected=-1, sorted=False)
        lib.llama_sampler_apply(self._grammar, ctypes.byref(array))
        return bool(one.logit != -math.inf)

    def _prob_before(self, token: int, logits: npt.NDArray[np.float32]) -> TokenProb | None:
        """Logarithms of the softmax over all raw logits (get_token_probabilities of llama-server)."""
        if not self._n_probs:
            return None
        n_top = min(self._n_probs, self._n_vocab)
        shifted = logits - logits.max()
        total = np.log(np.exp(shifted).sum())
        top = np.argpartition(-logits, n_top - 1)[:n_top]
        top = top[np.argsort(-logits[top], kind="stable")]
        values = np.maximum(shifted[top] - total, _LOWEST)
        own = max(float(shifted[token] - total), _LOWEST)
        return TokenProb(token, own, tuple(zip(top.tolist(), values.tolist(), strict=True)))

    def _prob_after(self, token: int) -> TokenProb | None:
        """What the samplers left, zeros dropped."""
        if not self._n_probs:
            return None
        if self._chain is None:
            return TokenProb(token, 1.0, ((token, 1.0),))
        left = self._candidates.left
        own = float(left["p"][self._candidates.chosen])
        order = np.argsort(-left["p"], kind="stable")[: self._n_probs]
        top = tuple((int(left["id"][i]), float(left["p"][i])) for i in order if left["p"][i] > 0)
        return TokenProb(token, own, top)

    def close(self) -> None:
        """Free the chain with its links, and the grammar."""
        for sampler in (self._chain, self._grammar):
            if sampler is not None:
                lib.llama_sampler_free(sampler)
        self._chain = self._grammar = None


def draw_all(context: Any, wanted: Sequence[tuple[Sampler, int, Sequence[int]]]) -> list[tuple[Draw, ...]]:
    """The runs of all sequences of a step, given as (sampler, batch index, draft)."""
    return [sampler.draw_run(context, index, draft) for sampler, index, draft in wanted]


def _suppressed(vocab: Any) -> list[int]:
    count = ctypes.c_int32(0)
    tokens = lib.llama_vocab_get_suppress_tokens(vocab, ctypes.byref(count))
    return [tokens[index] for index in range(count.value)]


def _links(
    params: SamplingParams, suppressed: list[int], parts: LlamaParts, vocab: Any, n_vocab: int, n_ctx: int
) -> list[Any]:
    links = []
    biases = [*params.logit_bias, *((token, float("-inf")) for token in suppressed)]
    if biases:
        array = (lib.llama_logit_bias * len(biases))(*biases)
        links.append(lib.llama_sampler_init_logit_bias(n_vocab, len(biases), array))
    if params.mirostat:
        links.append(lib.llama_sampler_init_temp(params.temperature))
        links.append(_mirostat(params, n_vocab))
        return links
    for name in params.samplers:
        if name == "dry":
            if uses_dry(params):
                links.append(parts.dry(params))
        elif name != "adaptive_p":
            links.append(_link(name, params, vocab, n_vocab, n_ctx))
    if "adaptive_p" in params.samplers:
        links.append(
            lib.llama_sampler_init_adaptive_p(params.adaptive_target, params.adaptive_decay, params.seed)
        )
    else:
        links.append(lib.llama_sampler_init_dist(params.seed))
    return links


def _mirostat(params: SamplingParams, n_vocab: int) -> Any:
    if params.mirostat == 1:
        return lib.llama_sampler_init_mirostat(
            n_vocab, params.seed, params.mirostat_tau, params.mirostat_eta, MIROSTAT_M
        )
    return lib.llama_sampler_init_mirostat_v2(params.seed, params.mirostat_tau, params.mirostat_eta)


def _link(name: str, params: SamplingParams, vocab: Any, n_vocab: int, n_ctx: int) -> Any:
    match name:
        case "penalties":
            last_n = n_ctx if params.repeat_last_n < 0 else min(params.repeat_last_n, n_ctx)
            return lib.llama_sampler_init_penalties(
                n_vocab, last_n, params.repeat_penalty, params.frequency_penalty, params.presence_penalty
            )
        case "top_n_sigma":
            return lib.llama_sampler_init_top_n_sigma(params.top_n_sigma)
        case "top_k":
            return lib.llama_sampler_init_top_k(params.top_k)
        case "typ_p":
            return lib.llama_sampler_init_typical(params.typical_p, params.min_keep)
        case "top_p":
            return lib.llama_sampler_init_top_p(params.top_p, params.min_keep)
        case "min_p":
            return lib.llama_sampler_init_min_p(params.min_p, params.min_keep)
        case "xtc":
            return lib.llama_sampler_init_xtc(
                params.xtc_probability, params.xtc_threshold, params.min_keep, params.seed
            )
        case "temperature":
            return lib.llama_sampler_init_temp_ext(
                params.temperature, params.dynatemp_range, params.dynatemp_exponent
            )
        case "infill":
            return lib.llama_sampler_init_infill(vocab)
    raise ValueError(f"no sampler is called {name}")
