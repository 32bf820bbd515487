"""Prometheus metrics: one Collector that reads the engine's snapshot when scraped.

Names are llama-server's (`llamacpp:`), so dashboards made for it work; the histograms are ours
(`wingman:`). Runs on the loop; a scrape costs no step anything.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Final

import psutil
from msgspec import Struct
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from wingman.engine.client import Engine
from wingman.engine.stats import FIRST_TOKEN_BOUNDS_S, QUEUE_WAIT_BOUNDS_S, TOKEN_GAP_BOUNDS_S
from wingman.engine.types import HistogramView, Snapshot

CONTENT_TYPE: Final = "text/plain; version=0.0.4"


class _Totals(Struct, frozen=True):
    """Token and second totals at a scrape; rates are averages since the previous one."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    predicted_tokens: int = 0
    predicted_seconds: float = 0.0


class EngineCollector(Collector):
    """Metrics of one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._previous = _Totals()
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def exposition(self) -> bytes:
        """The text of a scrape; it resets the averages, as llama-server's does."""
        text = generate_latest(self._registry)
        return text.replace(b"n_tokens_max_total", b"n_tokens_max")  # a counter by llama-server's word only

    def describe(self) -> Iterable[Metric]:
        """Nothing: `collect` is not called at registration."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """All metrics as of the engine's last step."""
        engine = self._engine
        snapshot = engine.snapshot
        yield from _counters(snapshot)
        yield from self._rates(snapshot)
        yield _gauge("requests_processing", "Requests that have a slot.", engine.n_running)
        yield _gauge("requests_deferred", "Requests that wait for a slot.", engine.n_waiting)
        busy = snapshot.n_busy_slots_total / snapshot.n_steps if snapshot.n_steps else 0.0
        yield _gauge("n_busy_slots_per_decode", "Average busy slots per llama_decode call.", busy)
        held = sum(slot.n_held for slot in snapshot.slots)
        share = min(1.0, held / engine.info.n_ctx_total)  # what slots share counts for each
        yield _gauge("kv_cache_usage_ratio", "Share of the KV cache in use.", share)
        yield _gauge("kv_cache_tokens", "Tokens in the KV cache.", held)
        yield from _threads(snapshot)
        yield from _prefixes(snapshot)
        yield from _histograms(snapshot)

    def _rates(self, snapshot: Snapshot) -> Iterable[Metric]:
        now = _Totals(
            snapshot.prompt_tokens_total,
            snapshot.prompt_seconds_total,
            snapshot.predicted_tokens_total,
            snapshot.predicted_seconds_total,
        )
        before, self._previous = self._previous, now
        prompt_s = now.prompt_seconds - before.prompt_seconds
        predicted_s = now.predicted_seconds - before.predicted_seconds
        prompt = (now.prompt_tokens - before.prompt_tokens) / prompt_s if prompt_s > 0 else 0.0
        predicted = (now.predicted_tokens - before.predicted_tokens) / predicted_s if predicted_s > 0 else 0.0
        yield _gauge("prompt_tokens_seconds", "Average prompt throughput in tokens/s.", prompt)
        yield _gauge("predicted_tokens_seconds", "Average generation throughput in tokens/s.", predicted)


def _counters(snapshot: Snapshot) -> Iterable[Metric]:
    for name, text, value in (
        (
            "prompt_tokens_total",
            "Prompt tokens processed, without reused ones.",
            snapshot.prompt_tokens_total,
        ),
        ("prompt_tokens_cached_total", "Prompt tokens reused.", snapshot.prompt_tokens_cached_total),
        ("prompt_seconds_total", "Prompt process time.", snapshot.prompt_seconds_total),
        ("tokens_predicted_total", "Generated tokens.", snapshot.predicted_tokens_total),
        ("tokens_predicted_seconds_total", "Generation time.", snapshot.predicted_seconds_total),
        ("n_decode_total", "llama_decode calls.", snapshot.n_steps),
        ("n_tokens_max", "Largest number of tokens a slot held.", snapshot.n_tokens_max),
        ("spec_decode_num_draft_tokens_total", "Draft tokens proposed.", snapshot.draft_tokens_total),
        (
            "spec_decode_num_accepted_tokens_total",
            "Draft tokens accepted.",
            snapshot.draft_tokens_accepted_total,
        ),
        ("spec_decode_num_drafts_total", "Drafts made.", snapshot.n_drafts_total),
    ):
        yield CounterMetricFamily(f"llamacpp:{name}", text, value)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"llamacpp:{name}", text, value)


def _prefixes(snapshot: Snapshot) -> Iterable[Metric]:
    """What is kept in host memory, and how often a full pool took a sequence's room."""
    for name, text, value in (
        ("parked_bytes", "Host memory taken by sequences that left their slot.", snapshot.parked_bytes),
        ("parked_bytes_limit", "Most of it (--cache-ram).", snapshot.parked_budget_bytes),
        ("parked_sequences", "Sequences kept there.", snapshot.n_parked),
    ):
        yield GaugeMetricFamily(f"wingman:{name}", text, value)
    yield CounterMetricFamily(
        "wingman:preemptions_total",
        "Times that a sequence gave its room in a full cache to older ones.",
        snapshot.n_preemptions_total,
    )


def _threads(snapshot: Snapshot) -> Iterable[Metric]:
    gauge = GaugeMetricFamily("wingman:threads", "Threads of the last step.", labels=["phase"])
    for phase, count in snapshot.threads:
        gauge.add_metric([phase], count)
    yield gauge
    name, text = "wingman:thread_changes_total", "Times that another count turned out faster."
    yield CounterMetricFamily(name, text, snapshot.thread_changes_total)


def _histograms(snapshot: Snapshot) -> Iterable[Metric]:
    for name, text, bounds, view in (
        (
            "time_to_first_token_seconds",
            "Arrival to first token.",
            FIRST_TOKEN_BOUNDS_S,
            snapshot.first_token,
        ),
        ("inter_token_gap_seconds", "Time between two tokens.", TOKEN_GAP_BOUNDS_S, snapshot.token_gap),
        ("queue_wait_seconds", "Arrival to slot.", QUEUE_WAIT_BOUNDS_S, snapshot.queue_wait),
    ):
        if view is not None:
            yield HistogramMetricFamily(
                f"wingman:{name}", text, buckets=_cumulated(bounds, view), sum_value=view.sum_s
            )


def _cumulated(bounds: Sequence[float], view: HistogramView) -> list[tuple[str, float]]:
    buckets = []
    total = 0
    for bound, count in zip((*map(str, bounds), "+Inf"), view.counts, strict=True):
        total += count
        buckets.append((bound, float(total)))
    return buckets


def process_start_time() -> int:
    """When this process began, in Unix seconds."""
    try:
        return int(psutil.Process().create_time())
    except psutil.Error:
        return int(time.time())
