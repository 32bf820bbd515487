"""What it costs to be watched: the same load with and without a thousand idle WebSocket clients.

One server; rounds of two turns, first nobody watching, then everybody, so that what the machine does meanwhile
hits both. What counts is the ratio of a round's two throughputs. Beside it: how late the server's loop is,
seen from outside as the latency of GET /live asked every 20 ms, and how many messages arrive. Watchers and
probe are processes of their own and cheap: frames are counted by their heads and dropped. The engine has one
thread by default, so that there is a core for everything else.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import http.client
import json
import multiprocessing
import os
import resource
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, Final

from tools.bench_load import LOOPBACK, LoadFailure, Summary, percentile, run_level, summarize
from tools.bench_prompts import make_prompts
from tools.bench_serve import WINGMAN, BenchFailure, Contender, RunningServer, Settings, running

PROBE_S: Final = 0.02
_CONNECT_AT_ONCE: Final = 50
_ANSWER_S: Final = 60.0
_PING: Final = 9
_PONG_HEAD: Final = 0x8A80
_SPAWN: Final = multiprocessing.get_context("spawn")


@dataclass(frozen=True, slots=True)
class Counts:
    """What all watchers together have received so far."""

    n_open: int = 0
    """Connections still there."""
    n_messages: int = 0
    n_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Turn:
    """The load once, watched by so many; lags in milliseconds."""

    round: int
    n_monitors: int
    n_left: int
    """Monitors that were still connected at the end."""
    summary: Summary
    lag_p50_ms: float
    lag_p99_ms: float
    lag_max_ms: float
    messages_per_s: float
    mb_per_s: float


# -- watchers, in a process of their own ------------------------------------------------------------


def read_frame(data: bytes, start: int) -> tuple[int, int, int] | None:
    """Opcode of the server's frame at `start`, and where its payload begins and ends; None when it is not
    all there (RFC 6455, 5.2)."""
    if len(data) < start + 2:
        return None
    length, begin = data[start + 1] & 0x7F, start + 2
    if length >= 126:
        form = "!H" if length == 126 else "!Q"
        begin += struct.calcsize(form)
        if len(data) < begin:
            return None
        (length,) = struct.unpack_from(form, data, start + 2)
    return None if len(data) < begin + length else (data[start] & 0x0F, begin, begin + length)


class Watcher(asyncio.Protocol):
    """One WebSocket client that only listens; `opened` is done after the handshake."""

    def __init__(self) -> None:
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.n_messages = 0
        self.n_bytes = 0
        self.is_open = False
        self._rest = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: Any) -> None:
        """Ask for the upgrade."""
        self._transport = transport
        key = base64.b64encode(os.urandom(16)).decode()
        transport.write(
            f"GET / HTTP/1.1\r\nHost: {LOOPBACK}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )

    def data_received(self, data: bytes) -> None:
        """Count frames, answer pings, drop the rest."""
        self.n_bytes += len(data)
        data = self._rest + data
        position = 0 if self.is_open else self._read_handshake(data)
        while self.is_open and (frame := read_frame(data, position)) is not None:
            opcode, begin, position = frame
            if opcode == _PING:
                self._answer(data[begin:position])
            else:
                self.n_messages += 1
        self._rest = data[position:]

    def connection_lost(self, error: Exception | None) -> None:
        """It is over; nobody connects again."""
        self.is_open = False
        if not self.opened.done():
            self.opened.set_exception(error or EOFError("a monitor was refused"))

    def _read_handshake(self, data: bytes) -> int:
        end = data.find(b"\r\n\r\n") + 4
        if end < 4 or self._transport is None:
            return 0
        if data.split(b" ", 2)[1] != b"101":
            self._transport.close()
            return 0
        self.is_open = True
        self.opened.set_result(None)
        return end

    def _answer(self, payload: bytes) -> None:
        assert self._transport is not None
        head = struct.pack("!HI", _PONG_HEAD | len(payload), 0)  # masked with zeros
        self._transport.write(head + payload)


def watch(port: int, n_monitors: int, pipe: Connection) -> None:
    """Main function of the watchers' process: connect, tell Counts, then again for each message; the end of
    `pipe` ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_watch(port, n_monitors, pipe))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not made for this platform
        return None
    return uvloop.new_event_loop


async def _watch(port: int, n_monitors: int, pipe: Connection) -> None:
    loop = asyncio.get_running_loop()
    try:
        watchers = await _connect(port, n_monitors)
    except (OSError, EOFError) as error:
        pipe.send(f"the monitors can't connect: {error!r}")
        return
    asked = asyncio.Event()
    loop.add_reader(pipe.fileno(), asked.set)
    while True:
        pipe.send(_count(watchers))
        await asked.wait()
        asked.clear()
        try:
            pipe.recv()
        except EOFError:
            return


async def _connect(port: int, n_monitors: int) -> list[Watcher]:
    loop = asyncio.get_running_loop()
    watchers: list[Watcher] = []
    for start in range(0, n_monitors, _CONNECT_AT_ONCE):
        n_now = min(_CONNECT_AT_ONCE, n_monitors - start)
        some = await asyncio.gather(*(loop.create_connection(Watcher, LOOPBACK, port) for _ in range(n_now)))
        await asyncio.gather(*(watcher.opened for _, watcher in some))
        watchers += [watcher for _, watcher in some]
    return watchers


def _count(watchers: Sequence[Watcher]) -> Counts:
    return Counts(
        sum(watcher.is_open for watcher in watchers),
        sum(watcher.n_messages for watcher in watchers),
        sum(watcher.n_bytes for watcher in watchers),
    )


# -- probe, in another ------------------------------------------------------------------------------


def probe(port: int, pipe: Connection) -> None:
    """Main function of the probe's process: ask GET /live every 20 ms until a message comes, then send the
    latencies in milliseconds. A question that is late because the one before took long counts as asked in time."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lags: list[float] = []
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=_ANSWER_S)
    try:
        _ask(connection)
        pipe.send("ready")
        due = time.perf_counter()
        while not pipe.poll(max(0.0, due - time.perf_counter())):
            _ask(connection)
            lags.append((time.perf_counter() - due) * 1e3)
            due += PROBE_S
        pipe.send(lags)
    except (OSError, http.client.HTTPException) as error:
        pipe.send(f"the server does not answer: {error!r}")
    finally:
        connection.close()


def _ask(connection: http.client.HTTPConnection) -> None:
    connection.request("GET", "/live")
    connection.getresponse().read()


@contextlib.contextmanager
def child(main: Callable[..., None], *arguments: Any) -> Iterator[Connection]:
    """Run a main function with `arguments` and a pipe, whose other end this is, in a process that ends with
    the block."""
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=main, args=(*arguments, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join(1)
        process.kill()
        process.join()


def hear(pipe: Connection) -> Any:
    """What a child says. Raises BenchFailure with its words when it has failed, or when it says nothing."""
    try:
        said = pipe.recv() if pipe.poll(_ANSWER_S) else "a child process does not answer"
    except EOFError:
        said = "a child process ended"
    if isinstance(said, str) and said != "ready":
        raise BenchFailure(said)
    return said


# -- turns ------------------------------------------------------------------------------------------


def take_turn(server: RunningServer, settings: Settings, number: int, n_monitors: int) -> Turn:
    """The load once, with so many watching. Raises BenchFailure."""
    (n_clients,) = settings.levels
    seed = f"{settings.seed}/{number}/{n_monitors}"
    prompts = make_prompts(seed, n_clients, settings.n_requests, settings.n_prompt_words)
    with child(watch, server.port, n_monitors) as watchers, child(probe, server.port) as prober:
        hear(watchers)
        hear(prober)
        before = _ask_counts(watchers)
        try:
            run = run_level(
                server.port,
                prompts,
                n_predict=settings.n_predict,
                cache_prompt=False,
                timeout_s=settings.level_timeout_s,
            )
        except LoadFailure as failure:
            raise BenchFailure(f"{failure}\n{server.log_tail()}") from failure
        after = _ask_counts(watchers)
        prober.send("stop")
        lags = hear(prober)
    return Turn(
        round=number,
        n_monitors=n_monitors,
        n_left=after.n_open,
        summary=summarize(run, server.rss_mib()),
        lag_p50_ms=percentile(lags, 0.5),
        lag_p99_ms=percentile(lags, 0.99),
        lag_max_ms=max(lags, default=0.0),
        messages_per_s=(after.n_messages - before.n_messages) / run.wall_s,
        mb_per_s=(after.n_bytes - before.n_bytes) / run.wall_s / 1e6,
    )


def _ask_counts(watchers: Connection) -> Counts:
    watchers.send("count")
    counts: Counts = hear(watchers)
    return counts


def measure(settings: Settings, n_monitors: int) -> list[Turn]:
    """All turns, nobody watching and everybody watching in alternation. Raises BenchFailure."""
    turns = []
    with (
        tempfile.TemporaryDirectory(prefix="bench-monitors-") as home,
        running(_contender(home, n_monitors), settings) as server,
    ):
        for number in range(1, settings.rounds + 1):
            for n_watching in (0, n_monitors):
                turns.append(take_turn(server, settings, number, n_watching))
                _say(_describe(turns[-1]))
    return turns


def _contender(home: str, n_monitors: int) -> Contender:
    flags = ("--home", home, "--control", "--single-port", "--offline", "--log-level", "warning")
    room = ("--max-monitors", str(n_monitors), "--max-connections", str(n_monitors + 256))
    return Contender(WINGMAN, (sys.executable, "-m", "wingman", "serve", *flags, *room))


# -- report -----------------------------------------------------------------------------------------

_COLUMNS: Final[tuple[tuple[str, Callable[[Turn], float]], ...]] = (
    ("tok/s", lambda turn: turn.summary.tokens_per_s),
    ("gap p95", lambda turn: turn.summary.gap_p95_ms),
    ("lag p50", lambda turn: turn.lag_p50_ms),
    ("lag p99", lambda turn: turn.lag_p99_ms),
    ("lag max", lambda turn: turn.lag_max_ms),
    ("msg/s", lambda turn: turn.messages_per_s),
    ("MB/s", lambda turn: turn.mb_per_s),
    ("RSS", lambda turn: turn.summary.rss_mib),
)


def ratios(turns: Sequence[Turn]) -> list[float]:
    """Throughput watched by throughput unwatched, of each round."""
    pairs = zip(turns[::2], turns[1::2], strict=True)
    return [watched.summary.tokens_per_s / alone.summary.tokens_per_s for alone, watched in pairs]


def format_report(settings: Settings, turns: Sequence[Turn]) -> str:
    """Everything a person wants to read."""
    own = ratios(turns)
    n_lost = sum(turn.n_monitors - turn.n_left for turn in turns)
    return "\n".join(
        [
            f"{settings.model.name}: {settings.levels[0]} clients, {settings.n_predict} tokens out, "
            f"{settings.n_requests} requests per client, -c {settings.n_ctx} -np {settings.n_slots} "
            f"-t {settings.n_threads}",
            "gap (between tokens) and lag (of GET /live) in ms, RSS in MiB with the mapped model",
            f"Medians of {settings.rounds} rounds:",
            _row("monitors", *(name for name, _ in _COLUMNS)),
            *(_medians([turn for turn in turns if turn.n_monitors == n]) for n in _kinds(turns)),
            f"ratio of tok/s, watched / unwatched: {median(own):.3f} "
            f"({', '.join(f'{one:.3f}' for one in own)}); {n_lost} monitors lost",
        ]
    )


def _kinds(turns: Sequence[Turn]) -> list[int]:
    return sorted({turn.n_monitors for turn in turns})


def _medians(turns: Sequence[Turn]) -> str:
    cells = (f"{median(read(turn) for turn in turns):.1f}" for _, read in _COLUMNS)
    return _row(str(turns[0].n_monitors), *cells)


def _row(first: str, *cells: str) -> str:
    return f"{first:>8}" + "".join(f"{cell:>10}" for cell in cells)


def _describe(turn: Turn) -> str:
    return (
        f"round {turn.round}, {turn.n_monitors} monitors: {turn.summary.tokens_per_s:.1f} tokens/s, "
        f"lag p99 {turn.lag_p99_ms:.1f} ms, {turn.messages_per_s:.0f} messages/s"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -- command line -----------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # unwinds, so children end
    try:
        settings = _read_settings(options)
        turns = measure(settings, options.monitors)
        print(format_report(settings, turns))
        if options.json is not None:
            document = {"ratios": ratios(turns), "turns": [dataclasses.asdict(turn) for turn in turns]}
            options.json.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    except (BenchFailure, OSError) as error:
        _say(f"bench_monitors: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _read_settings(options: argparse.Namespace) -> Settings:
    if not options.model.is_file():
        raise BenchFailure(f"{options.model} is not a file")
    return Settings(
        model=options.model.resolve(),
        n_ctx=512 * options.clients,
        n_slots=options.clients,
        n_threads=options.threads,
        levels=(options.clients,),
        rounds=options.rounds,
        n_requests=options.requests,
        n_predict=options.predict,
        n_prompt_words=20,
        cache_prompt=False,
        seed=0,
        is_isolated=False,
        level_timeout_s=300,
        start_timeout_s=120,
        max_time_s=3600,
    )


_COUNTS: Final = (
    ("--monitors", 1000, 20_000, "WebSocket clients that watch"),
    ("--clients", 8, 64, "clients that generate, and slots"),
    ("--threads", 1, 1024, "threads of the engine"),
    ("--rounds", 3, 100, "rounds of two turns"),
    ("--requests", 2, 1000, "requests of each client in a turn"),
    ("--predict", 128, 400, "tokens generated per request"),
)
"""Flag, default, largest value and help; the smallest value is 1."""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_monitors",
        description="Measure what WebSocket monitors cost a server that generates.",
    )
    parser.add_argument("-m", "--model", type=Path, required=True, metavar="FILE", help="GGUF file to load")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write the numbers of each turn")
    for flag, default, high, text in _COUNTS:
        shown = f"{text} (default: {default})"
        parser.add_argument(flag, type=_bounded(high), default=default, metavar="N", help=shown)
    return parser


def _bounded(high: int) -> Callable[[str], int]:
    """Parser of a whole number from 1 to `high`."""

    def parse(text: str) -> int:
        value = int(text)
        if not 1 <= value <= high:
            raise argparse.ArgumentTypeError(f"must be from 1 to {high}")
        return value

    parse.__name__ = "number"  # argparse shows it
    return parse


if __name__ == "__main__":
    raise SystemExit(main())
