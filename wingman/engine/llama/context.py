"""A llama_context: the KV cache of all slots, and the batch that is written again for each step.

The batch's arrays are allocated once and seen through numpy, so that filling them costs a few
microseconds whatever their length. Engine thread only.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any, Final

import numpy as np
import psutil

from wingman.config import ContextConfig
from wingman.engine.llama import binding
from wingman.engine.llama.binding import lib
from wingman.engine.llama.model import LlamaModel
from wingman.engine.runner import Batch, KvOp, KvRemove, RunnerFailure
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


def default_threads() -> int:
    """Physical cores this process may use; hyper-threads only get in each other's way here."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(usable, psutil.cpu_count(logical=False) or usable))


class LlamaContext:
    """The context of a model; slot ids are its sequence ids."""

    def __init__(self, model: LlamaModel, config: ContextConfig) -> None:
        """Allocate cache and compute buffers. Raises ModelLoadFailure when they don't fit."""
        self.handle: Any = lib.llama_init_from_model(model.handle, _params(model, config))
        if not self.handle:
            reason = binding.take_errors() or "out of memory?"
            raise ModelLoadFailure(f"can't make a context of {config.ctx_size} tokens: {reason}")
        self.memory: Any = lib.llama_get_memory(self.handle)
        if not self.memory:
            self.close()
            raise ModelLoadFailure(f"{model.path.name} does not generate text (it has no KV cache)")
        self.n_batch = int(lib.llama_n_batch(self.handle))
        self.n_ubatch = int(lib.llama_n_ubatch(self.handle))
        self.n_ctx = int(lib.llama_n_ctx(self.handle))
        self.n_ctx_slot = min(int(lib.llama_n_ctx_seq(self.handle)), self.n_ctx)
        self._allocate_batch()

    def _allocate_batch(self) -> None:
        size = self.n_batch
        self._token = np.zeros(size, np.int32)
        self._position = np.zeros(size, np.int32)
        self._slot = np.zeros(size, np.int32)
        self._n_slots = np.ones(size, np.int32)
        self._wants_logits = np.zeros(size, np.int8)
        slot_address = self._slot.ctypes.data
        pointer = ctypes.POINTER(lib.llama_seq_id)
        self._slot_pointers = (pointer * size)(
            *(ctypes.cast(slot_address + 4 * index, pointer) for index in range(size))
        )
        self._batch = lib.llama_batch(
            n_tokens=0,
            token=self._token.ctypes.data_as(ctypes.POINTER(lib.llama_token)),
            embd=None,
            pos=self._position.ctypes.data_as(ctypes.POINTER(lib.llama_pos)),
            n_seq_id=self._n_slots.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            seq_id=self._slot_pointers,
            logits=self._wants_logits.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def edit_cache(self, op: KvOp) -> None:
        """Apply one cache operation. Raises RunnerFailure when the cache can't do it."""
        if isinstance(op, KvRemove):
            if not lib.llama_memory_seq_rm(self.memory, op.slot_id, op.start, op.end):
                raise RunnerFailure("the cache can't forget a part of a sequence")
            return
        lib.llama_memory_seq_add(self.memory, op.slot_id, op.start, op.end, op.delta)

    def decode(self, batch: Batch) -> list[int]:
        """Compute the batch; the batch index of each chunk's last token, in order of the chunks.

        Raises RunnerFailure when llama_decode reports anything but success.
        """
        end = 0
        last = []
        for chunk in batch.chunks:
            start, end = end, end + len(chunk.tokens)
            self._token[start:end] = chunk.tokens
            self._position[start:end] = range(chunk.position, chunk.position + end - start)
            self._slot[start:end] = chunk.slot_id
            self._wants_logits[start:end] = 0
            self._wants_logits[end - 1] = chunk.wants_sample
            last.append(end - 1)
        if end:
            self._batch.n_tokens = end
            code = lib.llama_decode(self.handle, self._batch)
            if code:
                raise RunnerFailure(f"llama_decode returned {code}: {binding.take_errors()}")
        return last

    def warm_up(self, model: LlamaModel) -> None:
        """Touch all weights once and empty the cache again (common_init_from_params)."""
        token = max(0, int(lib.llama_vocab_bos(model.vocab)))
        self._token[0], self._position[0], self._slot[0], self._wants_logits[0] = token, 0, 0, 1
        self._batch.n_tokens = 1
        lib.llama_set_warmup(self.handle, True)
        lib.llama_decode(self.handle, self._batch)
        lib.llama_memory_clear(self.memory, True)
        lib.llama_synchronize(self.handle)
        lib.llama_set_warmup(self.handle, False)

    def close(self) -> None:
        """Free cache and buffers."""
        if self.handle:
            lib.llama_free(self.handle)
            self.handle = None


def _params(model: LlamaModel, config: ContextConfig) -> Any:
    n_ctx_train = int(lib.llama_model_n_ctx_train(model.handle))
    params = lib.llama_context_default_params()
    params.n_ctx = config.ctx_size or n_ctx_train
    params.n_batch = config.batch_size
    params.n_ubatch = min(config.ubatch_size, config.batch_size)
    params.n_seq_max = config.parallel
    params.n_threads = config.threads or default_threads()
    params.n_threads_batch = config.threads_batch or params.n_threads
    params.flash_attn_type = _FLASH_ATTN[config.flash_attn]
    params.type_k = _KV_TYPES[config.cache_type_k]
    params.type_v = _KV_TYPES[config.cache_type_v]
    params.kv_unified = config.kv_unified
    params.offload_kqv = config.kv_offload
    params.swa_full = config.swa_full
    params.no_perf = True
    return params
