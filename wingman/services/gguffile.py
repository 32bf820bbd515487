"""The bytes of a GGUF header: pairs and tensor descriptions, in windows of a file, each within a bound.

The layout is that of versions 2 and 3, little-endian: magic, version, counts, key-value pairs,
descriptions of the tensors, their data (docs/gguf.md of ggml). Every length is checked against a cap and the
file's size before it is believed. Used by `wingman.services.gguf` alone; blocks for the disk.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import BinaryIO, Final

from msgspec import Struct

from wingman.errors import WingmanError

Scalar = int | float | bool | str

MAX_LAYERS: Final = 512
"""LLAMA_MAX_LAYERS."""
TOKENS: Final = "tokenizer.ggml.tokens"
_MAX_HEADER_BYTES: Final = 128 << 20
"""The largest vocabularies take some 16 MiB."""
_MAX_PAIRS: Final = 1024
_MAX_TENSORS: Final = 65_536
_MAX_KEY_BYTES: Final = 1024
_MAX_NAME_BYTES: Final = 63
"""GGML_MAX_NAME with its terminator."""
_MAX_TEXTS: Final = 2 << 20
"""In lists; the largest vocabularies known have a quarter of a million tokens and twice as many merges."""
_MAX_DIMS: Final = 4
_MAX_ELEMENTS: Final = 2**63 - 1
_KEPT_BYTES: Final = 4096
_KEPT_ELEMENTS: Final = MAX_LAYERS
_WINDOW_BYTES: Final = 1 << 20
_WORD: Final = struct.Struct("<I")
_LENGTH: Final = struct.Struct("<Q")

_SCALARS: Final = {  # gguf_type
    0: ("uint8", struct.Struct("<B")),
    1: ("int8", struct.Struct("<b")),
    2: ("uint16", struct.Struct("<H")),
    3: ("int16", struct.Struct("<h")),
    4: ("uint32", struct.Struct("<I")),
    5: ("int32", struct.Struct("<i")),
    6: ("float32", struct.Struct("<f")),
    7: ("bool", struct.Struct("<?")),
    10: ("uint64", struct.Struct("<Q")),
    11: ("int64", struct.Struct("<q")),
    12: ("float64", struct.Struct("<d")),
}
_STRING: Final = 8
_ARRAY: Final = 9

TENSOR_TYPES: Final = {  # ggml_type: name, elements and bytes of a block (ggml.c, ggml-common.h)
    0: ("f32", 1, 4), 1: ("f16", 1, 2), 2: ("q4_0", 32, 18), 3: ("q4_1", 32, 20), 6: ("q5_0", 32, 22),
    7: ("q5_1", 32, 24), 8: ("q8_0", 32, 34), 9: ("q8_1", 32, 36), 10: ("q2_K", 256, 84),
    11: ("q3_K", 256, 110), 12: ("q4_K", 256, 144), 13: ("q5_K", 256, 176), 14: ("q6_K", 256, 210),
    15: ("q8_K", 256, 292), 16: ("iq2_xxs", 256, 66), 17: ("iq2_xs", 256, 74), 18: ("iq3_xxs", 256, 98),
    19: ("iq1_s", 256, 50), 20: ("iq4_nl", 32, 18), 21: ("iq3_s", 256, 110), 22: ("iq2_s", 256, 82),
    23: ("iq4_xs", 256, 136), 24: ("i8", 1, 1), 25: ("i16", 1, 2), 26: ("i32", 1, 4), 27: ("i64", 1, 8),
    28: ("f64", 1, 8), 29: ("iq1_m", 256, 56), 30: ("bf16", 1, 2), 34: ("tq1_0", 256, 54),
    35: ("tq2_0", 256, 66), 39: ("mxfp4", 32, 17), 40: ("nvfp4", 64, 36), 41: ("q1_0", 128, 18),
    42: ("q2_0", 64, 18),
}  # fmt: skip
_REMOVED_TYPES: Final = {
    4: "q4_2", 5: "q4_3", 31: "q4_0_4_4", 32: "q4_0_4_8", 33: "q4_0_8_8", 36: "iq4_nl_4_4", 37: "iq4_nl_4_8",
    38: "iq4_nl_8_8",
}  # fmt: skip


class BadGguf(WingmanError):
    """The file is no GGUF file that can be used; the message says why."""


class Omitted(Struct, frozen=True):
    """Stands for a list or text that was too long to keep; `length` in elements or bytes."""

    length: int


Value = Scalar | tuple[Scalar, ...] | Omitted


class Cursor:
    """Reads forward through windows of a file, up to its end or the cap of headers."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self._window = b""
        self._start = 0
        self._at = 0
        self._n_texts = 0

    @property
    def position(self) -> int:
        """Where the next byte is read, from the start of the file."""
        return self._start + self._at

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if self._at + count > len(self._window):
            self._fill(self._at, count)
        self._at += count
        return self._window[self._at - count : self._at]

    def skip(self, count: int) -> None:
        """Pass over bytes."""
        self._check(self._at, count)
        self._at += count

    def unpack(self, layout: struct.Struct) -> tuple[Scalar, ...]:
        """The next numbers."""
        return layout.unpack(self.take(layout.size))

    def number(self, layout: struct.Struct = _WORD) -> int:
        """The next whole number."""
        return int(self.unpack(layout)[0])

    def text(self, most: int, what: str) -> bytes:
        """The next text, of at most so many bytes."""
        length = self.number(_LENGTH)
        if length > most:
            raise BadGguf(f"{what} is longer than {most} bytes")
        return self.take(length)

    def skip_texts(self, count: int) -> None:
        """Pass over texts by their lengths alone: a vocabulary has hundreds of thousands."""
        self._count(count)
        window, at, unpack, head = self._window, self._at, _LENGTH.unpack_from, _LENGTH.size
        end = len(window) - head
        for _ in range(count):
            if at > end:
                self._fill(at, head)
                window, at = self._window, 0
                end = len(window) - head
            at += head + unpack(window, at)[0]
        self._check(at, 0)
        self._at = at

    def texts(self, count: int) -> list[bytes]:
        """The next texts."""
        self._count(count)
        texts: list[bytes] = []
        window, at, unpack, head = self._window, self._at, _LENGTH.unpack_from, _LENGTH.size
        end = len(window)
        for _ in range(count):
            if at + head > end:
                self._fill(at, head)
                window, at, end = self._window, 0, len(self._window)
            start = at + head
            at = start + unpack(window, at)[0]
            if at > end:
                self._fill(start, at - start)
                window, start, at, end = self._window, 0, at - start, len(self._window)
            texts.append(window[start:at])
        self._at = at
        return texts

    def _count(self, count: int) -> None:
        self._n_texts += count
        if self._n_texts > _MAX_TEXTS:
            raise BadGguf(f"its lists have {self._n_texts} texts")

    def _check(self, at: int, count: int) -> None:
        end = self._start + at + count
        if end > self._size:
            raise BadGguf("it ends within its header")
        if end > _MAX_HEADER_BYTES:
            raise BadGguf(f"its header is larger than {_MAX_HEADER_BYTES >> 20} MiB")

    def _fill(self, at: int, count: int) -> None:
        """Let the window begin at `at` of the present one and hold `count` bytes at least."""
        self._check(at, count)
        self._start, self._at = self._start + at, 0
        self._file.seek(self._start)
        self._window = self._file.read(max(count, _WINDOW_BYTES)) or b""
        if len(self._window) < count:
            raise BadGguf("it ends within its header")  # it became shorter meanwhile


def read_counts(cursor: Cursor) -> tuple[int, int, int]:
    """Version, number of tensors, number of pairs; what a file begins with. Raises BadGguf."""
    if cursor.take(4) != b"GGUF":
        raise BadGguf("it is not a GGUF file")
    version = cursor.number()
    if version and version & 0xFFFF == 0:
        raise BadGguf("it is big-endian")
    if version not in (2, 3):
        raise BadGguf(f"it is of GGUF version {version}; 2 and 3 can be read")
    n_tensors, n_pairs = cursor.number(_LENGTH), cursor.number(_LENGTH)
    if n_pairs > _MAX_PAIRS or n_tensors > _MAX_TENSORS:
        raise BadGguf(f"it claims {n_pairs} key-value pairs and {n_tensors} tensors")
    return version, n_tensors, n_pairs


def read_pairs(cursor: Cursor, n_pairs: int) -> tuple[dict[str, Value], dict[str, str]]:
    """Values, and the names of their types, by key. Raises BadGguf."""
    metadata: dict[str, Value] = {}
    kinds: dict[str, str] = {}
    for _ in range(n_pairs):
        key = cursor.text(_MAX_KEY_BYTES, "a key").decode("utf-8", "backslashreplace")
        if not key or "\0" in key or key in metadata:
            raise BadGguf(f"key {key!r} is empty, has a NUL, or is there twice")
        kinds[key], metadata[key] = _read_value(cursor, key)
    return metadata, kinds


def _read_value(cursor: Cursor, key: str) -> tuple[str, Value]:
    kind = cursor.number()
    if kind == _ARRAY:
        return _read_array(cursor, key)
    if kind == _STRING:
        return "string", _read_string(cursor)
    name, layout = _scalar(kind, key)
    return name, cursor.unpack(layout)[0]


def _read_string(cursor: Cursor) -> Value:
    length = cursor.number(_LENGTH)
    if length <= _KEPT_BYTES:
        return cursor.take(length).partition(b"\0")[0].decode("utf-8", "replace")  # as C reads it
    cursor.skip(length)
    return Omitted(length)


def _read_array(cursor: Cursor, key: str) -> tuple[str, Value]:
    kind, length = cursor.number(), cursor.number(_LENGTH)
    if kind == _STRING:
        if key == TOKENS:
            _skip_tokens(cursor, length)
        else:
            cursor.skip_texts(length)
        return "string[]", Omitted(length)
    name, layout = _scalar(kind, key)
    if length > _KEPT_ELEMENTS:
        cursor.skip(length * layout.size)
        return f"{name}[]", Omitted(length)
    return f"{name}[]", cursor.unpack(struct.Struct(f"<{length}{layout.format[1:]}"))


def _skip_tokens(cursor: Cursor, count: int) -> None:
    """Pass over the vocabulary; llama.cpp sees tokens up to a NUL, and aborts when two are the same."""
    tokens = cursor.texts(count)
    distinct = set(tokens)
    if b"\0" in b"".join(distinct) or b"" in distinct:  # it seldom is
        seen = enumerate(token.partition(b"\0")[0] for token in tokens)
        distinct = {token or b"[EMPTY_%d]" % index for index, token in seen}
    if len(distinct) != count:
        raise BadGguf("a token of its vocabulary is there twice")


def _scalar(kind: int, key: str) -> tuple[str, struct.Struct]:
    if kind not in _SCALARS:
        raise BadGguf(f"{key} is of an unknown type: {kind}")
    return _SCALARS[kind]


class Tensor(Struct, frozen=True):
    """Where a tensor's data lies, in bytes from the start of all data, and what it is."""

    name: str
    type_name: str
    n_elements: int
    n_bytes: int
    offset: int


def read_tensors(cursor: Cursor, n_tensors: int, alignment: int) -> Iterator[Tensor]:
    """Their descriptions, each where the one before it ends, as gguf.cpp wants it. Raises BadGguf."""
    names: set[bytes] = set()
    end = 0
    for _ in range(n_tensors):
        tensor = _read_tensor(cursor, names)
        if tensor.offset != padded(end, alignment):
            raise BadGguf(f"tensor {tensor.name!r} does not lie where the one before it ends")
        end = tensor.offset + tensor.n_bytes
        yield tensor


def _read_tensor(cursor: Cursor, names: set[bytes]) -> Tensor:
    raw = cursor.text(_MAX_NAME_BYTES, "a tensor's name")
    name = raw.decode("utf-8", "backslashreplace")
    if b"\0" in raw or raw in names:
        raise BadGguf(f"tensor {name!r} has a NUL in its name, or is there twice")
    names.add(raw)
    n_dims = cursor.number()
    if n_dims > _MAX_DIMS:
        raise BadGguf(f"tensor {name!r} has {n_dims} dimensions")
    shape = [int(size) for size in cursor.unpack(struct.Struct(f"<{n_dims}Q"))]
    type_name, n_block, block_bytes = _tensor_type(cursor.number(), name)
    n_elements = math.prod(shape)
    if not 0 < n_elements <= _MAX_ELEMENTS or (shape or [1])[0] % n_block:
        raise BadGguf(f"tensor {name!r} can't be of shape {shape} and type {type_name}")
    return Tensor(name, type_name, n_elements, n_elements // n_block * block_bytes, cursor.number(_LENGTH))


def _tensor_type(number: int, name: str) -> tuple[str, int, int]:
    if number in _REMOVED_TYPES:
        raise BadGguf(f"tensor {name!r} is of type {_REMOVED_TYPES[number]}, which llama.cpp has given up")
    if number not in TENSOR_TYPES:
        raise BadGguf(f"tensor {name!r} is of a type that llama.cpp does not know: {number}")
    return TENSOR_TYPES[number]


def padded(position: int, alignment: int) -> int:
    """The next position that is a multiple."""
    return -(-position // alignment) * alignment
