"""Tiny GGUF models with random weights, for tests that need a real runtime but no sense.

They have every part of a big model (vocabulary with scores, special tokens, chat template, weights
of the published shapes) at a few hundred kilobytes. What they say is noise, byte tokens included, so
invalid UTF-8 comes out as it does from a real model cut off in the middle of a character. The same
arguments give the same bytes: weights are uniform numbers of a seeded PCG64, scaled by the fan-in
so that activations keep their size from layer to layer.
"""

from __future__ import annotations

import argparse
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import numpy.typing as npt

Weights = npt.NDArray[np.float32]
Tensors = dict[str, Weights]

N_EMBD: Final = 64
N_LAYERS: Final = 2
N_HEADS: Final = 4
N_KV_HEADS: Final = 2
N_FF: Final = 128
NORM_EPSILON: Final = 1e-5
LOGIT_SCALE: Final = 2.0
"""Spread of the llama model's logits: enough that greedy choices don't hang on the last bit."""

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

CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML, whose two markers are control tokens of the vocabulary."""

_FIM_TOKENS: Final = {
    "fim_pre": "<|fim_prefix|>",
    "fim_suf": "<|fim_suffix|>",
    "fim_mid": "<|fim_middle|>",
}
_REPO_TOKENS: Final = {"fim_rep": "<|repo_name|>", "fim_sep": "<|file_sep|>"}
"""Special tokens by the names of their metadata keys."""

_WORDS: Final = (
    "the and that with this have from they will what there would about which when make can like time "
    "just him know take people into year your good some could them see other than then now look only come "
    "over think also back after use two how our work first well way even new want because any these give day "
    "most us hello world one"
).split()
_SUFFIXES: Final = ("ing", "er", "ed", "es", "ly", "ion", "al", "est")
_SPACE: Final = "\u2581"
"""How SentencePiece, and llama.cpp for WordPiece too, writes a space inside a token."""
_MAX_SPLITS: Final = 99_999


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """Tokens in order of their ids, with what llama.cpp wants to know about each."""

    texts: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]

    def id(self, text: str) -> int:
        """The id of a token."""
        return self.texts.index(text)


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
    vocabulary = _spm_vocabulary(_REPO_TOKENS if knows_repositories else {})
    metadata = _llama_metadata(vocabulary, n_ctx_train, chat_template)
    return _write(path, "llama", metadata, _llama_tensors(seed, len(vocabulary.texts)), n_splits)


def _spm_vocabulary(extra: Mapping[str, str]) -> _Vocabulary:
    """A SentencePiece vocabulary: specials, all bytes, printable ASCII, and pieces of common words."""
    specials = ["<|im_start|>", "<|im_end|>", *_FIM_TOKENS.values(), *extra.values()]
    heads = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    letters = [_SPACE, *(chr(code) for code in range(0x21, 0x7F))]
    pieces = _prefix_closed([_SPACE + word for word in _WORDS] + list(_SUFFIXES))
    texts = [*heads, *byte_tokens, *letters, *pieces, *specials]
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    types = [gguf.TokenType.UNKNOWN, control, control]
    types += [gguf.TokenType.BYTE] * len(byte_tokens)
    types += [normal] * (len(letters) + len(pieces)) + [control] * len(specials)
    scores = [0.0] * (len(heads) + len(byte_tokens))
    scores += [-float(rank) for rank in range(len(letters) + len(pieces))] + [0.0] * len(specials)
    return _Vocabulary(tuple(texts), tuple(map(int, types)), tuple(scores))


def _prefix_closed(pieces: Sequence[str]) -> list[str]:
    """The pieces with all their beginnings of two characters and more, shortest first.

    SentencePiece joins two neighbours at a time, so a long piece needs its beginnings to be reached.
    """
    beginnings = {piece[:end] for piece in pieces for end in range(2, len(piece) + 1)}
    return sorted(beginnings, key=lambda piece: (len(piece), piece))


def _llama_metadata(vocabulary: _Vocabulary, n_ctx_train: int, chat_template: str | None) -> dict[str, Any]:
    metadata: dict[str, Any] = {
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
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        **_token_lists(vocabulary),
        "tokenizer.ggml.unknown_token_id": vocabulary.id("<unk>"),
        "tokenizer.ggml.bos_token_id": vocabulary.id("<s>"),
        "tokenizer.ggml.eos_token_id": vocabulary.id("</s>"),
        **{
            f"tokenizer.ggml.{name}_token_id": vocabulary.id(text)
            for name, text in (_FIM_TOKENS | _REPO_TOKENS).items()
            if text in vocabulary.texts
        },
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }
    if chat_template is not None:
        metadata["tokenizer.chat_template"] = chat_template
    return metadata


def _llama_tensors(seed: int, n_vocab: int) -> Tensors:
    rng = np.random.default_rng(seed)
    n_kv = N_EMBD // N_HEADS * N_KV_HEADS
    tensors = {"token_embd.weight": _uniform(rng, n_vocab, N_EMBD, scale=1.0)}
    for layer in range(N_LAYERS):
        block = {
            "attn_norm": _ones(N_EMBD),
            "attn_q": _linear(rng, N_EMBD, N_EMBD),
            "attn_k": _linear(rng, n_kv, N_EMBD),
            "attn_v": _linear(rng, n_kv, N_EMBD),
            "attn_output": _linear(rng, N_EMBD, N_EMBD),
            "ffn_norm": _ones(N_EMBD),
            "ffn_gate": _linear(rng, N_FF, N_EMBD),
            "ffn_up": _linear(rng, N_FF, N_EMBD),
            "ffn_down": _linear(rng, N_EMBD, N_FF),
        }
        tensors |= {f"blk.{layer}.{name}.weight": weights for name, weights in block.items()}
    tensors["output_norm.weight"] = _ones(N_EMBD)
    tensors["output.weight"] = _linear(rng, n_vocab, N_EMBD, gain=LOGIT_SCALE)
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
        tensors[f"{name}.weight.lora_a"] = _linear(rng, LORA_RANK, n_in)
        tensors[f"{name}.weight.lora_b"] = _linear(rng, n_out, LORA_RANK)
    metadata = {
        "general.type": "adapter",
        "general.name": "tiny adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(LORA_RANK),
        "adapter.lora.task_name": f"noise {seed}",
    }
    return _write(path, "llama", metadata, tensors, n_splits=1)


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
    return _write(path, "bert", _bert_metadata(vocabulary, pooling), tensors, n_splits=1)


def _wordpiece_vocabulary() -> _Vocabulary:
    """A WordPiece vocabulary: specials, beginnings of words (marked as in llama.cpp), continuations."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = string.ascii_lowercase + string.digits
    words = [*letters, *string.punctuation, *_WORDS]
    texts = [*specials, *(_SPACE + word for word in words), *letters, *_SUFFIXES]
    n_plain = len(texts) - len(specials)
    control, unknown = gguf.TokenType.CONTROL, gguf.TokenType.UNKNOWN
    types = [control, unknown, control, control, control, *([gguf.TokenType.NORMAL] * n_plain)]
    return _Vocabulary(tuple(texts), tuple(map(int, types)), (0.0,) * len(texts))


def _bert_metadata(vocabulary: _Vocabulary, pooling: str) -> dict[str, Any]:
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
        **_token_lists(vocabulary),
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
        "token_embd.weight": _uniform(rng, n_vocab, N_EMBD, scale=1.0),
        "token_types.weight": _uniform(rng, 2, N_EMBD, scale=0.1),
        "position_embd.weight": _uniform(rng, BERT_N_CTX, N_EMBD, scale=0.1),
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


# -- weights --------------------------------------------------------------------------------------


def _uniform(rng: np.random.Generator, *shape: int, scale: float) -> Weights:
    """Uniform numbers around 0 whose standard deviation is `scale`."""
    spread = 2 * scale * np.sqrt(3.0)
    return np.asarray((rng.random(shape) - 0.5) * spread, np.float32)


def _linear(rng: np.random.Generator, n_out: int, n_in: int, gain: float = 1.0) -> Weights:
    return _uniform(rng, n_out, n_in, scale=gain / float(np.sqrt(n_in)))


def _biased(rng: np.random.Generator, name: str, n_out: int, n_in: int) -> Tensors:
    bias = _uniform(rng, n_out, scale=0.1)
    return {f"{name}.weight": _linear(rng, n_out, n_in), f"{name}.bias": bias}


def _norm(name: str) -> Tensors:
    return {f"{name}.weight": _ones(N_EMBD), f"{name}.bias": np.zeros(N_EMBD, np.float32)}


def _ones(size: int) -> Weights:
    return np.ones(size, np.float32)


# -- file -----------------------------------------------------------------------------------------


def _token_lists(vocabulary: _Vocabulary) -> dict[str, Any]:
    return {
        "tokenizer.ggml.tokens": list(vocabulary.texts),
        "tokenizer.ggml.scores": list(vocabulary.scores),
        "tokenizer.ggml.token_type": list(vocabulary.types),
    }


@dataclass(frozen=True, slots=True)
class _Split:
    """Which of how many files a part is; `n_tensors` counts those of all files together."""

    number: int
    n_splits: int
    n_tensors: int


def _write(
    path: Path, architecture: str, metadata: Mapping[str, Any], tensors: Tensors, n_splits: int
) -> Path:
    """Write one file, or `n_splits` of them laid out as by llama-gguf-split: metadata in the first only."""
    if not 1 <= n_splits <= min(len(tensors), _MAX_SPLITS):
        raise ValueError(f"{len(tensors)} tensors can't be split into {n_splits} files")
    if n_splits == 1:
        _write_file(path, architecture, metadata, tensors)
        return path
    names = list(tensors)
    for number in range(n_splits):
        start, end = (len(names) * edge // n_splits for edge in (number, number + 1))
        _write_file(
            _part_path(path, number, n_splits),
            architecture,
            metadata if number == 0 else {},
            {name: tensors[name] for name in names[start:end]},
            _Split(number, n_splits, len(names)),
        )
    return _part_path(path, 0, n_splits)


def _part_path(path: Path, number: int, n_splits: int) -> Path:
    return path.with_name(f"{path.stem}-{number + 1:05d}-of-{n_splits:05d}.gguf")


def _write_file(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Tensors,
    split: _Split | None = None,
) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _add(writer, key, value)
    if split is not None:
        writer.add_uint16("split.no", split.number)
        writer.add_uint16("split.count", split.n_splits)
        writer.add_int32("split.tensors.count", split.n_tensors)
    for name, weights in tensors.items():
        writer.add_tensor(name, weights)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add one pair with the type llama.cpp expects: counts and ids are uint32, lists go by their items."""
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


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
