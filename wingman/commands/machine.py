"""`hardware` and `shutdown`."""

from __future__ import annotations

from typing import Any

from wingman.commands.api import ask
from wingman.commands.session import Session


def hardware_command(session: Session) -> int:
    """`wingman hardware`."""
    hardware = ask(session.api(), "/api/hardware")
    if session.output.is_json:
        session.output.document(hardware)
        return 0
    for title, text in describe(hardware):
        session.output.line(f"{title:<7} {text}")
    return 0


def shutdown_command(session: Session) -> int:
    """`wingman shutdown`."""
    answer = ask(session.daemon(), "/api/shutdown", "POST")
    if session.output.is_json:
        session.output.document(answer)
    session.output.line("the server is shutting down")
    return 0


def describe(hardware: dict[str, Any]) -> list[tuple[str, str]]:
    """Titles and texts of what /api/hardware tells."""
    rows = [("gpu", _named(gpu)) for gpu in hardware["gpu"].get("gpus", [])] or [("gpu", "none")]
    rows.append(("cpu", _named(hardware["cpu"])))
    return rows + [(name, _named(hardware[name])) for name in ("disk", "os", "llama") if hardware.get(name)]


def _named(facts: Any) -> str:
    """Facts in one line: the name first, then what else is known."""
    if not isinstance(facts, dict):
        return str(facts)
    name = [str(facts["name"])] if facts.get("name") else []
    rest = [f"{key} {value}" for key, value in facts.items() if key != "name" and value not in ("", None)]
    return ", ".join(name + rest)
