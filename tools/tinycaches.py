"""Tiny GGUF models that remember in other ways than by full attention, for tests of what caches can do.

They share vocabulary, chat template and sizes with the llama model of `tinymodel`: one looks back through
a sliding window in every other layer, one has a recurrent state only, one has both attention and a
recurrent state. What each needs is what llama.cpp asks for when it loads that architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np

from tools.tinyparts import (
    CHAT_TEMPLATE,
    LOGIT_SCALE,
    N_EMBD,
    N_FF,
    N_HEADS,
    N_KV_HEADS,
    N_LAYERS,
    NORM_EPSILON,
    Tensors,
    attention,
    feed_forward,
    in_layer,
    linear,
    ones,
    spm_metadata,
    spm_vocabulary,
    uniform,
    write,
)

N_WINDOW: Final = 32
"""Tokens that the sliding-window model looks back in half of its layers."""
N_CTX_TRAIN: Final = 512
_HEAD: Final = N_EMBD // N_HEADS
_WIDE_HEAD: Final = 64
"""Keys of this width can be quantised and turned again when a context shifts."""
_SHARPNESS: Final = 1.7
_N_CONV: Final = 4
"""Tokens that a convolution of the recurrent model sees."""
_N_STATE: Final = 8
_N_INNER: Final = 2 * N_EMBD
"""The only expansion that llama.cpp computes."""
_N_STEP: Final = 4
_N_SHORT: Final = 3
"""Tokens that a convolution of the hybrid model sees."""


def write_window(path: Path, *, seed: int = 0, n_window: int = N_WINDOW) -> Path:
    """Write a model of the gemma3 architecture: the first layer has a window, the second has none. With
    `n_window` 0 neither has one."""
    rng = np.random.default_rng(seed)
    tensors: Tensors = {}
    for layer in range(N_LAYERS):
        tensors |= (
            attention(rng, layer, _WIDE_HEAD) | _head_norms(layer, _WIDE_HEAD) | feed_forward(rng, layer)
        )
        tensors |= in_layer(layer, {"post_attention_norm": ones(N_EMBD), "post_ffw_norm": ones(N_EMBD)})
    metadata = {
        "attention.head_count": N_HEADS,
        "attention.head_count_kv": N_KV_HEADS,
        "attention.key_length": _WIDE_HEAD,
        "attention.value_length": _WIDE_HEAD,
    }
    if n_window:
        metadata |= {"attention.sliding_window": n_window, "attention.sliding_window_pattern": 2}
    return _write(path, "gemma3", metadata, tensors, rng)


def write_recurrent(path: Path, *, seed: int = 0) -> Path:
    """Write a model of the mamba architecture."""
    rng = np.random.default_rng(seed)
    tensors: Tensors = {}
    for layer in range(N_LAYERS):
        tensors |= _mamba(rng, layer)
    metadata = {
        "attention.head_count": 0,
        "ssm.conv_kernel": _N_CONV,
        "ssm.inner_size": _N_INNER,
        "ssm.state_size": _N_STATE,
        "ssm.time_step_rank": _N_STEP,
    }
    return _write(path, "mamba", metadata, tensors, rng)


def write_hybrid(path: Path, *, seed: int = 0) -> Path:
    """Write a model of the lfm2 architecture: a convolution with a state, then attention."""
    rng = np.random.default_rng(seed)
    convolution = {
        "attn_norm": ones(N_EMBD),
        "shortconv.conv": linear(rng, N_EMBD, _N_SHORT),
        "shortconv.in_proj": linear(rng, 3 * N_EMBD, N_EMBD),
        "shortconv.out_proj": linear(rng, N_EMBD, N_EMBD),
    }
    tensors = in_layer(0, convolution) | feed_forward(rng, 0)
    tensors |= attention(rng, 1) | _head_norms(1, _HEAD) | feed_forward(rng, 1)
    metadata = {
        "attention.head_count": N_HEADS,
        "attention.head_count_kv": [0, N_KV_HEADS],
        "shortconv.l_cache": _N_SHORT,
    }
    return _write(path, "lfm2", metadata, tensors, rng, norm="token_embd_norm")


def _head_norms(layer: int, n_head: int) -> Tensors:
    """Norms that make attention pick a few tokens, be they far away."""
    scale = ones(n_head) * _SHARPNESS
    return in_layer(layer, {"attn_q_norm": scale, "attn_k_norm": scale})


def _mamba(rng: np.random.Generator, layer: int) -> Tensors:
    """A block whose states fade at rates between fast and slow (Gu and Dao 2023, 3.6)."""
    block = {
        "attn_norm": ones(N_EMBD),
        "ssm_in": linear(rng, 2 * _N_INNER, N_EMBD),
        "ssm_conv1d": linear(rng, _N_INNER, _N_CONV),
        "ssm_x": linear(rng, _N_STEP + 2 * _N_STATE, _N_INNER),
        "ssm_dt": linear(rng, _N_INNER, _N_STEP),
        "ssm_out": linear(rng, N_EMBD, _N_INNER),
    }
    rates = np.geomspace(0.01, 1, _N_STATE, dtype=np.float32)
    return in_layer(layer, block) | {
        f"blk.{layer}.ssm_conv1d.bias": uniform(rng, _N_INNER, scale=0.1),
        f"blk.{layer}.ssm_dt.bias": uniform(rng, _N_INNER, scale=0.5) - 3,
        f"blk.{layer}.ssm_a": np.tile(-rates, (_N_INNER, 1)),
        f"blk.{layer}.ssm_d": ones(_N_INNER),
    }


def _write(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Tensors,
    rng: np.random.Generator,
    norm: str = "output_norm",
) -> Path:
    """Add what all have. Raises OSError when the file can't be written."""
    vocabulary = spm_vocabulary({})
    n_vocab = len(vocabulary.texts)
    sizes = {
        "vocab_size": n_vocab,
        "context_length": N_CTX_TRAIN,
        "embedding_length": N_EMBD,
        "block_count": N_LAYERS,
        "feed_forward_length": N_FF,
        "attention.layer_norm_rms_epsilon": NORM_EPSILON,
    }
    pairs = {
        "general.name": f"tiny {architecture}",
        "general.file_type": int(gguf.LlamaFileType.ALL_F32),
        **{f"{architecture}.{key}": value for key, value in {**sizes, **metadata}.items()},
        **spm_metadata(vocabulary, CHAT_TEMPLATE),
    }
    weights = {
        "token_embd.weight": uniform(rng, n_vocab, N_EMBD, scale=1.0),
        f"{norm}.weight": ones(N_EMBD),
        "output.weight": linear(rng, n_vocab, N_EMBD, gain=LOGIT_SCALE),
    }
    return write(path, architecture, pairs, weights | tensors)
