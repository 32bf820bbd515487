"""Slots and counters -> the frozen Snapshot that the loop reads. Pure; engine thread."""

from __future__ import annotations

from wingman.engine.cache import KvCache
from wingman.engine.occupancy import Occupancy
from wingman.engine.slots import Slot
from wingman.engine.stats import EngineStats
from wingman.engine.types import SlotView, Snapshot


def snapshot_of(cache: KvCache, occupancy: Occupancy, n_waiting: int, stats: EngineStats) -> Snapshot:
    """The engine at the end of a step; a few microseconds."""
    return Snapshot(
        slots=tuple(_view(slot) for slot in cache.slots),
        n_waiting=n_waiting,
        n_steps=stats.n_steps,
        n_busy_slots_total=stats.n_busy_slots_total,
        prompt_tokens_total=stats.prompt_tokens,
        prompt_tokens_cached_total=stats.prompt_tokens_cached,
        prompt_seconds_total=stats.prompt_seconds,
        predicted_tokens_total=stats.predicted_tokens,
        predicted_seconds_total=stats.predicted_seconds,
        sample_seconds_total=stats.sample_seconds,
        n_preemptions_total=occupancy.n_preemptions,
        n_drafts_total=stats.n_drafts,
        draft_tokens_total=stats.draft_tokens,
        draft_tokens_accepted_total=stats.draft_tokens_accepted,
        parked_bytes=cache.parked.n_bytes,
        parked_budget_bytes=cache.parked.budget_bytes,
        n_parked=cache.parked.n_entries,
        n_tokens_max=stats.n_tokens_max,
        first_token=stats.first_token.view(),
        token_gap=stats.token_gap.view(),
        queue_wait=stats.queue_wait.view(),
    )


def _view(slot: Slot) -> SlotView:
    sequence = slot.last_sequence
    if sequence is None:
        return SlotView(slot.id, None, is_busy=False)
    return SlotView(
        id=slot.id,
        job_id=sequence.job.id,
        is_busy=not slot.is_idle,
        n_prompt=len(sequence.job.prompt),
        n_processed=sequence.n_processed - sequence.n_cached,
        n_cached=sequence.n_cached,
        n_decoded=len(sequence.output),
        n_held=len(slot.tokens),
        has_new_line=sequence.has_new_line,
        stop_type=sequence.stop_type,
        stopping_word=sequence.stopping_word,
    )
