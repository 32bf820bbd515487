"""A plain mutation fuzzer: random edits of a seed corpus, without coverage feedback.

It finds less than a coverage-guided fuzzer, but needs only the standard library and gives the
same inputs for the same seed, corpus and tokens; a run in the test suite is reproducible.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

MAX_BYTES = 4096
"""Longest input: long enough for every grammar here, short enough for thousands a second."""

Target = Callable[[bytes], None]


@dataclass(frozen=True, slots=True)
class Failure:
    """An input that broke a target's invariant."""

    data: bytes
    error: Exception


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did; `failure` is None when the invariant held throughout."""

    n_executions: int
    failure: Failure | None


def corpus_dir(name: str) -> Path:
    """Where the seeds of a target lie."""
    return Path(__file__).parent / "corpus" / name


def read_corpus(name: str) -> tuple[bytes, ...]:
    """The seeds of a target, in the order of their names."""
    return tuple(path.read_bytes() for path in sorted(corpus_dir(name).iterdir()))


def pieces(data: bytes) -> list[bytes]:
    """`data` cut at random places that depend on `data` alone."""
    rng = random.Random(data)
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(1, 8)))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True) if start < end]


class Mutator:
    """An endless stream of inputs: the seeds as they are, then edits of them."""

    def __init__(self, corpus: Sequence[bytes], tokens: Sequence[bytes], seed: int) -> None:
        self._corpus = tuple(corpus) or (b"",)
        self._tokens = tuple(tokens) or (b"\x00",)
        self._rng = random.Random(seed)
        self._edits = (
            self._flip_bit,
            self._set_byte,
            self._insert_token,
            self._insert_token,
            self._insert_bytes,
            self._delete,
            self._repeat,
            self._splice,
            self._truncate,
        )

    def __iter__(self) -> Iterator[bytes]:
        yield from self._corpus
        while True:
            data = bytearray(self._rng.choice(self._corpus))
            for _ in range(self._rng.choice((1, 1, 2, 3, 5, 8))):
                self._rng.choice(self._edits)(data)
            yield bytes(data[:MAX_BYTES])

    def _range(self, data: bytearray) -> tuple[int, int]:
        start = self._rng.randrange(len(data) + 1)
        length = self._rng.choice((1, 2, 4, 16, 64))
        return start, min(len(data), start + self._rng.randrange(1, length + 1))

    def _flip_bit(self, data: bytearray) -> None:
        if data:
            data[self._rng.randrange(len(data))] ^= 1 << self._rng.randrange(8)

    def _set_byte(self, data: bytearray) -> None:
        if data:
            data[self._rng.randrange(len(data))] = self._rng.randrange(256)

    def _insert_token(self, data: bytearray) -> None:
        start, end = self._range(data)
        data[start : end if self._rng.random() < 0.3 else start] = self._rng.choice(self._tokens)

    def _insert_bytes(self, data: bytearray) -> None:
        start, _ = self._range(data)
        data[start:start] = self._rng.randbytes(self._rng.randrange(1, 9))

    def _delete(self, data: bytearray) -> None:
        start, end = self._range(data)
        del data[start:end]

    def _repeat(self, data: bytearray) -> None:
        start, end = self._range(data)
        data[start:start] = data[start:end] * self._rng.choice((1, 2, 8))

    def _splice(self, data: bytearray) -> None:
        start, end = self._range(data)
        other = self._rng.choice(self._corpus)
        left, right = self._range(bytearray(other))
        data[start:end] = other[left:right] if self._rng.random() < 0.5 else other[left:]

    def _truncate(self, data: bytearray) -> None:
        del data[self._range(data)[0] :]


def run(
    target: Target,
    inputs: Iterator[bytes],
    seconds: float | None = None,
    max_executions: int | None = None,
) -> Outcome:
    """Feed inputs to a target until time or count is up, or its invariant breaks."""
    deadline = None if seconds is None else time.monotonic() + seconds
    n_executions = 0
    for data in inputs:
        if n_executions == max_executions or (deadline is not None and time.monotonic() >= deadline):
            break
        n_executions += 1
        try:
            target(data)
        except Exception as error:
            return Outcome(n_executions, Failure(data, error))
    return Outcome(n_executions, None)
