"""A llama_context: the KV cache of all slots, and the batch that is written again for each step.
Engine thread only.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import islice
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from wingman.config import ContextConfig
from wingman.engine.cores import CORES
from wingman.engine.llama import binding
from wingman.engine.llama.batch import TokenBatch
from wingman.engine.llama.binding import lib, quick
from wingman.engine.llama.model import LlamaModel
from wingman.engine.llama.pages import anonymous_ranges, large_allocations, release_zeros
from wingman.engine.runner import (
    Batch,
    Chunk,
    Fork,
    KvCopy,
    KvDrop,
    KvOp,
    KvPark,
    KvRemove,
    KvRestore,
    KvShift,
    RunnerFailure,
)
from wingman.errors import ModelLoadFailure

_GGML_BF16: Final = 30
_KV_TYPES: Final = {
    "f32": lib.GGML_TYPE_F32,
    "f16": lib.GGML_TYPE_F16,
    "bf16": _GGML_BF16,
    "q8_0": lib.GGML_TYPE_Q8_0,
    "q4_0": lib.GGML_TYPE_Q4_0,
    "q4_1": lib.GGML_TYPE_Q4_1,
    "iq4_nl": lib.GGML_TYPE_IQ4_NL,
    "q5_0": lib.GGML_TYPE_Q5_0,
    "q5_1": lib.GGML_TYPE_Q5_1,
}
_FLASH_ATTN: Final = {"auto": -1, "off": 0, "on": 1}
STATE_HEAD_BYTES: Final = 8
"""A magic number and the slot's id, in front of what a slot file holds."""
_SMALL_BYTES: Final = 1 << 30
"""Weights that one thread reads in no time."""
_TIDIED_BLOCKS: Final = 32
"""Blocks of 128 KiB."""
_MAX_STREAMS: Final = 256
"""LLAMA_MAX_SEQ."""


SlotState = npt.NDArray[np.uint8]
"""The serialised cache of a slot, as bytes."""


class LlamaContext:
    """The context of a model; slot ids are its sequence ids."""

    def __init__(
        self, model: LlamaModel, config: ContextConfig, *, is_alone: bool = False, on_node: Any = None
    ) -> None:
        """Allocate cache and compute buffers. `is_alone`: no other thread allocates much, so that the cache can be
        found and `tidy` give back what it does not use. `on_node`: a ggml_backend_sched_eval_callback that its
        owner keeps. Raises ModelLoadFailure when they don't fit."""
        params = context_params(model, config)
        if on_node is not None:
            params.cb_eval = on_node
        mapped = anonymous_ranges() if is_alone else None
        self.handle: Any = binding.quietly(lambda: lib.llama_init_from_model(model.handle, params))
        if not self.handle:
            reason = binding.take_errors() or "out of memory?"
            raise ModelLoadFailure(f"can't make a context of {config.ctx_size} tokens: {reason}")
        self._unused = release_zeros([] if mapped is None else large_allocations(mapped))
        self.memory: Any = lib.llama_get_memory(self.handle)
        if not self.memory:
            self.close()
            raise ModelLoadFailure(f"{model.path.name} does not generate text")
        self.n_batch = int(lib.llama_n_batch(self.handle))
        self.n_ubatch = int(lib.llama_n_ubatch(self.handle))
        self.n_ctx = int(lib.llama_n_ctx(self.handle))
        self.n_ctx_slot = min(int(lib.llama_n_ctx_seq(self.handle)), self.n_ctx)
        self._has_cells = not lib.llama_model_is_recurrent(model.handle)
        self._batch = TokenBatch(self.n_batch)
        self._n_threads = params.n_threads, params.n_threads_batch
        self._lora: tuple[float, ...] = ()
        self._is_unified = config.kv_unified
        self._parked: dict[int, SlotState] = {}

    def edit_cache(self, op: KvOp) -> None:
        """Apply one cache operation. Raises RunnerFailure when the cache can't do it."""
        match op:
            case KvRemove(slot_id, start, end):
                if not quick.llama_memory_seq_rm(self.memory, slot_id, start, end):
                    raise RunnerFailure("the cache can't forget a part of a sequence")
            case KvShift(slot_id, start, end, delta):
                lib.llama_memory_seq_add(self.memory, slot_id, start, end, delta)
            case KvCopy(source, target, n_tokens):
                self._copy(source, target, n_tokens)
            case KvPark(slot_id, key):
                self._parked[key] = self.read(slot_id)
            case KvRestore(key, slot_id, n_tokens):
                self.write(self._parked[key], slot_id)
                quick.llama_memory_seq_rm(self.memory, slot_id, n_tokens, -1)
            case KvDrop(key):
                del self._parked[key]

    def _copy(self, source: int, target: int, n_tokens: int) -> None:
        """Copy the first tokens of a slot to another. In a shared pool they share the cells; else the state
        goes through memory, which takes as long as what the slot holds, where llama_memory_seq_cp copies
        all it could hold, and only at the next step."""
        if self._is_unified:
            quick.llama_memory_seq_rm(self.memory, target, -1, -1)
            quick.llama_memory_seq_cp(self.memory, source, target, 0, n_tokens)
            return
        self.write(self.read(source), target)
        quick.llama_memory_seq_rm(self.memory, target, n_tokens, -1)

    def read(self, slot_id: int, n_spare: int = 0) -> SlotState:
        """All that a slot holds, for `write`, and so many zeros behind it. Raises RunnerFailure."""
        size = self.slot_bytes(slot_id)
        try:
            buffer = np.empty(size + n_spare, np.uint8)
        except MemoryError as error:
            raise RunnerFailure(f"no memory for the {size} bytes of a sequence") from error
        buffer[size:] = 0
        n_bytes = lib.llama_state_seq_get_data(self.handle, _bytes_of(buffer), size, slot_id)
        if n_bytes != size:
            raise RunnerFailure("the state of a sequence could not be read")
        return buffer

    def write(self, state: SlotState, slot_id: int) -> None:
        """Let a slot hold what was read from one. Raises RunnerFailure."""
        quick.llama_memory_seq_rm(self.memory, slot_id, -1, -1)
        n_bytes = lib.llama_state_seq_set_data(self.handle, _bytes_of(state), len(state), slot_id)
        if n_bytes != len(state):
            raise RunnerFailure("the state of a sequence could not be written")

    def decode(self, batch: Batch) -> list[int]:
        """Compute the batch; the batch index of each chunk's last token that is no draft, in order.

        Raises RunnerFailure when llama_decode reports anything but success.
        """
        self._batch.clear()
        last = [self._add(chunk) for chunk in batch.chunks]
        if last:
            code = lib.llama_decode(self.handle, self._batch.native())
            lib.llama_synchronize(self.handle)  # a GPU may be at it still, and logits are asked for quickly
            if code:
                raise RunnerFailure(f"llama_decode returned {code}: {binding.take_errors()}")
        return last

    def _add(self, chunk: Chunk) -> int:
        """Put a chunk into the batch, asking for the outputs that are sampled from."""
        tokens, n_draft = chunk.tokens, chunk.n_draft
        if not n_draft:
            return self._batch.add(tokens, chunk.position, chunk.slot_id, wants_output=chunk.wants_sample)
        return self._batch.add(tokens, chunk.position, chunk.slot_id, wants_all=True) - n_draft

    def fork(self, fork: Fork) -> None:
        """Copy all a slot holds to an empty one."""
        n_tokens = int(quick.llama_memory_seq_pos_max(self.memory, fork.source)) + 1
        self._copy(fork.source, fork.target, n_tokens)

    def slot_bytes(self, slot_id: int) -> int:
        """What `edit_cache` would take to park a slot."""
        return int(quick.llama_state_seq_get_size(self.handle, slot_id))

    def set_lora(self, adapters: Sequence[Any], scales: tuple[float, ...]) -> None:
        """Apply adapters with these scales from the next step on; none beyond the end of `scales`."""
        if scales == self._lora:
            return
        chosen = [(adapter, scale) for adapter, scale in zip(adapters, scales, strict=False) if scale != 0]
        handles = (lib.llama_adapter_lora_p_ctypes * max(len(chosen), 1))(*(one[0] for one in chosen))
        factors = (ctypes.c_float * max(len(chosen), 1))(*(one[1] for one in chosen))
        if lib.llama_set_adapters_lora(self.handle, handles, len(chosen), factors):
            raise RunnerFailure("the LoRA adapters could not be applied")
        self._lora = scales

    def read_slot(self, slot_id: int) -> bytes:
        """The serialised cache of a slot, without the head that names slot and process."""
        size = lib.llama_state_seq_get_size(self.handle, slot_id)
        buffer = (ctypes.c_uint8 * size)()
        n_bytes = lib.llama_state_seq_get_data(self.handle, buffer, size, slot_id)
        return bytes(memoryview(buffer)[STATE_HEAD_BYTES:n_bytes])

    def write_slot(self, slot_id: int, state: bytes, n_tokens: int) -> bool:
        """Fill a slot from `read_slot` output; False, and the slot empty, when it does not fit this model or
        does not end with token `n_tokens` of a sequence."""
        lib.llama_memory_seq_rm(self.memory, slot_id, -1, -1)
        positions = _positions(state) if self._has_cells else ()
        if positions and not 0 <= min(positions) <= max(positions) < n_tokens:
            return False  # the library takes cells anywhere, some of which can never be removed again
        head = (ctypes.c_uint8 * lib.llama_state_seq_get_size(self.handle, slot_id))()
        lib.llama_state_seq_get_data(self.handle, head, len(head), slot_id)
        data = bytes(head[:STATE_HEAD_BYTES]) + state
        buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        n_read = lib.llama_state_seq_set_data(self.handle, buffer, len(data), slot_id)
        if n_read == len(data) and self._ends_at(slot_id, n_tokens):
            return True
        lib.llama_memory_seq_rm(self.memory, slot_id, -1, -1)
        return False

    def _ends_at(self, slot_id: int, n_tokens: int) -> bool:
        """Whether the next token of a slot is that at position `n_tokens`; any other makes the step fail that
        adds it, for everybody."""
        first = int(lib.llama_memory_seq_pos_min(self.memory, slot_id))
        last = int(lib.llama_memory_seq_pos_max(self.memory, slot_id))
        return last == n_tokens - 1 and (first >= 0 or not n_tokens)

    def warm_up(self, model: LlamaModel, *, is_alone: bool = False) -> None:
        """Touch all weights once and empty the cache again (common_init_from_params); a small model on one thread
        while the rest of the program starts (`is_alone`)."""
        n_threads = self._n_threads
        if is_alone and lib.llama_model_size(model.handle) < _SMALL_BYTES:
            self._use_threads((1, 1))
        self._batch.clear()
        self._batch.add((max(0, int(lib.llama_vocab_bos(model.vocab))),), 0, 0, wants_output=True)
        lib.llama_set_warmup(self.handle, True)
        lib.llama_decode(self.handle, self._batch.native())
        lib.llama_memory_clear(self.memory, not self._has_cells)
        lib.llama_synchronize(self.handle)
        lib.llama_set_warmup(self.handle, False)
        self._use_threads(n_threads)

    def tidy(self) -> bool:
        """Give back some of the pages that the new cache does not use yet, for a millisecond; False when none are
        left."""
        return sum(1 for _ in islice(self._unused, _TIDIED_BLOCKS)) == _TIDIED_BLOCKS

    def set_threads(self, n_threads: int) -> None:
        """Compute the next steps with so many threads, whatever their size."""
        self._use_threads((n_threads, n_threads))

    def _use_threads(self, n_threads: tuple[int, int]) -> None:
        if n_threads != self._n_threads:
            self._n_threads = n_threads
            lib.llama_set_n_threads(self.handle, *n_threads)

    def close(self) -> None:
        """Free cache and buffers."""
        self._parked.clear()
        if self.handle:
            lib.llama_free(self.handle)
            self.handle = None


def _bytes_of(state: SlotState) -> Any:
    return state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def _positions(state: bytes) -> Sequence[int]:
    """Positions of the cells in a serialised cache (llama_kv_cache::state_write): the number of streams, for each
    the number of its cells, and behind the first that is not 0 three words a cell."""
    words = memoryview(state[: len(state) // 4 * 4]).cast("i")
    for index in range(1, min(words[0], _MAX_STREAMS) + 1 if words else 0):
        if index < len(words) and words[index]:
            return words[index + 1 : index + 1 + 3 * max(words[index], 0)][::3]
    return ()


def context_params(model: LlamaModel, config: ContextConfig) -> Any:
    """llama_context_params as the flags say."""
    n_ctx_train = int(lib.llama_model_n_ctx_train(model.handle))
    params = lib.llama_context_default_params()
    params.n_ctx = config.ctx_size or n_ctx_train
    params.n_batch = config.batch_size
    params.n_ubatch = min(config.ubatch_size, config.batch_size)
    params.n_seq_max = config.parallel
    params.n_threads = config.threads or CORES.n_cores
    params.n_threads_batch = config.threads_batch or params.n_threads
    params.flash_attn_type = _FLASH_ATTN[config.flash_attn]
    params.type_k = _KV_TYPES[config.cache_type_k]
    params.type_v = _KV_TYPES[config.cache_type_v]
    params.kv_unified = config.kv_unified
    params.offload_kqv = config.kv_offload
    params.swa_full = config.swa_full
    params.no_perf = True
    return params
