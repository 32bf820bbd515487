"""A job -> `generation_settings`, the echo of all that influenced it. Pure."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Final

from wingman.config import Config
from wingman.engine.types import Constraint, Job

TRIGGER_TOKEN: Final = 0
TRIGGER_WORD: Final = 1
"""Values of `type` in grammar_triggers (common_grammar_trigger_type)."""


def settings_of(job: Job, config: Config, model: str) -> dict[str, Any]:
    """`generation_settings`: llama-server's keys, and those of the original Wingman."""
    sampling, constraint = job.sampling, job.constraint
    return brief_settings(job, config, model) | {
        "dry_sequence_breakers": sampling.dry_sequence_breakers,
        "stop": job.stop,
        "logit_bias": [
            {"bias": None if math.isinf(bias) else bias, "token": token}
            for token, bias in sampling.logit_bias
        ],
        "grammar": constraint.grammar if constraint else "",
        "grammar_lazy": constraint.is_lazy if constraint else False,
        "grammar_triggers": _triggers(constraint) if constraint else [],
        "preserved_tokens": [],
    }


def brief_settings(job: Job, config: Config, model: str) -> dict[str, Any]:
    """The same without what may be long, as /slots shows it."""
    sampling = job.sampling
    settings = {
        field.name: getattr(sampling, field.name)
        for field in dataclasses.fields(sampling)
        if field.name not in ("logit_bias", "dry_sequence_breakers")
    }
    return settings | {
        "max_tokens": job.n_predict,
        "n_predict": job.n_predict,
        "n_keep": job.n_keep,
        "n_discard": job.n_discard,
        "stream": job.stream,
        "n_probs": job.n_probs,
        "chat_format": "Content-only",
        "reasoning_format": "none",
        "reasoning_in_content": False,
        "generation_prompt": "",
        "speculative.types": job.drafting.kind.value,
        "speculative.n_max": job.drafting.n_max,
        "speculative.n_min": job.drafting.n_min,
        "speculative.p_min": job.drafting.p_min,
        "timings_per_token": job.timings_per_token,
        "post_sampling_probs": job.post_sampling_probs,
        "backend_sampling": False,
        "lora": [{"id": index, "scale": scale} for index, scale in enumerate(job.lora)],
        "n_ctx": config.context.ctx_size,
        "model": model,
        "tfs_z": 1.0,
        "penalty_prompt_tokens": [],
        "use_penalty_prompt_tokens": False,
        "penalize_nl": False,
    }


def _triggers(constraint: Constraint) -> list[dict[str, Any]]:
    words = [{"type": TRIGGER_WORD, "value": text} for text in constraint.trigger_texts]
    return words + [
        {"type": TRIGGER_TOKEN, "value": "", "token": token} for token in constraint.trigger_tokens
    ]
