"""The composition root: builds everything, hands it out by constructor, and lists every route.

Middleware is the explicit calls in `App.screen` and `App.handle`: request id, loading, keys,
routing, error table, CORS. Runs on the loop thread.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import re
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Final, TypeVar

import orjson

from protocol import Limits
from wingman.api import (
    anthropic,
    chat,
    completions,
    embeddings,
    infill,
    lora,
    models,
    ops,
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
from wingman.api.errors import error_response, protocol_error_response
from wingman.api.forms import is_form, read_form
from wingman.api.openapi import Description, openapi_document
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
from wingman.config import Config, ServerConfig
from wingman.errors import ConfigurationError, NotFound, Unauthenticated, WingmanError
from wingman.http.access import Cors, Keys
from wingman.http.connection import ConnectionLimits
from wingman.http.messages import Answer, EventStream, Request, Response
from wingman.http.router import Match, Router
from wingman.services.metrics import EngineCollector
from wingman.services.residency import Residency, ServedModel

Endpoint = Callable[[Request], Answer | Awaitable[Answer]]
A = TypeVar("A", Response, EventStream, Answer)
ModelEndpoint = Callable[[ServedModel, Request], Answer | Awaitable[Answer]]

PUBLIC: Final = frozenset({"/health", "/v1/health", "/live", "/ready"})
"""Paths that need no key, as in llama-server, and our probes."""
_REQUEST_ID = re.compile(r"^[\w.:/+=@-]{1,128}$", re.ASCII)

_VECTORS: Final = (replies.Embeddings, list[replies.NativeEmbedding])
_RANKS: Final = (replies.Ranking, list[replies.TextRank])
_COMPLETIONS: Final = (replies.Completion, list[replies.Completion])
_SLOT_CHANGES: Final = (replies.SlotErased, replies.SlotSaved, replies.SlotRestored)
_TOKENS: Final = (replies.Tokens, replies.TokenPieces)

MODEL_ROUTES: Final[tuple[tuple[str, tuple[str, ...], ModelEndpoint, Any, Any], ...]] = (
    # method, paths, endpoint, body, reply
    ("GET", ("/health", "/v1/health"), slots.get_health, None, replies.Health),
    ("GET", ("/slots",), slots.get_slots, None, list[replies.Slot]),
    ("POST", ("/slots/{id}",), slots.change_slot, SlotFileRequest, _SLOT_CHANGES),
    ("GET", ("/props",), models.get_props, None, replies.Props),
    ("POST", ("/props",), models.set_props, None, replies.Success),
    ("GET", ("/models", "/v1/models"), models.list_models, None, replies.Models),
    ("GET", ("/models/{id}", "/v1/models/{id}"), models.get_model, None, replies.Model),
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
"""Every route that needs the loaded model."""
_STREAMING: Final = frozenset(
    {
        completions.complete,
        completions.complete_text,
        chat.chat,
        responses.respond,
        anthropic.create_message,
        infill.infill,
    }
)
_QUERIES: Final[dict[str, tuple[str, ...]]] = {
    "/health": ("include_slots", "fail_on_no_slot"),
    "/v1/health": ("include_slots", "fail_on_no_slot"),
    "/slots": ("fail_on_no_slot",),
    "/slots/{id}": ("action",),
}


class App:
    """The application behind the listeners."""

    def __init__(self, config: Config, residency: Residency, keys: Keys) -> None:
        self._config = config
        self._residency = residency
        self._keys = keys
        server = config.server
        self._cors = Cors(
            server.cors_origins, server.cors_methods, server.cors_headers, server.cors_credentials
        )
        self._collector = EngineCollector(lambda: residency.served().engine)
        self._router = self._routes()
        self.is_draining = False

    def _own_routes(self) -> tuple[tuple[str, Endpoint, Any], ...]:
        """Every route that needs none: path of a GET, endpoint, reply."""
        return (
            ("/live", ops.get_live, replies.Status),
            ("/ready", self._ready, replies.Status),
            ("/metrics", self._metrics, None),
            ("/openapi.json", self._openapi, dict[str, Any]),
        )

    def _routes(self) -> Router[Endpoint]:
        router: Router[Endpoint] = Router()
        for path, own, _ in self._own_routes():
            router.add("GET", path, own)
        for method, paths, endpoint, _, _ in MODEL_ROUTES:
            for path in paths:
                router.add(method, path, self._served_by(endpoint))
        return router

    def describe(self) -> list[Description]:
        """All routes, for /openapi.json."""
        described = [
            Description("GET", path, _summary(endpoint), _forms(reply), needs_key=path not in PUBLIC)
            for path, endpoint, reply in self._own_routes()
        ]
        for method, paths, endpoint, body, reply in MODEL_ROUTES:
            for path in paths:
                streams, query = endpoint in _STREAMING, _QUERIES.get(path, ())
                described.append(
                    Description(
                        method,
                        path,
                        _summary(endpoint),
                        _forms(reply),
                        body,
                        streams,
                        query,
                        path not in PUBLIC,
                    )
                )
        return described

    def _served_by(self, endpoint: ModelEndpoint) -> Endpoint:
        """An endpoint that needs the loaded model; refused with the reason while there is none."""
        return lambda request: endpoint(self._residency.served(), request)

    def _ready(self, _: Request) -> Response:
        """Whether a request sent now would be served."""
        return ops.get_ready(self._residency)

    async def _openapi(self, _: Request) -> Response:
        """This document."""
        return Response(200, await asyncio.to_thread(lambda: self._document))

    @functools.cached_property
    def _document(self) -> bytes:
        return orjson.dumps(openapi_document(self.describe()))

    def _metrics(self, _: Request) -> Awaitable[Answer]:
        """Prometheus text."""
        self._residency.served()
        return ops.get_metrics(self._collector, is_enabled=self._config.server.metrics)

    # -- Application of wingman.http.connection -------------------------------------------------

    def screen(self, request: Request) -> Response | None:
        """Refuse by the head alone: CORS preflight, loading, key, path; in this order."""
        if request.method == "OPTIONS":
            return self._finish(
                request, Response(200, b"", "text/html", self._cors.preflight_headers(request.headers))
            )
        try:
            if request.path not in ("/live", "/ready"):
                self._residency.served()
            if request.path not in PUBLIC and not self._keys.allow(request.headers):
                raise Unauthenticated("Invalid API Key")
            self._match(request)
        except WingmanError as error:
            return self._finish(request, error_response(error))
        return None

    async def handle(self, request: Request) -> Answer:
        """Answer a complete request."""
        try:
            match = self._match(request)
            if is_form(request):
                request = replace(request, body=await read_form(request))
            answer = match.endpoint(replace(request, params=match.params))
            if inspect.isawaitable(answer):
                answer = await answer
        except Exception as error:  # noqa: BLE001 - the root of every request
            answer = error_response(error)
        return self._finish(request, answer)

    def refuse(self, status: int, message: str) -> Response:
        """The answer to something that is no valid request."""
        return protocol_error_response(status, message)

    def request_id(self, offered: str | None) -> str:
        """The peer's id when it is short and plain, else a fresh one."""
        if offered is not None and _REQUEST_ID.match(offered):
            return offered
        return secrets.token_hex(8)

    def _match(self, request: Request) -> Match[Endpoint]:
        match = self._router.match(request.method, request.path)
        if match is None:
            raise NotFound("File Not Found")
        return match

    def _finish(self, request: Request, answer: A) -> A:
        headers = (*answer.headers, ("x-request-id", request.id), *self._cors.answer_headers(request.headers))
        return replace(answer, headers=headers)


def _forms(reply: Any) -> tuple[Any, ...]:
    if isinstance(reply, tuple):
        return reply
    return () if reply is None else (reply,)


def _summary(endpoint: Callable[..., Any]) -> str:
    """The first sentence of an endpoint's docstring."""
    return " ".join((endpoint.__doc__ or "").split("\n\n")[0].split())


def read_keys(config: ServerConfig) -> Keys:
    """All API keys of flags and key file. Raises ConfigurationError when the file can't be read."""
    keys = list(config.api_key)
    if config.api_key_file is not None:
        try:
            lines = config.api_key_file.expanduser().read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"can't read --api-key-file: {error}") from error
        keys += [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return Keys(keys)


def connection_limits(config: ServerConfig) -> ConnectionLimits:
    """The flags that concern connections."""
    return ConnectionLimits(
        wire=Limits(config.max_head_size, config.max_body_size, config.max_pipelined),
        head_timeout_s=config.head_timeout,
        body_timeout_s=config.body_timeout,
        idle_timeout_s=config.idle_timeout,
        write_timeout_s=config.write_timeout,
    )
