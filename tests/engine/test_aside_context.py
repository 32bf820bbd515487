"""The context in which long prompts are computed, on a real library and a generated model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support.runner import compute
from wingman.config import ContextConfig, ModelConfig, SamplingParams
from wingman.engine.llama.aside import MAX_NODES, _Pauses, for_one_stream, for_streams
from wingman.engine.llama.binding import lib
from wingman.engine.llama.model import LlamaModel
from wingman.engine.llama.runner import LlamaRunner
from wingman.engine.runner import AsidePiece, Batch, Chunk, RunnerFailure, SamplerStart

N_SLOTS = 4
GREEDY = SamplingParams(temperature=0.0)
LONG = tuple(300 + index * 7 % 200 for index in range(150))


@pytest.fixture
def runner(tiny_model: Path) -> Iterator[LlamaRunner]:
    config = ContextConfig(ctx_size=N_SLOTS * 256, parallel=N_SLOTS, threads=1, ubatch_size=64)
    runner = LlamaRunner(ModelConfig(model=tiny_model), config)
    yield runner
    runner.close()


def step(runner: LlamaRunner, slot: int, tokens: tuple[int, ...], position: int) -> int:
    """Add tokens to a slot; the one that follows."""
    chunk = Chunk(slot, 1, tokens, position, wants_sample=True)
    return compute(runner, Batch((), (SamplerStart(slot, GREEDY, ()),), (chunk,), 0.0)).tokens[slot][0]


def said_after(runner: LlamaRunner, slot: int, first: int, n_tokens: int = 12) -> list[int]:
    """What follows `LONG` and its first token."""
    said = [first]
    for index in range(n_tokens):
        said.append(step(runner, slot, (said[-1],), len(LONG) + index))
    return said


def pieces(slot: int, start: int = 0) -> Iterator[AsidePiece]:
    end = len(LONG) - 1
    for at in range(start, end, 64):
        tokens = LONG[at : min(at + 64, end)]
        yield AsidePiece(slot, 1, tokens, at, len(LONG), (), is_first=at == start)


def compute_aside(
    runner: LlamaRunner, slot: int, start: int = 0, goes_on: Callable[[], bool] = lambda: True
) -> int:
    """Compute `LONG` after what the slot holds, and its last token there; the one that follows."""
    for piece in pieces(slot, start):
        if piece.is_first:
            runner.begin_aside(piece)
        assert runner.run_aside(piece, goes_on)
    assert piece.is_last
    runner.land_aside(slot)
    return step(runner, slot, LONG[-1:], len(LONG) - 1)


@pytest.mark.parametrize("slot", range(N_SLOTS))
@pytest.mark.parametrize("n_held", [0, 40])
def test_a_prompt_computed_with_pauses_is_the_same(runner: LlamaRunner, slot: int, n_held: int) -> None:
    beside = (slot + 1) % N_SLOTS
    right = said_after(runner, slot, step(runner, slot, LONG, 0))
    runner.reset()
    n_asked = 0
    step(runner, beside, (5, 6, 7), 0)
    if n_held:
        step(runner, slot, LONG[:n_held], 0)

    def goes_on() -> bool:
        nonlocal n_asked
        n_asked += 1
        step(runner, beside, (8,), 2 + n_asked)  # somebody else has a step
        return True

    first = compute_aside(runner, slot, n_held, goes_on)
    assert n_asked > 10
    assert said_after(runner, slot, first) == right


@pytest.mark.parametrize("flash_attn", ["on", "off"])
def test_the_slot_is_the_same_byte_for_byte(tiny_model: Path, flash_attn: str) -> None:
    config = ContextConfig(
        ctx_size=N_SLOTS * 256, parallel=N_SLOTS, threads=1, ubatch_size=64, flash_attn=flash_attn
    )
    runner = LlamaRunner(ModelConfig(model=tiny_model), config)
    context = runner._generating()
    for piece in pieces(2):
        chunk = Chunk(2, 1, piece.tokens, piece.position, wants_sample=False)
        context.decode(Batch((), (), (chunk,), 0.0))
    right = context.read(2)
    runner.reset()
    compute_aside(runner, 2)
    context = runner._generating()
    assert context.memory
    lib.llama_memory_seq_rm(context.memory, 2, len(LONG) - 1, -1)
    assert np.array_equal(context.read(2), right)
    runner.close()


def test_what_is_given_up_leaves_no_trace(runner: LlamaRunner) -> None:
    right = said_after(runner, 0, step(runner, 0, LONG, 0))
    runner.reset()
    asked: list[bool] = []
    first, *_ = pieces(1)
    runner.begin_aside(first)
    assert not runner.run_aside(first, lambda: bool(asked.append(True)) or len(asked) < 3)
    assert len(asked) == 3, "it ended at once"
    assert said_after(runner, 0, compute_aside(runner, 0)) == right


def test_a_no_is_kept_for_all_parts_of_a_graph() -> None:
    pauses, asked = _Pauses(), []
    pauses.resume(lambda: bool(asked.append(True)))
    for _ in range(2):  # parts
        while not pauses._on_node(0, True, None):
            pass
        assert not pauses._on_node(0, False, None)
    assert asked == [True]
    assert pauses.is_stopped


def test_slow_nodes_are_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    pauses = _Pauses()

    def n_between(node_s: float) -> int:
        nonlocal now
        for count in range(1, 100):
            now += node_s
            if pauses._on_node(0, True, None):
                assert pauses._on_node(0, False, None)
                return count
        raise AssertionError

    assert [n_between(0.1) for _ in range(5)] == [MAX_NODES, MAX_NODES // 2, MAX_NODES // 4, 1, 1]
    assert [n_between(1e-5) for _ in range(5)] == [1, 2, 4, MAX_NODES, MAX_NODES]


def test_what_is_raised_in_a_pause_is_raised_to_the_caller(runner: LlamaRunner) -> None:
    def fall_over() -> bool:
        raise ZeroDivisionError

    first, *_ = pieces(0)
    runner.begin_aside(first)
    with pytest.raises(ZeroDivisionError):
        runner.run_aside(first, fall_over)
    compute_aside(runner, 0)


def test_an_idle_engine_gives_its_memory_back(runner: LlamaRunner) -> None:
    compute_aside(runner, 0)
    assert runner.tidy()
    assert runner._aside is None
    with pytest.raises(RunnerFailure):
        runner.land_aside(0)


def test_it_is_as_large_as_the_prompt_needs(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = LlamaRunner(ModelConfig(model=tiny_model), ContextConfig(ctx_size=8192, parallel=2, threads=1))
    sizes = []
    for n_prompt in (10, 1025, 20, 4000):
        runner.begin_aside(AsidePiece(0, 1, LONG, 0, n_prompt))
        sizes.append(runner._begun_aside().n_ctx)
    assert sizes == [1024, 2048, 2048, 4096]
    runner.tidy()
    monkeypatch.setattr(LlamaModel, "metadata", lambda _: {"llama.rope.scaling.type": "longrope"})
    runner.begin_aside(AsidePiece(0, 1, LONG, 0, 10))
    assert runner._begun_aside().n_ctx == 4096, "how positions are computed may depend on it"
    runner.close()


@pytest.mark.parametrize("fields", [{"kv_unified": True}, {}])
def test_where_it_can_be_used(tiny_model: Path, fields: dict[str, bool]) -> None:
    runner = LlamaRunner(ModelConfig(model=tiny_model), ContextConfig(ctx_size=512, parallel=2, **fields))
    assert runner.can_compute_aside is not bool(fields)
    runner.close()


def test_a_state_of_unknown_form_is_refused(runner: LlamaRunner) -> None:
    step(runner, 2, LONG[:20], 0)
    context = runner._generating()
    state = context.read(2)
    for_one_stream(state.copy(), 2, N_SLOTS)
    for slot, n_streams in ((1, N_SLOTS), (3, N_SLOTS), (2, N_SLOTS - 1)):
        with pytest.raises(RunnerFailure, match="unknown form"):
            for_one_stream(state.copy(), slot, n_streams)
    with pytest.raises(RunnerFailure, match="unknown form"):
        for_streams(state.copy(), N_SLOTS)
    assert np.array_equal(state, context.read(2))
