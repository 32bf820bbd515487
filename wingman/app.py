"""The composition root of requests: routes from the tables, and what every request passes.

Middleware is the explicit calls in `App.screen` and `App.handle`: CORS, Host and Origin, loading, key, routing,
the model, error table. One App serves one listener, or several of the same kind. Runs on the loop thread.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import re
import secrets
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import orjson

from protocol import Limits, is_upgrade
from wingman.api import models, ops, replies, slots
from wingman.api.errors import error_response, protocol_error_response
from wingman.api.forms import is_form, read_form
from wingman.api.openapi import Description, openapi_document
from wingman.api.requested import requested_model
from wingman.api.routes import MODEL_ROUTES, QUERIES, STREAMING, ModelEndpoint
from wingman.config import Config, ControlConfig, ServerConfig
from wingman.engine.client import Engine
from wingman.errors import ConfigurationError, NotFound, WingmanError
from wingman.http.access import Cors, Guard, Keys
from wingman.http.connection import ConnectionLimits
from wingman.http.messages import Answer, EventStream, Request, Response, Upgrade
from wingman.http.router import Router
from wingman.http.session import SocketLimits
from wingman.services.inference import Inference

if TYPE_CHECKING:  # a server of one model needs neither
    from wingman.api.control import ControlPlane
    from wingman.services.metrics import EngineCollector

Endpoint = Callable[[Request], Answer | Awaitable[Answer]]
A = TypeVar("A", Response, EventStream, Upgrade, Answer)

PUBLIC: Final = frozenset({"/health", "/v1/health", "/live", "/ready", "/"})
"""Paths that need no key, as in llama-server, our probes, and the page that asks for one."""
_PROBES: Final = frozenset({"/live", "/ready", "/"})
_REQUEST_ID = re.compile(r"^[\w.:/+=@-]{1,128}$", re.ASCII)
_CONTROL: Final = "/api/"


@dataclass(frozen=True, slots=True)
class Gates:
    """Who may do what."""

    inference: Guard
    control: Guard
    cors: Cors
    control_cors: Cors


def open_gates() -> Gates:
    """Everybody may do everything: for requests out of this process."""
    anybody = Guard(Keys(()))
    return Gates(anybody, anybody, Cors(), Cors())


class App:
    """The application behind a listener."""

    def __init__(
        self,
        config: Config,
        gates: Gates,
        inference: Inference | None,
        plane: ControlPlane | None = None,
        default: str | None = None,
    ) -> None:
        """With `inference` it serves models, with `plane` the control API and the WebSocket; `default` is the
        alias that requests without a model mean."""
        self._config = config
        self._gates = gates
        self._inference = inference
        self._plane = plane
        self._default = default
        self._collectors: dict[int, EngineCollector] = {}
        self._new_collector: Callable[[Engine], EngineCollector] | None = None
        if config.server.metrics:
            from wingman.services import metrics  # else it is not wanted

            self._new_collector = metrics.EngineCollector
        self._router: Router[Endpoint] = Router()
        for method, path, endpoint in self._routes():
            self._router.add(method, path, endpoint)
        self.is_draining = False

    # -- routes ---------------------------------------------------------------------------------------

    def _own_routes(self) -> tuple[tuple[str, Endpoint, Any, tuple[str, ...]], ...]:
        """Routes beside the tables: path of a GET, endpoint, reply, parameters."""
        common: tuple[tuple[str, Endpoint, Any, tuple[str, ...]], ...] = (
            ("/", self._page, None, ()),
            ("/live", ops.get_live, replies.Status, ()),
            ("/ready", self._ready, replies.Status, ()),
            ("/openapi.json", self._openapi, dict[str, Any], ()),
        )
        if self._inference is None:
            return common
        health = ("include_slots", "fail_on_no_slot")
        return (
            *common,
            ("/metrics", self._metrics, None, ()),
            ("/health", self._health, replies.Health, health),
            ("/v1/health", self._health, replies.Health, health),
            ("/models", self._list_models, replies.Models, ()),
            ("/v1/models", self._list_models, replies.Models, ()),
            ("/models/{id}", self._get_model, replies.Model, ()),
            ("/v1/models/{id}", self._get_model, replies.Model, ()),
        )

    def _routes(self) -> Iterator[tuple[str, str, Endpoint]]:
        for path, own, _, _ in self._own_routes():
            yield "GET", path, own
        if self._inference is not None:
            for method, paths, endpoint, _, _ in MODEL_ROUTES:
                for path in paths:
                    yield method, path, self._served_by(endpoint, uses=method == "POST")
        if self._plane is not None:
            yield from self._plane.routes()

    def describe(self) -> list[Description]:
        """All routes, for /openapi.json."""
        described = [
            Description(
                "GET", path, _summary(endpoint), _forms(reply), query=query, needs_key=path not in PUBLIC
            )
            for path, endpoint, reply, query in self._own_routes()
            if path != "/"
        ]
        if self._inference is not None:
            described += [
                Description(
                    method, path, _summary(endpoint), _forms(reply), body, endpoint in STREAMING,
                    QUERIES.get(path, ()),
                )
                for method, paths, endpoint, body, reply in MODEL_ROUTES
                for path in paths
            ]  # fmt: skip
        if self._plane is not None:
            described += [
                Description(method, path, summary, _forms(reply), body, query=query)
                for method, path, summary, reply, body, query in self._plane.described_routes()
            ]
        return described

    # -- models ---------------------------------------------------------------------------------------

    @property
    def _models(self) -> Inference:
        assert self._inference is not None
        return self._inference

    def _served_by(self, endpoint: ModelEndpoint, *, uses: bool) -> Endpoint:
        """An endpoint that needs the model which the request names."""
        if not uses:
            return lambda request: endpoint(
                self._models.peek(request.target.first("model"), self._default), request
            )

        async def use(request: Request) -> Answer:
            lease = await self._models.lease(await requested_model(request), self._default)
            try:
                answer = endpoint(lease.served, request)
                if inspect.isawaitable(answer):
                    answer = await answer
            except BaseException:
                lease.release()
                raise
            if isinstance(answer, EventStream):
                return replace(answer, close=_both(answer.close, lease.release))
            lease.release()
            return answer

        return use

    def _health(self, request: Request) -> Response:
        """Whether slots are free, in the original Wingman's form, a superset of llama-server's."""
        name = request.target.first("model")
        try:
            return slots.get_health(self._models.peek(name, self._default), request)
        except NotFound:
            if name is not None:
                raise
            return slots.idle_health()

    def _ready(self, _: Request) -> Response:
        """Whether a request sent now would be served."""
        if self.is_draining:
            return ops.get_ready("the server is shutting down")
        return ops.get_ready(self._inference.readiness() if self._inference else None)

    def _list_models(self, _: Request) -> Response:
        """The models, in OpenAI's and in Ollama's shape: those in memory, and those a request may name."""
        return models.list_models(self._models)

    def _get_model(self, request: Request) -> Response:
        """One model by any of its names."""
        return models.get_model(self._models, request)

    def _metrics(self, request: Request) -> Answer | Awaitable[Answer]:
        """Prometheus text of one model."""
        served = self._models.peek(request.target.first("model"), self._default)
        if self._new_collector is None:
            return ops.refuse_metrics()
        collector = self._collectors.get(id(served.engine))
        if collector is None:
            loaded = {id(one.engine) for one in self._models.loaded}
            self._collectors = {key: kept for key, kept in self._collectors.items() if key in loaded}
            collector = self._collectors[id(served.engine)] = self._new_collector(served.engine)
        return ops.get_metrics(collector)

    # -- others ---------------------------------------------------------------------------------------

    def _page(self, _: Request) -> Response:
        """The page for people."""
        return ops.get_page()

    async def _openapi(self, _: Request) -> Response:
        """This document."""
        return Response(200, await asyncio.to_thread(lambda: self._document))

    @functools.cached_property
    def _document(self) -> bytes:
        return orjson.dumps(openapi_document(self.describe()))

    def _open_socket(self, request: Request) -> Answer:
        assert self._plane is not None
        return self._plane.sockets.connect(request, may_shutdown=True)

    # -- Application of wingman.http.connection -------------------------------------------------

    def screen(self, request: Request) -> Response | None:
        """Refuse by the head alone: CORS preflight, Host and Origin, loading, key, path; in this order."""
        is_control = self._is_control(request)
        guard = self._gates.control if is_control else self._gates.inference
        try:
            if request.method == "OPTIONS" and not is_control:
                headers = self._gates.cors.preflight_headers(request.headers)
                return self._finish(request, Response(200, b"", "text/html", headers))
            if request.path != "/" or is_control:
                guard.check_origin(request.headers, is_unix=request.client == "unix")
            if request.method == "OPTIONS":
                headers = self._gates.control_cors.preflight_headers(request.headers)
                return self._finish(request, Response(200, b"", "text/html", headers))
            if not is_control and self._inference is not None and request.path not in _PROBES:
                self._inference.check_loading()
            if is_control or request.path not in PUBLIC:
                guard.check_key(request.headers)
            self._endpoint(request)
        except WingmanError as error:
            return self._finish(request, error_response(error))
        return None

    async def handle(self, request: Request) -> Answer:
        """Answer a complete request."""
        try:
            endpoint, params = self._endpoint(request)
            if is_form(request):
                request = replace(request, body=await read_form(request))
            answer = endpoint(replace(request, params=params))
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

    def _is_control(self, request: Request) -> bool:
        """Whether a request is for the control API or the WebSocket, and not for a model."""
        if self._plane is None:
            return False
        is_api = request.path.lower().startswith(_CONTROL) or self._inference is None
        return (is_api and request.path not in PUBLIC) or is_upgrade(request.headers)

    def _endpoint(self, request: Request) -> tuple[Endpoint, dict[str, str]]:
        if self._plane is not None and is_upgrade(request.headers):
            return self._open_socket, {}
        path = request.path
        if path.lower().startswith(_CONTROL):  # the original's paths: any case, slashes at the end
            path = path.lower().rstrip("/")
            if (
                request.method == "HEAD" and self._plane is not None and path not in self._plane.read_only
            ):  # HEAD is safe (RFC 9110, 9.2.1)
                raise NotFound("File Not Found")
        match = self._router.match(request.method, path)
        if match is None:
            raise NotFound("File Not Found")
        return match.endpoint, match.params

    def _finish(self, request: Request, answer: A) -> A:
        cors: Cors = self._gates.control_cors if self._is_control(request) else self._gates.cors
        headers = (*answer.headers, ("x-request-id", request.id), *cors.answer_headers(request.headers))
        return replace(answer, headers=headers)


def _both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def close() -> None:
        try:
            first()
        finally:
            second()

    return close


def _forms(reply: Any) -> tuple[Any, ...]:
    if isinstance(reply, tuple):
        return reply
    return () if reply is None else (reply,)


def _summary(endpoint: Callable[..., Any]) -> str:
    """The first sentence of an endpoint's docstring."""
    return " ".join((endpoint.__doc__ or "").split("\n\n")[0].split())


def read_keys(given: tuple[str, ...], file: Path | None, flag: str) -> Keys:
    """All keys of a flag and of a key file. Raises ConfigurationError when the file can't be read."""
    keys = list(given)
    if file is not None:
        try:
            lines = file.expanduser().read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"can't read {flag}: {error}") from error
        keys += [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return Keys(keys)


def connection_limits(config: ServerConfig, control: ControlConfig) -> ConnectionLimits:
    """The flags that concern connections."""
    return ConnectionLimits(
        wire=Limits(config.max_head_size, config.max_body_size, config.max_pipelined),
        head_timeout_s=config.head_timeout,
        body_timeout_s=config.body_timeout,
        idle_timeout_s=config.idle_timeout,
        write_timeout_s=config.write_timeout,
        socket=SocketLimits(control.max_message_size, write_timeout_s=config.write_timeout),
    )
