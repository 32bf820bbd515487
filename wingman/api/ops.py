"""Operations: liveness, readiness, metrics, and the page for people."""

from __future__ import annotations

import asyncio
import functools
from importlib import resources
from typing import Final

import orjson

from wingman.api.errors import error_response
from wingman.errors import NotSupported, Unavailable
from wingman.http.messages import Request, Response
from wingman.services.metrics import CONTENT_TYPE, EngineCollector, process_start_time

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


async def get_metrics(collector: EngineCollector, *, is_enabled: bool) -> Response:
    """Prometheus text."""
    if not is_enabled:
        raise NotSupported("this server does not support metrics endpoint; start it with --metrics")
    text = await asyncio.to_thread(collector.exposition)
    headers = (("process-start-time-unix", str(process_start_time())),)
    return Response(200, text, CONTENT_TYPE, headers)
