"""GGUF headers, read within bounds before native code sees the file.

What llama.cpp refuses is refused here with words (gguf.cpp, llama-model-loader.cpp), and so is what makes
it abort the whole process: wrong types of keys it does not check, impossible counts, a vocabulary that
names a token twice. Conditions of single architectures are left to the load. Long lists and texts are
passed over, not kept; `wingman.services.gguffile` does the reading.
Functions block for the disk: call them in an executor.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Final

from msgspec import Struct
from msgspec.structs import replace

from wingman.services.gguffile import (
    MAX_LAYERS,
    TOKENS,
    BadGguf,
    Cursor,
    Omitted,
    Value,
    padded,
    read_counts,
    read_pairs,
    read_tensors,
)

__all__ = ["BadGguf", "GgufHeader", "Omitted", "Value", "parse", "read_header", "read_parts"]

_MAX_COUNT: Final = 2**32 - 1
"""llama.cpp reads its counts as 32-bit words."""
_ALIGNMENT: Final = 32

_REQUIRED_KINDS: Final = {
    "general.architecture": ("string",),
    "general.alignment": ("uint32",),
    "split.no": ("uint16",),
    "split.count": ("uint16",),
    TOKENS: ("string[]",),
    "tokenizer.ggml.scores": ("float32[]", "int32[]"),
    "tokenizer.ggml.token_type": ("int32[]",),
    "tokenizer.ggml.merges": ("string[]",),
}
_ROPE_SCALINGS: Final = ("none", "linear", "yarn", "longrope")


class GgufHeader(Struct, frozen=True):
    """What a file, or a set of split files, says about itself. Counts that it does not tell are 0."""

    version: int
    metadata: dict[str, Value]
    """Lists of texts are always Omitted, those of numbers beyond 512, texts beyond 4096 bytes."""
    file_size: int
    """Bytes, of all parts."""
    tensor_bytes: int
    """The weights."""
    tensor_types: dict[str, int]
    """ggml's name of the type -> number of tensors."""
    n_tensors: int
    n_params: int

    def text(self, key: str) -> str:
        """A text of the metadata; "" when there is none."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) else ""

    def count(self, key: str) -> int:
        """A count of the metadata, the largest of a list of them; 0 when there is none."""
        value = self.metadata.get(key)
        values = value if isinstance(value, tuple) else (value,)
        return max((one for one in values if type(one) is int and 0 <= one <= _MAX_COUNT), default=0)

    def fact(self, name: str) -> int:
        """A count under the architecture's name, such as `attention.head_count`."""
        return self.count(f"{self.architecture}.{name}")

    @property
    def architecture(self) -> str:
        """The family, such as llama; "" in later parts of a split model."""
        return self.text("general.architecture")

    @property
    def name(self) -> str:
        """The model's name in words."""
        return self.text("general.name")

    @property
    def context_length(self) -> int:
        """Tokens the model was trained for."""
        return self.fact("context_length")

    @property
    def n_embd(self) -> int:
        """Width of a hidden state."""
        return self.fact("embedding_length")

    @property
    def n_layer(self) -> int:
        """Blocks; at most 512."""
        return self.fact("block_count")

    @property
    def n_head(self) -> int:
        """Attention heads, of the layer that has most."""
        return self.fact("attention.head_count")

    @property
    def n_head_kv(self) -> int:
        """Key and value heads, of the layer that has most."""
        return max(self.kv_heads(), default=0)

    @property
    def head_size_k(self) -> int:
        """Elements of one key."""
        return self.fact("attention.key_length") or self._head_size()

    @property
    def head_size_v(self) -> int:
        """Elements of one value."""
        return self.fact("attention.value_length") or self._head_size()

    @property
    def n_vocab(self) -> int:
        """Tokens of the vocabulary."""
        tokens = self.metadata.get(TOKENS)
        return tokens.length if isinstance(tokens, Omitted) else self.fact("vocab_size")

    @property
    def file_type(self) -> int:
        """llama_ftype; -1 when it does not say."""
        return self.count("general.file_type") if "general.file_type" in self.metadata else -1

    @property
    def split_no(self) -> int:
        """Which part of a split model this is, from 0."""
        return self.count("split.no")

    @property
    def split_count(self) -> int:
        """Number of parts."""
        return max(1, self.count("split.count"))

    def kv_heads(self) -> tuple[int, ...]:
        """Key and value heads of each layer; as many as attention heads unless it says otherwise."""
        key = f"{self.architecture}.attention.head_count_kv"
        listed = self.metadata.get(key)
        if isinstance(listed, tuple) and len(listed) == self.n_layer:
            return tuple(one if type(one) is int and 0 <= one <= _MAX_COUNT else 0 for one in listed)
        return (self.count(key) if key in self.metadata else self.n_head,) * self.n_layer

    def _head_size(self) -> int:
        return self.n_embd // self.n_head if self.n_head else 0


def read_header(path: Path) -> GgufHeader:
    """Read and check one file. Blocks; raises BadGguf."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would wait for ever
        with open(descriptor, "rb", buffering=0) as file:  # noqa: PTH123 - a descriptor
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise BadGguf("it is not a plain file")
            return parse(file, status.st_size)
    except OSError as error:
        raise BadGguf(f"it can't be read: {error.strerror}") from error


def read_parts(paths: Sequence[Path]) -> GgufHeader:
    """Read all parts of a model, in order: facts of the first, sizes and tensors of all. Raises BadGguf."""
    parts = [read_header(path) for path in paths]
    first = parts[0]
    if len(parts) != first.split_count or any(part.split_count != len(parts) for part in parts):
        raise BadGguf(f"the model has {first.split_count} parts, not {len(parts)}")
    if [part.split_no for part in parts] != list(range(len(parts))):
        raise BadGguf("its parts are not in order")
    n_tensors = sum(part.n_tensors for part in parts)
    if len(parts) > 1 and n_tensors != first.count("split.tensors.count"):
        raise BadGguf("tensors are missing in its parts")
    return replace(
        first,
        file_size=sum(part.file_size for part in parts),
        tensor_bytes=sum(part.tensor_bytes for part in parts),
        tensor_types=dict(sum((Counter(part.tensor_types) for part in parts), Counter[str]())),
        n_tensors=n_tensors,
        n_params=sum(part.n_params for part in parts),
    )


def parse(file: BinaryIO, size: int) -> GgufHeader:
    """Read and check a file of `size` bytes. Raises BadGguf."""
    cursor = Cursor(file, size)
    version, n_tensors, n_pairs = read_counts(cursor)
    metadata, kinds = read_pairs(cursor, n_pairs)
    _check_kinds(kinds)
    alignment = _alignment(metadata)
    tensors = list(read_tensors(cursor, n_tensors, alignment))
    end = padded(cursor.position, alignment) + tensors[-1].offset + tensors[-1].n_bytes if tensors else 0
    if end > size:
        raise BadGguf(f"it is incomplete: it has {size} bytes of {end}")
    header = GgufHeader(
        version,
        metadata,
        size,
        tensor_bytes=sum(tensor.n_bytes for tensor in tensors),
        tensor_types=dict(Counter(tensor.type_name for tensor in tensors)),
        n_tensors=n_tensors,
        n_params=sum(tensor.n_elements for tensor in tensors),
    )
    _check_model(header)
    return header


# -- what the loader takes for granted --------------------------------------------------------------


def _alignment(metadata: dict[str, Value]) -> int:
    value = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(value, int) or value.bit_count() != 1:
        raise BadGguf("its alignment is not a power of two")
    return value


def _check_kinds(kinds: dict[str, str]) -> None:
    for key, allowed in _REQUIRED_KINDS.items():
        if kinds.get(key, allowed[0]) not in allowed:
            raise BadGguf(f"{key} is {kinds[key]}, not {' or '.join(allowed)}")


def _check_model(header: GgufHeader) -> None:
    """What llama_model_load would refuse, or die of, in any architecture."""
    if header.split_no >= header.split_count:
        raise BadGguf(f"it is part {header.split_no + 1} of {header.split_count}")
    if header.split_no == 0 and not header.architecture:
        raise BadGguf("it does not say its architecture")
    if header.split_count == 1 and header.n_tensors == 0:
        raise BadGguf("it has no tensors")
    for key in ("scores", "token_type"):
        length = _length(header.metadata.get(f"tokenizer.ggml.{key}"))
        if length is not None and length < header.n_vocab:
            raise BadGguf(f"it has {header.n_vocab} tokens but {length} of their {key}")
    _check_layers(header)
    _check_experts(header)


def _length(value: Value | None) -> int | None:
    """Elements of a list; None for any other value."""
    return value.length if isinstance(value, Omitted) else len(value) if isinstance(value, tuple) else None


def _check_layers(header: GgufHeader) -> None:
    n_layer = header.n_layer
    if f"{header.architecture}.block_count" in header.metadata and not 0 < n_layer <= MAX_LAYERS:
        raise BadGguf(f"it can't have {n_layer} layers")
    if header.fact("nextn_predict_layers") > n_layer:
        raise BadGguf("it has more layers that predict ahead than layers")
    scaling = header.metadata.get(f"{header.architecture}.rope.scaling.type", "linear")
    if scaling not in _ROPE_SCALINGS:
        raise BadGguf("its positions are scaled in an unknown way")


def _check_experts(header: GgufHeader) -> None:
    """Rules of llama_model_base::load_hparams."""
    n_experts, n_used = header.fact("expert_count"), header.fact("expert_used_count")
    n_groups, n_groups_used = header.fact("expert_group_count"), header.fact("expert_group_used_count")
    if n_experts <= 1 and header.architecture.startswith("hunyuan"):
        return
    if n_experts:
        is_grouped = n_groups > 1
        is_sound = 0 < n_used <= n_experts and n_groups < n_experts
        is_sound &= not is_grouped or (n_experts % n_groups == 0 and 0 < n_groups_used < n_groups)
    else:
        is_sound = n_used == n_groups == 0
    if not is_sound:
        raise BadGguf(f"it can't use {n_used} of {n_experts} experts")
