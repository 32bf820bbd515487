"""Request bodies as types, and bytes -> types.

Unknown fields are skipped without being built (a huge one would hold up every thread) and null
counts as absent. Numbers may be ints, floats or booleans, as
llama-server takes them; `wingman.api.generation` gives each its range. Fields that llama-server
reads leniently are `Any`.
"""

from __future__ import annotations

import asyncio
import re
from typing import Annotated, Any, Final, TypeVar

import msgspec

from wingman.errors import InvalidRequest

Number = int | float | bool
_TEXT: Final = {"type": "string"}
_MIXED: Final = {"type": "array", "items": {"type": ["string", "integer"]}, "minItems": 1}
_PROMPT: Final = [_TEXT, _MIXED, {"type": "array", "items": {"anyOf": [_TEXT, _MIXED]}, "minItems": 1}]
Prompt = Annotated[Any, msgspec.Meta(extra_json_schema={"anyOf": _PROMPT})]
"""A text, texts and token ids in turn, or several of these: `wingman.api.prompts` reads it."""
Side = Annotated[Any, msgspec.Meta(extra_json_schema={"anyOf": _PROMPT[:2]})]
_MESSAGE: Final = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"type": "string", "examples": ["system", "user", "assistant", "tool"]},
        "content": {
            "anyOf": [
                _TEXT,
                {"type": "null"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["type", "text"],
                        "properties": {"type": {"const": "text"}, "text": _TEXT},
                    },
                },
            ]
        },
    },
}
ChatMessage = Annotated[Any, msgspec.Meta(extra_json_schema=_MESSAGE)]
"""A message; `wingman.chat.conversation` reads it."""
S = TypeVar("S", bound=msgspec.Struct)
T = TypeVar("T")

INLINE_PARSE_BYTES: Final = 64 * 1024
"""Bodies up to this size are parsed on the loop, in well under a millisecond; larger ones elsewhere."""


class StreamOptions(msgspec.Struct):
    """`stream_options` of OpenAI."""

    include_usage: bool | None = None


class GenerationFields(msgspec.Struct, kw_only=True):
    """Fields that every generating route shares (llama-server's make_llama_cmpl_schema)."""

    model: Any = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n_predict: Number | None = None
    max_completion_tokens: Number | None = None
    max_tokens: Number | None = None
    cache_prompt: bool | None = None
    return_tokens: bool | None = None
    return_progress: bool | None = None
    timings_per_token: bool | None = None
    verbose: bool | None = None
    sse_ping_interval: Number | None = None
    n_keep: Number | None = None
    n_discard: Number | None = None
    n_indent: Number | None = None
    n_cmpl: Number | None = None
    n: Number | None = None
    n_cache_reuse: Number | None = None
    t_max_predict_ms: Number | None = None
    response_fields: Any = None
    seed: Number | None = None
    temperature: Number | None = None
    dynatemp_range: Number | None = None
    dynatemp_exponent: Number | None = None
    top_k: Number | None = None
    top_p: Number | None = None
    min_p: Number | None = None
    top_n_sigma: Number | None = None
    typical_p: Number | None = None
    xtc_probability: Number | None = None
    xtc_threshold: Number | None = None
    repeat_last_n: Number | None = None
    repeat_penalty: Number | None = None
    frequency_penalty: Number | None = None
    presence_penalty: Number | None = None
    dry_multiplier: Number | None = None
    dry_base: Number | None = None
    dry_allowed_length: Number | None = None
    dry_penalty_last_n: Number | None = None
    dry_sequence_breakers: list[str] | None = None
    mirostat: Number | None = None
    mirostat_tau: Number | None = None
    mirostat_eta: Number | None = None
    adaptive_target: Number | None = None
    adaptive_decay: Number | None = None
    min_keep: Number | None = None
    n_probs: Number | None = None
    logprobs: Any = None
    top_logprobs: Any = None
    post_sampling_probs: bool | None = None
    backend_sampling: bool | None = None
    ignore_eos: bool | None = None
    logit_bias: Any = None
    stop: Any = None
    grammar: str | None = None
    grammar_lazy: bool | None = None
    grammar_triggers: list[Any] | None = None
    json_schema: Any = None
    response_format: Any = None
    samplers: Any = None
    id_slot: Any = None
    lora: list[Any] | None = None
    speculative_type: str | None = msgspec.field(default=None, name="speculative.type")
    speculative_n_max: Number | None = msgspec.field(default=None, name="speculative.n_max")
    speculative_n_min: Number | None = msgspec.field(default=None, name="speculative.n_min")
    speculative_p_min: Number | None = msgspec.field(default=None, name="speculative.p_min")


class CompletionRequest(GenerationFields, kw_only=True):
    """POST /completion, /completions and /v1/completions."""

    prompt: Prompt = None
    echo: bool | None = None
    suffix: Any = None
    best_of: Number | None = None


class InfillRequest(GenerationFields, kw_only=True):
    """POST /infill."""

    input_prefix: Side = None
    input_suffix: Side = None
    input_extra: list[Any] | None = None
    prompt: Any = None


class EmbeddingRequest(msgspec.Struct, kw_only=True):
    """POST /embedding, /embeddings and /v1/embeddings."""

    input: Prompt = None
    content: Prompt = None
    model: Any = None
    encoding_format: str | None = None
    embd_normalize: Number | None = None
    dimensions: Number | None = None


class RerankRequest(msgspec.Struct, kw_only=True):
    """POST /rerank, /v1/rerank and /reranking: Jina's fields, or TEI's with `texts`."""

    query: str | None = None
    documents: list[str] | None = None
    texts: list[str] | None = None
    top_n: Number | None = None
    return_text: bool | None = None
    model: Any = None


class SlotFileRequest(msgspec.Struct, kw_only=True):
    """POST /slots/:id?action=save and restore."""

    filename: str | None = None


class LoraScale(msgspec.Struct, kw_only=True):
    """How much an adapter counts."""

    id: int
    scale: Number = 0.0


class ChatRequest(GenerationFields, kw_only=True):
    """POST /chat/completions and /v1/chat/completions."""

    messages: list[ChatMessage] | None = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Any = None
    reasoning_format: str | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /tokenize."""

    content: str | list[int | str] | None = None
    add_special: bool | None = None
    parse_special: bool | None = None
    with_pieces: bool | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /detokenize."""

    tokens: list[int] | None = None


async def parse_body(body: bytes, kind: type[S]) -> S:
    """Decode a JSON body; raises InvalidRequest naming the field at fault."""
    if len(body) <= INLINE_PARSE_BYTES:
        return parse_json(body, kind)
    return await asyncio.to_thread(parse_json, body, kind)


async def parse_list(body: bytes) -> list[Any]:
    """Decode a JSON array; raises InvalidRequest."""
    if len(body) > INLINE_PARSE_BYTES:
        raise InvalidRequest("the array is too long")
    return parse_json(body, list)


def parse_json(body: bytes, kind: type[T]) -> T:
    """`parse_body` on the calling thread, for any type msgspec knows."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _field_error(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise InvalidRequest("the body is not valid JSON") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None


_AT: Final = re.compile(r"^(?P<what>.*?)(?: - at `(?:key in )?\$\.?(?P<path>[^`]*)`)?$", re.DOTALL)
_NULL: Final = re.compile(r" \| null`")
_NUMBER: Final = re.compile(r"`bool \| int \| float`|`int \| float \| bool`")


def _field_error(text: str) -> InvalidRequest:
    """msgspec's message in the words of this API."""
    match = _AT.match(text)
    assert match is not None
    what = _NUMBER.sub("a number", _NULL.sub("`", match["what"])).replace("`", "")
    what = what[:1].lower() + what[1:]
    path = match["path"]
    return InvalidRequest(f"Field '{path}': {what}", path) if path else InvalidRequest(what)
