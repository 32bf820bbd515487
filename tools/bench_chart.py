"""The curves of a benchmark as an SVG file: throughput and time to first token over clients.

Made by hand, so that it needs no library, and for pages of any background: nothing is filled, and
colours follow the reader's preference. Servers differ in colour, dash and name beside the line.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import escape

from tools.bench_report import Reading, distinct, middle

_PANELS: Final = (
    ("tokens_per_s", "Tokens per second, more is better"),
    ("first_p50_ms", "Time to first token in ms (median), less is better"),
)
_WIDTH: Final = 460
_HEIGHT: Final = 280
_LEFT: Final = 52
_RIGHT: Final = 124
_TOP: Final = 44
_BOTTOM: Final = 40
_LABEL_GAP: Final = 15
_N_TICKS: Final = 5
_INKS: Final = (
    ("#0550ae", "#79c0ff", "none"),
    ("#bc4c00", "#ffa657", "6 3"),
    ("#116329", "#7ee787", "2 3"),
    ("#6639ba", "#d2a8ff", "9 3 2 3"),
)
"""Of each server the colour on light and on dark ground, and the dashes of its line."""


@dataclass(frozen=True, slots=True)
class Panel:
    """A pair of axes: `lines` holds, by server, the value at each number of clients."""

    title: str
    lines: Mapping[str, Mapping[int, float]]
    left: float

    @property
    def levels(self) -> list[int]:
        """Numbers of clients that have a tick."""
        return sorted({level for line in self.lines.values() for level in line})

    @property
    def ticks(self) -> list[float]:
        """Values that have a tick, from 0 to above the highest."""
        highest = max((value for line in self.lines.values() for value in line.values()), default=0.0)
        step = nice_step(highest / _N_TICKS)
        return [number * step for number in range(math.ceil(highest / step) + 1)]

    def x(self, level: int) -> float:
        """Where so many clients are."""
        share = (level - self.levels[0]) / max(1, self.levels[-1] - self.levels[0])
        return self.left + _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        """Where a value is."""
        return _HEIGHT - _BOTTOM - value / (self.ticks[-1] or 1.0) * (_HEIGHT - _TOP - _BOTTOM)


def nice_step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not below `least`; 1 for nothing."""
    if not 0 < least < math.inf:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def format_chart(done: Sequence[Reading]) -> str:
    """An SVG document of two panels with a line for each server: the medians of the rounds."""
    names = distinct(reading.server for reading in done)
    panels = [
        Panel(title, {name: _line(done, name, column) for name in names}, number * _WIDTH)
        for number, (column, title) in enumerate(_PANELS)
    ]
    width = _WIDTH * len(panels)
    about = escape(f"{', '.join(names)} with {done[0].model}: medians over clients at once")
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_HEIGHT}" width="{width}" '
        f'height="{_HEIGHT}" role="img" font-family="system-ui, sans-serif" font-size="12">',
        f"<title>{about}</title>",
        f"<style>{_style()}</style>",
        *(line for panel in panels for line in _draw(panel)),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _line(done: Sequence[Reading], name: str, column: str) -> dict[int, float]:
    levels = sorted({reading.n_clients for reading in done if reading.server == name})
    return {level: middle(done, name, level, column) for level in levels}


def _style() -> str:
    light, dark = (
        "".join(
            f".s{number}{{stroke:{ink[side]}}}.t{number}{{fill:{ink[side]}}}"
            for number, ink in enumerate(_INKS)
        )
        for side in (0, 1)
    )
    dashes = "".join(f".s{number}{{stroke-dasharray:{ink[2]}}}" for number, ink in enumerate(_INKS))
    return (
        f"text{{fill:#1f2328}}.grid{{stroke:#8c959f;stroke-opacity:.4}}.s{{fill:none;stroke-width:2}}{dashes}"
        f"{light}@media(prefers-color-scheme:dark){{text{{fill:#e6edf3}}{dark}}}"
    )


def _draw(panel: Panel) -> Iterator[str]:
    right = panel.left + _WIDTH - _RIGHT
    yield f'<text x="{panel.left + 8:.0f}" y="20" font-weight="600">{escape(panel.title)}</text>'
    for tick in panel.ticks:
        y = panel.y(tick)
        yield f'<line class="grid" x1="{panel.left + _LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{panel.left + _LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
    for level in panel.levels:
        yield f'<text x="{panel.x(level):.1f}" y="{_HEIGHT - 22}" text-anchor="middle">{level}</text>'
    middle_x = (panel.left + _LEFT + right) / 2
    yield f'<text x="{middle_x:.1f}" y="{_HEIGHT - 6}" text-anchor="middle">clients</text>'
    yield from _curves(panel)


def _curves(panel: Panel) -> Iterator[str]:
    heights = _label_heights([panel.y(line[max(line)]) for line in panel.lines.values()])
    for number, (name, line) in enumerate(panel.lines.items()):
        ink = number % len(_INKS)
        points = [(panel.x(level), panel.y(value)) for level, value in line.items()]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        yield f'<polyline class="s s{ink}" points="{path}"/>'
        for x, y in points:
            yield f'<circle class="t{ink}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
        x = points[-1][0] + 8
        yield f'<text class="t{ink}" x="{x:.1f}" y="{heights[number] + 4:.1f}">{escape(name)}</text>'


def _label_heights(wanted: Sequence[float]) -> list[float]:
    """The heights nearest to those wanted at which no two names overlap, pushed down from the top."""
    placed = dict.fromkeys(range(len(wanted)), 0.0)
    lowest = -math.inf
    for number in sorted(placed, key=lambda number: wanted[number]):
        lowest = placed[number] = max(wanted[number], lowest + _LABEL_GAP)
    return list(placed.values())
