"""Logits of the real model, to tell a rounding tie from a defect.

ggml's kernels for one token and for many round differently. Where a batched run chose another token
than a solo run, the two top logits must lie closer than that difference, measured here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from wingman.config import ContextConfig, ModelConfig
from wingman.engine.llama.binding import lib
from wingman.engine.llama.runner import LlamaRunner
from wingman.engine.runner import Batch, Chunk, KvRemove


class Logits:
    """A model of its own, asked about prefixes."""

    def __init__(self, model: Path) -> None:
        self._runner = LlamaRunner(ModelConfig(model=model), ContextConfig(ctx_size=2048, parallel=1))

    def close(self) -> None:
        self._runner.close()

    def _evaluate(self, tokens: Sequence[int], size: int) -> np.ndarray:
        context = self._runner._context
        context.edit_cache(KvRemove(0, 0))
        for start in range(0, len(tokens), size):
            part = tuple(tokens[start : start + size])
            (last,) = context.decode(Batch((), (), (Chunk(0, 1, part, start, wants_sample=True),), 0.0))
        pointer = lib.llama_get_logits_ith(context.handle, last)
        return np.ctypeslib.as_array(pointer, (self._runner.info.n_vocab,)).copy()

    def tie(self, tokens: Sequence[int]) -> tuple[float, float]:
        """(gap between the two top logits, largest rounding difference between the kernels)."""
        single = self._evaluate(tokens, 1)
        variants = [self._evaluate(tokens, size) for size in (len(tokens), 8, 3)]
        rounding = max(float(np.abs(single - other).max()) for other in variants)
        top = np.sort(single)[-2:]
        return float(top[1] - top[0]), rounding
