"""Operations: liveness, readiness, metrics."""

from __future__ import annotations

import asyncio

import orjson

from wingman.api.errors import error_response
from wingman.errors import NotSupported, Unavailable
from wingman.http.messages import Request, Response
from wingman.services.metrics import CONTENT_TYPE, EngineCollector, process_start_time
from wingman.services.residency import Residency


def get_live(_: Request) -> Response:
    """The process answers; says nothing about the model."""
    return Response(200, orjson.dumps({"status": "ok"}))


def get_ready(residency: Residency) -> Response:
    """Whether a request sent now would be served."""
    reason = residency.readiness()
    if reason is None:
        return Response(200, orjson.dumps({"status": "ok"}))
    return error_response(Unavailable(reason, retry_after_s=2))


async def get_metrics(collector: EngineCollector, *, is_enabled: bool) -> Response:
    """Prometheus text."""
    if not is_enabled:
        raise NotSupported("this server does not support metrics endpoint; start it with --metrics")
    text = await asyncio.to_thread(collector.exposition)
    headers = (("process-start-time-unix", str(process_start_time())),)
    return Response(200, text, CONTENT_TYPE, headers)
