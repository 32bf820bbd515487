"""Every seed passes its fuzz target, and so do a few hundred mutations of them, the same each time."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

import pytest

from fuzz import __main__ as command
from fuzz.mutate import MAX_BYTES, Mutator, Outcome, corpus_dir, pieces, read_corpus, run

SEEDS = [(name, path) for name in command.TARGETS for path in sorted(corpus_dir(name).iterdir())]


@pytest.mark.parametrize(("name", "path"), SEEDS, ids=[f"{name}-{path.name}" for name, path in SEEDS])
def test_a_seed_passes(name: str, path: Path) -> None:
    importlib.import_module(f"fuzz.{name}").one(path.read_bytes())


@pytest.mark.parametrize("name", command.TARGETS)
def test_mutations_pass(name: str) -> None:
    module = importlib.import_module(f"fuzz.{name}")
    inputs = iter(Mutator(read_corpus(name), module.TOKENS, seed=4))
    outcome = run(module.one, inputs, max_executions=len(read_corpus(name)) + 300)
    assert outcome == Outcome(len(read_corpus(name)) + 300, None)


def first_inputs(corpus: Sequence[bytes], seed: int, count: int = 200) -> list[bytes]:
    inputs = iter(Mutator(corpus, (b"token",), seed))
    return [next(inputs) for _ in range(count)]


def test_the_mutator_starts_with_the_seeds_and_repeats_itself() -> None:
    corpus = (b"GET / HTTP/1.1\r\n", b"", b"x" * (MAX_BYTES - 1))
    inputs = first_inputs(corpus, seed=1)
    assert inputs[:3] == list(corpus)
    assert inputs == first_inputs(corpus, seed=1)
    assert inputs != first_inputs(corpus, seed=2)
    assert len(set(inputs)) > 100
    assert max(len(data) for data in inputs) <= MAX_BYTES


def test_pieces_are_the_input() -> None:
    for data in (b"", b"a", bytes(range(256))):
        assert b"".join(pieces(data)) == data
        assert all(pieces(data))


def crash_on_token(data: bytes) -> None:
    if b"token" in data:
        raise ZeroDivisionError


def test_a_run_stops_at_the_first_failure() -> None:
    outcome = run(crash_on_token, iter([b"", b"a", b"a token", b"token"]))
    assert outcome.n_executions == 3
    assert outcome.failure is not None
    assert outcome.failure.data == b"a token"
    assert isinstance(outcome.failure.error, ZeroDivisionError)


def test_the_command_saves_what_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["sse", "--plain", "--seed", "3", "--seconds"]
    assert command.main([*arguments, "0.01"]) == 0
    assert "executions, seed 3" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []

    module = importlib.import_module("fuzz.sse")
    monkeypatch.setattr(module, "one", lambda data: crash_on_token(b"token"))
    assert command.main([*arguments, "600"]) == 1
    (saved,) = tmp_path.iterdir()
    assert saved.name.startswith("crash-sse-")
    assert saved.read_bytes() == read_corpus("sse")[0]
