"""The candidates a native sampler chooses among, and the few that the likeliest are sure to be among.

Engine thread only. A llama_token_data_array over a large vocabulary takes longer to fill and to sort than
all the rest of a draw, and a chain that begins with top-k forgets nearly all of it.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from wingman.engine.llama.binding import lib, quick

_CANDIDATE: Final = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""llama_token_data."""
_QUICK_SIZE: Final = 2048
"""Candidates that a chain is through with in well under a millisecond."""
_N_ROWS: Final = 32
"""Logits in a group of `likeliest`; 16 to 64 take the same time at 50k to 262k tokens."""


def likeliest(logits: npt.NDArray[np.float32], n_wanted: int) -> npt.NDArray[np.intp]:
    """Ids of all logits that are not below some value: at least `n_wanted` and few more. Where fewer than that
    are above -inf, all of those and some others.

    The value is the n-th largest maximum of the groups that one pass makes: as many logits reach it.
    """
    width = len(logits) // _N_ROWS
    if n_wanted > width:
        return np.arange(len(logits))
    maxima = logits[: width * _N_ROWS].reshape(_N_ROWS, width).max(axis=0)
    least = np.partition(maxima, -n_wanted)[-n_wanted]
    if least > -math.inf:
        return np.flatnonzero(logits >= least)
    return np.union1d(np.arange(n_wanted), np.flatnonzero(logits > least))


class Candidates:
    """A llama_token_data_array with room for the whole vocabulary, allocated once and filled for each draw."""

    def __init__(self, n_vocab: int) -> None:
        self._ids = np.arange(n_vocab, dtype=np.int32)
        self._data = np.zeros(n_vocab, _CANDIDATE)
        self._pointer = ctypes.cast(self._data.ctypes.data, lib.llama_token_data_p)
        self._array: Any = lib.llama_token_data_array(data=self._pointer, size=0, selected=-1, sorted=False)

    @property
    def n_vocab(self) -> int:
        """Tokens of the vocabulary."""
        return len(self._ids)

    def fill(self, logits: npt.NDArray[np.float32]) -> None:
        """Start over from logits of shape (n_vocab,)."""
        self.start(self._ids, logits)

    def start(self, ids: npt.NDArray[Any], logits: npt.NDArray[np.float32] | float) -> None:
        """Start over from these tokens, each once, and their logits."""
        data, array = self._data[: len(ids)], self._array
        data["id"], data["logit"], data["p"] = ids, logits, 0
        array.data, array.size, array.selected, array.sorted = self._pointer, len(ids), -1, False

    def apply(self, sampler: Any) -> None:
        """Let a sampler narrow or choose."""
        library = quick if self._array.size <= _QUICK_SIZE else lib
        library.llama_sampler_apply(sampler, ctypes.byref(self._array))

    @property
    def left(self) -> npt.NDArray[Any]:
        """The candidates that samplers have left; some (XTC) move the start instead of the items."""
        address = ctypes.addressof(self._array.data.contents)
        start = (address - self._data.ctypes.data) // self._data.itemsize
        return self._data[start : start + self._array.size]

    @property
    def chosen(self) -> int:
        """Where in `left` a chain has chosen."""
        return int(self._array.selected)

    def has_tie(self, n_top: int) -> bool:
        """Whether two of the `n_top` + 1 largest logits left are equal: then which of them samplers take, and
        in which order, depends on all the others."""
        top = np.sort(self.left["logit"])[-n_top - 1 :]
        return bool(((top[1:] == top[:-1]) & (top[1:] > -math.inf)).any())
