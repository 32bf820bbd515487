"""What people type for a model -> the model.

MODEL is an alias, a name that `wingman.services.modelnames` gives a file, or the path of a file in the models
folder. More than one match is never guessed at: all are named.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import orjson

from wingman.commands.api import Api, CommandFailed, ask, read_as
from wingman.errors import InvalidRequest
from wingman.services.home import LOCAL, Home, split_parts
from wingman.services.items import ACTIVE_INFERENCE, DownloadableItem, DownloadItem, WingmanItem
from wingman.services.modelnames import model_name, names_of
from wingman.services.quantization import quantization_of

_MAX_NAMED: Final = 12


def read_download(item: Any) -> DownloadItem:
    """A DownloadItem of an answer. Raises CommandFailed when it is none."""
    return read_as(item, DownloadItem)


def read_items(api: Api, **query: str) -> list[WingmanItem]:
    """The WingmanItems that the API has. Raises CommandFailed."""
    return read_as(ask(api, "/api/inference", **query), dict[str, list[WingmanItem]])["WingmanItems"]


def active_items(api: Api) -> list[WingmanItem]:
    """Those that hold or will hold a model."""
    return [item for item in read_items(api) if item.status in ACTIVE_INFERENCE]


def known_models(api: Api) -> list[DownloadItem]:
    """Every download, and as complete ones the files in the models folder that come from no repository."""
    downloads = read_as(ask(api, "/api/downloads"), dict[str, list[DownloadItem]])["DownloadItems"]
    status, body = api.call("/api/models", {"modelRepo": LOCAL})
    models = body["models"] if status == 200 else []
    files = [read_as(item, DownloadableItem) for model in models for item in model["items"]]
    own = [
        DownloadItem(
            model_repo=LOCAL, file_path=file.file_path, total_bytes=file.size_bytes, status="complete"
        )
        for file in files
        if file.model_repo == LOCAL
    ]
    return sorted(downloads + own, key=lambda item: item.key)


def told_quantization(item: DownloadItem) -> str:
    """As its header told when it was downloaded, else as its name tells; "" for unknown."""
    try:
        told = orjson.loads(item.metadata)["quantization"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        told = None
    return told if isinstance(told, str) and told else quantization_of(item.file_path)


def find_model(models: Sequence[DownloadItem], text: str, home: Home) -> DownloadItem:
    """The one model that `text` names. Raises CommandFailed, naming candidates, for none or several."""
    wanted = text.lower()
    matches = [item for item in models if wanted in (name.lower() for name in names_of(item))]
    matches = matches or [item for item in models if _is_file(item, text, home)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise CommandFailed(f"{text} could be any of: {_listed(matches, models)}")
    here = f"here are: {_listed(models, models)}" if models else "there are none here yet"
    hint = f"; wingman pull {text} gets it" if text.count("/") == 1 and text[0] not in "./~" else ""
    raise CommandFailed(f"no model is called {text}; {here}{hint}")


def _is_file(item: DownloadItem, text: str, home: Home) -> bool:
    try:
        path = Path(text).expanduser().resolve()
        parts = split_parts(item.file_path)
        return any(home.model_file(item.model_repo, part).resolve() == path for part in parts)
    except (InvalidRequest, OSError, RuntimeError, ValueError):  # ~ of nobody, a loop of links, a zero byte
        return False


def _listed(chosen: Sequence[DownloadItem], models: Sequence[DownloadItem]) -> str:
    names = [model_name(item, models) for item in chosen]
    more = f" and {len(names) - _MAX_NAMED} more (wingman list)" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more
