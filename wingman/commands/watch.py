"""`logs`: the end of the log file, or what happens as it happens."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Final

from wingman.commands.api import CommandFailed, Message
from wingman.commands.output import size_text
from wingman.commands.session import Session

_EVENTS: Final = ("download_status", "inference_status")
_MAX_LINE_BYTES: Final = 65536


def logs_command(session: Session) -> int:
    """`wingman logs`."""
    return _follow(session) if session.arguments.follow else _tail(session)


def _follow(session: Session) -> int:
    given = session.arguments.events
    names = tuple(name for name in given.split(",") if name) if given else _EVENTS
    with session.daemon().events(names, idle_s=5.0) as messages:
        for message in messages:
            if message is None or message.get("event") not in names:
                continue
            if session.output.is_json:
                session.output.document(message)
            else:
                session.output.line(f"{time.strftime('%H:%M:%S')} {event_text(message)}")
    session.output.note("the server is gone")
    return 1


def event_text(message: Message) -> str:
    """An event for people."""
    event = message["event"]
    if event == "download_status":
        done, total = size_text(message.get("downloadedBytes", 0)), size_text(message.get("totalBytes", 0))
        words = f"{message.get('modelRepo')}/{message.get('filePath')} {message.get('status')}"
        words += f" {done or 0} of {total or '?'}"
    elif event == "inference_status":
        words = f"{message.get('alias')} {message.get('status')}"
        if "progress" in message:
            words += f" {message['progress']:.0%}"
    else:
        words = " ".join(f"{key}={value}" for key, value in message.items() if key not in ("event", "seq"))
    error = message.get("error")
    return f"{event} {words}" + (f": {error}" if error and event in _EVENTS else "")


def _tail(session: Session) -> int:
    """The last lines of the newest log file; rotation leaves the one being written the newest."""
    folder = session.home.logs
    files = [path for path in folder.glob("*.log*") if path.is_file()] if folder.is_dir() else []
    if not files:
        raise CommandFailed(f"there is no log in {folder}; wingman logs -f shows what a server does")
    for line in last_lines(max(files, key=lambda path: path.stat().st_mtime), session.arguments.lines):
        if session.output.is_json:
            session.output.document({"line": line})
        session.output.line(line)
    return 0


def last_lines(path: Path, n_lines: int) -> list[str]:
    """The last lines of a file, long ones cut. Reads no more than they can take."""
    with path.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - _MAX_LINE_BYTES * 16))
        lines = deque(file, maxlen=max(n_lines, 0))
    return [line[:_MAX_LINE_BYTES].decode("utf-8", "replace").rstrip("\r\n") for line in lines]
