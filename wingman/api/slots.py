"""Slots: GET /slots and /health, from the engine's last snapshot, never waiting; POST /slots/:id."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Final

import orjson

from wingman.api.schema import SlotFileRequest, parse_json
from wingman.api.settings import brief_settings
from wingman.engine.client import BULK_BYTES
from wingman.engine.types import SlotChanged, SlotJob, SlotMove, SlotView, StopType
from wingman.errors import EngineFailure, InvalidRequest, NotSupported, Unavailable
from wingman.http.messages import Request, Response
from wingman.services import slotfiles
from wingman.services.served import ServedModel
from wingman.services.slotfiles import SavedSlot


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


def idle_health() -> Response:
    """The health of a server that has no model loaded, and loads one when it is asked for."""
    return Response(200, orjson.dumps({"status": "ok", "slots_idle": 0, "slots_processing": 0}))


def _n_idle(served: ServedModel) -> int:
    return sum(not slot.is_busy for slot in served.engine.snapshot.slots)


def slot_bodies(served: ServedModel) -> list[dict[str, Any]]:
    """Every slot as llama-server shows it, with the original Wingman's keys beside."""
    return [_slot_body(served, slot) for slot in served.engine.snapshot.slots]


def _slot_body(served: ServedModel, slot: SlotView) -> dict[str, Any]:
    body: dict[str, Any] = {
        "id": slot.id,
        "n_ctx": served.info.n_ctx_slot,
        "speculative": served.config.context.spec_type != "none",
        "is_processing": slot.is_busy,
        "state": int(slot.is_busy),
        "model": served.name,
    }
    job = served.engine.last_job(slot.id)
    if job is None or slot.job_id != job.id:
        return body
    params = brief_settings(job, served.config, served.name)
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


# -- POST /slots/:id -------------------------------------------------------------------------------

MAX_SLOT_FILE_BYTES: Final = 64 * 1024**3
"""Longest file that is read; a slot of the largest models stays below."""


async def change_slot(served: ServedModel, request: Request) -> Response:
    """Save, restore or erase what a slot holds, once it is idle."""
    slot_id = request.params["id"]
    is_number = slot_id.isascii() and slot_id.isdigit() and len(slot_id) < 10
    if not is_number or int(slot_id) >= served.info.n_slots:
        raise InvalidRequest(f"Invalid slot ID: there are slots 0 to {served.info.n_slots - 1}", "id_slot")
    action = request.target.first("action")
    if action not in ("save", "restore", "erase"):
        raise InvalidRequest("Invalid action: it must be save, restore or erase", "action")
    if action == "erase":
        return await _erase(served, int(slot_id))
    folder = served.config.server.slot_save_path
    if folder is None:
        raise NotSupported("This server does not support slot files. Start it with `--slot-save-path`")
    fields = parse_json(request.body, SlotFileRequest)
    name = slotfiles.check_name(fields.filename)
    change = _save if action == "save" else _restore
    return await change(served, int(slot_id), folder.expanduser() / name)


async def _erase(served: ServedModel, slot_id: int) -> Response:
    done = await served.engine.change_slot(SlotJob(served.engine.new_job_id(), slot_id, SlotMove.ERASE))
    return Response(200, orjson.dumps({"id_slot": slot_id, "n_erased": len(done.tokens)}))


async def _save(served: ServedModel, slot_id: int, path: Path) -> Response:
    started = time.monotonic()
    engine = served.engine
    done = await engine.change_slot(SlotJob(engine.new_job_id(), slot_id, SlotMove.SAVE))
    n_written = await engine.work(len(done.state), _write, path, done, served)
    return Response(
        200,
        orjson.dumps(
            {
                "id_slot": slot_id,
                "filename": path.name,
                "n_saved": len(done.tokens),
                "n_written": n_written,
                "timings": {"save_ms": (time.monotonic() - started) * 1000},
            }
        ),
    )


def _write(path: Path, done: SlotChanged, served: ServedModel) -> int:
    mark = slotfiles.fingerprint(served.info, done.lora)
    data = slotfiles.pack(SavedSlot(done.tokens, done.state), mark)
    try:
        slotfiles.write(path, data)
    except OSError as error:
        raise EngineFailure(f"the slot could not be saved: {error.strerror}") from error
    return len(data)


async def _restore(served: ServedModel, slot_id: int, path: Path) -> Response:
    started = time.monotonic()
    engine = served.engine
    try:
        saved, n_read = await engine.work(BULK_BYTES + 1, _read, path, served)
    except InvalidRequest:
        await _erase(served, slot_id)  # as llama-server: what can't be restored leaves the slot empty
        raise
    job = SlotJob(engine.new_job_id(), slot_id, SlotMove.RESTORE, saved.tokens, saved.state)
    await engine.change_slot(job)
    return Response(
        200,
        orjson.dumps(
            {
                "id_slot": slot_id,
                "filename": path.name,
                "n_restored": len(saved.tokens),
                "n_read": n_read,
                "timings": {"restore_ms": (time.monotonic() - started) * 1000},
            }
        ),
    )


def _read(path: Path, served: ServedModel) -> tuple[SavedSlot, int]:
    data = slotfiles.read(path, MAX_SLOT_FILE_BYTES)
    mark = slotfiles.fingerprint(served.info, served.engine.lora_scales)
    saved = slotfiles.unpack(data, mark, served.info.n_vocab)
    if len(saved.tokens) >= served.info.n_ctx_slot:
        raise InvalidRequest("the file holds more tokens than a slot takes", "filename")
    return saved, len(data)
