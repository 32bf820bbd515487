"""Sampling fields of a request -> SamplingParams. In the engine's executor: texts are tokenised."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Final

from msgspec import Struct

from wingman.api.ranges import FLOAT32_MAX, SAMPLING, read_number
from wingman.api.schema import GenerationFields
from wingman.config import SamplingParams
from wingman.engine.runner import Tokenizer
from wingman.engine.types import ModelInfo
from wingman.errors import InvalidRequest
from wingman.options import RANDOM_SEED, canonical_samplers, samplers_from_letters

MAX_BIAS_CHARS: Final = 64 * 1024
"""Length of all texts in logit_bias together."""
MAX_BREAKERS: Final = 16
"""DRY sequence breakers; each is compared with the whole vocabulary, up to 30 ms at 49k tokens."""
MAX_SAMPLERS: Final = 32
"""Links of a sampler chain."""
MAX_INFILL_TOP_K: Final = 1024
"""The infill sampler compares candidates pairwise: a whole vocabulary takes seconds a token."""


class SamplingReader(Struct, frozen=True):
    """Reads requests for one model on top of the server's defaults."""

    defaults: SamplingParams
    info: ModelInfo
    tokenizer: Tokenizer

    def read(self, fields: GenerationFields) -> SamplingParams:
        """The parameters of a request; raises InvalidRequest naming the field at fault."""
        defaults = self.defaults
        changes: dict[str, Any] = {
            name: read_number(value, name, bounds)
            for name, bounds in SAMPLING.items()
            if (value := getattr(fields, name)) is not None
        }
        if changes.get("dry_base", 1.0) < 1.0:
            changes["dry_base"] = defaults.dry_base
        if fields.seed is not None:
            changes["seed"] = _read_seed(fields.seed)
        if fields.samplers is not None:
            changes["samplers"] = read_samplers(fields.samplers, defaults.samplers)
        if fields.dry_sequence_breakers is not None:
            changes["dry_sequence_breakers"] = _read_breakers(fields.dry_sequence_breakers)
        _refuse_endless_infill(dataclasses.replace(defaults, **changes))
        ignore_eos = defaults.ignore_eos if fields.ignore_eos is None else fields.ignore_eos
        biases = list(defaults.logit_bias) if fields.logit_bias is None else self._biases(fields.logit_bias)
        if ignore_eos:
            biases += [(token, -math.inf) for token in self.tokenizer.eog_tokens]
        return dataclasses.replace(defaults, **changes, ignore_eos=ignore_eos, logit_bias=tuple(biases))

    def _biases(self, raw: Any) -> list[tuple[int, float]]:
        """`logit_bias` as pairs or as an object; malformed entries are skipped, as llama-server does."""
        pairs = raw.items() if isinstance(raw, dict) else raw if isinstance(raw, list) else ()
        if len(pairs) > self.info.n_vocab:
            raise InvalidRequest("Field 'logit_bias': has more entries than the vocabulary", "logit_bias")
        if sum(len(text) for pair in pairs for text in _texts(pair)) > MAX_BIAS_CHARS:
            raise InvalidRequest(f"Field 'logit_bias': holds over {MAX_BIAS_CHARS} characters", "logit_bias")
        biases: dict[int, float] = {}  # several biases of a token add up, as they do in the sampler
        for pair in pairs:
            if isinstance(pair, list | tuple) and len(pair) == 2:
                bias = _read_bias(pair[1])
                if bias is not None:
                    for token in self._bias_tokens(pair[0], isinstance(raw, dict)):
                        biases[token] = biases.get(token, 0.0) + bias
        return list(biases.items())

    def _bias_tokens(self, token: Any, is_key: bool) -> list[int]:
        if is_key and isinstance(token, str) and token.isascii() and token.isdigit():
            token = int(token) if len(token) < 10 else -1
        if isinstance(token, str):
            return self.tokenizer.tokenize(token, add_special=False, parse_special=False)
        if isinstance(token, int) and not isinstance(token, bool) and 0 <= token < self.info.n_vocab:
            return [token]
        return []


def _texts(pair: Any) -> list[str]:
    return [item for item in pair[:1] if isinstance(item, str)] if isinstance(pair, list | tuple) else []


def _read_seed(value: Any) -> int:
    """A 32-bit seed; larger ints wrap, as in llama-server."""
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidRequest("Field 'seed': must be finite", "seed")
    return int(value) & RANDOM_SEED


def _read_bias(value: Any) -> float | None:
    if value is False:
        return -math.inf
    if isinstance(value, int | float) and not isinstance(value, bool):
        return max(-FLOAT32_MAX, min(float(value), FLOAT32_MAX))
    return None


def _read_breakers(breakers: list[str]) -> tuple[str, ...]:
    if not breakers:
        raise InvalidRequest("Field 'dry_sequence_breakers': must not be empty", "dry_sequence_breakers")
    if len(breakers) > MAX_BREAKERS:
        raise InvalidRequest(
            f"Field 'dry_sequence_breakers': at most {MAX_BREAKERS} are taken", "dry_sequence_breakers"
        )
    return tuple(breaker.replace("\x00", "") for breaker in breakers)


def _refuse_endless_infill(params: SamplingParams) -> None:
    if "infill" not in params.samplers:
        return
    before = params.samplers[: params.samplers.index("infill")]
    if "top_k" not in before or not 0 < params.top_k <= MAX_INFILL_TOP_K:
        raise InvalidRequest(
            f"Field 'samplers': infill needs top_k before it, with at most {MAX_INFILL_TOP_K}", "samplers"
        )


def read_samplers(raw: Any, default: tuple[str, ...]) -> tuple[str, ...]:
    """`samplers` as a list of names or a string of letters; other types leave the default."""
    if isinstance(raw, str | list) and len(raw) > MAX_SAMPLERS:
        raise InvalidRequest(f"Field 'samplers': at most {MAX_SAMPLERS} are taken", "samplers")
    if isinstance(raw, str):
        return samplers_from_letters(raw)
    if isinstance(raw, list):
        return canonical_samplers([name for name in raw if isinstance(name, str)])
    return default
