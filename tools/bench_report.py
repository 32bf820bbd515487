"""The readings of a benchmark as text tables, as one Markdown table and as JSON.

Wingman's servers are compared with llama-server round by round: a round's two readings were taken
within a minute of each other, so that their ratio says more than the ratio of two medians. Reported
are the median of these ratios and the lowest and highest of them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final, TypeVar

import psutil

from tools.bench_load import Exchange
from tools.bench_servers import LLAMA_SERVER, WINGMAN, Settings
from tools.bench_workloads import WORKLOADS, Workload

T = TypeVar("T")
Numbers = Mapping[str, float]

_NOTES: Final = (
    "TTFT (time to first token) and gap (between tokens) in ms, RSS in MiB with the mapped model",
    "ratio: a server by llama-server, median and lowest-highest of the rounds",
)


@dataclass(frozen=True, slots=True)
class Column:
    """How a number is called in tables, and whether more of it is better."""

    title: str
    is_more_better: bool = False


COLUMNS: Final[Mapping[str, Column]] = {
    "tokens_per_s": Column("tok/s", is_more_better=True),
    "requests_per_s": Column("requests/s", is_more_better=True),
    "inputs_per_s": Column("inputs/s", is_more_better=True),
    "together_share": Column("share", is_more_better=True),
    "alone_per_s": Column("alone tok/s", is_more_better=True),
    "n_evaluated": Column("evaluated"),
    "n_cached": Column("cached", is_more_better=True),
    "first_p50_ms": Column("TTFT p50"),
    "first_p95_ms": Column("TTFT p95"),
    "gap_p50_ms": Column("gap p50"),
    "gap_p95_ms": Column("gap p95"),
    "gap_max_ms": Column("worst gap"),
    "ready_ms": Column("ready ms"),
    "rss_mib": Column("RSS"),
}


@dataclass(frozen=True, slots=True)
class Reading:
    """One server under one workload with so many clients in one round."""

    model: str
    workload: str
    server: str
    round: int
    n_clients: int
    numbers: Numbers
    exchanges: tuple[Exchange, ...] = ()


# -- numbers ----------------------------------------------------------------------------------------


def median_round(rounds: Sequence[Numbers], column: str) -> Numbers:
    """The round with the median of a column, the worse of the two middle ones if their number is even."""
    return _ranked(rounds, column)[(len(rounds) - 1) // 2]


def best_round(rounds: Sequence[Numbers], column: str) -> Numbers:
    """The round with the best value of a column."""
    return _ranked(rounds, column)[-1]


def _ranked(rounds: Sequence[Numbers], column: str) -> list[Numbers]:
    return sorted(rounds, key=lambda numbers: numbers[column], reverse=not COLUMNS[column].is_more_better)


def ratios(done: Sequence[Reading], server: str, n_clients: int, column: str) -> list[float]:
    """A server's value by llama-server's, of each round that both have finished; NaN where the latter is 0."""
    values = {(r.server, r.round): r.numbers[column] for r in done if r.n_clients == n_clients}
    pairs = [
        (value, values[LLAMA_SERVER, number])
        for (name, number), value in values.items()
        if name == server and (LLAMA_SERVER, number) in values
    ]
    return [ours / theirs if theirs else math.nan for ours, theirs in pairs]


def chosen_round(
    done: Sequence[Reading], choose: Callable[[Sequence[Numbers], str], Numbers], column: str
) -> dict[tuple[int, str], Numbers]:
    """By clients and server, the numbers of the round that is chosen."""
    rounds: dict[tuple[int, str], list[Numbers]] = {}
    for reading in done:
        rounds.setdefault((reading.n_clients, reading.server), []).append(reading.numbers)
    return {key: choose(some, column) for key, some in rounds.items()}


# -- text -------------------------------------------------------------------------------------------


def format_report(name: str, settings: Settings, done: Sequence[Reading]) -> str:
    """Everything a person wants to read about one workload and model; `done` must not be empty."""
    workload = WORKLOADS[name]
    rank = COLUMNS[workload.columns[0]].title
    n_rounds = len({reading.round for reading in done})
    return "\n".join(
        [
            *_headline(name, workload, settings, done),
            *_NOTES,
            "",
            f"Median round of {n_rounds} by {rank}:",
            format_table(done, workload.columns, median_round),
            "",
            f"Best round of {n_rounds} by {rank}:",
            format_table(done, workload.columns, best_round, has_ratios=False),
        ]
    )


def _headline(name: str, workload: Workload, settings: Settings, done: Sequence[Reading]) -> list[str]:
    n_prompt = sorted(exchange.n_prompt for reading in done for exchange in reading.exchanges)
    n_prompt = [count for count in n_prompt if count]  # not every server tells
    sizes = f", prompts of {n_prompt[0]} to {n_prompt[-1]} tokens" if n_prompt else ""
    threads = settings.n_threads or "of their own choice"
    loaded = (
        "one server loaded at a time" if settings.is_isolated else "all servers loaded, one busy at a time"
    )
    return [
        f"{name}: {workload.about}",
        f"{settings.model.name}{sizes}, -n {settings.n_predict}, {settings.n_requests} requests per client",
        f"-c {settings.n_ctx} -np {settings.n_slots}, threads {threads}, {loaded}",
    ]


def format_table(
    done: Sequence[Reading],
    columns: Sequence[str],
    choose: Callable[[Sequence[Numbers], str], Numbers],
    *,
    has_ratios: bool = True,
) -> str:
    """A row for each level and server of the round that `choose` picks by the first column, then what
    llama-server's rounds make of them."""
    chosen = chosen_round(done, choose, columns[0])
    rows = [("clients", "server", *(COLUMNS[column].title for column in columns))]
    for level in distinct(n_clients for n_clients, _ in chosen):
        names = [name for n_clients, name in chosen if n_clients == level]
        rows += [(str(level), name, *_numbers(chosen[level, name], columns)) for name in names]
        if has_ratios and LLAMA_SERVER in names:
            rivals = [name for name in names if name != LLAMA_SERVER]
            rows += [row for name in rivals for row in _ratio_rows(done, name, level, columns)]
    return _aligned(rows)


def _ratio_rows(
    done: Sequence[Reading], name: str, level: int, columns: Sequence[str]
) -> Iterator[tuple[str, ...]]:
    found = [ratios(done, name, level, column) for column in columns]
    mark = "" if name == WINGMAN else f" {name}"
    yield (str(level), f"ratio{mark}", *(_median(some) for some in found))
    yield (str(level), f"spread{mark}", *(_spread(some) for some in found))


def _numbers(numbers: Numbers, columns: Sequence[str]) -> list[str]:
    return [_number(numbers[column]) for column in columns]


def _number(value: float) -> str:
    return f"{value:.{3 if abs(value) < 10 else 1}f}"


def _median(some: Sequence[float]) -> str:
    return f"{median(some):.3f}" if some else "-"


def _spread(some: Sequence[float]) -> str:
    return f"{min(some):.2f}-{max(some):.2f}" if some else "-"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    widths[2:] = [max(width, 9) for width in widths[2:]]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index == 1 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def distinct(items: Iterable[T]) -> list[T]:
    """Each item once, in order."""
    return list(dict.fromkeys(items))


# -- Markdown and JSON ------------------------------------------------------------------------------

_TITLES: Final = ("workload", "model", "clients", "measure", "Wingman", "llama-server", "ratio", "spread")


def format_markdown(done: Sequence[Reading]) -> str:
    """One table of all workloads: medians of the rounds, the median ratio and its spread. A server that is
    neither Wingman nor llama-server stands in Wingman's column, with its name beside the workload's."""
    lines = [_line(_TITLES), _line("---" for _ in _TITLES)]
    for model, name in distinct((reading.model, reading.workload) for reading in done):
        own = [reading for reading in done if (reading.model, reading.workload) == (model, name)]
        lines += [_line(row) for row in _markdown_rows(model, name, own)]
    return "\n".join(lines) + "\n"


def _markdown_rows(model: str, name: str, own: Sequence[Reading]) -> Iterator[tuple[str, ...]]:
    workload = WORKLOADS[name]
    rivals = [server for server in distinct(reading.server for reading in own) if server != LLAMA_SERVER]
    for level in distinct(reading.n_clients for reading in own):
        for column in workload.columns[: workload.n_key]:
            for server in rivals:
                shown = name if server == WINGMAN else f"{name} ({server})"
                values = (middle(own, one, level, column) for one in (server, LLAMA_SERVER))
                found = ratios(own, server, level, column)
                numbers = ("-" if math.isnan(value) else _number(value) for value in values)
                title = COLUMNS[column].title
                yield (shown, model, str(level), title, *numbers, _median(found), _spread(found))


def middle(done: Sequence[Reading], server: str, n_clients: int, column: str) -> float:
    """The median of a number over a server's rounds; NaN when it has none."""
    found = [r.numbers[column] for r in done if (r.server, r.n_clients) == (server, n_clients)]
    return median(found) if found else math.nan


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def write_json(path: Path, settings: Settings, done: Sequence[Reading]) -> None:
    """Settings, machine and every number, also of each request. Raises OSError."""
    document = {
        "settings": dataclasses.asdict(settings) | {"model": settings.model.name},
        "machine": {
            "system": platform.system(),
            "architecture": platform.machine(),
            "cores": psutil.cpu_count(logical=False),
            "memory_mib": psutil.virtual_memory().total // 2**20,
        },
        "measurements": [dataclasses.asdict(reading) for reading in done],
    }
    path.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
