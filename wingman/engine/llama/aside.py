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
import time
from collections.abc import Callable
from typing import Final

import numpy as np

from wingman.config import ContextConfig
from wingman.engine.aside import MAX_PIECE_TOKENS
from wingman.engine.llama.binding import lib
from wingman.engine.llama.context import STATE_HEAD_BYTES, LlamaContext, SlotState
from wingman.engine.llama.model import LlamaModel
from wingman.engine.runner import AsidePiece, Batch, Chunk, RunnerFailure
from wingman.errors import ModelLoadFailure

MAX_NODES: Final = 8
"""So many of the thousand nodes of a graph are computed at most before anybody is asked: as many as take less than
`SLOW_S`, but one at least."""
SLOW_S: Final = 0.02
QUICK_S: Final = 0.005
LEAST_TOKENS: Final = 1024
"""A context is for a prompt of so many tokens, or twice as many, and so on."""
_WORD_BYTES: Final = 4


def has_one_part(context: LlamaContext, n_streams: int) -> bool:
    """Whether the state of an empty slot is what `for_streams` expects. Models with several caches write several."""
    return context.slot_bytes(0) == STATE_HEAD_BYTES + _WORD_BYTES * (1 + n_streams)


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
        self.callback = lib.ggml_backend_sched_eval_callback(self._on_node)
        self.resume(lambda: True)

    def resume(self, goes_on: Callable[[], bool]) -> None:
        """Ask `goes_on` from now on, until it says no or raises."""
        self.is_stopped = False
        self.error: BaseException | None = None
        self._goes_on = goes_on
        self._n_each = self._n_left = MAX_NODES
        self._resumed_at = time.perf_counter()

    def _on_node(self, _tensor: int, is_question: bool, _: object) -> bool:
        """Asked before: whether to stop after this node; told after: whether to compute the rest. A no ends one of
        the parts that a graph may have, so it is said to each."""
        if is_question:
            self._n_left -= 1
            return self.is_stopped or self._n_left <= 0
        if not self.is_stopped:
            self._ask()
        return not self.is_stopped

    def _ask(self) -> None:
        elapsed_s = time.perf_counter() - self._resumed_at
        if elapsed_s > SLOW_S:
            self._n_each = max(1, self._n_each // 2)
        elif elapsed_s < QUICK_S:
            self._n_each = min(2 * self._n_each, MAX_NODES)
        try:
            self.is_stopped = not self._goes_on()
        except BaseException as error:  # noqa: BLE001 - raised again where Python is entered from
            self.error = error
            self.is_stopped = True
        self._n_left = self._n_each
        self._resumed_at = time.perf_counter()


class AsideContext:
    """A context for one prompt at a time."""

    def __init__(self, model: LlamaModel, config: ContextConfig, slots: LlamaContext, n_prompt: int) -> None:
        """Allocate it beside that of the slots, which has this configuration. Raises RunnerFailure when it does not
        fit."""
        self._adapters = model.adapters
        self._n_streams = config.parallel
        self._pauses = _Pauses()
        n_ubatch = min(slots.n_ubatch, MAX_PIECE_TOKENS)
        n_ctx = max(LEAST_TOKENS, 1 << (n_prompt - 1).bit_length())
        is_scaled = any(".rope.scaling." in key for key in model.metadata())
        if is_scaled:  # perhaps depending on the size of the context
            n_ctx = slots.n_ctx_slot
        own = dataclasses.replace(
            config,
            parallel=1,
            ctx_size=min(n_ctx, slots.n_ctx_slot),
            batch_size=n_ubatch,
            ubatch_size=n_ubatch,
        )
        try:
            self._context = LlamaContext(model, own, on_node=self._pauses.callback)
        except ModelLoadFailure as error:
            raise RunnerFailure(str(error)) from error

    @property
    def n_ctx(self) -> int:
        """Most tokens of a prompt."""
        return self._context.n_ctx

    def begin(self, piece: AsidePiece, slots: LlamaContext) -> None:
        """Hold what a slot holds. Raises RunnerFailure."""
        lib.llama_memory_seq_rm(self._context.memory, 0, -1, -1)
        if piece.position:
            state = slots.read(piece.slot_id)
            self._context.write(for_one_stream(state, piece.slot_id, self._n_streams), 0)

    def run(self, piece: AsidePiece, goes_on: Callable[[], bool]) -> bool:
        """Compute a piece; see Runner.run_aside."""
        pauses = self._pauses
        self._context.set_lora(self._adapters, piece.lora)
        chunk = Chunk(0, piece.job_id, piece.tokens, piece.position, wants_sample=False)
        pauses.resume(goes_on)
        try:
            self._context.decode(Batch((), (), (chunk,), 0.0))
        finally:
            error, is_stopped = pauses.error, pauses.is_stopped
            pauses.resume(lambda: True)
        if error is not None:
            raise error
        return not is_stopped

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
