"""A GGUF file from a stranger.

Invariant: reading its header gives facts within their bounds, or refuses with BadGguf; a file that
is cut short is refused. The corpus is what `python -m fuzz.gguf` writes.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping, Sequence
from typing import Final

from fuzz.mutate import corpus_dir
from wingman.services.gguf import BadGguf, GgufHeader, Omitted, parse

_CODES: Final = {
    "uint8": (0, "B"), "int8": (1, "b"), "uint16": (2, "H"), "int16": (3, "h"), "uint32": (4, "I"),
    "int32": (5, "i"), "float32": (6, "f"), "bool": (7, "?"), "string": (8, ""), "uint64": (10, "Q"),
    "int64": (11, "q"), "float64": (12, "d"),
}  # fmt: skip
TOKENS = (
    b"GGUF", b"\x03\x00\x00\x00", b"\x02\x00\x00\x00", b"\xff" * 8, b"\x00" * 8, b"\x00\x00\x00\x00\x00\x00\x00\x80",
    b"\x01" + bytes(7), b"\x09\x00\x00\x00", b"\x08\x00\x00\x00", b"\x04\x00\x00\x00", b"\x20" + bytes(7),
    b"\x14" + bytes(7) + b"general.architecture", b"llama.block_count", b"split.no", b"general.alignment",
    b"llama.expert_count", b"\x00\x00\x00\x40" + bytes(4),
)  # fmt: skip
Item = int | float | bool | str | bytes
Pair = tuple[str, Item | Sequence[Item]]
"""Name of a type and value; a list for an array of it."""

LLAMA: Final[dict[str, Pair]] = {
    "general.architecture": ("string", "llama"),
    "llama.block_count": ("uint32", 2),
    "llama.context_length": ("uint32", 512),
    "llama.embedding_length": ("uint32", 64),
    "llama.attention.head_count": ("uint32", 4),
    "llama.attention.head_count_kv": ("int32", [2, 1]),
    "tokenizer.ggml.tokens": ("string", ["a", "b", "", ""]),
    "tokenizer.ggml.scores": ("float32", [0.0, 1.0, 2.0, 3.0]),
    "tokenizer.ggml.token_type": ("int32", [1, 1, 1, 1]),
}
"""The pairs of a header that is accepted."""


def one(data: bytes) -> None:
    """Check the invariant for `data`."""
    header = _read(data)
    if header is None:
        return
    assert header.file_size == len(data)
    assert 0 < header.tensor_bytes < len(data) or header.split_count > 1
    assert sum(header.tensor_types.values()) == header.n_tensors <= len(data)
    assert 0 <= header.n_layer <= 512
    assert len(header.kv_heads()) == header.n_layer
    assert all(0 <= count < 2**32 for count in (header.n_head_kv, header.context_length, header.n_vocab))
    assert all(_is_small(value) for value in header.metadata.values())
    if header.n_tensors:
        assert _read(data[: header.tensor_bytes]) is None


def _read(data: bytes) -> GgufHeader | None:
    try:
        return parse(io.BytesIO(data), len(data))
    except BadGguf:
        return None


def _is_small(value: object) -> bool:
    return len(value) <= 4096 if isinstance(value, str | tuple) else isinstance(value, Omitted | int | float)


def build(
    pairs: Mapping[str, Pair],
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """The bytes of a file; `tensors` come from `tensor`."""
    head = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(pairs))
    head += b"".join(text(key) + _value(*pair) for key, pair in pairs.items()) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


def tensor(name: str, shape: Sequence[int], kind: int = 0, offset: int = 0) -> bytes:
    """A tensor's description."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def text(content: str | bytes) -> bytes:
    """A text with its length before it."""
    raw = content if isinstance(content, bytes) else content.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(kind: str, value: Item | Sequence[Item]) -> bytes:
    code, _ = _CODES[kind]
    if isinstance(value, list | tuple):
        return struct.pack("<IIQ", 9, code, len(value)) + b"".join(_item(kind, item) for item in value)
    return struct.pack("<I", code) + _item(kind, value)


def _item(kind: str, value: object) -> bytes:
    if isinstance(value, str | bytes):
        return text(value)
    return struct.pack(f"<{_CODES[kind][1]}", value)


def seeds() -> dict[str, bytes]:
    """The corpus by file name."""
    two = [tensor("token_embd.weight", [32, 4]), tensor("output.weight", [64], kind=8, offset=512)]
    whole = build(LLAMA, two, bytes(512 + 68))
    kinds: dict[str, Pair] = {f"key.{kind}": (kind, 1) for kind in _CODES if kind != "string"}
    lists: dict[str, Pair] = {key: (kind, [1, 1]) for key, (kind, _) in kinds.items()}
    split: dict[str, Pair] = {"split.no": ("uint16", 1), "split.count": ("uint16", 2)}
    one_tensor = [tensor("a", [1])]
    architecture: dict[str, Pair] = {"general.architecture": ("string", "llama")}
    return {
        "empty": b"",
        "magic": b"GGUF",
        "whole": whole,
        "version-2": build(LLAMA, two, bytes(580), version=2),
        "cut": whole[:-1],
        "kinds": build({**architecture, **kinds}, one_tensor, bytes(4)),
        "lists": build({**architecture, **lists}, one_tensor, bytes(4)),
        "part": build(split, one_tensor, bytes(4)),
        "aligned": build({**architecture, "general.alignment": ("uint32", 64)}, one_tensor, bytes(4), alignment=64),
        "big-endian": b"GGUF\x00\x00\x00\x03" + bytes(16),
        "huge-counts": b"GGUF\x03\x00\x00\x00" + b"\xff" * 16,
        "long-text": build({**architecture, "tokenizer.chat_template": ("string", "x" * 3000)}, one_tensor, bytes(4)),
        "experts": build(
            {**LLAMA, "llama.expert_count": ("uint32", 8), "llama.expert_used_count": ("uint32", 2)}, two, bytes(580)
        ),
    }  # fmt: skip


if __name__ == "__main__":
    for name, content in seeds().items():
        (corpus_dir("gguf") / name).write_bytes(content)
