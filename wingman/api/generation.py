"""Generation fields of a request -> Jobs. In the engine's executor: it tokenises and compiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Final

from msgspec import Struct, structs

from wingman.api.ranges import COUNT_OR_ALL, DRAFTING, INT32_MAX, LIMITS, Range, read_number
from wingman.api.sampling import SamplingReader
from wingman.api.schema import GenerationFields
from wingman.config import Config, ContextConfig
from wingman.engine.runner import SamplerParts, Tokenizer
from wingman.engine.types import Constraint, Drafting, DraftKind, Job, ModelInfo
from wingman.errors import InvalidRequest
from wingman.options import RANDOM_SEED
from wingman.services.served import ServedModel

MAX_STOPS: Final = 256
"""Stop strings of a request; every token is searched for all of them."""
MAX_STOP_CHARS: Final = 512
MAX_ALL_STOP_CHARS: Final = 8192
"""Length of a stop string, and of all: what is held back is compared with them for every token."""


class JobMaker(Struct, frozen=True):
    """Makes the jobs of requests for one model; usable from any thread."""

    config: Config
    info: ModelInfo
    tokenizer: Tokenizer
    parts: SamplerParts
    new_id: Callable[[], int]
    lora_scales: tuple[float, ...]

    @classmethod
    def of(cls, served: ServedModel) -> JobMaker:
        """The maker for a loaded model."""
        engine = served.engine
        return cls(
            served.config, engine.info, engine.tokenizer, engine.parts, engine.new_job_id, engine.lora_scales
        )

    def build_jobs(
        self,
        prompt: Sequence[int],
        fields: GenerationFields,
        constraint: Constraint | None = None,
        preserved: frozenset[int] = frozenset(),
    ) -> list[Job]:
        """`n` jobs for a tokenised prompt: all but the first are forks of it, with seeds of their own.

        `preserved` special tokens appear in the output. Raises InvalidRequest naming the field at fault.
        """
        first = self._build(prompt, fields, constraint, preserved)
        self.parts.prepare(first.sampling, constraint)
        return [first, *(self._fork(first, index) for index in range(1, self._n_answers(fields)))]

    def _build(
        self,
        prompt: Sequence[int],
        fields: GenerationFields,
        constraint: Constraint | None,
        preserved: frozenset[int],
    ) -> Job:
        context = self.config.context
        limits = {
            name: read_number(value, name, bounds)
            for name, bounds in LIMITS.items()
            if (value := getattr(fields, name)) is not None
        }
        limits.setdefault("n_keep", context.n_keep)
        return Job(
            id=self.new_id(),
            prompt=tuple(prompt),
            sampling=SamplingReader(self.config.sampling, self.info, self.tokenizer).read(fields),
            n_predict=self._n_predict(fields),
            stop=read_stop(fields.stop) or context.reverse_prompt,
            cache_prompt=context.cache_prompt if fields.cache_prompt is None else fields.cache_prompt,
            id_slot=read_id_slot(fields.id_slot),
            stream=bool(fields.stream),
            return_progress=bool(fields.return_progress),
            timings_per_token=bool(fields.timings_per_token),
            preserved_tokens=self._preserved() or preserved,
            constraint=constraint,
            n_probs=min(read_n_probs(fields), context.max_probs, self.info.n_vocab),
            post_sampling_probs=bool(fields.post_sampling_probs),
            lora=read_lora(fields.lora, self.lora_scales),
            drafting=read_drafting(fields, context),
            **limits,
        )

    def _fork(self, first: Job, index: int) -> Job:
        sampling = first.sampling
        if sampling.seed != RANDOM_SEED:
            seed = (sampling.seed + index) & RANDOM_SEED
            sampling = dataclasses.replace(sampling, seed=seed)
        return structs.replace(first, id=self.new_id(), sampling=sampling, fork_of=first.id, id_slot=-1)

    def _n_answers(self, fields: GenerationFields) -> int:
        for field in ("n_cmpl", "n"):
            value = getattr(fields, field)
            if value is not None:
                return int(read_number(value, field, Range(int, 1, self.info.n_slots)))
        return 1

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


def read_n_probs(fields: GenerationFields) -> int:
    """How many alternatives a native or text request wants: `n_probs`, or `logprobs`, true being 1."""
    value = fields.logprobs if fields.n_probs is None else fields.n_probs
    if not isinstance(value, int | float):
        return 0
    return int(read_number(value, "n_probs", Range(int, 0, INT32_MAX, clamps=True)))


def read_lora(raw: list[Any] | None, default: tuple[float, ...]) -> tuple[float, ...]:
    """`lora`, a list of {id, scale}, as the scale of each loaded adapter; those not named are off."""
    if raw is None or not default:
        return default
    scales = [0.0] * len(default)
    for index, item in enumerate(raw):
        where = f"lora[{index}]"
        if not isinstance(item, dict) or type(item.get("id")) is not int:
            raise InvalidRequest(f"Field '{where}': must be an object with id and scale", where)
        scale = item.get("scale", 0.0)
        if not 0 <= item["id"] < len(default):
            raise InvalidRequest(f"Field '{where}.id': there are {len(default)} adapters", where)
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            raise InvalidRequest(f"Field '{where}.scale': must be a number", where)
        scales[item["id"]] = float(read_number(scale, f"{where}.scale", Range(float)))
    return tuple(scales)


def read_drafting(fields: GenerationFields, context: ContextConfig) -> Drafting:
    """How tokens are guessed ahead; the fields are named with a dot, after llama-server's."""
    kinds = [kind.value for kind in DraftKind]
    kind = fields.speculative_type or context.spec_type
    if kind not in kinds:
        raise InvalidRequest(
            f"Field 'speculative.type': must be one of {', '.join(kinds)}", "speculative.type"
        )
    if kind == DraftKind.MODEL.value and context.model_draft is None:
        raise InvalidRequest("Field 'speculative.type': no draft model is loaded", "speculative.type")

    def number(value: Any, name: str, default: Any) -> Any:
        return default if value is None else read_number(value, f"speculative.{name}", DRAFTING[name])

    return Drafting(
        kind=DraftKind(kind),
        n_max=min(number(fields.speculative_n_max, "n_max", context.draft_max), context.draft_max),
        n_min=number(fields.speculative_n_min, "n_min", context.draft_min),
        p_min=number(fields.speculative_p_min, "p_min", context.draft_p_min),
    )


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
