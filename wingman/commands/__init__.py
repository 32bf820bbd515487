"""The commands beside `serve`: one table, and what runs a row of it.

Each command is a function of a `Session` in a module of its own, imported when it runs: `--help` and
`--version` stay quick. Commands work through `wingman.commands.api.Api` alone, so they do the same with
a running server and without one.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from wingman.errors import WingmanError

if TYPE_CHECKING:
    from wingman.commands.session import Hooks, Session

INTERRUPTED: Final = 130
"""Exit status after ctrl-C: 128 and the number of SIGINT, as a shell has it."""


@dataclass(frozen=True, slots=True)
class _Flag:
    names: tuple[str, ...]
    settings: dict[str, Any]


def _flag(*names: str, **settings: Any) -> _Flag:
    return _Flag(names, settings)


def _count(text: str) -> int:
    number = int(text)
    if not -1 <= number < 2**31:
        raise ValueError
    return number


_count.__name__ = "number"  # argparse's messages name it


@dataclass(frozen=True, slots=True)
class _Command:
    name: str
    module: str
    help: str
    flags: tuple[_Flag, ...] = ()


_COMMON: Final = (
    _flag("--home", type=Path, metavar="DIR", help="where models and data live [env: WINGMAN_HOME]"),
    _flag("--url", metavar="URL", help="control address of a server [env: WINGMAN_URL]"),
    _flag("--admin-key", metavar="KEY", help="key of its control API [env: WINGMAN_ADMIN_KEY]"),
    _flag("--api-key", metavar="KEY", help="key of its inference API [env: WINGMAN_API_KEY]"),
    _flag("--json", action="store_true", help="print JSON: one document, or one a line"),
)
_MODEL: Final = _flag(
    "model", metavar="MODEL", help="alias, owner/repo[:QUANT], file name, or path of a file"
)
_LOADING: Final = (
    _flag("--ctx-size", "-c", type=_count, metavar="N", help="tokens of context; 0: from the model"),
    _flag("--gpu-layers", "-ngl", type=_count, metavar="N", help="layers on the GPU; -1: all that fit"),
    _flag("--force", action="store_true", help="start it even if it seems not to fit in memory"),
)

COMMANDS: Final = (
    _Command("pull", "pull", "download a model; run again, it resumes", (
        _flag("repo", metavar="REPO", help="owner/repo[:QUANT] or hf://owner/repo[@revision][/file.gguf]"),
        _flag("file", nargs="?", metavar="FILE|QUANT", help="which file; left out, one that suits this machine"),
    )),
    _Command("list", "models", "list models", (
        _flag("--all", action="store_true", help="what the Hub offers, too"),
    )),
    _Command("ps", "running", "list what runs", (
        _flag("--all", "-a", action="store_true", help="what has stopped or failed, too"),
    )),
    _Command("start", "running", "load a model; without a server, become one", (
        _MODEL,
        _flag("--alias", metavar="NAME", help="name to serve it under; else the file's"),
        _flag("--port", type=_count, metavar="N", help="give it a listener of its own"),
        _flag("--chat-template", metavar="TEMPLATE", help="instead of the model's own"),
        *_LOADING,
    )),
    _Command("stop", "running", "unload a model", (
        _flag("model", metavar="ALIAS", help="alias of a loaded model, or the model"),
    )),
    _Command("rm", "models", "delete a downloaded model", (
        _MODEL,
        _flag("--yes", "-y", action="store_true", help="don't ask"),
    )),
    _Command("run", "chat", "chat with a model in the terminal", (
        _MODEL,
        _flag("prompt", nargs="*", metavar="PROMPT", help="ask this, print the answer, and end"),
        _flag("--system", metavar="TEXT", help="system message"),
        *_LOADING,
    )),
    _Command("hardware", "machine", "show what this machine has"),
    _Command("logs", "watch", "show the log, or with -f what happens", (
        _flag("--follow", "-f", action="store_true", help="live events, until ctrl-C"),
        _flag("--events", metavar="NAMES", help="which, comma-separated (default: download_status,inference_status)"),
        _flag("--lines", "-n", type=_count, default=50, metavar="N", help="last lines of the log (default: 50)"),
    )),
    _Command("shutdown", "machine", "stop the server"),
)  # fmt: skip
"""Every command: its name, its module, its help, its flags."""


def add_commands(subparsers: Any) -> None:
    """Add a parser for each command; what they parse goes to `run_command`."""
    for command in COMMANDS:
        parser = subparsers.add_parser(
            command.name, help=command.help, description=command.help.capitalize() + ".", allow_abbrev=False
        )
        flags = (*command.flags, *_COMMON)
        for flag in flags:
            parser.add_argument(*flag.names, **flag.settings)
        valued = {name for flag in flags if "action" not in flag.settings for name in flag.names}
        parser.parse_known_args = functools.partial(_parse, parser.parse_known_args, valued)


def _parse(
    parse: Callable[..., Any], valued: set[str], arguments: Sequence[str], namespace: Any = None
) -> Any:
    """Parse with flags before words: argparse loses an optional word that follows a flag."""
    flags: list[str] = []
    words: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            words.extend(rest)
        elif argument.startswith("-") and argument != "-":
            flags += (argument, *itertools.islice(rest, int(argument in valued)))
        else:
            words.append(argument)
    return parse([*flags, "--", *words] if words else flags, namespace)


def run_command(arguments: argparse.Namespace, hooks: Hooks | None = None) -> int:
    """Run the command that was parsed; the exit status. Says what went wrong in one line on stderr."""
    from wingman.commands.output import printable
    from wingman.commands.session import Hooks, Session

    session = Session(arguments, hooks or Hooks())
    try:
        try:
            return _function(arguments.command)(session)
        finally:
            session.close()
    except WingmanError as error:
        print(f"wingman: {printable(error.message)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output has gone, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _function(name: str) -> Callable[[Session], int]:
    module = next(command.module for command in COMMANDS if command.name == name)
    function: Callable[[Session], int] = getattr(
        importlib.import_module(f"wingman.commands.{module}"), f"{name}_command"
    )
    return function
