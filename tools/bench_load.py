"""A load of streaming completions over loopback and the numbers it gives.

The loop is closed: each client sends its next request when the last one has ended, so N clients
keep at most N requests in flight and a slow server is not buried under a queue. Each event is
only stamped with the time it came; JSON is read after the clock has stopped, so that the client
takes little of the processor it shares with the server. Three things are measured, all as a
client sees them: throughput (tokens of all clients per second of wall clock), time to first token
(from before connecting to the first event with text) and the gaps between events with text.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

T = TypeVar("T")

LOOPBACK: Final = "127.0.0.1"
"""The only address this load is ever sent to."""
_LINE_LIMIT: Final = 1 << 20
_CHUNK_LIMIT: Final = 1 << 24
_MAX_EVENTS: Final = 100_000
_BEGUN_EVENTS: Final = 8
"""Events after which a stream counts as well under way."""


class LoadFailure(Exception):
    """A server answered something that is no stream of completion events, or too late."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request and its answer as the client saw it; times in milliseconds, counts in tokens."""

    n_prompt: int
    n_tokens: int
    first_token_ms: float
    gaps_ms: tuple[float, ...]
    n_evaluated: int = 0
    """Prompt tokens the server computed, by its own count."""
    n_cached: int = 0
    """Prompt tokens it had already."""
    text: str = ""


@dataclass(frozen=True, slots=True)
class LevelRun:
    """What so many clients got at once; `wall_s` is from the first request to the end of the last."""

    n_clients: int
    wall_s: float
    exchanges: tuple[Exchange, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """A level in six numbers: tokens per second, milliseconds, MiB."""

    tokens_per_s: float
    first_p50_ms: float
    first_p95_ms: float
    gap_p50_ms: float
    gap_p95_ms: float
    rss_mib: float


Stamped = list[tuple[float, bytes]]
"""Data of events with the time each came, in seconds."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a server is asked for completions, and how its streams are read."""

    ready_path: str
    """Answers 200 as soon as the model is loaded."""
    path: str
    body: Callable[[str, int, bool], bytes]
    """From prompt, tokens to generate and whether the prompt may be cached."""
    read: Callable[[float, Stamped], Exchange]
    """From the time of the request, in seconds, and its events. Raises LoadFailure."""


# -- load ----------------------------------------------------------------------------------------


def run_level(
    port: int,
    prompts: Sequence[Sequence[str]],
    *,
    n_predict: int,
    cache_prompt: bool,
    timeout_s: float,
    dialect: Dialect | None = None,
) -> LevelRun:
    """Run one client for each list of prompts against a server on `port`, all at once.

    Raises LoadFailure when any request fails or all together take longer than `timeout_s` seconds.
    """
    dialect = dialect or NATIVE
    bodies = [[dialect.body(prompt, n_predict, cache_prompt) for prompt in own] for own in prompts]
    return play(_run_clients(port, bodies, dialect), timeout_s)


def play(scenario: Coroutine[Any, Any, T], timeout_s: float) -> T:
    """Run what clients do in a loop of its own and return its result.

    Raises LoadFailure when a request fails or all takes longer than `timeout_s` seconds.
    """
    return asyncio.run(_within(scenario, timeout_s))


async def _within(scenario: Coroutine[Any, Any, T], timeout_s: float) -> T:
    try:
        async with asyncio.timeout(timeout_s):
            return await scenario
    except TimeoutError:
        raise LoadFailure(f"the clients were not done after {timeout_s:.0f} s") from None
    except (OSError, EOFError, ValueError) as error:
        raise LoadFailure(f"the connection broke: {error!r}") from error


def request_body(prompt: str, n_predict: int, cache_prompt: bool) -> bytes:
    """JSON for POST /completion: greedy, streamed, exactly `n_predict` tokens long."""
    fields = {
        "prompt": prompt,
        "n_predict": n_predict,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "cache_prompt": cache_prompt,
    }
    return json.dumps(fields).encode()


async def _run_clients(port: int, bodies: Sequence[Sequence[bytes]], dialect: Dialect) -> LevelRun:
    started = time.perf_counter()
    answers = await asyncio.gather(*(_run_client(port, own, dialect.path) for own in bodies))
    wall_s = time.perf_counter() - started
    exchanges = tuple(dialect.read(*answer) for own in answers for answer in own)
    return LevelRun(len(bodies), wall_s, exchanges)


async def stream(port: int, body: bytes, begun: asyncio.Event | None = None) -> Exchange:
    """One request of a scenario; `begun` is set when its answer is well under way."""
    return read_exchange(*await _complete(port, body, NATIVE.path, begun))


async def _run_client(port: int, bodies: Sequence[bytes], path: str) -> list[tuple[float, Stamped]]:
    return [await _complete(port, body, path) for body in bodies]


async def _complete(
    port: int, body: bytes, path: str, begun: asyncio.Event | None = None
) -> tuple[float, Stamped]:
    """When the request began, in seconds, and its events."""
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection(LOOPBACK, port, limit=_LINE_LIMIT)
    try:
        writer.write(_head(port, path, len(body)) + body)
        await writer.drain()
        is_chunked = await _read_head(reader)
        events = []
        async for data in _events(_pieces(reader, is_chunked=is_chunked)):
            events.append((time.perf_counter(), data))
            if begun is not None and len(events) == _BEGUN_EVENTS:
                begun.set()
            if len(events) > _MAX_EVENTS:
                raise LoadFailure(f"the stream has more than {_MAX_EVENTS} events")
        return started, events
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _head(port: int, path: str, length: int) -> bytes:
    lines = (
        f"POST {path} HTTP/1.1",
        f"Host: {LOOPBACK}:{port}",
        "Content-Type: application/json",
        f"Content-Length: {length}",
        "Connection: close",
    )
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode()


async def _read_head(reader: asyncio.StreamReader) -> bool:
    """Whether the body is chunked. Raises LoadFailure with the answer when it is not a 200."""
    status_line = await reader.readline()
    is_chunked = False
    while line := (await reader.readline()).strip().lower():
        name, _, value = line.partition(b":")
        is_chunked = is_chunked or (name == b"transfer-encoding" and value.strip() == b"chunked")
    if status_line.split(b" ")[1:2] != [b"200"]:
        text = (status_line + await reader.read(1000)).decode("utf-8", "replace")
        raise LoadFailure(f"the server answered {text!r}")
    return is_chunked


async def _pieces(reader: asyncio.StreamReader, *, is_chunked: bool) -> AsyncIterator[bytes]:
    """The body as it comes. Raises ValueError or EOFError when it is cut off or no valid HTTP."""
    if not is_chunked:
        while piece := await reader.read(_LINE_LIMIT):
            yield piece
        return
    while size := int((await reader.readline()).split(b";")[0], 16):
        if not 0 < size <= _CHUNK_LIMIT:
            raise ValueError(f"a chunk of {size} bytes")
        yield await reader.readexactly(size)
        await reader.readexactly(2)


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Data of Server-Sent Events of one line each; comments and other fields are skipped."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def read_exchange(started: float, events: Stamped) -> Exchange:
    """The measurements of one answer. Raises LoadFailure when it reports an error or has no end."""
    texts: list[tuple[float, str]] = []
    last: dict[str, Any] = {}
    for came, data in events:
        last = read_event(data)
        if last.get("content"):
            texts.append((came, last["content"]))
    if not last.get("stop"):
        raise LoadFailure(f"the stream ended early, with {last}")
    if not texts:
        raise LoadFailure("the stream has no text")
    stamps = [came for came, _ in texts]
    timings = last.get("timings", {})
    return Exchange(
        n_prompt=last["tokens_evaluated"],
        n_tokens=last["tokens_predicted"],
        first_token_ms=(stamps[0] - started) * 1e3,
        gaps_ms=tuple((after - before) * 1e3 for before, after in itertools.pairwise(stamps)),
        n_evaluated=timings.get("prompt_n", 0),
        n_cached=timings.get("cache_n", 0),
        text="".join(text for _, text in texts),
    )


def read_event(data: bytes) -> dict[str, Any]:
    """The JSON object of an event. Raises LoadFailure when it is none, or reports an error."""
    try:
        event = json.loads(data)
    except ValueError:
        event = None
    if not isinstance(event, dict) or "error" in event:
        raise LoadFailure(f"the stream has {data[:1000]!r}")
    return event


NATIVE: Final = Dialect("/health", "/completion", request_body, read_exchange)
"""What Wingman and llama-server speak."""


# -- numbers -------------------------------------------------------------------------------------


def summarize(run: LevelRun, rss_mib: float) -> Summary:
    """The numbers of a level; `rss_mib` is the server's resident memory after it."""
    n_tokens = sum(exchange.n_tokens for exchange in run.exchanges)
    first = [exchange.first_token_ms for exchange in run.exchanges]
    gaps = [gap for exchange in run.exchanges for gap in exchange.gaps_ms]
    return Summary(
        tokens_per_s=n_tokens / run.wall_s,
        first_p50_ms=percentile(first, 0.5),
        first_p95_ms=percentile(first, 0.95),
        gap_p50_ms=percentile(gaps, 0.5),
        gap_p95_ms=percentile(gaps, 0.95),
        rss_mib=rss_mib,
    )


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the values lie, interpolated; NaN for no values."""
    if not values:
        return math.nan
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
