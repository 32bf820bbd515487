"""Get a model loaded: find what was meant, start it, wait with a progress bar. For `start` and `run`."""

from __future__ import annotations

import argparse
from contextlib import closing
from typing import Final

from wingman.commands.api import Api, CommandFailed, Message, ask
from wingman.commands.follow import follow
from wingman.commands.names import find_model, known_models, read_items
from wingman.commands.output import Output
from wingman.commands.session import Session
from wingman.services.items import ACTIVE_INFERENCE, DownloadItem, WingmanItem
from wingman.services.modelnames import model_name

_FLAGS: Final = {
    "ctx_size": "contextSize",
    "gpu_layers": "gpuLayers",
    "port": "port",
    "chat_template": "chatTemplate",
}
"""Flags and the parameters of /api/inference/start that they set."""


def start_query(session: Session, api: Api, text: str) -> dict[str, str]:
    """Parameters of the start of the model that `text` names. Raises CommandFailed."""
    items = {item.alias: item for item in read_items(api)}
    given = _given(session.arguments)
    alias = getattr(session.arguments, "alias", None)
    if text in items:
        return _again(items[text]) | given | ({"alias": alias} if alias else {})
    models = known_models(api)
    model = find_model(models, text, session.home)
    _check_complete(model)
    before = [item for item in items.values() if (item.model_repo, item.file_path) == model.key]
    if before and alias is None:  # it may run already
        return _again(max(before, key=lambda item: (item.status in ACTIVE_INFERENCE, item.updated))) | given
    name = model_name(model, models)
    path = f"{model.model_repo}/{model.file_path}"
    target = {"modelRepo": model.model_repo, "filePath": model.file_path}
    return target | {"alias": alias or (path if name in items else name)} | given


def _again(item: WingmanItem) -> dict[str, str]:
    """As it ran before."""
    return {
        "alias": item.alias,
        "modelRepo": item.model_repo,
        "filePath": item.file_path,
        "contextSize": str(item.context_size),
        "gpuLayers": str(item.gpu_layers),
        "chatTemplate": item.chat_template,
    }


def _given(arguments: argparse.Namespace) -> dict[str, str]:
    given = {name: getattr(arguments, flag, None) for flag, name in _FLAGS.items()}
    query = {name: str(value) for name, value in given.items() if value is not None}
    return query | {"force": "true"} if arguments.force else query


def _check_complete(model: DownloadItem) -> None:
    if model.status == "complete":
        return
    state = f"{model.status}, {model.progress:.0%}" + (f": {model.error}" if model.error else "")
    raise CommandFailed(
        f"{model.file_path} is not here completely ({state}); "
        f"wingman pull {model.model_repo} {model.file_path} gets the rest"
    )


def load(api: Api, output: Output, query: dict[str, str]) -> Message:
    """Start a model and wait until it is loaded; its item. Raises CommandFailed when it does not load."""
    alias = query["alias"]
    if not query["modelRepo"]:
        raise CommandFailed(f"{alias} is the model of wingman serve --model: it is loaded when that starts")
    item: Message = ask(api, "/api/inference/start", "POST", **query)
    if [item["modelRepo"], item["filePath"]] != [query["modelRepo"], query["filePath"]]:
        raise CommandFailed(f"{alias} is {item['filePath']} already: choose another with --alias")
    if item["status"] == "inferring":
        return item
    states = follow(
        api, "inference_status", lambda message: message.get("alias") == alias, lambda: _fetch(api, alias)
    )
    with output.progress(f"loading {alias}", unit="%") as bar, closing(states):
        for state in states:
            share = 1.0 if state["status"] == "inferring" else state.get("progress", 0.0)
            bar.show(round(100 * share), 100, state["status"])
            if state["status"] not in ("queued", "preparing"):
                break
    if state["status"] != "inferring":
        raise CommandFailed(f"{alias} did not load: {state['error'] or state['status']}")
    return state


def _fetch(api: Api, alias: str) -> Message:
    items = ask(api, "/api/inference", alias=alias)["WingmanItems"]
    if not items:
        raise CommandFailed(f"{alias} was removed while it loaded")
    item: Message = items[0]
    return item
