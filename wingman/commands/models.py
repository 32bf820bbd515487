"""`list` and `rm`: what is here, and what the Hub offers."""

from __future__ import annotations

import sys

from wingman.commands.api import CommandFailed, Message, ask
from wingman.commands.names import active_items, find_model, known_models, told_quantization
from wingman.commands.output import printable, size_text
from wingman.commands.session import Session
from wingman.services.home import LOCAL
from wingman.services.items import DownloadItem
from wingman.services.modelnames import model_name


def list_command(session: Session) -> int:
    """`wingman list`."""
    return _list_hub(session) if session.arguments.all else _list_here(session)


def _list_here(session: Session) -> int:
    api = session.api()
    models = known_models(api)
    running = {(item.model_repo, item.file_path): item.status for item in active_items(api)}
    facts = [_facts(model, models, running.get(model.key)) for model in models]
    if session.output.is_json:
        session.output.document(facts)
        return 0
    if not facts:
        session.output.note("no models are here yet; wingman pull owner/repo gets one")
        return 0
    titles = ("NAME", "REPO", "FILE", "SIZE", "QUANT", "STATUS")
    session.output.table(titles, [_row(fact) for fact in facts])
    return 0


def _facts(model: DownloadItem, models: list[DownloadItem], running: str | None) -> Message:
    return {
        "name": model_name(model, models),
        "modelRepo": model.model_repo,
        "filePath": model.file_path,
        "sizeBytes": model.total_bytes,
        "quantization": told_quantization(model),
        "status": running or model.status,
        "progress": 1.0 if model.status == "complete" else model.progress,
        "error": model.error,
    }


def _row(fact: Message) -> tuple[str, ...]:
    status = fact["status"]
    if fact["error"]:
        status = f"{status}: {fact['error']}"
    elif 0 < fact["progress"] < 1:
        status = f"{status} {fact['progress']:.0%}"
    size = size_text(fact["sizeBytes"])
    return fact["name"], fact["modelRepo"], fact["filePath"], size, fact["quantization"], status


def _list_hub(session: Session) -> int:
    answer = ask(session.api(), "/api/models")
    if answer.get("stale"):
        session.output.note("the Hub could not be reached; this is what was known before")
    if session.output.is_json:
        session.output.document(answer["models"])
        return 0
    titles = ("MODEL", "SIZE", "DOWNLOADS", "LIKES", "QUANTIZATIONS; * is here, ! does not fit in memory")
    session.output.table(titles, [_offer(model) for model in answer["models"]])
    return 0


def _offer(model: Message) -> tuple[object, ...]:
    items = " ".join((item["quantization"] or item["filePath"]) + _mark(item) for item in model["items"])
    return model["id"], model["size"], model["downloads"], model["likes"], items


def _mark(item: Message) -> str:
    if item["isDownloaded"]:
        return "*"
    return "!" if item["normalizedQuantizedMemRequired"] and not item["isInferable"] else ""


def rm_command(session: Session) -> int:
    """`wingman rm`."""
    api = session.api()
    model = find_model(known_models(api), session.arguments.model, session.home)
    using = [item.alias for item in active_items(api) if (item.model_repo, item.file_path) == model.key]
    if using:
        raise CommandFailed(f"{model.file_path} is loaded: wingman stop {using[0]} first")
    if model.model_repo == LOCAL:
        raise CommandFailed(
            f"{session.home.model_file(*model.key)} is a file of your own; delete it yourself"
        )
    if not session.arguments.yes and not _confirm(model):
        session.output.note("nothing is deleted")
        return 1
    query = {"modelRepo": model.model_repo, "filePath": model.file_path}
    item = ask(api, "/api/downloads/reset", "POST", **query)
    if session.output.is_json:
        session.output.document(item)
    session.output.line(f"{model.file_path} is deleted")
    return 0


def _confirm(model: DownloadItem) -> bool:
    if not sys.stdin.isatty():
        raise CommandFailed("nobody can be asked here: give --yes to delete it")
    size = size_text(model.total_bytes)
    question = (
        f"delete {printable(model.file_path)} of {printable(model.model_repo)}{f', {size}' if size else ''}?"
    )
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
