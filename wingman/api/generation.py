"""Generation fields of a request -> a Job, by one table of ranges.

A number outside its range is clamped or refused as the table says, before anything native sees
it. `build_job` tokenises (stop biases), so it runs in the engine's executor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from wingman.api.schema import GenerationFields
from wingman.config import RANDOM_SEED, Config, SamplingParams, canonical_samplers, samplers_from_letters
from wingman.engine.runner import Tokenizer
from wingman.engine.types import Job, ModelInfo
from wingman.errors import ContextOverflow, InvalidRequest, NotSupported

_INT32_MAX: Final = 2**31 - 1
_INT64_MAX: Final = 2**63 - 1
_INF: Final = math.inf
_FLOAT32_MAX: Final = 3.4028234663852886e38

MAX_STOPS: Final = 256
"""Stop strings of a request; every token is searched for all of them."""
MAX_STOP_CHARS: Final = 512
MAX_ALL_STOP_CHARS: Final = 8192
"""Length of a stop string, and of all: what is held back is compared with them for every token."""
MAX_BIAS_CHARS: Final = 64 * 1024
"""Length of all texts in logit_bias together."""
MAX_BREAKERS: Final = 16
"""DRY sequence breakers; each is compared with the whole vocabulary, up to 30 ms at 49k tokens."""
MAX_SAMPLERS: Final = 32
"""Links of a sampler chain."""
MAX_INFILL_TOP_K: Final = 1024
"""The infill sampler compares candidates pairwise: a whole vocabulary takes seconds a token."""


@dataclass(frozen=True, slots=True)
class _Range:
    """A number's kind and range; outside of it, `clamps` or refuse."""

    kind: type[int] | type[float]
    low: float = -_FLOAT32_MAX
    high: float = _FLOAT32_MAX
    clamps: bool = False


_INT: Final = _Range(int, -_INT32_MAX - 1, _INT32_MAX, clamps=True)
_FLOAT: Final = _Range(float, clamps=True)
_UNIT: Final = _Range(float, 0.0, 1.0, clamps=True)
_COUNT: Final = _Range(int, 0, _INT32_MAX)
COUNT_OR_ALL: Final = _Range(int, -1, _INT32_MAX)

_SAMPLING: Final[dict[str, _Range]] = {
    "temperature": _Range(float, 0.0, clamps=True),
    "dynatemp_range": _FLOAT,
    "dynatemp_exponent": _FLOAT,
    "top_k": _Range(int, 0, _INT32_MAX, clamps=True),
    "top_p": _UNIT,
    "min_p": _UNIT,
    "top_n_sigma": _FLOAT,
    "typical_p": _FLOAT,
    "xtc_probability": _UNIT,
    "xtc_threshold": _UNIT,
    "repeat_last_n": COUNT_OR_ALL,
    "repeat_penalty": _Range(float, 1e-30),
    "frequency_penalty": _Range(float),
    "presence_penalty": _Range(float),
    "dry_multiplier": _FLOAT,
    "dry_base": _FLOAT,
    "dry_allowed_length": _COUNT,
    "dry_penalty_last_n": COUNT_OR_ALL,
    "mirostat": _Range(int, 0, 2, clamps=True),
    "mirostat_tau": _FLOAT,
    "mirostat_eta": _FLOAT,
    "adaptive_target": _Range(float, high=1.0, clamps=True),
    "adaptive_decay": _Range(float, 0.0, 0.99),
    "min_keep": _COUNT,
}
_LIMITS: Final[dict[str, _Range]] = {
    "n_keep": COUNT_OR_ALL,
    "n_discard": _COUNT,
    "n_indent": _COUNT,
    "t_max_predict_ms": _Range(int, -1, _INT64_MAX),
}


def read_number(value: Any, field: str, bounds: _Range) -> Any:
    """A request's number within its range; raises InvalidRequest naming the field."""
    try:
        is_finite = math.isfinite(value)
    except OverflowError:  # an integer beyond the range of float
        is_finite = False
    if not is_finite:
        raise InvalidRequest(f"Field '{field}': must be finite", field)
    number = bounds.kind(value)
    if bounds.low <= number <= bounds.high:
        return number
    if not bounds.clamps:
        limit = f"at least {bounds.low:g}" if number < bounds.low else f"at most {bounds.high:g}"
        raise InvalidRequest(f"Field '{field}': must be {limit}", field)
    return bounds.kind(min(max(number, bounds.low), bounds.high))


def refuse_unsupported(fields: GenerationFields) -> None:
    """Raise NotSupported for what this version does not do, rather than give a wrong result."""
    wanted = {
        "grammar": bool(fields.grammar),
        "json_schema": fields.json_schema is not None,
        "response_format": _response_format(fields) != "text",
        "n_probs": fields.n_probs is not None and fields.n_probs > 0,
        "logprobs": bool(fields.logprobs),
    }
    for field, is_wanted in wanted.items():
        if is_wanted:
            raise NotSupported(f"'{field}' is not supported yet")
    for field in ("n", "n_cmpl"):
        value = getattr(fields, field)
        if value is not None and read_number(value, field, _Range(int, 1, _INT32_MAX)) > 1:
            raise NotSupported(f"'{field}' above 1 is not supported yet")


def _response_format(fields: GenerationFields) -> str:
    given = fields.response_format
    if not isinstance(given, dict) or given.get("type") is None:
        return "text"
    if given["type"] not in ("text", "json_object", "json_schema"):
        raise InvalidRequest(
            "Field 'response_format.type': must be text, json_object or json_schema", "response_format"
        )
    return str(given["type"])


@dataclass(frozen=True, slots=True)
class JobMaker:
    """Makes jobs for one model; usable from any thread."""

    config: Config
    info: ModelInfo
    tokenizer: Tokenizer

    def build_job(self, job_id: int, prompt: Sequence[int], fields: GenerationFields) -> Job:
        """A job from a tokenised prompt; raises InvalidRequest naming the field at fault."""
        context = self.config.context
        limits = {
            name: read_number(value, name, bounds)
            for name, bounds in _LIMITS.items()
            if (value := getattr(fields, name)) is not None
        }
        limits.setdefault("n_keep", context.n_keep)
        return Job(
            id=job_id,
            prompt=tuple(prompt),
            sampling=self._sampling(fields),
            n_predict=self._n_predict(fields),
            stop=read_stop(fields.stop) or context.reverse_prompt,
            cache_prompt=context.cache_prompt if fields.cache_prompt is None else fields.cache_prompt,
            id_slot=read_id_slot(fields.id_slot),
            stream=bool(fields.stream),
            return_progress=bool(fields.return_progress),
            timings_per_token=bool(fields.timings_per_token),
            preserved_tokens=self._preserved(),
            **limits,
        )

    def ping_interval(self, fields: GenerationFields) -> int:
        """Seconds of silence after which the request's stream gets a comment; -1 for none."""
        if fields.sse_ping_interval is None:
            return self.config.server.sse_ping_interval
        return int(read_number(fields.sse_ping_interval, "sse_ping_interval", COUNT_OR_ALL))

    def _preserved(self) -> frozenset[int]:
        return frozenset(range(self.info.n_vocab)) if self.config.model.special else frozenset()

    def _n_predict(self, fields: GenerationFields) -> int:
        for field in ("n_predict", "max_completion_tokens", "max_tokens"):
            value = getattr(fields, field)
            if value is not None:
                number = int(read_number(value, field, COUNT_OR_ALL))
                return number if number != -1 else self.config.context.n_predict
        return self.config.context.n_predict

    def _sampling(self, fields: GenerationFields) -> SamplingParams:
        defaults = self.config.sampling
        changes: dict[str, Any] = {
            name: read_number(value, name, bounds)
            for name, bounds in _SAMPLING.items()
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
            biases += [(token, -_INF) for token in self.info.eog_tokens]
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
        return -_INF
    if isinstance(value, int | float) and not isinstance(value, bool):
        return max(-_FLOAT32_MAX, min(float(value), _FLOAT32_MAX))
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


def read_stop(raw: Any) -> tuple[str, ...]:
    """`stop` as a string or a list of strings; nulls and empty strings are dropped, other types ignored."""
    if isinstance(raw, str):
        raw = [raw]
    if not isinstance(raw, list):
        return ()
    if len(raw) > MAX_STOPS:
        raise InvalidRequest(f"Field 'stop': at most {MAX_STOPS} are taken", "stop")
    words = []
    for index, word in enumerate(raw):
        if word is None:
            continue
        if not isinstance(word, str):
            raise InvalidRequest(f"Field 'stop[{index}]': must be a string", "stop")
        if word:
            words.append(word)
    if any(len(word) > MAX_STOP_CHARS for word in words) or sum(map(len, words)) > MAX_ALL_STOP_CHARS:
        message = f"at most {MAX_STOP_CHARS} characters each and {MAX_ALL_STOP_CHARS} in all are taken"
        raise InvalidRequest(f"Field 'stop': {message}", "stop")
    return tuple(dict.fromkeys(words))


def read_id_slot(raw: Any) -> int:
    """`id_slot`, or -1 for any; a value that is no number is ignored, as llama-server does."""
    if isinstance(raw, bool) or not isinstance(raw, int | float):
        return -1
    return int(read_number(raw, "id_slot", COUNT_OR_ALL))


def refuse_endless(text: str, info: ModelInfo) -> None:
    """Raise ContextOverflow for a text that no tokenisation can fit into a slot: tokenising megabytes
    takes seconds and can't be interrupted. The count reported is the least there could be."""
    n_least = -(-len(text) // info.max_piece_bytes)
    if n_least >= info.n_ctx_slot:
        raise ContextOverflow(n_least, info.n_ctx_slot)


def read_prompt(raw: Any, tokenizer: Tokenizer, info: ModelInfo) -> list[int]:
    """Token ids of `prompt` in any of its forms (tokenize_input_prompts of llama-server).

    A string gets BOS as the model wants; in a list of strings and ids only a leading string does.
    Raises InvalidRequest for anything else, NotSupported for several prompts.
    """
    raw = _unwrap_prompt(raw)
    if isinstance(raw, str):
        refuse_endless(raw, info)
        return tokenizer.tokenize(raw, add_special=True, parse_special=True)
    if not isinstance(raw, list) or not raw:
        raise InvalidRequest("Field 'prompt': must be a string, or a list of strings and token ids", "prompt")
    if not any(isinstance(item, int | float) for item in raw):
        raise NotSupported("several prompts in one request are not supported yet")
    tokens: list[int] = []
    for index, item in enumerate(raw):
        if isinstance(item, str):
            refuse_endless(item, info)
            tokens += tokenizer.tokenize(item, add_special=index == 0, parse_special=True)
        elif isinstance(item, int) and not isinstance(item, bool) and 0 <= item < info.n_vocab:
            tokens.append(item)
        else:
            raise InvalidRequest(f"Field 'prompt[{index}]': must be a string or a token id", "prompt")
    return tokens


def _unwrap_prompt(raw: Any) -> Any:
    """The prompt inside lists of one and objects with `prompt_string`; refuses multimodal data."""
    while True:
        if isinstance(raw, dict):
            if raw.get("multimodal_data"):
                raise InvalidRequest("Field 'prompt': this model takes no multimodal data", "prompt")
            raw = raw.get("prompt_string")
        elif isinstance(raw, list) and len(raw) == 1 and isinstance(raw[0], str | list | dict):
            raw = raw[0]
        else:
            return raw


def settings_of(job: Job, config: Config, model: str) -> dict[str, Any]:
    """`generation_settings`: llama-server's keys, and those of the original Wingman."""
    sampling = job.sampling
    settings = {
        field.name: getattr(sampling, field.name)
        for field in dataclasses.fields(sampling)
        if field.name not in ("logit_bias", "samplers", "dry_sequence_breakers")
    }
    return settings | {
        "dry_sequence_breakers": sampling.dry_sequence_breakers,
        "stop": job.stop,
        "max_tokens": job.n_predict,
        "n_predict": job.n_predict,
        "n_keep": job.n_keep,
        "n_discard": job.n_discard,
        "stream": job.stream,
        "logit_bias": [
            {"bias": None if math.isinf(bias) else bias, "token": token}
            for token, bias in sampling.logit_bias
        ],
        "n_probs": 0,
        "grammar": "",
        "grammar_lazy": False,
        "grammar_triggers": [],
        "preserved_tokens": [],
        "chat_format": "Content-only",
        "reasoning_format": "none",
        "reasoning_in_content": False,
        "generation_prompt": "",
        "samplers": sampling.samplers,
        "speculative.types": "none",
        "timings_per_token": job.timings_per_token,
        "post_sampling_probs": False,
        "backend_sampling": False,
        "lora": [],
        "n_ctx": config.context.ctx_size,
        "model": model,
        "tfs_z": 1.0,
        "penalty_prompt_tokens": [],
        "use_penalty_prompt_tokens": False,
        "penalize_nl": False,
    }
