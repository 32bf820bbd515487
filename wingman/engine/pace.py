"""How many prompt tokens a step takes, so that who generates meanwhile is not kept waiting. Pure."""

from __future__ import annotations

MIN_PREFILL_TOKENS = 32
"""Least prompt tokens a step takes beside running generations, so that prompts always advance."""
UNMEASURED_PREFILL_TOKENS = 64
"""The same until the first prompt has shown how fast this machine is."""


class PrefillPace:
    """Follows the speed of prompt evaluation. Sizes in tokens, times in seconds."""

    def __init__(self, n_batch: int, n_ubatch: int, max_step_s: float) -> None:
        self._n_batch = n_batch
        self._n_ubatch = n_ubatch
        self._max_step_s = max_step_s
        self._rate = 0.0

    def observe(self, n_tokens: int, elapsed_s: float) -> None:
        """A step took so long; small ones tell nothing about prompts."""
        if n_tokens >= MIN_PREFILL_TOKENS and elapsed_s > 0:
            rate = n_tokens / elapsed_s
            self._rate = rate if not self._rate else 0.8 * self._rate + 0.2 * rate

    def budget(self, n_decoding: int) -> int:
        """Prompt tokens for a step that already has `n_decoding` tokens of generating sequences."""
        most = min(self._n_ubatch, self._n_batch - n_decoding)
        if not n_decoding:
            return most
        if not self._rate:
            return min(UNMEASURED_PREFILL_TOKENS, most)
        affordable = int(self._rate * self._max_step_s) - n_decoding
        return min(max(affordable, MIN_PREFILL_TOKENS), most)
