"""Pages of a fresh allocation: given back where they are zeros, never where they are not."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.restoring import step
from wingman.config import ContextConfig, ModelConfig
from wingman.engine.llama import pages
from wingman.engine.llama.runner import LlamaRunner

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="pages are given back on Linux only"
)
MIB = 1 << 20
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.fixture
def allocation() -> Iterator[tuple[int, list[pages.Range]]]:
    """100 MiB of zeros from malloc that are all resident, and what was found of them."""
    before = pages.anonymous_ranges()
    address = libc.malloc(100 * MIB)
    ctypes.memset(address, 0, 100 * MIB)
    yield address, pages.large_allocations(before)
    libc.free(address)


def test_zeros_are_given_back(allocation: tuple[int, list[pages.Range]]) -> None:
    address, found = allocation
    assert [start < address < end and 100 * MIB < end - start < 101 * MIB for start, end in found] == [True]
    n_before = resident()
    assert sum(pages.release_zeros(found)) >= 99 * MIB
    assert n_before - resident() > 90 * MIB
    assert ctypes.string_at(address, 100 * MIB) == bytes(100 * MIB), "they are still zeros"


def test_what_is_written_stays(allocation: tuple[int, list[pages.Range]]) -> None:
    address, found = allocation
    places = [0, 1, 4095, 4096, 5 * MIB, 5 * MIB + 1, 50 * MIB - 1, 100 * MIB - 1]
    for index, place in enumerate(places):
        ctypes.memset(address + place, index + 1, 1)
    n_released = sum(pages.release_zeros(found))
    assert 98 * MIB < n_released < 100 * MIB
    assert [ctypes.string_at(address + place, 1)[0] for place in places] == list(range(1, len(places) + 1))
    ctypes.memset(address, 7, 100 * MIB)
    assert sum(pages.release_zeros(found)) == 0
    assert ctypes.string_at(address, 100 * MIB) == b"\7" * (100 * MIB)


def test_older_and_smaller_allocations_are_not_found(allocation: tuple[int, list[pages.Range]]) -> None:
    before = pages.anonymous_ranges()
    small = libc.malloc(40 * MIB)
    try:
        assert pages.large_allocations(before) == []
    finally:
        libc.free(small)


def test_allocations_below_a_large_one_are_passed_over_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    look = pages._size_at
    monkeypatch.setattr(pages, "_size_at", lambda memory, at: looks.append(at) or look(memory, at))
    before = pages.anonymous_ranges()
    blocks = [libc.malloc(size * MIB) for size in (100, 40, 30)]  # each is put below the one before
    try:
        assert [round((end - start) / MIB) for start, end in pages.large_allocations(before)] == [100]
        assert len(looks) <= 3
    finally:
        for block in blocks:
            libc.free(block)


def greedy_tokens(runner: LlamaRunner) -> list[int]:
    """What a slot says after a prompt of two tokens."""
    said = [step(runner, 1, (300, 301), 0)]
    while len(said) < 40:
        said.append(step(runner, 1, (said[-1],), 1 + len(said)))
    return said


def test_a_cache_takes_memory_as_it_is_used(tiny_model: Path) -> None:
    said, took = [], []
    for is_alone in (False, True):
        n_before = resident()
        runner = LlamaRunner(
            ModelConfig(model=tiny_model),
            ContextConfig(ctx_size=1 << 18, parallel=2, threads=1),
            is_alone=is_alone,
        )
        while runner.tidy():
            pass
        took.append(resident() - n_before)
        said.append(greedy_tokens(runner))
        runner.close()
    assert said[0] == said[1]
    assert took[0] - took[1] > 50 * MIB
