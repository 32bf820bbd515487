"""Slot files: what is written is read back, what is damaged is refused, and nothing reaches native code that
breaks it."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wingman.errors import InvalidRequest
from wingman.services.slotfiles import MAX_NAME_BYTES, SavedSlot, check_name, pack, read, unpack, write

MODEL, OTHER = bytes(32), bytes(range(32))
N_VOCAB = 100
SLOTS = st.builds(SavedSlot, st.lists(st.integers(0, N_VOCAB - 1)).map(tuple), st.binary())


@given(SLOTS)
def test_what_was_saved_is_read_back(slot: SavedSlot) -> None:
    assert unpack(pack(slot, MODEL), MODEL, N_VOCAB) == slot


@given(SLOTS, st.data())
def test_damage_is_noticed(slot: SavedSlot, data: st.DataObject) -> None:
    whole = bytearray(pack(slot, MODEL))
    place = data.draw(st.integers(0, len(whole) - 65))
    mark = range(len(whole) - 72, len(whole) - 64)
    if place not in mark:  # else it looks like one of llama-server's, which has no end to check
        whole[place] ^= data.draw(st.integers(1, 255))
        with pytest.raises(InvalidRequest, match="damaged"):
            unpack(bytes(whole), MODEL, N_VOCAB)


def test_another_model_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="another model"):
        unpack(pack(SavedSlot((1,), b"x"), MODEL), OTHER, N_VOCAB)


@pytest.mark.parametrize("words", [(5, 6, 7), (-1, 1, 3, 5, 6, 7, 0)], ids=["plain", "packed"])
def test_files_of_llama_server_are_read(words: tuple[int, ...]) -> None:
    head = struct.pack(f"<III{len(words)}i", 0x67677371, 3, len(words), *words)
    assert unpack(head + b"state", MODEL, N_VOCAB) == SavedSlot((5, 6, 7), b"state")


@pytest.mark.parametrize(
    "words",
    [
        (-1,),
        (-1, 2, 0, 0),
        (-1, 1, 4, 5, 6, 7, 0),
        (-1, 1, 3, 5, 6, 7, 1),
        (-1, 1, 0),
        (100,),
        (-2,),
        (5, -1),
    ],
)
def test_odd_token_lists_are_damaged(words: tuple[int, ...]) -> None:
    head = struct.pack(f"<III{len(words)}i", 0x67677371, 3, len(words), *words)
    with pytest.raises(InvalidRequest, match="damaged"):
        unpack(head, MODEL, N_VOCAB)


@pytest.mark.parametrize(
    "name",
    [None, "", ".", "..", "a/b", "../a", "a\\b", "a:b", "a\x00", "a\n", " a", "a ", "a.", "x" * 256, "\u00e9" * 128,
     "\ud800", "a*", "\u202e"],
)  # fmt: skip
def test_names_with_a_path_or_worse_are_refused(name: str | None) -> None:
    with pytest.raises(InvalidRequest):
        check_name(name)


def test_plain_names_are_taken() -> None:
    for name in ("slot.bin", "\u00e9t\u00e9", "x" * MAX_NAME_BYTES, ".hidden"):
        assert check_name(name) == name


def test_writing_replaces_a_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "slot"
    write(path, b"one")
    write(path, b"two")
    assert read(path, 3) == b"two"
    assert [one.name for one in path.parent.iterdir()] == ["slot"]
    with pytest.raises(InvalidRequest, match="damaged"):
        read(path, 2)


def test_only_plain_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(Path(__file__))
    for name in ("none", "link"):
        with pytest.raises(InvalidRequest, match="no such file"):
            read(tmp_path / name, 10**6)


@pytest.mark.parametrize("flags", [(), ("unified",), ("no-flash",)], ids=["split", "unified", "no flash"])
def test_changed_files_leave_a_slot_empty_or_usable(tiny_model: Path, flags: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "tests.support.restoring", str(tiny_model), "1", "2000", *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    counts = [int(count) for count in re.findall(r"\d+", result.stdout)]
    assert min(counts) > 50, result.stdout
