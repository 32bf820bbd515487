"""Finished and running jobs -> the objects clients read. Pure.

Native objects are llama-server's with the original Wingman's keys added; OpenAI objects carry both
where the original served native ones on the same path.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from wingman.engine.types import Finished, Job, Progress, StopType, TextDelta, Timings


class Naming(Struct, frozen=True):
    """What all objects of one answer share. `created` is in Unix seconds."""

    id: str
    model: str
    created: int
    fingerprint: str


def new_completion_id() -> str:
    """An id as llama-server makes them, for chat and text alike."""
    return "chatcmpl-" + secrets.token_hex(16)


def finish_reason(finished: Finished) -> str:
    """OpenAI's word for how a generation ended."""
    return "stop" if finished.stop_type in (StopType.EOS, StopType.WORD) else "length"


def usage_of(finished: Sequence[Finished]) -> dict[str, Any]:
    """`usage` of all answers of a request: outputs are summed over answers, inputs over prompts."""
    n_output = sum(one.timings.predicted_n for one in finished)
    prompts = {one.job_id: one for one in finished if not one.is_fork}
    n_prompt = sum(one.n_prompt for one in prompts.values())
    return {
        "completion_tokens": n_output,
        "prompt_tokens": n_prompt,
        "total_tokens": n_output + n_prompt,
        "prompt_tokens_details": {"cached_tokens": sum(one.timings.cache_n for one in prompts.values())},
    }


def native_partial(
    delta: TextDelta, index: int, slot_id: int, n_prompt: int, progress: Progress | None = None
) -> dict[str, Any]:
    """A partial event of a native stream."""
    body: dict[str, Any] = {
        "index": index,
        "content": delta.text,
        "tokens": delta.tokens,
        "stop": False,
        "id_slot": slot_id,
        "multimodal": False,
        "tokens_predicted": delta.n_decoded,
        "tokens_evaluated": n_prompt,
    }
    if delta.timings is not None:
        body["timings"] = delta.timings.to_dict()
    if progress is not None:
        body["prompt_progress"] = progress_body(progress)
    return body


def progress_body(progress: Progress) -> dict[str, Any]:
    """`prompt_progress` of llama-server; `processed` includes the reused tokens."""
    return {
        "total": progress.total,
        "cache": progress.cache,
        "processed": progress.processed,
        "time_ms": int(progress.time_ms),
    }


def native_final(
    finished: Finished,
    index: int,
    job: Job,
    model: str,
    prompt: str,
    settings: dict[str, Any],
    *,
    return_tokens: bool,
) -> dict[str, Any]:
    """The final native object; in a stream `content` and `tokens` were sent before and are empty."""
    return {
        "index": index,
        "content": "" if job.stream else finished.text,
        "tokens": finished.tokens if return_tokens and not job.stream else [],
        "id_slot": finished.slot_id,
        "stop": True,
        "model": model,
        "tokens_predicted": finished.timings.predicted_n,
        "tokens_evaluated": finished.n_prompt,
        "generation_settings": settings,
        "prompt": prompt,
        "has_new_line": finished.has_new_line,
        "truncated": finished.truncated,
        "stop_type": finished.stop_type.value,
        "stopping_word": finished.stopping_word,
        "tokens_cached": finished.n_held,
        "timings": finished.timings.to_dict(),
        "stopped_eos": finished.stop_type is StopType.EOS,
        "stopped_word": finished.stop_type is StopType.WORD,
        "stopped_limit": finished.stop_type is StopType.LIMIT,
        "multimodal": False,
    }


def select_fields(body: dict[str, Any], fields: Any) -> dict[str, Any]:
    """`response_fields`: just these keys; "a/b" is lifted to a root key of that name; unknown ones are
    skipped."""
    if not isinstance(fields, list) or not fields:
        return body
    selected = {}
    for name in fields:
        if not isinstance(name, str):
            continue
        value: Any = body
        for key in name.split("/"):
            if not isinstance(value, dict) or key not in value:
                break
            value = value[key]
        else:
            selected[name] = value
    return selected


def text_chunk(naming: Naming, *choices: dict[str, Any]) -> dict[str, Any]:
    """An object of POST /v1/completions, streamed or not."""
    return {
        "choices": choices,
        "created": naming.created,
        "model": naming.model,
        "system_fingerprint": naming.fingerprint,
        "object": "text_completion",
        "id": naming.id,
    }


def text_choice(index: int, text: str, reason: str | None, logprobs: Any = None) -> dict[str, Any]:
    """A choice of a text completion."""
    return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": reason}


def chat_chunk(
    naming: Naming, index: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None
) -> dict[str, Any]:
    """A chunk of a chat stream."""
    choice: dict[str, Any] = {"index": index, "delta": delta, "finish_reason": reason}
    if logprobs is not None:
        choice["logprobs"] = {"content": logprobs}
    return {
        "choices": [choice],
        "created": naming.created,
        "id": naming.id,
        "model": naming.model,
        "system_fingerprint": naming.fingerprint,
        "object": "chat.completion.chunk",
    }


def usage_chunk(base: dict[str, Any], usage: dict[str, Any]) -> dict[str, Any]:
    """The extra last chunk that `include_usage` asks for: no choices, only usage."""
    return base | {"choices": [], "usage": usage}


def chat_completion(
    naming: Naming, choices: Sequence[dict[str, Any]], finished: Sequence[Finished]
) -> dict[str, Any]:
    """The object of a chat answer that is not streamed."""
    return {
        "choices": choices,
        "created": naming.created,
        "model": naming.model,
        "system_fingerprint": naming.fingerprint,
        "object": "chat.completion",
        "usage": usage_of(finished),
        "id": naming.id,
        "timings": finished[0].timings.to_dict(),
    }


def add_timings(body: dict[str, Any], timings: Timings | None) -> dict[str, Any]:
    """The body with `timings` when there are any."""
    if timings is not None:
        body["timings"] = timings.to_dict()
    return body
