"""The routes that need a model, as a table: what the router is built from and /openapi.json is written from.

Their endpoints take the model that the request names; with GET it is only looked at, with POST it is used, and
loaded if need be. Those of `/api` are in `wingman.api.control`, the few others in `wingman.app`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from wingman.api import (
    anthropic,
    chat,
    completions,
    embeddings,
    infill,
    lora,
    models,
    replies,
    responses,
    slots,
    tokens,
)
from wingman.api.dialects_schema import (
    MessageObject,
    MessageRequest,
    ResponseInputTokens,
    ResponseObject,
    ResponseRequest,
)
from wingman.api.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    InfillRequest,
    LoraScale,
    RerankRequest,
    SlotFileRequest,
    TokenizeRequest,
)
from wingman.http.messages import Answer, Request
from wingman.services.served import ServedModel

ModelEndpoint = Callable[[ServedModel, Request], Answer | Awaitable[Answer]]

_VECTORS: Final = (replies.Embeddings, list[replies.NativeEmbedding])
_RANKS: Final = (replies.Ranking, list[replies.TextRank])
_COMPLETIONS: Final = (replies.Completion, list[replies.Completion])
_SLOT_CHANGES: Final = (replies.SlotErased, replies.SlotSaved, replies.SlotRestored)
_TOKENS: Final = (replies.Tokens, replies.TokenPieces)

MODEL_ROUTES: Final[tuple[tuple[str, tuple[str, ...], ModelEndpoint, Any, Any], ...]] = (
    # method, paths, endpoint, body, reply
    ("GET", ("/slots",), slots.get_slots, None, list[replies.Slot]),
    ("POST", ("/slots/{id}",), slots.change_slot, SlotFileRequest, _SLOT_CHANGES),
    ("GET", ("/props",), models.get_props, None, replies.Props),
    ("POST", ("/props",), models.set_props, None, replies.Success),
    ("POST", ("/completion", "/completions"), completions.complete, CompletionRequest, _COMPLETIONS),
    ("POST", ("/v1/completions",), completions.complete_text, CompletionRequest, replies.TextCompletion),
    ("POST", ("/chat/completions", "/v1/chat/completions"), chat.chat, ChatRequest, replies.ChatCompletion),
    ("POST", ("/apply-template",), chat.apply_template, ChatRequest, replies.Prompt),
    (
        "POST",
        ("/chat/completions/input_tokens", "/v1/chat/completions/input_tokens"),
        chat.input_tokens,
        ChatRequest,
        replies.InputTokens,
    ),
    ("POST", ("/responses", "/v1/responses"), responses.respond, ResponseRequest, ResponseObject),
    (
        "POST",
        ("/responses/input_tokens", "/v1/responses/input_tokens"),
        responses.input_tokens,
        ResponseRequest,
        ResponseInputTokens,
    ),
    ("POST", ("/v1/messages",), anthropic.create_message, MessageRequest, MessageObject),
    (
        "POST",
        ("/v1/messages/count_tokens",),
        anthropic.count_message_tokens,
        MessageRequest,
        replies.InputTokens,
    ),
    ("POST", ("/infill",), infill.infill, InfillRequest, _COMPLETIONS),
    ("POST", ("/embedding", "/embeddings", "/v1/embeddings"), embeddings.embed, EmbeddingRequest, _VECTORS),
    (
        "POST",
        ("/rerank", "/reranking", "/v1/rerank", "/v1/reranking"),
        embeddings.rerank,
        RerankRequest,
        _RANKS,
    ),
    ("POST", ("/tokenize",), tokens.tokenize, TokenizeRequest, _TOKENS),
    ("POST", ("/detokenize",), tokens.detokenize, DetokenizeRequest, replies.Content),
    ("GET", ("/lora-adapters",), lora.list_adapters, None, list[replies.LoraAdapter]),
    ("POST", ("/lora-adapters",), lora.set_adapters, list[LoraScale], replies.Success),
)
"""Every route that needs a model."""
STREAMING: Final = frozenset(
    {
        completions.complete,
        completions.complete_text,
        chat.chat,
        responses.respond,
        anthropic.create_message,
        infill.infill,
    }
)
QUERIES: Final[dict[str, tuple[str, ...]]] = {
    "/health": ("include_slots", "fail_on_no_slot"),
    "/v1/health": ("include_slots", "fail_on_no_slot"),
    "/slots": ("fail_on_no_slot",),
    "/slots/{id}": ("action",),
}
