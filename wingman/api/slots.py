"""GET /slots and /health: what each slot is doing, from the engine's last snapshot; never waits."""

from __future__ import annotations

from typing import Any

import orjson

from wingman.api.generation import settings_of
from wingman.engine.types import SlotView, StopType
from wingman.errors import NotSupported, Unavailable
from wingman.http.messages import Request, Response
from wingman.services.residency import ServedModel

_NOT_IN_PARAMS = frozenset(
    {
        "dry_sequence_breakers",
        "stop",
        "logit_bias",
        "grammar",
        "grammar_lazy",
        "grammar_triggers",
        "preserved_tokens",
    }
)


def get_slots(served: ServedModel, request: Request) -> Response:
    """All slots; ?fail_on_no_slot=1 makes it a 503 when none is idle."""
    if not served.config.server.slots:
        raise NotSupported("this server does not support slots endpoint; start it without --no-slots")
    if request.target.first("fail_on_no_slot") and not _n_idle(served):
        raise Unavailable("no slot available")
    return Response(200, orjson.dumps(slot_bodies(served)))


def get_health(served: ServedModel, request: Request) -> Response:
    """Whether slots are free, in the original Wingman's form, a superset of llama-server's."""
    n_idle = _n_idle(served)
    body: dict[str, Any] = {
        "status": "ok" if n_idle else "no slot available",
        "slots_idle": n_idle,
        "slots_processing": len(served.engine.snapshot.slots) - n_idle,
    }
    if request.target.first("include_slots") is not None and served.config.server.slots:
        body["slots"] = slot_bodies(served)
    fails = request.target.first("fail_on_no_slot") is not None and not n_idle
    return Response(503 if fails else 200, orjson.dumps(body))


def _n_idle(served: ServedModel) -> int:
    return sum(not slot.is_busy for slot in served.engine.snapshot.slots)


def slot_bodies(served: ServedModel) -> list[dict[str, Any]]:
    """Every slot as llama-server shows it, with the original Wingman's keys beside."""
    return [_slot_body(served, slot) for slot in served.engine.snapshot.slots]


def _slot_body(served: ServedModel, slot: SlotView) -> dict[str, Any]:
    body: dict[str, Any] = {
        "id": slot.id,
        "n_ctx": served.info.n_ctx_slot,
        "speculative": False,
        "is_processing": slot.is_busy,
        "state": int(slot.is_busy),
        "model": served.name,
    }
    job = served.engine.last_job(slot.id)
    if job is None or slot.job_id != job.id:
        return body
    settings = settings_of(job, served.config, served.name)
    params = {key: value for key, value in settings.items() if key not in _NOT_IN_PARAMS}
    return params | body | {
        "id_task": slot.job_id,
        "n_prompt_tokens": slot.n_held,
        "n_prompt_tokens_processed": slot.n_processed,
        "n_prompt_tokens_cache": slot.n_cached,
        "params": params,
        "next_token": [_next_token(slot, job.n_predict)],
    }  # fmt: skip


def _next_token(slot: SlotView, n_predict: int) -> dict[str, Any]:
    n_decoded = slot.n_decoded if slot.is_busy else 0
    is_limited = slot.is_busy and n_predict >= 0
    return {
        "has_next_token": slot.is_busy,
        "has_new_line": slot.has_new_line,
        "n_remain": n_predict - n_decoded if is_limited else -1,
        "n_decoded": n_decoded,
        "stopped_eos": slot.stop_type is StopType.EOS,
        "stopped_word": slot.stop_type is StopType.WORD,
        "stopped_limit": slot.stop_type is StopType.LIMIT,
        "stopping_word": slot.stopping_word,
    }
