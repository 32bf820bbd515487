"""Gives back the pages of a fresh cache, so that it takes memory only as far as it is used.

llama.cpp fills a new cache with zeros, which makes all of it resident: 360 MiB for 16 384 tokens of a model of
98 MB. A private anonymous page that was given back reads as zeros again when it is next touched, so nothing that
computes sees a difference. Only pages that hold nothing but zeros are given back.

For Linux with glibc; elsewhere nothing is found. The cache is found on the thread that makes it, right after that,
and only while a server starts with its one model: a thread that allocated as much meanwhile would be taken for it.
Its pages are given back later, a few at a time, on the thread that alone writes to them.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_LEAST_BYTES: Final = 64 << 20
"""Smaller allocations are left alone; nothing else makes such large ones while a server starts."""
_MAX_LOOKS: Final = 1 << 16
"""Pages looked at for the head of an allocation."""
_BLOCK_BYTES: Final = 128 << 10
_MADV_DONTNEED: Final = 4
_IS_MMAPPED: Final = 2
"""Flag in the size of a chunk that malloc got from mmap (malloc.c)."""
_HEAD: Final = struct.Struct("@NN")
_MAPS: Final = Path("/proc/self/maps")
_MEMORY: Final = Path("/proc/self/mem")
_libc: Final = ctypes.CDLL(None)

Range = tuple[int, int]
"""Addresses from the first to behind the last."""


def anonymous_ranges() -> list[Range]:
    """What this process has mapped privately and for itself, in order; none where that can't be found out."""
    if not sys.platform.startswith("linux"):
        return []
    try:
        lines = _MAPS.read_text().splitlines()
    except OSError:
        return []
    fields = (line.split() for line in lines)
    return [
        (int(start, 16), int(end, 16))
        for start, _, end in (
            each[0].partition("-") for each in fields if each[1:] == ["rw-p", "00000000", "00:00", "0"]
        )
    ]


def large_allocations(before: list[Range]) -> list[Range]:
    """Large pieces of memory that were allocated since `before`, the earlier `anonymous_ranges`."""
    found: list[Range] = []
    new = [each for each in _added(anonymous_ranges(), before) if each[1] - each[0] >= _LEAST_BYTES]
    if new:
        with contextlib.suppress(OSError), _MEMORY.open("rb", buffering=0) as memory:
            for each in new:
                found += _chunks(memory.fileno(), *each)
    return found


def release_zeros(allocations: list[Range]) -> Iterator[int]:
    """Give back the pages of allocations that nobody writes to meanwhile, as far as they are zeros: a block at each
    `next`, how many bytes it gave. 0.25 s a gigabyte."""
    for start, end in allocations:
        for block in range(start + mmap.PAGESIZE, end, _BLOCK_BYTES):
            yield _release_block(block, min(_BLOCK_BYTES, end - block))


def _added(after: list[Range], before: list[Range]) -> Iterator[Range]:
    """The parts of `after` that are not in `before`."""
    for first, end in after:
        start = first
        for old_start, old_end in before:
            if old_end <= start or old_start >= end:
                continue
            if old_start > start:
                yield start, old_start
            start = old_end
        if start < end:
            yield start, end


def _chunks(memory: int, start: int, end: int) -> Iterator[Range]:
    """Allocations of their own in a range: malloc writes how much it mapped into the second word."""
    for _ in range(_MAX_LOOKS):
        if end - start < _LEAST_BYTES:
            return
        size = _size_at(memory, start)
        length = size & ~7
        if size & 7 != _IS_MMAPPED or length % mmap.PAGESIZE or not 0 < length <= end - start:
            start += mmap.PAGESIZE
            continue
        if length >= _LEAST_BYTES:
            yield start, start + length
        start += length


def _size_at(memory: int, address: int) -> int:
    """The second word at an address, read through a file: it may be another thread's and gone by now. 0 then."""
    try:
        size: int = _HEAD.unpack(os.pread(memory, _HEAD.size, address))[1]
    except (OSError, struct.error):
        return 0
    return size


def _release_block(start: int, n_bytes: int) -> int:
    """Give back a block of whole pages if it is all zeros: if it starts with one and equals itself a byte later."""
    is_zero = ctypes.c_char.from_address(start).value == b"\0" and not _libc.memcmp(
        ctypes.c_void_p(start), ctypes.c_void_p(start + 1), ctypes.c_size_t(n_bytes - 1)
    )
    if not is_zero or _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(n_bytes), _MADV_DONTNEED):
        return 0
    return n_bytes
