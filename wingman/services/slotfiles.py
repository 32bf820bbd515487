"""Saved slots on disk, in llama-server's format, and what is checked before one is believed.

A file is: magic, version, token count and tokens as 32-bit words (llama_state_seq_save_file), then
the runtime's state. llama-server packs its tokens as -1, 1, count, tokens, 0; a list of plain
tokens is the older form. After the state Wingman adds a trailer with a digest and the model's
fingerprint, so that damage and foreign models are found before native code reads the state.
Pure but for `write` and `read`, which block and run in an executor.
"""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
from array import array
from pathlib import Path
from typing import Final

from msgspec import Struct

from wingman.engine.types import ModelInfo
from wingman.errors import InvalidRequest

_MAGIC: Final = 0x67677371
_VERSION: Final = 3
_HEAD: Final = struct.Struct("<III")
_PACKED_MARK: Final = -1
_PACKED_VERSION: Final = 1
_TRAILER_MAGIC: Final = b"wingman1"
_DIGEST_BYTES: Final = 32
_TRAILER_BYTES: Final = len(_TRAILER_MAGIC) + 2 * _DIGEST_BYTES
_BAD_CHARS: Final = frozenset('/\\:*?"<>|')
MAX_NAME_BYTES: Final = 255


class SavedSlot(Struct, frozen=True):
    """What a file holds."""

    tokens: tuple[int, ...]
    state: bytes


def check_name(name: str | None) -> str:
    """A file name without any path in it (fs_validate_filename of llama.cpp); raises InvalidRequest."""
    if not name or len(name.encode("utf-8", "replace")) > MAX_NAME_BYTES:
        raise InvalidRequest("Invalid filename: it must have 1 to 255 bytes", "filename")
    is_odd = any(char in _BAD_CHARS or not char.isprintable() for char in name)
    if is_odd or ".." in name or name != name.strip(" ") or name.endswith("."):
        raise InvalidRequest("Invalid filename: it must be a plain name", "filename")
    return name


def fingerprint(info: ModelInfo, lora: tuple[float, ...] = ()) -> bytes:
    """Tells models apart whose states would fit each other, and scales of their adapters; 32 bytes."""
    adapters = [(adapter.path, scale) for adapter, scale in zip(info.loras, lora, strict=False) if scale]
    facts = (info.description, info.n_vocab, info.n_embd, info.n_params, info.size_bytes, info.ftype)
    named = sorted(info.metadata.items())
    return hashlib.sha256(repr((facts, named, adapters)).encode("utf-8", "replace")).digest()


def pack(slot: SavedSlot, model: bytes) -> bytes:
    """The bytes of a file; `model` is its fingerprint."""
    words = array("i", [_PACKED_MARK, _PACKED_VERSION, len(slot.tokens), *slot.tokens, 0])
    head = _HEAD.pack(_MAGIC, _VERSION, len(words)) + words.tobytes()
    return head + slot.state + _TRAILER_MAGIC + _digest(slot) + model


def unpack(data: bytes, model: bytes, n_vocab: int) -> SavedSlot:
    """Read a file's bytes; raises InvalidRequest when they are damaged or of another model."""
    if len(data) < _HEAD.size:
        raise _damaged()
    magic, version, n_words = _HEAD.unpack_from(data)
    end = _HEAD.size + 4 * n_words
    if magic != _MAGIC or version != _VERSION or end > len(data):
        raise _damaged()
    tokens = _read_tokens(array("i", data[_HEAD.size : end]))
    if not all(0 <= token < n_vocab for token in tokens):
        raise _damaged()
    trailer = data[-_TRAILER_BYTES:]
    if len(data) - end < _TRAILER_BYTES or not trailer.startswith(_TRAILER_MAGIC):
        return SavedSlot(tokens, data[end:])  # llama-server wrote it
    slot = SavedSlot(tokens, data[end:-_TRAILER_BYTES])
    if trailer[len(_TRAILER_MAGIC) : -_DIGEST_BYTES] != _digest(slot):
        raise _damaged()
    if trailer[-_DIGEST_BYTES:] != model:
        raise InvalidRequest("the file was saved from another model, or with other adapters", "filename")
    return slot


def _read_tokens(words: array[int]) -> tuple[int, ...]:
    if not words or words[0] != _PACKED_MARK:
        return tuple(words)
    if len(words) < 4 or words[1] != _PACKED_VERSION or words[2] != len(words) - 4 or words[-1] != 0:
        raise _damaged()
    return tuple(words[3:-1])


def _digest(slot: SavedSlot) -> bytes:
    digest = hashlib.sha256(array("i", slot.tokens).tobytes())
    digest.update(slot.state)
    return digest.digest()


def _damaged() -> InvalidRequest:
    return InvalidRequest("the file is damaged or no saved slot", "filename")


def write(path: Path, data: bytes) -> None:
    """Replace a file at once: it is the old or the new one whatever happens. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=".saving-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read(path: Path, max_bytes: int) -> bytes:
    """A file's bytes; raises InvalidRequest when there is none, or one longer than any slot can be."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            if os.fstat(file.fileno()).st_size > max_bytes:
                raise _damaged()
            return file.read()
    except OSError as error:
        raise InvalidRequest("there is no such file to restore", "filename") from error
