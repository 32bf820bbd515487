"""What the tiny models have in common: sizes, vocabulary, weights, and the file they are written to.

Used by `tinymodel` and `tinycaches`. Weights are uniform numbers of a seeded PCG64, scaled by the fan-in so
that activations keep their size from layer to layer.
"""

from __future__ import annotations

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
REPO_TOKENS: Final = {"fim_rep": "<|repo_name|>", "fim_sep": "<|file_sep|>"}
"""Special tokens by the names of their metadata keys."""

WORDS: Final = (
    "the and that with this have from they will what there would about which when make can like time "
    "just him know take people into year your good some could them see other than then now look only come "
    "over think also back after use two how our work first well way even new want because any these give day "
    "most us hello world one"
).split()
SUFFIXES: Final = ("ing", "er", "ed", "es", "ly", "ion", "al", "est")
SPACE: Final = "\u2581"
"""How SentencePiece, and llama.cpp for WordPiece too, writes a space inside a token."""
_MAX_SPLITS: Final = 99_999


# -- vocabulary -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens in order of their ids, with what llama.cpp wants to know about each."""

    texts: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]

    def id(self, text: str) -> int:
        """The id of a token."""
        return self.texts.index(text)


def spm_vocabulary(extra: Mapping[str, str]) -> Vocabulary:
    """A SentencePiece vocabulary: specials, all bytes, printable ASCII, and pieces of common words."""
    specials = ["<|im_start|>", "<|im_end|>", *_FIM_TOKENS.values(), *extra.values()]
    heads = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    letters = [SPACE, *(chr(code) for code in range(0x21, 0x7F))]
    pieces = _prefix_closed([SPACE + word for word in WORDS] + list(SUFFIXES))
    texts = [*heads, *byte_tokens, *letters, *pieces, *specials]
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    types = [gguf.TokenType.UNKNOWN, control, control]
    types += [gguf.TokenType.BYTE] * len(byte_tokens)
    types += [normal] * (len(letters) + len(pieces)) + [control] * len(specials)
    scores = [0.0] * (len(heads) + len(byte_tokens))
    scores += [-float(rank) for rank in range(len(letters) + len(pieces))] + [0.0] * len(specials)
    return Vocabulary(tuple(texts), tuple(map(int, types)), tuple(scores))


def _prefix_closed(pieces: Sequence[str]) -> list[str]:
    """The pieces with all their beginnings of two characters and more, shortest first.

    SentencePiece joins two neighbours at a time, so a long piece needs its beginnings to be reached.
    """
    beginnings = {piece[:end] for piece in pieces for end in range(2, len(piece) + 1)}
    return sorted(beginnings, key=lambda piece: (len(piece), piece))


def spm_metadata(vocabulary: Vocabulary, chat_template: str | None) -> dict[str, Any]:
    """The metadata of a SentencePiece tokenizer."""
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        **token_lists(vocabulary),
        "tokenizer.ggml.unknown_token_id": vocabulary.id("<unk>"),
        "tokenizer.ggml.bos_token_id": vocabulary.id("<s>"),
        "tokenizer.ggml.eos_token_id": vocabulary.id("</s>"),
        **{
            f"tokenizer.ggml.{name}_token_id": vocabulary.id(text)
            for name, text in (_FIM_TOKENS | REPO_TOKENS).items()
            if text in vocabulary.texts
        },
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }
    if chat_template is not None:
        metadata["tokenizer.chat_template"] = chat_template
    return metadata


def token_lists(vocabulary: Vocabulary) -> dict[str, Any]:
    """The metadata of any vocabulary."""
    return {
        "tokenizer.ggml.tokens": list(vocabulary.texts),
        "tokenizer.ggml.scores": list(vocabulary.scores),
        "tokenizer.ggml.token_type": list(vocabulary.types),
    }


# -- weights --------------------------------------------------------------------------------------


def uniform(rng: np.random.Generator, *shape: int, scale: float) -> Weights:
    """Uniform numbers around 0 whose standard deviation is `scale`."""
    spread = 2 * scale * np.sqrt(3.0)
    return np.asarray((rng.random(shape) - 0.5) * spread, np.float32)


def linear(rng: np.random.Generator, n_out: int, n_in: int, gain: float = 1.0) -> Weights:
    """A matrix whose outputs are `gain` times as large as its inputs."""
    return uniform(rng, n_out, n_in, scale=gain / float(np.sqrt(n_in)))


def ones(size: int) -> Weights:
    """What a norm multiplies with."""
    return np.ones(size, np.float32)


def attention(rng: np.random.Generator, layer: int, n_head: int = N_EMBD // N_HEADS) -> Tensors:
    """The weights of an attention block whose heads are `n_head` wide."""
    n_q, n_kv = n_head * N_HEADS, n_head * N_KV_HEADS
    block = {
        "attn_norm": ones(N_EMBD),
        "attn_q": linear(rng, n_q, N_EMBD),
        "attn_k": linear(rng, n_kv, N_EMBD),
        "attn_v": linear(rng, n_kv, N_EMBD),
        "attn_output": linear(rng, N_EMBD, n_q),
    }
    return in_layer(layer, block)


def feed_forward(rng: np.random.Generator, layer: int) -> Tensors:
    """The weights of a gated feed-forward block."""
    block = {
        "ffn_norm": ones(N_EMBD),
        "ffn_gate": linear(rng, N_FF, N_EMBD),
        "ffn_up": linear(rng, N_FF, N_EMBD),
        "ffn_down": linear(rng, N_EMBD, N_FF),
    }
    return in_layer(layer, block)


def in_layer(layer: int, block: Mapping[str, Weights]) -> Tensors:
    """Weights under the names they have in a layer."""
    return {f"blk.{layer}.{name}.weight": weights for name, weights in block.items()}


# -- file -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Split:
    """Which of how many files a part is; `n_tensors` counts those of all files together."""

    number: int
    n_splits: int
    n_tensors: int


def write(
    path: Path, architecture: str, metadata: Mapping[str, Any], tensors: Tensors, n_splits: int = 1
) -> Path:
    """Write one file, or `n_splits` of them laid out as by llama-gguf-split: metadata in the first only.
    Raises ValueError when there are fewer tensors than files."""
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
