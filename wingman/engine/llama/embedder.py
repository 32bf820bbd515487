"""The second context of a model: token ids -> vectors, beside generation and over the same weights.

Made when the first input arrives, on the engine thread. Each input is a sequence of its own and is
computed in one piece, because pooling sees only what is computed together; that is why the
context's batch is as long as the longest input it takes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Final

from wingman.config import ContextConfig
from wingman.engine.llama import binding
from wingman.engine.llama.batch import TokenBatch
from wingman.engine.llama.binding import lib
from wingman.engine.llama.model import LlamaModel
from wingman.engine.runner import MAX_EMBED_INPUTS, RunnerFailure
from wingman.engine.types import EmbeddingInfo, PoolingType

_FLOAT_BYTES: Final = 4


def describe_embedding(model: LlamaModel, config: ContextConfig) -> EmbeddingInfo:
    """What embeddings of this model will look like: pooled as the flags say, else the model, else by mean."""
    pooling = PoolingType.RANK if config.reranking else None
    if config.pooling is not None:
        pooling = PoolingType[config.pooling.upper()]
    if pooling is None:
        pooling = _model_pooling(model)
    n_dims = int(lib.llama_model_n_embd_out(model.handle))
    if pooling is PoolingType.RANK:
        n_dims = int(lib.llama_model_n_cls_out(model.handle))
    n_train = int(lib.llama_model_n_ctx_train(model.handle))
    return EmbeddingInfo(pooling, n_dims, min(n_train, config.max_embed_tokens or n_train))


def _model_pooling(model: LlamaModel) -> PoolingType:
    metadata = model.metadata()
    stated = metadata.get(metadata.get("general.architecture", "") + ".pooling_type", "")
    if stated.isdigit() and int(stated) in {kind.value for kind in PoolingType}:
        return PoolingType(int(stated))
    return PoolingType.MEAN


class Embedder:
    """The embedding context of a model."""

    def __init__(self, model: LlamaModel, base: Any, info: EmbeddingInfo) -> None:
        """Allocate it with the parameters `base` changed for embeddings. Raises RunnerFailure when it does
        not fit."""
        self._info = info
        base.n_ctx = base.n_batch = base.n_ubatch = info.n_max
        base.n_seq_max = MAX_EMBED_INPUTS
        base.kv_unified = True
        base.embeddings = True
        base.pooling_type = info.pooling.value
        self._handle: Any = lib.llama_init_from_model(model.handle, base)
        if not self._handle:
            raise RunnerFailure(f"no memory for embeddings: {binding.take_errors()}")
        self._memory: Any = lib.llama_get_memory(self._handle)
        self._batch = TokenBatch(info.n_max)

    def embed(self, inputs: Sequence[Sequence[int]]) -> list[bytes]:
        """Vectors of inputs that fit the context together, as float32 bytes; one vector per token when
        nothing is pooled. Raises RunnerFailure."""
        self._batch.clear()
        ends = [self._batch.add(tokens, 0, index, wants_all=True) + 1 for index, tokens in enumerate(inputs)]
        if self._memory:
            lib.llama_memory_clear(self._memory, False)
        code = lib.llama_decode(self._handle, self._batch.native())
        if code:
            raise RunnerFailure(f"llama_decode returned {code}: {binding.take_errors()}")
        if self._info.pooling is not PoolingType.NONE:
            return [
                self._read(lib.llama_get_embeddings_seq(self._handle, index)) for index in range(len(inputs))
            ]
        starts = [0, *ends[:-1]]
        return [
            b"".join(
                self._read(lib.llama_get_embeddings_ith(self._handle, index)) for index in range(start, end)
            )
            for start, end in zip(starts, ends, strict=True)
        ]

    def _read(self, vector: Any) -> bytes:
        if not vector:
            raise RunnerFailure("the model gave no embedding")
        return ctypes.string_at(vector, self._info.n_dims * _FLOAT_BYTES)

    def close(self) -> None:
        """Free the context."""
        if self._handle:
            lib.llama_free(self._handle)
            self._handle = None
