"""How many prompt tokens a step takes, so that who generates meanwhile is not kept waiting. Pure.

Attention over a long context is computed in tiles of 64 queries where there are so many, else at half the
speed (ggml_fa_tile_config). So beside others a prompt takes whole tiles, and one token more: the first one
is computed together with those of the others (llama_batch_allocr::split_equal).
"""

from __future__ import annotations

TILE_TOKENS = 64
"""Pieces of prompts come in multiples of this, and take one of it until the speed is known."""
MIN_MEASURED_TOKENS = 32
"""Smaller steps tell nothing about the speed of prompts."""
SLOW_PREFILL_TOKENS = 32
"""Least prompt tokens of a step, where a tile takes more than three times as long as a step may."""


TURN_SHARE = 1 / 6
"""Share of the time that others have for their steps while a prompt is computed aside."""
BUSY_TURN_SHARE = 2 / 3
"""The same while those steps evaluate prompts too, which are shorter."""
MIN_STRETCH_S = 0.02
"""It goes on for at least so long, so that looking for others costs nothing."""


class PrefillPace:
    """Follows the speed of prompt evaluation. Sizes in tokens, times in seconds."""

    def __init__(self, n_batch: int, n_ubatch: int, max_step_s: float) -> None:
        self._n_batch = n_batch
        self._n_ubatch = n_ubatch
        self._max_step_s = max_step_s
        self._rate = 0.0

    def observe(self, n_tokens: int, elapsed_s: float) -> None:
        """A step took so long; small ones tell nothing about prompts."""
        if n_tokens >= MIN_MEASURED_TOKENS and elapsed_s > 0:
            rate = n_tokens / elapsed_s
            self._rate = rate if not self._rate else 0.8 * self._rate + 0.2 * rate

    def budget(self, n_decoding: int) -> int:
        """Prompt tokens for a step that already has `n_decoding` tokens of generating sequences."""
        most = min(self._n_ubatch, self._n_batch - n_decoding)
        if not n_decoding:
            return most
        affordable = int(self._rate * self._max_step_s) - n_decoding
        is_slow = self._rate and 3 * affordable < TILE_TOKENS
        return min(SLOW_PREFILL_TOKENS if is_slow else max(affordable, TILE_TOKENS + 1), most)


def stretch_s(turn_s: float, max_step_s: float, *, is_busy: bool = False) -> float:
    """How long to compute a prompt aside before others have their turn again, when the last one took `turn_s`, and,
    if `is_busy`, left prompts to evaluate."""
    share = BUSY_TURN_SHARE if is_busy else TURN_SHARE
    return min(max(turn_s * (1 / share - 1), MIN_STRETCH_S), max_step_s)


def piece_of(n_left: int, budget: int, *, is_first: bool) -> int:
    """How much of a prompt with `n_left` tokens to take: all, or whole tiles and one; less only of the first
    prompt of a step."""
    n_tiles = (budget - 1) // TILE_TOKENS
    if n_left <= budget or (is_first and not n_tiles):
        return min(n_left, budget)
    return n_tiles * TILE_TOKENS + 1 if n_tiles > 0 else 0
