"""How a turn of each workload is taken.

In a turn one server gets the load of one round at one number of clients, and numbers come back. The
prompts depend on round and clients and not on the server, so that all get the same. `bench_workloads`
has the table of workloads; which turns are taken, and when, is the business of `bench_serve`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import http.client
import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from tools.bench_load import (
    LOOPBACK,
    Exchange,
    LevelRun,
    LoadFailure,
    percentile,
    play,
    request_body,
    run_level,
    stream,
    summarize,
)
from tools.bench_prompts import copying_prompts, make_prompts, questions, shared_prompts
from tools.bench_servers import (
    BenchFailure,
    Contender,
    RunningServer,
    Settings,
    launched,
    plain_environment,
)

_N_TALKS: Final = 24
_N_TALK_TURNS: Final = 3
_LONG_WORDS: Final = 1500
_STREAM_TOKENS: Final = 192
_NEWCOMER_TOKENS: Final = 16
_SHORT_WORDS: Final = 10
_SHORT_TOKENS: Final = 8
_EMBEDDED_INPUTS: Final = 32
_EMBEDDED_WORDS: Final = 48
_HEALTH_POLL_S: Final = 0.005
_SETTLE_S: Final = 0.5
_DECODED_PROMPT: Final = 64
_WORDS_BYTES: Final = 2000


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn: the contender, its running servers (as many as the workload wants) and the load."""

    contender: Contender
    servers: tuple[RunningServer, ...]
    settings: Settings
    round: int
    n_clients: int

    @property
    def seed(self) -> str:
        """What the prompts depend on."""
        return f"{self.settings.seed}/round {self.round}/{self.n_clients}"

    @property
    def port(self) -> int:
        """The port of the first server."""
        return self.servers[0].port

    def body(self, prompt: str, n_predict: int = 0) -> bytes:
        """A request for `n_predict` tokens, by default those of the settings."""
        settings = self.settings
        return request_body(prompt, n_predict or settings.n_predict, settings.cache_prompt)

    def run(
        self, prompts: Sequence[Sequence[str]], n_predict: int = 0, server: RunningServer | None = None
    ) -> LevelRun:
        """A client for each list of prompts, all at once. Raises LoadFailure."""
        return run_level(
            (server or self.servers[0]).port,
            prompts,
            n_predict=n_predict or self.settings.n_predict,
            cache_prompt=self.settings.cache_prompt,
            timeout_s=self.settings.level_timeout_s,
            dialect=self.contender.dialect,
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a turn: numbers by the names of `bench_report.COLUMNS`, and each request."""

    numbers: Mapping[str, float]
    exchanges: tuple[Exchange, ...] = ()


# -- turns ------------------------------------------------------------------------------------------


def _complete(turn: Turn, prompts: Sequence[Sequence[str]], n_predict: int = 0) -> Outcome:
    run = turn.run(prompts, n_predict)
    numbers = dataclasses.asdict(summarize(run, turn.servers[0].rss_mib()))
    return Outcome(numbers | {"requests_per_s": len(run.exchanges) / run.wall_s}, run.exchanges)


def take_unique(turn: Turn) -> Outcome:
    """Distinct prompts."""
    settings = turn.settings
    return _complete(
        turn, make_prompts(turn.seed, turn.n_clients, settings.n_requests, settings.n_prompt_words)
    )


def take_shared(turn: Turn) -> Outcome:
    """One request of each client, all with the same long beginning."""
    return _complete(turn, [[prompt] for prompt in shared_prompts(turn.seed, turn.n_clients)])


def take_short(turn: Turn) -> Outcome:
    """Requests that are over soon."""
    prompts = make_prompts(turn.seed, turn.n_clients, turn.settings.n_requests, _SHORT_WORDS)
    return _complete(turn, prompts, _SHORT_TOKENS)


def take_repetitive(turn: Turn) -> Outcome:
    """Prompts whose answers stand in them."""
    return _complete(turn, copying_prompts(turn.seed, turn.n_clients, turn.settings.n_requests))


def take_neighbour(turn: Turn) -> Outcome:
    """Distinct prompts while another process wants a core."""
    with _busy_neighbour():
        return take_unique(turn)


@contextlib.contextmanager
def _busy_neighbour() -> Iterator[None]:
    code = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
    neighbour = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield
    finally:
        neighbour.kill()
        neighbour.wait()


def take_conversations(turn: Turn) -> Outcome:
    """Conversations that go on in turn, more than there are slots; each request holds all that was said."""
    started = time.perf_counter()
    exchanges = play(_talk(turn), turn.settings.level_timeout_s)
    wall_s = time.perf_counter() - started
    summary = summarize(LevelRun(turn.n_clients, wall_s, exchanges), turn.servers[0].rss_mib())
    evaluated = sum(exchange.n_evaluated for exchange in exchanges)
    cached = sum(exchange.n_cached for exchange in exchanges)
    numbers = dataclasses.asdict(summary) | {"n_evaluated": float(evaluated), "n_cached": float(cached)}
    return Outcome(numbers, exchanges)


async def _talk(turn: Turn) -> tuple[Exchange, ...]:
    said = [""] * _N_TALKS
    asked = questions(turn.seed, _N_TALKS, _N_TALK_TURNS)
    done: list[Exchange] = []

    async def client(waiting: deque[int], number: int) -> None:
        while waiting:
            talk = waiting.popleft()
            said[talk] += f"User: {asked[talk][number]}\nAssistant:"
            exchange = await stream(turn.port, turn.body(said[talk]))
            said[talk] += f"{exchange.text}\n"
            done.append(exchange)

    for number in range(_N_TALK_TURNS):
        waiting = deque(range(_N_TALKS))
        await asyncio.gather(*(client(waiting, number) for _ in range(turn.n_clients)))
    return tuple(done)


def take_long(turn: Turn) -> Outcome:
    """All clients but one stream when the last comes with a long prompt."""
    exchanges = play(_interrupt(turn), turn.settings.level_timeout_s)
    *streams, newcomer = exchanges
    gaps = [gap for exchange in streams for gap in exchange.gaps_ms]
    numbers = {"gap_max_ms": max(gaps), "gap_p95_ms": percentile(gaps, 0.95)}
    return Outcome(numbers | {"first_p50_ms": newcomer.first_token_ms}, exchanges)


async def _interrupt(turn: Turn) -> tuple[Exchange, ...]:
    n_streams = turn.n_clients - 1
    begun = [asyncio.Event() for _ in range(n_streams)]
    prompts = make_prompts(turn.seed, n_streams, 1, turn.settings.n_prompt_words)
    ((long,),) = make_prompts(f"{turn.seed}/long", 1, 1, _LONG_WORDS)

    async def newcomer() -> Exchange:
        for event in begun:
            await event.wait()
        return await stream(turn.port, turn.body(long, _NEWCOMER_TOKENS))

    streams = [
        stream(turn.port, turn.body(prompt, _STREAM_TOKENS), event)
        for (prompt,), event in zip(prompts, begun, strict=True)
    ]
    return tuple(await asyncio.gather(*streams, newcomer()))


def take_twomodels(turn: Turn) -> Outcome:
    """Two servers, first one alone, then both at once."""
    settings = turn.settings
    loads = [
        make_prompts(f"{turn.seed}/{number}", turn.n_clients, settings.n_requests, settings.n_prompt_words)
        for number in range(3)
    ]
    alone = _throughput(turn.run(loads[0]))
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(turn.run, loads[1:], (0, 0), turn.servers))
    together = sum(_throughput(run) for run in both)
    numbers = {"together_share": together / alone, "tokens_per_s": together, "alone_per_s": alone}
    return Outcome(numbers, tuple(exchange for run in both for exchange in run.exchanges))


def _throughput(run: LevelRun) -> float:
    return sum(exchange.n_tokens for exchange in run.exchanges) / run.wall_s


def take_embeddings(turn: Turn) -> Outcome:
    """Many inputs in one request, one request after the other."""
    batches = make_prompts(turn.seed, turn.settings.n_requests, _EMBEDDED_INPUTS, _EMBEDDED_WORDS)
    started = time.perf_counter()
    for inputs in batches:
        _embed(turn.servers[0], inputs, turn.settings)
    wall_s = time.perf_counter() - started
    return Outcome({"inputs_per_s": len(batches) * _EMBEDDED_INPUTS / wall_s})


def embed_once(server: RunningServer, settings: Settings) -> None:
    """Warm a server up with a few embeddings. Raises LoadFailure."""
    (inputs,) = make_prompts(f"{settings.seed}/warm-up", 1, 2, _EMBEDDED_WORDS)
    _embed(server, inputs, settings)


def _embed(server: RunningServer, inputs: Sequence[str], settings: Settings) -> None:
    connection = http.client.HTTPConnection(LOOPBACK, server.port, timeout=settings.level_timeout_s)
    body = json.dumps({"model": "any", "input": inputs})
    try:
        connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        if answer.status != 200 or len(json.loads(text)["data"]) != len(inputs):
            raise LoadFailure(f"the server answered {answer.status} {text[:1000]!r}")
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
        raise LoadFailure(f"no embeddings: {error!r}") from error
    finally:
        connection.close()


def take_start(turn: Turn) -> Outcome:
    """A start: from the birth of the process until it says that it is ready; its memory once it has settled."""
    started = time.perf_counter()
    with launched(turn.contender, turn.settings) as server:
        server.wait_ready(turn.settings.start_timeout_s, _HEALTH_POLL_S)
        ready_ms = (time.perf_counter() - started) * 1e3
        time.sleep(_SETTLE_S)
        return Outcome({"ready_ms": ready_ms, "rss_mib": server.rss_mib()})


def take_batched(turn: Turn) -> Outcome:
    """Sequences decoded together without a server, in a process of its own."""
    settings = turn.settings
    threads = ("-t", str(settings.n_threads)) if settings.n_threads else ()
    sizes = ("-npp", str(_DECODED_PROMPT), "-ntg", str(settings.n_predict), "-npl", str(turn.n_clients))
    command = [
        *turn.contender.decoder,
        "-m",
        str(settings.model),
        "-c",
        str(settings.n_ctx),
        *threads,
        *sizes,
    ]
    try:
        done = subprocess.run(
            [*command, "--output-format", "jsonl"],
            env=plain_environment(os.environ),
            capture_output=True,
            timeout=settings.level_timeout_s,
            check=True,
        )
        (result,) = (line for line in done.stdout.splitlines() if line.startswith(b"{"))
        return Outcome({"tokens_per_s": float(json.loads(result)["speed_tg"])})
    except (OSError, subprocess.SubprocessError, ValueError, LookupError) as error:
        words = (getattr(error, "stderr", None) or b"")[-_WORDS_BYTES:].decode("utf-8", "replace")
        raise BenchFailure(f"{turn.contender.name} does not decode: {error!r}\n{words}") from error
