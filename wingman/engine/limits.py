"""The sizes a scheduler works within; plain data."""

from __future__ import annotations

from msgspec import Struct

from wingman.engine.cache import CacheLimits


class SchedulerLimits(Struct, frozen=True):
    """Sizes in tokens. `n_ctx_slot` bounds one sequence, `n_ctx_total` all of them when unified."""

    n_slots: int
    n_ctx_slot: int
    n_ctx_total: int
    n_batch: int
    n_ubatch: int
    max_step_s: float = 0.25
    similarity: float = 0.1
    is_unified: bool = False
    shifts_context: bool = False
    adds_bos: bool = False
    can_rollback: bool = True
    """Whether the cache can forget its last tokens (recurrent and sliding-window models can't)."""
    n_window: int = 0
    """A sequence up to this long can forget its last tokens even so."""
    parked_bytes: int = 0
    """Budget for sequences kept in host memory."""
    min_shared: int = 16
    """Fewer tokens are computed again rather than copied, kept or waited for."""
    can_compute_aside: bool = False
    """Whether long prompts can be computed outside their slots."""

    @property
    def cache(self) -> CacheLimits:
        """What of it concerns the cache."""
        return CacheLimits(
            n_slots=self.n_slots,
            n_total=self.n_ctx_total,
            is_unified=self.is_unified,
            can_cut=self.can_rollback,
            n_window=self.n_window,
            similarity=self.similarity,
            parked_bytes=self.parked_bytes,
            min_shared=self.min_shared,
        )
