"""A slot file from a damaged disk or a hostile neighbour.

Invariant: reading it gives tokens of the vocabulary and a state, or refuses with InvalidRequest; what was
written is read back; a file whose end says that Wingman wrote it can't be changed unnoticed.
The first byte says what is read: the input as it is, a file made of it, or that file with a byte changed.
"""

from __future__ import annotations

import zlib

from wingman.errors import InvalidRequest
from wingman.services.slotfiles import SavedSlot, check_name, pack, unpack

N_VOCAB = 1000
_MODEL = bytes(range(32))
TOKENS = (
    b"qsgg", b"\x03\x00\x00\x00", b"\xff\xff\xff\xff", b"\x01\x00\x00\x00", b"\x00\x00\x00\x00", b"\xe8\x03\x00\x00",
    b"\x04\x00\x00\x00", b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80", b"wingman1", _MODEL, b"../", b".", b"\x00",
)  # fmt: skip


def one(data: bytes) -> None:
    """Check the invariant for `data`."""
    _check_name(data)
    if not data or data[0] % 3 == 0:
        _read(data[1:])
        return
    slot = _slot(data)
    whole = pack(slot, _MODEL)
    assert _read(whole) == slot
    if data[0] % 3 == 2:
        _check_change(whole, zlib.crc32(data))


def _slot(data: bytes) -> SavedSlot:
    """Tokens of the first half, a state of the second."""
    middle = len(data) // 2
    tokens = tuple(4 * byte % N_VOCAB for byte in data[1:middle])
    return SavedSlot(tokens, data[middle:])


def _read(data: bytes) -> SavedSlot | None:
    try:
        slot = unpack(data, _MODEL, N_VOCAB)
    except InvalidRequest:
        return None
    assert all(0 <= token < N_VOCAB for token in slot.tokens)
    assert 4 * len(slot.tokens) + len(slot.state) <= len(data)
    return slot


def _check_change(whole: bytes, seed: int) -> None:
    """One changed byte is noticed, unless it hides that Wingman wrote the file."""
    place = seed % len(whole)
    changed = bytearray(whole)
    changed[place] ^= 1 + seed % 255
    mark = len(whole) - 2 * len(_MODEL) - len(b"wingman1")
    assert mark <= place < mark + len(b"wingman1") or _read(bytes(changed)) is None
    _read(whole[:place])


def _check_name(data: bytes) -> None:
    name = data.decode("utf-8", "surrogateescape")
    try:
        check_name(name)
    except InvalidRequest:
        return
    assert "/" not in name
    assert name not in (".", "..")
    assert "\x00" not in name
    assert len(name.encode()) <= 255
