"""How much memory a model takes: weights, the cache of its context, and buffers to compute in.

The numbers are those that llama.cpp reserves: it says so in its log, and on a GPU they are taken at once. In main
memory pages count when they are touched first: much of the compute buffer is room for the scores of
a whole batch, of which generation uses some rows. Pure.

Rule for the compute buffer, fitted to what llama.cpp logged for SmolLM2 (within 4 %): for each token of a
micro-batch, whatever is larger: the scores of the vocabulary and two hidden states, or the mask and
activations of a layer: 6 hidden states, 2 rows of the feed-forward network, and per position of the
context 2 bytes with flash attention, else 4 for each head and 4 more.
"""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from wingman.services.gguf import GgufHeader
from wingman.services.gguffile import TENSOR_TYPES

_BLOCKS: Final = {name: (n_elements, n_bytes) for name, n_elements, n_bytes in TENSOR_TYPES.values()}
_PADDING: Final = 256
"""Cells of a cache come in multiples of this."""
_FLOAT_BYTES: Final = 4
_MASK_BYTES: Final = 2
_MOST: Final = 2**62
"""Keeps what a hostile header leads to within the integers of JSON and SQLite."""
_WINDOW_PATTERNS: Final = {
    "cohere2": 4, "exaone4": 4, "gemma2": 2, "gemma3": 6, "gemma3n": 5, "gpt-oss": 2, "olmo2": 4,
}  # fmt: skip
"""Every n-th layer sees all positions, the others a window (load_swa_pattern); layers of other architectures
count as if they saw all, unless their headers say otherwise."""


class ContextShape(Struct, frozen=True):
    """What a context is made with; sizes in tokens, `n_ctx` of all sequences together."""

    n_ctx: int
    n_parallel: int = 1
    n_ubatch: int = 512
    type_k: str = "f16"
    type_v: str = "f16"
    is_unified: bool = False
    has_flash_attention: bool = True
    has_full_windows: bool = False
    """--swa-full."""

    @property
    def n_streams(self) -> int:
        """Caches: one for all sequences or one for each."""
        return 1 if self.is_unified else max(1, self.n_parallel)

    @property
    def n_cells(self) -> int:
        """Of one stream."""
        return _padded(-(-self.n_ctx // self.n_streams))


def estimate_bytes(
    header: GgufHeader,
    *,
    n_ctx: int,
    n_parallel: int = 1,
    n_ubatch: int = 512,
    type_k: str = "f16",
    type_v: str = "f16",
    is_unified: bool = False,
    has_flash_attention: bool = True,
    has_full_windows: bool = False,
) -> int:
    """Bytes that a model takes with a context of `n_ctx` tokens for all its sequences together.

    `header` is that of all parts (`read_parts`); the types of the cache are ggml's names. Raises KeyError for others.
    """
    shape = ContextShape(
        n_ctx, n_parallel, n_ubatch, type_k, type_v, is_unified, has_flash_attention, has_full_windows
    )
    return min(_MOST, header.tensor_bytes + cache_bytes(header, shape) + compute_bytes(header, shape))


def cache_bytes(header: GgufHeader, shape: ContextShape) -> int:
    """Keys and values of attention, states of recurrent layers."""
    if header.metadata.get(f"{header.architecture}.attention.causal") is False:
        return 0  # an encoder reads its input at once
    every = header.fact("full_attention_interval") or 1  # the layers between are recurrent
    heads = header.kv_heads()
    own = heads[: len(heads) - header.fact("attention.shared_kv_layers")]
    windows = _windows(header) if not shape.has_full_windows else (False,) * len(heads)
    total = 0
    for index, n_heads in enumerate(own):
        if n_heads == 0 or (index + 1) % every:
            total += shape.n_parallel * _state_bytes(header)
        else:
            total += n_heads * _layer_bytes(header, shape, is_windowed=windows[index])
    return total


def compute_bytes(header: GgufHeader, shape: ContextShape) -> int:
    """Room for one micro-batch; see the rule above."""
    scores = _FLOAT_BYTES * (header.n_vocab + 2 * header.n_embd)
    position = _MASK_BYTES if shape.has_flash_attention else _FLOAT_BYTES * (header.n_head + 1)
    activations = _FLOAT_BYTES * (2 * header.fact("feed_forward_length") + 6 * header.n_embd)
    return min(shape.n_ubatch, shape.n_ctx) * max(scores, activations + position * shape.n_cells)


def _layer_bytes(header: GgufHeader, shape: ContextShape, *, is_windowed: bool) -> int:
    """Keys and values of one head of a layer, in all streams."""
    size_k, size_v, n_cells = header.head_size_k, header.head_size_v, shape.n_cells
    if is_windowed:  # llama_kv_cache_iswa
        size_k = header.fact("attention.key_length_swa") or size_k
        size_v = header.fact("attention.value_length_swa") or size_v
        n_sequences = shape.n_parallel if shape.is_unified else 1
        window = header.fact("attention.sliding_window") * n_sequences + shape.n_ubatch
        n_cells = min(n_cells, _padded(window))
    return shape.n_streams * n_cells * (_row_bytes(size_k, shape.type_k) + _row_bytes(size_v, shape.type_v))


def _row_bytes(n_elements: int, kind: str) -> int:
    n_block, n_bytes = _BLOCKS[kind]
    return -(-n_elements * n_bytes // n_block)


def _state_bytes(header: GgufHeader) -> int:
    """Of a recurrent layer and sequence: convolution and state (n_embd_r, n_embd_s)."""
    inner, state = header.fact("ssm.inner_size"), header.fact("ssm.state_size")
    width = inner + 2 * header.fact("ssm.group_count") * state
    return _FLOAT_BYTES * (max(0, header.fact("ssm.conv_kernel") - 1) * width + inner * state)


def _windows(header: GgufHeader) -> tuple[bool, ...]:
    """Which layers see a window only."""
    n_layer = header.n_layer
    pattern = header.metadata.get(f"{header.architecture}.attention.sliding_window_pattern")
    if not header.fact("attention.sliding_window"):
        return (False,) * n_layer
    if isinstance(pattern, tuple) and len(pattern) == n_layer:
        return tuple(bool(one) for one in pattern)
    every = header.fact("attention.sliding_window_pattern") or _WINDOW_PATTERNS.get(header.architecture, 1)
    return tuple(bool((index + 1) % every) for index in range(n_layer))


def _padded(n_cells: int) -> int:
    return -(-n_cells // _PADDING) * _PADDING
