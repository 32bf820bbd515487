"""`ps`, `start` and `stop`: what runs."""

from __future__ import annotations

import time
from typing import Any, Final

import msgspec

from wingman.commands.api import Api, CommandFailed, EventsRefused, Message, ask
from wingman.commands.loading import load, start_query
from wingman.commands.names import active_items, find_model, known_models, read_items
from wingman.commands.session import Session
from wingman.services.items import ACTIVE_INFERENCE, WingmanItem

_METRICS_S: Final = 1.0
"""How long `ps` waits for the numbers of running models."""
_TITLES: Final = ("ALIAS", "STATUS", "MODEL", "PORT", "CONTEXT", "REQUESTS", "TOKENS/S")


def ps_command(session: Session) -> int:
    """`wingman ps`."""
    api = session.api()
    items = read_items(api)
    shown = [item for item in items if session.arguments.all or item.status in ACTIVE_INFERENCE]
    metrics = read_metrics(api, {item.alias for item in shown if item.status == "inferring"})
    if session.output.is_json:
        session.output.document(
            [msgspec.to_builtins(item) | {"metrics": metrics.get(item.alias)} for item in shown]
        )
        return 0
    if not shown:
        session.output.note("nothing runs; wingman run MODEL loads a model and asks it")
        return 0
    session.output.table(_TITLES, [_row(item, metrics.get(item.alias, {})) for item in shown])
    for item in shown:
        if item.error:
            session.output.note(f"{item.alias}: {item.error}")
    return 0


def _row(item: WingmanItem, metrics: Message) -> tuple[object, ...]:
    slots = metrics.get("slots")
    return (
        item.alias,
        item.status,
        f"{item.model_repo}/{item.file_path}" if item.model_repo else item.file_path,
        item.port or "",
        slots[0]["n_ctx"] if slots else item.context_size or "",
        metrics.get("requests_running", ""),
        _rate(metrics),
    )


def _rate(metrics: Message) -> object:
    rate = metrics.get("tokens_per_second")
    return round(rate, 1) if isinstance(rate, int | float) else ""


def read_metrics(api: Api, aliases: set[str]) -> dict[str, Message]:
    """The `metrics` message of each model, as far as they come at once."""
    found: dict[str, Message] = {}
    if not aliases:
        return found
    deadline = time.monotonic() + _METRICS_S
    try:
        with api.events(("metrics",), idle_s=_METRICS_S) as messages:
            for message in messages:
                if message is not None and message.get("event") == "metrics":
                    found[message["alias"]] = message
                if found.keys() >= aliases or message is None or time.monotonic() > deadline:
                    break
    except EventsRefused:
        pass
    return found


def start_command(session: Session) -> int:
    """`wingman start`: with a server, load there; without one, become it."""
    api = session.api()
    query = start_query(session, api, session.arguments.model)
    if not api.is_daemon:
        return _serve_with(session, query)
    item = load(api, session.output, query)
    if session.output.is_json:
        session.output.document(item)
    session.output.line(f"{item['alias']} is ready: wingman run {item['alias']}")
    return 0


def _serve_with(session: Session, query: dict[str, str]) -> int:
    if session.hooks.serve_with is None:
        raise CommandFailed("no server is running: start one with wingman serve")
    session.close()
    session.output.note(f"no server is running, so this becomes one, with {query['alias']}; ctrl-C ends it")
    return session.hooks.serve_with(session.config, query)


def stop_command(session: Session) -> int:
    """`wingman stop`."""
    api = session.daemon()
    alias = _running_alias(session, api, session.arguments.model)
    item: dict[str, Any] = ask(api, "/api/inference/stop", "POST", alias=alias)
    if session.output.is_json:
        session.output.document(item)
    session.output.line(f"{alias} is stopped")
    return 0


def _running_alias(session: Session, api: Api, text: str) -> str:
    """The alias that `text` is, or the only one of the model that it names."""
    items = active_items(api)
    aliases = [item.alias for item in items]
    if text in aliases:
        return text
    if not aliases:
        raise CommandFailed(f"{text} does not run; nothing does")
    try:
        model = find_model(known_models(api), text, session.home)
    except CommandFailed:
        raise CommandFailed(f"{text} does not run; these do: {', '.join(aliases)}") from None
    found = [item.alias for item in items if (item.model_repo, item.file_path) == model.key]
    if len(found) != 1:
        state = (
            f"runs as {', '.join(found)}: say which"
            if found
            else f"does not run; these do: {', '.join(aliases)}"
        )
        raise CommandFailed(f"{text} {state}")
    return found[0]
