"""The composition root: builds everything, hands it out by constructor, and lists every route.

Middleware is the explicit calls in `App.screen` and `App.handle`: request id, loading, keys,
routing, error table, CORS. Runs on the loop thread.
"""

from __future__ import annotations

import inspect
import re
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TypeVar

from protocol import Limits
from wingman.api import chat, completions, models, ops, slots, tokens
from wingman.api.errors import error_response, protocol_error_response
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

PUBLIC = frozenset({"/health", "/v1/health", "/live", "/ready"})
"""Paths that need no key, as in llama-server, and our probes."""
_REQUEST_ID = re.compile(r"^[\w.:/+=@-]{1,128}$", re.ASCII)


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

    def _routes(self) -> Router[Endpoint]:
        """Every route there is."""
        router: Router[Endpoint] = Router()
        served = self._served_by
        for method, path, endpoint in (
            ("GET", "/live", ops.get_live),
            ("GET", "/ready", lambda _: ops.get_ready(self._residency)),
            ("GET", "/health", served(slots.get_health)),
            ("GET", "/v1/health", served(slots.get_health)),
            ("GET", "/slots", served(slots.get_slots)),
            ("GET", "/props", served(models.get_props)),
            ("GET", "/metrics", self._metrics),
            ("GET", "/models", served(models.list_models)),
            ("GET", "/v1/models", served(models.list_models)),
            ("GET", "/models/{id}", served(models.get_model)),
            ("GET", "/v1/models/{id}", served(models.get_model)),
            ("POST", "/completion", served(completions.complete)),
            ("POST", "/completions", served(completions.complete)),
            ("POST", "/v1/completions", served(completions.complete_text)),
            ("POST", "/chat/completions", served(chat.chat)),
            ("POST", "/v1/chat/completions", served(chat.chat)),
            ("POST", "/tokenize", served(tokens.tokenize)),
            ("POST", "/detokenize", served(tokens.detokenize)),
        ):
            router.add(method, path, endpoint)
        return router

    def _served_by(self, endpoint: ModelEndpoint) -> Endpoint:
        """An endpoint that needs the loaded model; refused with the reason while there is none."""
        return lambda request: endpoint(self._residency.served(), request)

    def _metrics(self, _: Request) -> Awaitable[Answer]:
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
