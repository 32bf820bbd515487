"""The chain of samplers that llama-server builds (common_sampler_init), and a shortcut through it.

Engine thread only. With the same parameters and seed the chain draws the same tokens as llama-server's.
A chain that begins with top-k is shown only the few candidates that top-k can take, which gives the same
token: what comes before top-k changes known tokens, and where two of the largest logits are equal, so that
their order depends on the sorting, the chain is shown them all.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from wingman.config import SamplingParams
from wingman.engine.llama.binding import lib, quick
from wingman.engine.llama.candidates import Candidates, likeliest
from wingman.engine.llama.parts import LlamaParts, uses_dry

MIROSTAT_M = 100
"""Tokens Mirostat 1 estimates from, as in llama-server."""


def is_greedy(params: SamplingParams) -> bool:
    """Whether the chain is certain to pick the largest logit, biases added."""
    return (
        params.temperature <= 0
        and params.dynatemp_range <= 0
        and params.mirostat == 0
        and "temperature" in params.samplers
        and "adaptive_p" not in params.samplers
        and "infill" not in params.samplers
        and not _penalises(params)
        and not (params.typical_p < 1 and "typ_p" in params.samplers)
        and not (params.xtc_probability > 0 and "xtc" in params.samplers)
    )


def _penalises(params: SamplingParams) -> bool:
    is_penalised = (
        params.repeat_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0
    ) and params.repeat_last_n != 0
    return (is_penalised and "penalties" in params.samplers) or uses_dry(params)


MAX_INFILL: Final = 1024
"""Candidates that the infill sampler gets to see: it compares each with each, minutes for a whole vocabulary."""
MAX_FEW: Final = 512
"""Candidates up to which looking for them is cheaper than sorting them all, from 49k tokens on."""


class Greedy:
    """What picks the same token as a chain that takes the largest logit, without its candidates."""

    def __init__(self, params: SamplingParams, vocab: Any) -> None:
        biases: defaultdict[int, float] = defaultdict(float)
        for token, bias in _biases(params, vocab):
            biases[token] += bias
        self._biased = np.array(list(biases), np.intp)
        self._added = np.array(list(biases.values()), np.float32)
        n_few = 1 + len(biases)
        self.n_few = n_few if n_few <= MAX_FEW else None
        """Allowed tokens with the largest logits among which the choice is certain to fall, None: all."""

    def choose(self, logits: npt.NDArray[np.float32], candidates: Candidates) -> int:
        """The likeliest token."""
        if not len(self._biased):
            return int(logits.argmax())
        kept = logits[self._biased]
        logits[self._biased] = kept + self._added
        token = int(logits.argmax())
        logits[self._biased] = kept  # others look at them too
        return token

    def few(self, logits: npt.NDArray[np.float32], n_wanted: int) -> npt.NDArray[np.intp]:
        """At least `n_wanted` of the likeliest tokens, and all that have a bias."""
        return np.union1d(likeliest(logits, n_wanted), self._biased)

    def accept(self, token: int) -> None:
        """Nothing depends on what was said."""

    def close(self) -> None:
        """Nothing to free."""


class Chain:
    """The native chain of one sequence, not for greedy parameters; `n_ctx` bounds how far penalties look
    back, in tokens, `history` is what they have seen."""

    def __init__(
        self, params: SamplingParams, history: Sequence[int], parts: LlamaParts, vocab: Any, n_ctx: int
    ) -> None:
        biases = _biases(params, vocab)
        self._biased = tuple(token for token, _ in biases)
        n_back = _look_back(params, n_ctx)
        self._recent = deque(history[-n_back:] if n_back else (), maxlen=n_back)
        self._top_k = params.top_k
        self.n_few = self._count_few(params)
        """Allowed tokens with the largest logits among which the choice is certain to fall, None: all."""
        n_vocab = int(lib.llama_vocab_n_tokens(vocab))
        front, back = _links(params, parts, vocab, n_vocab, n_ctx, biases)
        self._front, self._back = _chain(front), _chain(back)
        if _penalises(params) and params.mirostat == 0:
            for token in history[-n_ctx:]:
                self._accept(token)

    def _count_few(self, params: SamplingParams) -> int | None:
        n_few = self._top_k + (self._recent.maxlen or 0) + len(self._biased)
        is_repeated = len(set(self._biased)) < len(self._biased)  # of which a search finds only one
        return n_few if _begins_with_top_k(params) and n_few <= MAX_FEW and not is_repeated else None

    def choose(self, logits: npt.NDArray[np.float32], candidates: Candidates) -> int:
        """Draw a token; what the chain left is in `candidates`."""
        ids = None if self.n_few is None else self.few(logits, self.n_few)
        self._start(logits, ids, candidates)
        if ids is not None and candidates.has_tie(self._top_k):
            self._start(logits, None, candidates)
        candidates.apply(self._back)
        return int(candidates.left["id"][candidates.chosen])

    def _start(
        self, logits: npt.NDArray[np.float32], ids: npt.NDArray[Any] | None, candidates: Candidates
    ) -> None:
        if ids is None:
            candidates.fill(logits)
        else:
            candidates.start(ids, logits[ids])
        candidates.apply(self._front)

    def few(self, logits: npt.NDArray[np.float32], n_wanted: int) -> npt.NDArray[np.intp]:
        """At least `n_wanted` of the likeliest tokens, and all whose logits the chain changes."""
        ids = likeliest(logits, n_wanted)
        if not self._recent and not self._biased:
            return ids
        changed = np.array(list({*self._recent, *self._biased}))
        return np.concatenate((ids, changed[logits[changed] < logits[ids].min()]))

    def accept(self, token: int) -> None:
        """Remember a token that was said."""
        self._recent.append(token)
        self._accept(token)

    def _accept(self, token: int) -> None:
        for chain in (self._front, self._back):
            quick.llama_sampler_accept(chain, token)

    def close(self) -> None:
        """Free the links."""
        for chain in (self._front, self._back):
            quick.llama_sampler_free(chain)


def _chain(links: list[Any]) -> Any:
    chain = quick.llama_sampler_chain_init(quick.llama_sampler_chain_default_params())
    for link in links:
        quick.llama_sampler_chain_add(chain, link)
    return chain


def _look_back(params: SamplingParams, n_ctx: int) -> int:
    """How many tokens have their logits changed by the penalties at most."""
    if not _penalises(params):
        return 0
    longest = (params.repeat_last_n, params.dry_penalty_last_n if uses_dry(params) else 0)
    return n_ctx if min(longest) < 0 else min(max(longest), n_ctx)


def _begins_with_top_k(params: SamplingParams) -> bool:
    """Whether top-k is the first to drop candidates."""
    if params.mirostat or "top_k" not in params.samplers or params.top_k <= 0:
        return False
    before = params.samplers[: params.samplers.index("top_k")]
    idle = {"top_n_sigma"} if params.top_n_sigma <= 0 else set()
    return set(before) <= {"penalties", "dry"} | idle


def _biases(params: SamplingParams, vocab: Any) -> list[tuple[int, float]]:
    """What is added to which logits, those of tokens that the model is never to say included."""
    return [*params.logit_bias, *((token, float("-inf")) for token in _suppressed(vocab))]


def _suppressed(vocab: Any) -> list[int]:
    """Tokens that the model is never to say."""
    count = ctypes.c_int32(0)
    tokens = lib.llama_vocab_get_suppress_tokens(vocab, ctypes.byref(count))
    return [tokens[index] for index in range(count.value)]


def _links(
    params: SamplingParams,
    parts: LlamaParts,
    vocab: Any,
    n_vocab: int,
    n_ctx: int,
    biases: list[tuple[int, float]],
) -> tuple[list[Any], list[Any]]:
    """The links before top-k and those from it on."""
    front = []
    if biases:
        array = (lib.llama_logit_bias * len(biases))(*biases)
        front.append(quick.llama_sampler_init_logit_bias(n_vocab, len(biases), array))
    if params.mirostat:
        return front, [quick.llama_sampler_init_temp(params.temperature), _mirostat(params, n_vocab)]
    back: list[Any] = []
    for name in params.samplers:
        links = back if back or name == "top_k" else front
        if name == "dry":
            if uses_dry(params):
                links.append(parts.dry(params))
        elif name != "adaptive_p":
            if name == "infill":
                links.append(quick.llama_sampler_init_top_k(MAX_INFILL))
            links.append(_link(name, params, vocab, n_vocab, n_ctx))
    back.append(_last_link(params))
    return front, back


def _last_link(params: SamplingParams) -> Any:
    if "adaptive_p" in params.samplers:
        return quick.llama_sampler_init_adaptive_p(params.adaptive_target, params.adaptive_decay, params.seed)
    return quick.llama_sampler_init_dist(params.seed)


def _mirostat(params: SamplingParams, n_vocab: int) -> Any:
    if params.mirostat == 1:
        return quick.llama_sampler_init_mirostat(
            n_vocab, params.seed, params.mirostat_tau, params.mirostat_eta, MIROSTAT_M
        )
    return quick.llama_sampler_init_mirostat_v2(params.seed, params.mirostat_tau, params.mirostat_eta)


def _link(name: str, params: SamplingParams, vocab: Any, n_vocab: int, n_ctx: int) -> Any:
    match name:
        case "penalties":
            last_n = n_ctx if params.repeat_last_n < 0 else min(params.repeat_last_n, n_ctx)
            return quick.llama_sampler_init_penalties(
                n_vocab, last_n, params.repeat_penalty, params.frequency_penalty, params.presence_penalty
            )
        case "top_n_sigma":
            return quick.llama_sampler_init_top_n_sigma(params.top_n_sigma)
        case "top_k":
            return quick.llama_sampler_init_top_k(params.top_k)
        case "typ_p":
            return quick.llama_sampler_init_typical(params.typical_p, params.min_keep)
        case "top_p":
            return quick.llama_sampler_init_top_p(params.top_p, params.min_keep)
        case "min_p":
            return quick.llama_sampler_init_min_p(params.min_p, params.min_keep)
        case "xtc":
            return quick.llama_sampler_init_xtc(
                params.xtc_probability, params.xtc_threshold, params.min_keep, params.seed
            )
        case "temperature":
            return quick.llama_sampler_init_temp_ext(
                params.temperature, params.dynatemp_range, params.dynatemp_exponent
            )
        case "infill":
            return quick.llama_sampler_init_infill(vocab)
    raise ValueError(f"no sampler is called {name}")
