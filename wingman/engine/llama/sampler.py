"""One sampler chain per slot, built as llama-server builds it (common_sampler_init).

Engine thread only. With the same parameters and seed the chain draws the same tokens as
llama-server's. A chain that would always pick the likeliest token is replaced by an argmax over
the logits, which gives the same token and is twenty times cheaper at a large vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from wingman.config import SamplingParams
from wingman.engine.llama.binding import lib

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
    return (is_penalised and "penalties" in params.samplers) or (
        params.dry_multiplier != 0 and params.dry_penalty_last_n != 0 and "dry" in params.samplers
    )


class Sampler:
    """Draws tokens for one sequence; `n_ctx` bounds how far penalties look back, in tokens."""

    def __init__(
        self, params: SamplingParams, history: Sequence[int], vocab: Any, n_vocab: int, n_ctx: int
    ) -> None:
        self._n_vocab = n_vocab
        self._chain: Any = None
        suppressed = _suppressed(vocab)
        if is_greedy(params, has_suppressed=bool(suppressed)):
            return
        self._chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        for link in _links(params, suppressed, vocab, n_vocab, n_ctx):
            lib.llama_sampler_chain_add(self._chain, link)
        if _penalises(params) and params.mirostat == 0:
            for token in history[-n_ctx:]:
                lib.llama_sampler_accept(self._chain, token)

    def sample(self, context: Any, index: int) -> int:
        """The next token from the logits of batch position `index`; the chain remembers it."""
        if self._chain is not None:
            return int(lib.llama_sampler_sample(self._chain, context, index))
        logits = lib.llama_get_logits_ith(context, index)
        address = ctypes.addressof(logits.contents)
        row: Any = (ctypes.c_float * self._n_vocab).from_address(address)
        return int(np.frombuffer(row, dtype=np.float32).argmax())

    def close(self) -> None:
        """Free the chain and its links."""
        if self._chain is not None:
            lib.llama_sampler_free(self._chain)
            self._chain = None


def _suppressed(vocab: Any) -> list[int]:
    count = ctypes.c_int32(0)
    tokens = lib.llama_vocab_get_suppress_tokens(vocab, ctypes.byref(count))
    return [tokens[index] for index in range(count.value)]


def _links(params: SamplingParams, suppressed: list[int], vocab: Any, n_vocab: int, n_ctx: int) -> list[Any]:
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
        if name != "adaptive_p":
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
        case "dry":
            return _dry(params, vocab, n_ctx)
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


def _dry(params: SamplingParams, vocab: Any, n_ctx: int) -> Any:
    last_n = n_ctx if params.dry_penalty_last_n < 0 else min(params.dry_penalty_last_n, n_ctx)
    words = [word.encode() for word in params.dry_sequence_breakers]
    breakers = (ctypes.c_char_p * max(len(words), 1))(*words)
    return lib.llama_sampler_init_dry(
        vocab, params.dry_multiplier, params.dry_base, params.dry_allowed_length, last_n, breakers, len(words)
    )
