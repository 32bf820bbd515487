"""The second context of a model: token ids -> vectors, beside generation and over the same weights.

Made when the first input arrives, on the engine thread. Each input is a sequence of its own.

Encoders pool in the library, which sees only what is computed together, so an input is one piece.
Models that generate would keep room for the logits of every token of a piece (800 MB for 4 096
tokens of a small vocabulary); for them the pieces are short, the pooling is done here, and the output
layer, up to a third of a small model's work, is left out.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from wingman.config import ContextConfig
from wingman.engine.embedding import MAX_PIECE_TOKENS
from wingman.engine.llama import binding
from wingman.engine.llama.batch import TokenBatch
from wingman.engine.llama.binding import lib
from wingman.engine.llama.model import LlamaModel
from wingman.engine.runner import MAX_EMBED_INPUTS, RunnerFailure
from wingman.engine.types import EmbeddingInfo, PoolingType

Matrix = npt.NDArray[np.float32]


class Part(Struct, frozen=True):
    """Tokens of input `index` from `position` on."""

    index: int
    position: int
    tokens: Sequence[int]


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


_HIDDEN: Final = frozenset({b"result_norm", b"result_embd_pooled"})
"""What the graphs of llama.cpp call the normalised states under the output layer (build_pooling)."""
_name_of: Final = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)(("ggml_get_name", lib._lib))


class _HeadStop:
    """Ends the computation of a graph under its output layer. C holds a pointer to `callback`."""

    def __init__(self) -> None:
        self.is_on = False
        self.callback = lib.ggml_backend_sched_eval_callback(self._goes_on)

    def _goes_on(self, tensor: int, is_question: bool, _: object) -> bool:
        """Asked before: whether to stop after this tensor; told after: whether to compute the rest."""
        return is_question and self.is_on and _name_of(tensor) in _HIDDEN


class Embedder:
    """The embedding context of a model."""

    def __init__(self, model: LlamaModel, base: Any, info: EmbeddingInfo) -> None:
        """Allocate it with the parameters `base` changed for embeddings. Raises RunnerFailure when it does
        not fit."""
        self._info = info
        self._is_cut = model.can_generate and info.pooling is not PoolingType.RANK
        self._pools_there = not self._is_cut and info.pooling is not PoolingType.NONE
        self._n_piece = min(info.n_max, MAX_PIECE_TOKENS) if self._is_cut else info.n_max
        # With fewer tokens than sequences the library ends the process.
        base.n_ctx = base.n_batch = max(info.n_max, MAX_EMBED_INPUTS)
        base.n_ubatch = self._n_piece
        base.n_seq_max = MAX_EMBED_INPUTS
        base.kv_unified = True
        base.embeddings = True
        base.pooling_type = info.pooling.value if self._pools_there else PoolingType.NONE.value
        self._head_stop = _HeadStop()
        if self._is_cut:
            base.cb_eval = self._head_stop.callback
        self._handle: Any = binding.quietly(lambda: lib.llama_init_from_model(model.handle, base))
        if not self._handle:
            raise RunnerFailure(f"no memory for embeddings: {binding.take_errors()}")
        self._memory: Any = lib.llama_get_memory(self._handle)
        self._batch = TokenBatch(self._n_piece)
        if self._is_cut:
            self._try_without_head()

    def _try_without_head(self) -> None:
        """Stop at the hidden states if those are this model's vectors. Raises RunnerFailure."""
        try:
            self._head_stop.is_on = self._is_same_without_head()
        except RunnerFailure:
            self.close()
            raise

    def _is_same_without_head(self) -> bool:
        """Tried without the output layer first: afterwards the right vectors might still lie where they are
        read."""
        found = []
        tokens = (0, 1)[: self._n_piece]
        for is_on in (True, False):
            self._head_stop.is_on = is_on
            self._decode([Part(0, 0, tokens)])
            found.append(self._output_rows(len(tokens)).copy())
            self._forget()
        return bool(np.array_equal(found[0], found[1]) and found[0].any())

    def _forget(self) -> None:
        if self._memory:
            lib.llama_memory_clear(self._memory, False)

    def embed(self, inputs: Sequence[Sequence[int]], n_piece: int) -> Iterator[list[bytes]]:
        """Vectors of inputs that fit the context together, as float32 bytes; one vector per token when
        nothing is pooled. Computed in pieces of at most `n_piece` tokens if the pooling is done here, []
        after each but the last. Raises RunnerFailure."""
        self._forget()
        rows: list[list[Matrix]] = [[] for _ in inputs]
        n_left = sum(map(len, inputs))
        for piece in _pieces(inputs, min(n_piece, self._n_piece) if self._is_cut else self._n_piece):
            self._decode(piece)
            n_left -= sum(len(part.tokens) for part in piece)
            if self._pools_there:
                found = (lib.llama_get_embeddings_seq(self._handle, part.index) for part in piece)
                yield [self._read(vector).tobytes() for vector in found]
                return
            self._keep_rows(piece, rows)
            if n_left:
                yield []
        pooling = self._info.pooling
        yield [_pool(np.concatenate(parts), pooling).tobytes() for parts in rows]

    def _keep_rows(self, piece: Sequence[Part], rows: list[list[Matrix]]) -> None:
        """Copy the vectors of a piece's tokens to those of their inputs."""
        outputs = self._output_rows(sum(len(part.tokens) for part in piece))
        start = 0
        for part in piece:
            rows[part.index].append(outputs[start : start + len(part.tokens)].copy())
            start += len(part.tokens)

    def _decode(self, parts: Sequence[Part]) -> None:
        self._batch.clear()
        for part in parts:
            self._batch.add(part.tokens, part.position, part.index, wants_all=True)
        code = lib.llama_decode(self._handle, self._batch.native())
        if code:
            raise RunnerFailure(f"llama_decode returned {code}: {binding.take_errors()}")

    def _output_rows(self, n_rows: int) -> Matrix:
        """The vectors of the last piece's tokens; overwritten by the next."""
        return self._read(lib.llama_get_embeddings(self._handle), n_rows)

    def _read(self, vector: Any, n_rows: int = 1) -> Matrix:
        if not vector:
            raise RunnerFailure("the model gave no embedding")
        address = ctypes.addressof(vector.contents)
        row: Any = (ctypes.c_float * (n_rows * self._info.n_dims)).from_address(address)
        return np.frombuffer(row, np.float32).reshape(n_rows, self._info.n_dims)

    def set_threads(self, n_threads: int) -> None:
        """Compute the next pieces with so many threads."""
        lib.llama_set_n_threads(self._handle, n_threads, n_threads)

    def close(self) -> None:
        """Free the context."""
        if self._handle:
            lib.llama_free(self._handle)
            self._handle = None


def _pieces(inputs: Sequence[Sequence[int]], n_most: int) -> Iterator[list[Part]]:
    """All inputs in order, cut into pieces of at most `n_most` tokens."""
    piece: list[Part] = []
    room = n_most
    for index, tokens in enumerate(inputs):
        position = 0
        while position < len(tokens):
            taken = tokens[position : position + room]
            piece.append(Part(index, position, taken))
            position += len(taken)
            room -= len(taken)
            if not room:
                yield piece
                piece, room = [], n_most
    if piece:
        yield piece


def _pool(rows: Matrix, pooling: PoolingType) -> Matrix:
    """The vector of an input, shape (1, n_dims); all rows when nothing is pooled (build_pooling)."""
    if pooling is PoolingType.MEAN:
        mean: Matrix = rows.mean(axis=0, keepdims=True, dtype=np.float64).astype(np.float32)
        return mean
    if pooling is PoolingType.CLS:
        return rows[:1]
    return rows[-1:] if pooling is PoolingType.LAST else rows
