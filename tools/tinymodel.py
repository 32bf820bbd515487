"""Tiny GGUF models with random weights, for tests that need a real runtime but no sense.

They have every part of a big model (vocabulary with scores, special tokens, chat template, weights
of the published shapes) at a few hundred kilobytes. What they say is noise, byte tokens included, so
invalid UTF-8 comes out as it does from a real model cut off in the middle of a character. The same
arguments give the same bytes. `tinycaches` has models that remember in other ways.
"""

from __future__ import annotations

import argparse
import string
from collections.abc import Sequence
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
    REPO_TOKENS,
    SPACE,
    SUFFIXES,
    WORDS,
    Tensors,
    Vocabulary,
    attention,
    feed_forward,
    linear,
    ones,
    spm_metadata,
    spm_vocabulary,
    token_lists,
    uniform,
    write,
)

LORA_RANK: Final = 8

BERT_N_CTX: Final = 128
"""Positions a BERT model has; more tokens than that can't be encoded at once."""

POOLINGS: Final = {
    "none": gguf.PoolingType.NONE,
    "mean": gguf.PoolingType.MEAN,
    "cls": gguf.PoolingType.CLS,
    "last": gguf.PoolingType.LAST,
    "rank": gguf.PoolingType.RANK,
}

# -- llama ----------------------------------------------------------------------------------------


def write_llama(
    path: Path,
    *,
    seed: int = 0,
    n_ctx_train: int = 512,
    n_splits: int = 1,
    chat_template: str | None = CHAT_TEMPLATE,
    knows_repositories: bool = False,
) -> Path:
    """Write a generating model of the llama architecture; the path of the (first) file.

    `n_ctx_train` is in tokens. With `n_splits` above 1 the tensors are spread over files named
    like `path` with -00001-of-0000N before the suffix. `chat_template` None leaves it out.
    `knows_repositories` adds the tokens that separate the files of a repository. Raises
    ValueError when there are fewer tensors than files, OSError when a file can't be written.
    """
    vocabulary = spm_vocabulary(REPO_TOKENS if knows_repositories else {})
    metadata = _llama_metadata(vocabulary, n_ctx_train, chat_template)
    return write(path, "llama", metadata, _llama_tensors(seed, len(vocabulary.texts)), n_splits)


def _llama_metadata(vocabulary: Vocabulary, n_ctx_train: int, chat_template: str | None) -> dict[str, Any]:
    return {
        "general.name": "tiny llama",
        "general.file_type": int(gguf.LlamaFileType.ALL_F32),
        "llama.vocab_size": len(vocabulary.texts),
        "llama.context_length": n_ctx_train,
        "llama.embedding_length": N_EMBD,
        "llama.block_count": N_LAYERS,
        "llama.feed_forward_length": N_FF,
        "llama.attention.head_count": N_HEADS,
        "llama.attention.head_count_kv": N_KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": NORM_EPSILON,
        "llama.rope.dimension_count": N_EMBD // N_HEADS,
        **spm_metadata(vocabulary, chat_template),
    }


def _llama_tensors(seed: int, n_vocab: int) -> Tensors:
    rng = np.random.default_rng(seed)
    tensors = {"token_embd.weight": uniform(rng, n_vocab, N_EMBD, scale=1.0)}
    for layer in range(N_LAYERS):
        tensors |= attention(rng, layer) | feed_forward(rng, layer)
    tensors["output_norm.weight"] = ones(N_EMBD)
    tensors["output.weight"] = linear(rng, n_vocab, N_EMBD, gain=LOGIT_SCALE)
    return tensors


# -- lora -----------------------------------------------------------------------------------------


def write_lora(path: Path, *, seed: int = 0) -> Path:
    """Write a LoRA adapter for any model of `write_llama`; returns `path`.

    At scale 1 it weighs as much as the weights it adapts, so that greedy output is another from the
    first tokens on. Raises OSError when the file can't be written.
    """
    rng = np.random.default_rng(seed)
    shapes = {f"blk.{layer}.ffn_down": (N_EMBD, N_FF) for layer in range(N_LAYERS)}
    shapes |= {f"blk.{layer}.attn_output": (N_EMBD, N_EMBD) for layer in range(N_LAYERS)}
    tensors: Tensors = {}
    for name, (n_out, n_in) in shapes.items():
        tensors[f"{name}.weight.lora_a"] = linear(rng, LORA_RANK, n_in)
        tensors[f"{name}.weight.lora_b"] = linear(rng, n_out, LORA_RANK)
    metadata = {
        "general.type": "adapter",
        "general.name": "tiny adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(LORA_RANK),
        "adapter.lora.task_name": f"noise {seed}",
    }
    return write(path, "llama", metadata, tensors, n_splits=1)


# -- bert -----------------------------------------------------------------------------------------


def write_bert(path: Path, *, seed: int = 0, pooling: str = "mean") -> Path:
    """Write an embedding model of the bert architecture; returns `path`.

    `pooling` is a key of POOLINGS; "rank" adds the classification head of a reranker, with one
    score. Raises ValueError for another pooling, OSError when the file can't be written.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, not {pooling!r}")
    vocabulary = _wordpiece_vocabulary()
    tensors = _bert_tensors(seed, len(vocabulary.texts), has_head=pooling == "rank")
    return write(path, "bert", _bert_metadata(vocabulary, pooling), tensors, n_splits=1)


def _wordpiece_vocabulary() -> Vocabulary:
    """A WordPiece vocabulary: specials, beginnings of words (marked as in llama.cpp), continuations."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = string.ascii_lowercase + string.digits
    words = [*letters, *string.punctuation, *WORDS]
    texts = [*specials, *(SPACE + word for word in words), *letters, *SUFFIXES]
    n_plain = len(texts) - len(specials)
    control, unknown = gguf.TokenType.CONTROL, gguf.TokenType.UNKNOWN
    types = [control, unknown, control, control, control, *([gguf.TokenType.NORMAL] * n_plain)]
    return Vocabulary(tuple(texts), tuple(map(int, types)), (0.0,) * len(texts))


def _bert_metadata(vocabulary: Vocabulary, pooling: str) -> dict[str, Any]:
    return {
        "general.name": f"tiny bert ({pooling})",
        "general.file_type": int(gguf.LlamaFileType.ALL_F32),
        "bert.vocab_size": len(vocabulary.texts),
        "bert.context_length": BERT_N_CTX,
        "bert.embedding_length": N_EMBD,
        "bert.block_count": N_LAYERS,
        "bert.feed_forward_length": N_FF,
        "bert.attention.head_count": N_HEADS,
        "bert.attention.layer_norm_epsilon": NORM_EPSILON,
        "bert.attention.causal": False,
        "bert.pooling_type": int(POOLINGS[pooling]),
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.pre": "default",
        **token_lists(vocabulary),
        "tokenizer.ggml.token_type_count": 2,
        "tokenizer.ggml.bos_token_id": vocabulary.id("[CLS]"),
        "tokenizer.ggml.eos_token_id": vocabulary.id("[SEP]"),
        "tokenizer.ggml.unknown_token_id": vocabulary.id("[UNK]"),
        "tokenizer.ggml.seperator_token_id": vocabulary.id("[SEP]"),  # the format spells it so
        "tokenizer.ggml.padding_token_id": vocabulary.id("[PAD]"),
        "tokenizer.ggml.mask_token_id": vocabulary.id("[MASK]"),
    }


def _bert_tensors(seed: int, n_vocab: int, *, has_head: bool) -> Tensors:
    rng = np.random.default_rng(seed)
    tensors = {
        "token_embd.weight": uniform(rng, n_vocab, N_EMBD, scale=1.0),
        "token_types.weight": uniform(rng, 2, N_EMBD, scale=0.1),
        "position_embd.weight": uniform(rng, BERT_N_CTX, N_EMBD, scale=0.1),
        **_norm("token_embd_norm"),
    }
    for layer in range(N_LAYERS):
        block = f"blk.{layer}"
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensors |= _biased(rng, f"{block}.{name}", N_EMBD, N_EMBD)
        tensors |= _norm(f"{block}.attn_output_norm")
        tensors |= _biased(rng, f"{block}.ffn_up", N_FF, N_EMBD)
        tensors |= _biased(rng, f"{block}.ffn_down", N_EMBD, N_FF)
        tensors |= _norm(f"{block}.layer_output_norm")
    if has_head:
        tensors |= _biased(rng, "cls", N_EMBD, N_EMBD)
        tensors |= _biased(rng, "cls.output", 1, N_EMBD)
    return tensors


def _biased(rng: np.random.Generator, name: str, n_out: int, n_in: int) -> Tensors:
    bias = uniform(rng, n_out, scale=0.1)
    return {f"{name}.weight": linear(rng, n_out, n_in), f"{name}.bias": bias}


def _norm(name: str) -> Tensors:
    return {f"{name}.weight": ones(N_EMBD), f"{name}.bias": np.zeros(N_EMBD, np.float32)}


# -- command line ---------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = _build_parser()
    options = parser.parse_args(argv)
    try:
        if options.kind == "llama":
            path = write_llama(
                options.path,
                seed=options.seed,
                n_ctx_train=options.n_ctx_train,
                n_splits=options.splits,
                knows_repositories=options.knows_repositories,
            )
        elif options.kind == "lora":
            path = write_lora(options.path, seed=options.seed)
        else:
            path = write_bert(options.path, seed=options.seed, pooling=options.pooling)
    except (OSError, ValueError) as error:
        parser.exit(1, f"tinymodel: {error}\n")
    print(path)
    return 0


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.tinymodel",
        description="Write a tiny GGUF model with random weights, for tests.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    llama = kinds.add_parser("llama", help="a model that generates text (noise)")
    bert = kinds.add_parser("bert", help="a model that makes embeddings, or ranks with --pooling rank")
    lora = kinds.add_parser("lora", help="an adapter that makes a llama model say other things")
    for kind in (llama, bert, lora):
        kind.add_argument("path", type=Path, metavar="FILE", help="where to write; ends in .gguf")
        kind.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the weights (default: 0)")
    llama.add_argument(
        "--n-ctx-train", type=int, default=512, metavar="TOKENS", help="context length (default: 512)"
    )
    llama.add_argument(
        "--splits", type=int, default=1, metavar="N", help="files to spread the tensors over (default: 1)"
    )
    llama.add_argument(
        "--knows-repositories", action="store_true", help="add the tokens of fill-in-the-middle over files"
    )
    bert.add_argument("--pooling", choices=tuple(POOLINGS), default="mean", help="(default: mean)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
