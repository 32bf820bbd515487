"""The `wingman` command: flags, environment and file -> Config -> a running server.

The parser is generated from the fields of `wingman.config`; nothing is declared here twice.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from wingman import __version__
from wingman.commands import add_commands, run_command
from wingman.config import GROUPS, Config, check_bounds, has_control
from wingman.errors import ConfigurationError, ModelLoadFailure
from wingman.options import Option, option_of
from wingman.services.home import Home

if TYPE_CHECKING:
    from logging.handlers import QueueListener

    from wingman.services.preload import Preload

_TITLES: Final = {
    "model": "model",
    "context": "engine",
    "sampling": "sampling defaults",
    "server": "server",
    "control": "control API, downloads, several models",
}
_START_SWITCH_INTERVAL_S: Final = 0.00002
"""While a model loads, other threads import modules, and the library asks for the interpreter each time it tells
how far it is or is listened to: each time it waits about as long as this."""
_TRUE: Final = frozenset({"1", "true", "on", "yes", "enabled"})
_FALSE: Final = frozenset({"0", "false", "off", "no", "disabled"})

_UNUSED_WITH_VALUE: Final = frozenset(
    """-C --cpu-mask -Cr --cpu-range --cpu-strict --prio --poll -Cb --cpu-mask-batch -Crb --cpu-range-batch
    --cpu-strict-batch --prio-batch --poll-batch --rope-scaling --rope-scale --rope-freq-base --rope-freq-scale
    --yarn-orig-ctx --yarn-ext-factor --yarn-attn-factor --yarn-beta-slow --yarn-beta-fast -dt --defrag-thold
    -lm --load-mode -lzm --lazy-mode --numa -dev --device -ot --override-tensor -ncmoe --n-cpu-moe -ncffn
    --n-cpu-ffn -ts --tensor-split -fit --fit -fitt --fit-target -fitc --fit-ctx
    --control-vector --control-vector-scaled --log-file --log-colors -lv --verbosity
    --log-verbosity --sampler-seq --sampling-seq
    -ctxcp --ctx-checkpoints -cms --cache-reuse -mm -td --threads-draft -tbd --threads-batch-draft -cd
    --ctx-size-draft -devd --device-draft -ctkd --cache-type-k-draft -ctvd --cache-type-v-draft --draft-p-split
    --mmproj --tags --embd-normalize --path --api-prefix --tools -to --timeout --threads-http
    --reasoning-effort --reasoning-budget
    --models-dir -hf --hf-repo -hff --hf-file -mu --model-url --ssl-key-file
    --ssl-cert-file --media-path --kv-unified-per-slot --rpc""".split()
)
_UNUSED_SWITCHES: Final = frozenset(
    """--list-devices -cmoe --cpu-moe --check-tensors --op-offload --no-op-offload --repack -nr --no-repack
    --no-host --log-disable --log-prefix --no-log-prefix --log-timestamps --no-log-timestamps
    --log-jsonl --perf --no-perf -e --escape --no-escape --backend-sampling -bs --warmup --no-warmup
    -cb --cont-batching -nocb --no-cont-batching
    --ui --webui --no-ui --no-webui --prefill-assistant --no-prefill-assistant --cache-idle-slots
    --no-cache-idle-slots --reuse-port""".split()
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    try:
        ignored: list[str] = []
        if "serve" in arguments[:1]:  # only its flags are llama-server's
            arguments, ignored = _drop_unused([_dashed(argument) for argument in arguments])
        parsed = parser.parse_args(arguments)
        if parsed.command is None:
            parser.print_help()
            return 0
        if parsed.command != "serve":
            from wingman.commands.session import Hooks

            return run_command(parsed, Hooks(load_config=_config_at, serve_with=_serve_with))
        given = vars(parsed)
        config = load_config(given, os.environ)
        return _serve(config, ignored)
    except (ConfigurationError, ModelLoadFailure) as error:
        print(f"wingman: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the server handles signals itself
        return 130


def _config_at(home: Path | None) -> Config:
    """The configuration that commands use: of the environment and its file, in a home folder."""
    config = load_config({}, os.environ)
    if home is None:
        return config
    return dataclasses.replace(config, server=dataclasses.replace(config.server, home=home))


def _serve_with(config: Config, query: Mapping[str, str]) -> int:
    """Become a server that starts a model: the parameters of /api/inference/start."""
    return _serve(config, [], query)


def _serve(config: Config, ignored: list[str], start: Mapping[str, str] | None = None) -> int:
    sys.setswitchinterval(_START_SWITCH_INTERVAL_S)  # here only: in other programs it is theirs to choose
    gc.disable()  # until all is loaded: nearly all of it stays
    # numpy's linear algebra, of which nothing is used: its threads would spin while the weights load
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    preload: Preload | None = None
    listener: QueueListener | None = None
    try:
        for flag in ignored:
            print(f"wingman: {flag} is a llama-server flag that has no effect here", file=sys.stderr)
        if config.model.starter and config.model.model is None:
            from wingman.services.starter import fetch_starter

            fetch_starter(config.server.home.expanduser() / "models")
        if config.model.model is not None:
            from wingman.services import preload as early

            preload = early.Preload(config.model, config.context)  # goes on while the rest is imported
        from wingman.logs import configure_logging

        level = "debug" if config.server.verbose else config.server.log_level
        listener = configure_logging(level, config.server.log_format, *_log_file(config))
        import asyncio

        from wingman.api.inference import read_start
        from wingman.lifecycle import serve

        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(serve(config, read_start(start) if start is not None else None, preload))
    finally:
        if preload is not None:
            preload.close()
        if listener is not None:
            listener.stop()


def _log_file(config: Config) -> tuple[Path | None, int]:
    """Where the log goes besides standard error, and how large a file of it grows."""
    n_bytes = config.control.log_file_size
    if not n_bytes or not has_control(config):
        return None, 0
    home = Home(config.server.home.expanduser())
    home.create()
    return home.logs / "wingman.log", n_bytes


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:  # not made for this platform
        return None
    return uvloop.new_event_loop


# -- parser ---------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """argparse that names the nearest flag of the same command when one is unknown."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse what is unknown here, where the flags that there are are known."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(word for word in unknown if word != '--')}")
        return parsed, unknown

    def error(self, message: str) -> Any:
        """End with status 2 and a message."""
        unknown = message.removeprefix("unrecognized arguments: ").split()[0]
        if message.startswith("unrecognized arguments: ") and unknown.startswith("-"):
            import difflib

            nearest = difflib.get_close_matches(unknown.split("=")[0], self._option_string_actions, 1)
            message = f"{unknown} is unknown" + (f"; did you mean {nearest[0]}?" if nearest else "")
        self.exit(2, f"wingman: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog="wingman",
        description="A server that runs large language models on your own machine.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"wingman {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    serve = commands.add_parser(
        "serve",
        help="run the server",
        usage="wingman serve [--starter | --model FILE.gguf] [flags]",
        description="Serve GGUF models through the OpenAI and llama.cpp APIs: those of the home folder, which "
        "/api and the other commands download, start and stop, or one file.",
        epilog="Every flag has a WINGMAN_<NAME> environment variable; the LLAMA_* names in brackets work too. "
        "A flag beats the environment, which beats the file of --config. Underscores equal dashes.",
        allow_abbrev=False,
        formatter_class=_wide_help,
    )
    serve.add_argument("--config", type=Path, metavar="FILE", help="TOML file with tables [model], [context], [sampling], [server] and [control] [env: WINGMAN_CONFIG]")  # fmt: skip  # noqa: E501
    for group_name, group in GROUPS.items():
        section = serve.add_argument_group(_TITLES[group_name])
        for record in dataclasses.fields(group):
            _add_flag(section, record)
    add_commands(commands)
    return parser


def _wide_help(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, max_help_position=38, width=110)


def _add_flag(section: Any, record: dataclasses.Field[Any]) -> None:
    option = option_of(record)
    settings: dict[str, Any] = {
        "dest": record.name,
        "default": argparse.SUPPRESS,
        "help": _help(record, option),
    }
    if option.is_switch:
        section.add_argument(*option.flags, action="store_true", **settings)
        negative = [f"--no-{flag[2:]}" for flag in option.flags if flag.startswith("--")]
        negative += option.off_flags
        if record.default:
            settings["help"] = argparse.SUPPRESS if not negative else f"turn off {option.flags[-1]}"
        else:
            settings["help"] = argparse.SUPPRESS
        section.add_argument(*negative, action="store_false", **settings)
        return
    if option.choices:
        settings["metavar"] = "{" + ",".join(option.choices) + "}"
    else:
        settings["metavar"] = option.metavar or "X"
    section.add_argument(*option.flags, action="append", type=str, **settings)


def _help(record: dataclasses.Field[Any], option: Option) -> str:
    names = ", ".join(_env_names(record.name, option))
    default = record.default
    if default is None or default == ():
        shown = ""
    elif isinstance(default, tuple):
        shown = f" (default: {','.join(map(str, default))!s})"
    elif option.is_switch:
        shown = f" (default: {'on' if default else 'off'})"
    else:
        shown = f" (default: {default})"
    return f"{option.help}{shown} [env: {names}]".replace("%", "%%").replace("\n", "\\n")


def _env_names(name: str, option: Option) -> tuple[str, ...]:
    return (f"WINGMAN_{name.upper()}", *option.env)


def _dashed(argument: str) -> str:
    """`--ctx_size=1` -> `--ctx-size=1`; values keep their underscores."""
    if not argument.startswith("--"):
        return argument
    name, separator, value = argument.partition("=")
    return name.replace("_", "-") + separator + value


def _drop_unused(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Arguments without llama-server's flags that mean nothing here, and those flags."""
    kept: list[str] = []
    ignored: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, has_value, _ = argument.partition("=")
        if name in _UNUSED_SWITCHES:
            ignored.append(name)
        elif name in _UNUSED_WITH_VALUE:
            ignored.append(name)
            if not has_value:
                next(rest, None)
        else:
            kept.append(argument)
    return kept, ignored


# -- values ---------------------------------------------------------------------------------------


def load_config(flags: Mapping[str, Any], environment: Mapping[str, str]) -> Config:
    """Config from parsed flags, environment and file; raises ConfigurationError naming what is wrong."""
    path = flags.get("config") or environment.get("WINGMAN_CONFIG")
    table = _read_file(Path(path)) if path else {}
    groups = {}
    for name, group in GROUPS.items():
        values = {}
        in_file = dict(table.pop(name, {}))
        for record in dataclasses.fields(group):
            found = _find(record, flags, environment, in_file)
            if found is not None:
                values[record.name] = found
        _refuse_leftovers(in_file, [record.name for record in dataclasses.fields(group)], f"[{name}]")
        groups[name] = group(**values)
        check_bounds(groups[name])
    _refuse_leftovers(table, list(GROUPS), "the configuration file")
    return Config(**groups)


def _find(
    record: dataclasses.Field[Any],
    flags: Mapping[str, Any],
    environment: Mapping[str, str],
    in_file: dict[str, Any],
) -> Any:
    option = option_of(record)
    from_file = in_file.pop(record.name, None)
    if record.name in flags:
        given = flags[record.name]
        return given if option.is_switch else _parse_all(given, option, option.flags[-1])
    for name in _env_names(record.name, option):
        if name in environment:
            return _parse_env(environment[name], option, name)
        negative = name.replace("LLAMA_ARG_", "LLAMA_ARG_NO_", 1)
        if option.is_switch and negative != name and negative in environment:
            return not _parse_env(environment[negative] or "1", option, negative)
    if from_file is None:
        return None
    if option.is_switch:
        if not isinstance(from_file, bool):
            raise ConfigurationError(f"{record.name} must be true or false")
        return from_file
    items = [str(item) for item in from_file] if isinstance(from_file, list) else [str(from_file)]
    return _parse_all(items if option.is_repeatable else [",".join(items)], option, record.name)


def _parse_env(text: str, option: Option, name: str) -> Any:
    if not option.is_switch:
        return _parse_all([text], option, name)
    if text.lower() in _TRUE | _FALSE:
        return text.lower() in _TRUE
    raise ConfigurationError(f"{name} must be on or off, not {text!r}")


def _parse_all(texts: Sequence[str], option: Option, name: str) -> Any:
    """The last value given, or all of them for a repeatable option."""
    if not option.is_repeatable:
        return _parse_one(texts[-1], option, name)
    return tuple(item for text in texts for item in _parse_one(text, option, name))


def _parse_one(text: str, option: Option, name: str) -> Any:
    if option.choices and text not in option.choices:
        raise ConfigurationError(f"{name} must be one of {', '.join(option.choices)}, not {text!r}")
    try:
        return option.parse(text)
    except ValueError:
        raise ConfigurationError(f"{name}: {text!r} is not a valid value") from None


def _read_file(path: Path) -> dict[str, Any]:
    import tomllib  # most have no such file

    try:
        return tomllib.loads(path.expanduser().read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"can't read {path}: {error}") from error


def _refuse_leftovers(table: Mapping[str, Any], known: list[str], where: str) -> None:
    for name in table:
        import difflib

        nearest = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise ConfigurationError(f"{name!r} is unknown in {where}{hint}")
