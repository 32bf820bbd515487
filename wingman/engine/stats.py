"""Counters and latency histograms of the engine; mutable, owned by the engine thread.

The loop sees frozen copies in each Snapshot. Bounds follow Prometheus habits; the last bucket,
+Inf, is implicit.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

from wingman.engine.types import HistogramView

FIRST_TOKEN_BOUNDS_S: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKEN_GAP_BOUNDS_S: Final = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
QUEUE_WAIT_BOUNDS_S: Final = (0.001, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0)


class Histogram:
    """Observations in seconds, counted per bucket."""

    __slots__ = ("_bounds", "_counts", "_sum_s")

    def __init__(self, bounds_s: tuple[float, ...]) -> None:
        self._bounds = bounds_s
        self._counts = [0] * (len(bounds_s) + 1)
        self._sum_s = 0.0

    def observe(self, seconds: float) -> None:
        """Count one observation."""
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum_s += seconds

    def view(self) -> HistogramView:
        """A frozen copy, per bucket (not cumulated)."""
        return HistogramView(tuple(self._counts), self._sum_s)


class EngineStats:
    """Everything the engine counts."""

    __slots__ = (
        "draft_tokens",
        "draft_tokens_accepted",
        "first_token",
        "n_busy_slots_total",
        "n_drafts",
        "n_steps",
        "n_tokens_max",
        "predicted_seconds",
        "predicted_tokens",
        "prompt_seconds",
        "prompt_tokens",
        "prompt_tokens_cached",
        "queue_wait",
        "sample_seconds",
        "token_gap",
    )

    def __init__(self) -> None:
        self.n_steps = 0
        self.n_busy_slots_total = 0
        self.prompt_tokens = 0
        self.prompt_tokens_cached = 0
        self.prompt_seconds = 0.0
        self.predicted_tokens = 0
        self.predicted_seconds = 0.0
        self.sample_seconds = 0.0
        self.n_drafts = 0
        self.draft_tokens = 0
        self.draft_tokens_accepted = 0
        self.n_tokens_max = 0
        self.first_token = Histogram(FIRST_TOKEN_BOUNDS_S)
        self.token_gap = Histogram(TOKEN_GAP_BOUNDS_S)
        self.queue_wait = Histogram(QUEUE_WAIT_BOUNDS_S)
