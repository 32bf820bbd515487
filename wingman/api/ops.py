"""Operations: liveness, readiness, metrics, and the page for people."""

from __future__ import annotations

import asyncio
import functools
from importlib import resources
from typing import TYPE_CHECKING, Final

import orjson

from wingman.api.errors import error_response
from wingman.errors import NotSupported, Unavailable
from wingman.http.messages import Request, Response

if TYPE_CHECKING:
    from wingman.services.metrics import EngineCollector

_PAGE_HEADERS: Final = (
    ("content-security-policy", "default-src 'self' 'unsafe-inline'; connect-src *; frame-ancestors 'none'"),
    ("x-content-type-options", "nosniff"),
    ("cache-control", "no-cache"),
)


def get_live(_: Request) -> Response:
    """The process answers; says nothing about the model."""
    return Response(200, orjson.dumps({"status": "ok"}))


def get_ready(reason: str | None) -> Response:
    """Whether a request sent now would be served; `reason` says why not."""
    if reason is None:
        return Response(200, orjson.dumps({"status": "ok"}))
    return error_response(Unavailable(reason, retry_after_s=2))


def get_page() -> Response:
    """The page for people."""
    return Response(200, _page(), "text/html; charset=utf-8", _PAGE_HEADERS)


@functools.cache
def _page() -> bytes:
    return (resources.files("wingman") / "web" / "index.html").read_bytes()


def refuse_metrics() -> Response:
    """The answer without --metrics."""
    message = "this server does not support metrics endpoint; start it with --metrics"
    return error_response(NotSupported(message))


async def get_metrics(collector: EngineCollector) -> Response:
    """Prometheus text."""
    from wingman.services.metrics import CONTENT_TYPE, process_start_time  # loaded with its Collector

    text = await asyncio.to_thread(collector.exposition)
    headers = (("process-start-time-unix", str(process_start_time())),)
    return Response(200, text, CONTENT_TYPE, headers)
