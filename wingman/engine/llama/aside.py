"""The context in which a long prompt is computed beside the steps of others: one sequence, and a pause wherever
somebody wants it.

llama_decode can't be interrupted, but the graph it computes can: its scheduler asks a callback which nodes somebody
wants to see, computes up to those, and tells. In such a moment no thread of the library works, so the steps of
another context can be computed, on the same threads, before the callback returns. What was computed here goes to
its slot as serialised state. Engine thread only.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Final

import numpy as np

from wingman.config import ContextConfig
from wingman.engine.llama.binding import lib
from wingman.engine.llama.context import STATE_HEAD_BYTES, LlamaContext, SlotState
from wingman.engine.llama.model import LlamaModel
from wingman.engine.runner import AsidePiece, Batch, Chunk, RunnerFailure
from wingman.errors import ModelLoadFailure

NODES_PER_STRETCH: Final = 4
"""So many of the thousand nodes of a graph are computed without a look at the clock."""


_WORD_BYTES: Final = 4


def for_one_stream(state: SlotState, slot_id: int, n_streams: int) -> SlotState:
    """The serialised state of a slot that has one of so many streams, changed in place for a context with one.

    Behind the head stands the number of streams, and for each the number of its cells with what they hold if there
    are any (llama_kv_cache::state_write). Raises RunnerFailure where that is not so.
    """
    start = _WORD_BYTES * slot_id
    counts = start + STATE_HEAD_BYTES + _WORD_BYTES
    end = len(state) - _WORD_BYTES * (n_streams - 1 - slot_id)
    is_known = (
        _word(state, STATE_HEAD_BYTES) == n_streams
        and not state[STATE_HEAD_BYTES + _WORD_BYTES : counts].any()
    )
    if not is_known or state[end:].any():
        raise RunnerFailure("the state of a slot has an unknown form")
    state[start : start + STATE_HEAD_BYTES] = state[:STATE_HEAD_BYTES].copy()
    _set_word(state, counts - _WORD_BYTES, 1)
    return state[start:end]


def for_streams(state: SlotState, n_streams: int) -> SlotState:
    """The serialised state of a context with one stream, with zeros behind it for the others, changed in place for
    one with so many: cells are read into that of their sequence, wherever they stand. Raises RunnerFailure."""
    if _word(state, STATE_HEAD_BYTES) != 1:
        raise RunnerFailure("the state of a prompt has an unknown form")
    _set_word(state, STATE_HEAD_BYTES, n_streams)
    return state


def _word(state: SlotState, at: int) -> int:
    return int.from_bytes(state[at : at + _WORD_BYTES].tobytes(), sys.byteorder)


def _set_word(state: SlotState, at: int, word: int) -> None:
    state[at : at + _WORD_BYTES] = np.frombuffer(word.to_bytes(_WORD_BYTES, sys.byteorder), np.uint8)


class _Pauses:
    """The callback of the graph's scheduler. C holds a pointer to `callback`."""

    def __init__(self) -> None:
        self.goes_on: Callable[[], bool] = lambda: True
        self.is_stopped = False
        self.error: BaseException | None = None
        self._n_nodes = 0
        self.callback = lib.ggml_backend_sched_eval_callback(self._on_node)

    def _on_node(self, _tensor: int, is_question: bool, _: object) -> bool:
        """Asked before: whether to stop after this node; told after: whether to compute the rest."""
        if is_question:
            self._n_nodes += 1
            return self._n_nodes % NODES_PER_STRETCH == 0
        try:
            self.is_stopped = not self.goes_on()
        except BaseException as error:  # noqa: BLE001 - raised again where Python is entered from
            self.error = error
            self.is_stopped = True
        return not self.is_stopped


class AsideContext:
    """A context as large as a slot of the one whose configuration it gets."""

    def __init__(self, model: LlamaModel, config: ContextConfig, slots: LlamaContext) -> None:
        """Allocate it. Raises RunnerFailure when it does not fit."""
        self._adapters = model.adapters
        self._n_streams = config.parallel
        self._pauses = _Pauses()
        # Models may compute long contexts in another way, so it must be as long as a slot.
        own = dataclasses.replace(
            config,
            parallel=1,
            ctx_size=slots.n_ctx_slot,
            batch_size=slots.n_ubatch,
            ubatch_size=slots.n_ubatch,
        )
        try:
            self._context = LlamaContext(model, own, on_node=self._pauses.callback)
        except ModelLoadFailure as error:
            raise RunnerFailure(str(error)) from error

    def run(self, piece: AsidePiece, slots: LlamaContext, goes_on: Callable[[], bool]) -> bool:
        """Compute a piece, after what a slot holds if it is the first; see Runner.run_aside."""
        context, pauses = self._context, self._pauses
        if piece.is_first:
            lib.llama_memory_seq_rm(context.memory, 0, -1, -1)
        if piece.is_first and piece.position:
            context.write(for_one_stream(slots.read(piece.slot_id), piece.slot_id, self._n_streams), 0)
        context.set_lora(self._adapters, piece.lora)
        pauses.goes_on, pauses.is_stopped = goes_on, False
        chunk = Chunk(0, piece.job_id, piece.tokens, piece.position, wants_sample=False)
        try:
            context.decode(Batch((), (), (chunk,), 0.0))
        finally:
            pauses.goes_on = lambda: True
            error, pauses.error = pauses.error, None
        if error is not None:
            raise error
        return not pauses.is_stopped

    def result(self) -> SlotState:
        """All that was computed, for a slot. Raises RunnerFailure."""
        state = self._context.read(0, n_spare=_WORD_BYTES * (self._n_streams - 1))
        return for_streams(state, self._n_streams)

    def set_threads(self, n_threads: int) -> None:
        """Compute the next pieces with so many threads."""
        self._context.set_threads(n_threads)

    def close(self) -> None:
        """Free it."""
        self._context.close()
