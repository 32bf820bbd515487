"""A llama_batch of tokens, written again for each step.

Its arrays are allocated once and seen through numpy, so that filling them costs a few microseconds
whatever their length. Engine thread only.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from wingman.engine.llama.binding import lib


class TokenBatch:
    """Up to `size` tokens, each of one sequence."""

    def __init__(self, size: int) -> None:
        self._token = np.zeros(size, np.int32)
        self._position = np.zeros(size, np.int32)
        self._sequence = np.zeros(size, np.int32)
        self._n_sequences = np.ones(size, np.int32)
        self._wants_output = np.zeros(size, np.int8)
        self._n_tokens = 0
        address = self._sequence.ctypes.data
        pointer = ctypes.POINTER(lib.llama_seq_id)
        self._sequence_pointers = (pointer * size)(
            *(ctypes.cast(address + 4 * index, pointer) for index in range(size))
        )
        self._batch = lib.llama_batch(
            n_tokens=0,
            token=self._token.ctypes.data_as(ctypes.POINTER(lib.llama_token)),
            embd=None,
            pos=self._position.ctypes.data_as(ctypes.POINTER(lib.llama_pos)),
            n_seq_id=self._n_sequences.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            seq_id=self._sequence_pointers,
            logits=self._wants_output.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def clear(self) -> None:
        """Start over."""
        self._n_tokens = 0

    def add(
        self,
        tokens: Sequence[int],
        position: int,
        sequence: int,
        *,
        wants_output: bool = False,
        wants_all: bool = False,
    ) -> int:
        """Append tokens of a sequence at consecutive positions, asking for the output of the last one or of
        all; the batch index of the last."""
        start, end = self._n_tokens, self._n_tokens + len(tokens)
        self._token[start:end] = tokens
        self._position[start:end] = range(position, position + end - start)
        self._sequence[start:end] = sequence
        self._wants_output[start:end] = wants_all
        self._wants_output[end - 1] = wants_output or wants_all
        self._n_tokens = end
        return end - 1

    def native(self) -> Any:
        """The structure to hand to the library."""
        self._batch.n_tokens = self._n_tokens
        return self._batch
