"""The benchmark's tables and its chart."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import pytest

from tools.bench_chart import format_chart, nice_step
from tools.bench_report import Reading, best_round, format_markdown, format_table, median_round, ratios
from tools.bench_serve import LLAMA_SERVER, WINGMAN

COLUMNS = ("tokens_per_s", "first_p50_ms")


def reading(server: str, number: int, n_clients: int, tokens_per_s: float, first_ms: float = 10.0) -> Reading:
    numbers = {"tokens_per_s": tokens_per_s, "first_p50_ms": first_ms}
    return Reading("m<1>.gguf", "unique", server, number, n_clients, numbers)


DONE = [
    reading(WINGMAN, 1, 1, 30.0),
    reading(WINGMAN, 1, 8, 80.0),
    reading(LLAMA_SERVER, 1, 1, 20.0),
    reading(LLAMA_SERVER, 1, 8, 100.0, 20.0),
    reading(WINGMAN, 2, 8, 120.0),
    reading(LLAMA_SERVER, 2, 8, 100.0, 20.0),
    reading("wingman-t1", 2, 8, 50.0),
]


def test_rounds_are_ranked_by_what_is_better() -> None:
    rounds = [{"tokens_per_s": value, "first_p50_ms": value} for value in (3.0, 1.0, 2.0, 4.0)]
    assert median_round(rounds[:3], "tokens_per_s") == rounds[2]
    assert median_round(rounds, "tokens_per_s") == rounds[2]
    assert best_round(rounds, "tokens_per_s") == rounds[3]
    assert best_round(rounds, "first_p50_ms") == rounds[1]


def test_ratios_are_of_rounds_that_both_have_finished() -> None:
    assert ratios(DONE, WINGMAN, 8, "tokens_per_s") == [0.8, 1.2]
    assert ratios(DONE, "wingman-t1", 8, "tokens_per_s") == [0.5]
    assert ratios(DONE[:1], WINGMAN, 1, "tokens_per_s") == []
    nothing = [reading(WINGMAN, 1, 1, 1.0), reading(LLAMA_SERVER, 1, 1, 0.0)]
    assert math.isnan(ratios(nothing, WINGMAN, 1, "tokens_per_s")[0])


def test_table() -> None:
    lines = format_table(DONE, COLUMNS, median_round).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.split() for line in lines] == [
        ["clients", "server", "tok/s", "TTFT", "p50"],
        ["1", WINGMAN, "30.0", "10.0"],
        ["1", LLAMA_SERVER, "20.0", "10.0"],
        ["1", "ratio", "1.500", "1.000"],
        ["1", "spread", "1.50-1.50", "1.00-1.00"],
        ["8", WINGMAN, "80.0", "10.0"],
        ["8", LLAMA_SERVER, "100.0", "20.0"],
        ["8", "wingman-t1", "50.0", "10.0"],
        ["8", "ratio", "1.000", "0.500"],
        ["8", "spread", "0.80-1.20", "0.50-0.50"],
        ["8", "ratio", "wingman-t1", "0.500", "0.500"],
        ["8", "spread", "wingman-t1", "0.50-0.50", "0.50-0.50"],
    ]


def test_alone_there_is_no_ratio() -> None:
    assert "ratio" not in format_table(DONE[:2], COLUMNS, median_round)


def test_markdown() -> None:
    lines = format_markdown(DONE).splitlines()
    assert {line.count("|") for line in lines} == {9}
    assert "| unique | m<1>.gguf | 8 | tok/s | 100.0 | 100.0 | 1.000 | 0.80-1.20 |" in lines
    assert "| unique (wingman-t1) | m<1>.gguf | 8 | TTFT p50 | 10.0 | 20.0 | 0.500 | 0.50-0.50 |" in lines
    assert "| unique | m<1>.gguf | 1 | tok/s | 30.0 | - | - | - |" in format_markdown(DONE[:1])


def test_chart_is_well_formed_and_inside_its_frame() -> None:
    root = ElementTree.fromstring(format_chart(DONE))
    width, height = (float(root.attrib[name]) for name in ("width", "height"))
    lines = [element for element in root if element.tag.endswith("polyline")]
    assert len(lines) == 6
    points = [
        tuple(map(float, point.split(","))) for line in lines for point in line.attrib["points"].split()
    ]
    assert all(0 < x < width and 0 < y < height for x, y in points)
    names = [element for element in root if element.text in (WINGMAN, LLAMA_SERVER, "wingman-t1")]
    heights = sorted(float(element.attrib["y"]) for element in names[:3])
    assert heights[1] - heights[0] >= 14
    assert heights[2] - heights[1] >= 14


def test_chart_of_one_reading() -> None:
    assert ElementTree.fromstring(format_chart(DONE[:1])) is not None


@pytest.mark.parametrize(
    ("least", "step"), [(0.0, 1.0), (math.nan, 1.0), (0.3, 0.5), (1.0, 1.0), (17.0, 20.0), (51.0, 100.0)]
)
def test_ticks_are_round(least: float, step: float) -> None:
    assert nice_step(least) == pytest.approx(step)
