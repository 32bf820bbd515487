"""Prefixes are shared, parked and preempted on every kind of cache, and no token is another for it.

Each text is compared with that of a fresh context that computes the same prompt alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.runner import compute
from tools.tinycaches import N_WINDOW, write_hybrid, write_recurrent, write_window
from tools.tinymodel import write_llama
from wingman.config import ContextConfig, ModelConfig, SamplingParams
from wingman.engine.client import _limits
from wingman.engine.llama.runner import LlamaRunner
from wingman.engine.scheduler import Scheduler
from wingman.engine.types import Failed, Finished, Job, JobEvent

N_SLOTS = 4
N_CTX_SLOT = 256
N_BATCH = 64
N_PREDICT = 8
Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Kind:
    """A model with a cache; `can_cut` says whether it can forget the last tokens of a long sequence."""

    name: str
    write: Callable[[Path], Path]
    can_cut: bool
    fields: dict[str, Any] = field(default_factory=dict)


KINDS = (
    Kind("split", write_llama, True),
    Kind("unified", write_llama, True, {"kv_unified": True}),
    Kind("quantised", partial(write_window, n_window=0), True,
         {"cache_type_k": "q8_0", "cache_type_v": "q8_0", "flash_attn": "on"}),
    Kind("window", write_window, False),
    Kind("unified window", write_window, False, {"kv_unified": True}),
    Kind("full window", write_window, False, {"swa_full": True}),
    Kind("recurrent", write_recurrent, False),
    Kind("hybrid", write_hybrid, False),
    Kind("unified hybrid", write_hybrid, False, {"kv_unified": True}),
)  # fmt: skip


def text(seed: int, n_tokens: int) -> Tokens:
    """Tokens of pieces of words."""
    rng = random.Random(seed)
    return tuple(rng.randrange(360, 550) for _ in range(n_tokens))


class Bench:
    """A model with one context after the other."""

    def __init__(self, kind: Kind, folder: Path) -> None:
        self.kind = kind
        self._path = kind.write(folder / "tiny.gguf")
        self._alone: dict[tuple[Tokens, int, bool], Tokens] = {}
        self._runners: dict[tuple[tuple[str, Any], ...], LlamaRunner] = {}

    def engine(self, **fields: Any) -> Engine:
        """An engine that has seen nothing."""
        sizes = {"ctx_size": N_SLOTS * N_CTX_SLOT, "parallel": N_SLOTS}
        fields = sizes | {"cache_ram": 0} | self.kind.fields | fields
        config = ContextConfig(threads=1, batch_size=N_BATCH, ubatch_size=N_BATCH, **fields)
        key = tuple(sorted(fields.items()))
        if key not in self._runners:
            self._runners[key] = LlamaRunner(ModelConfig(model=self._path), config)
        else:
            self._runners[key].reset()
        return Engine(self._runners[key], config)

    def alone(self, asked: Tokens, n_predict: int, shifts: bool = False) -> Tokens:
        """What a fresh context says to a prompt."""
        key = (asked, n_predict, shifts)
        if key not in self._alone:
            engine = self.engine(parallel=1, ctx_size=N_CTX_SLOT, context_shift=shifts)
            engine.add(1, asked, n_predict)
            self._alone[key] = engine.run()[1].tokens
        return self._alone[key]

    def close(self) -> None:
        for runner in self._runners.values():
            runner.close()


class Engine:
    """A scheduler and its runner, step by step."""

    def __init__(self, runner: LlamaRunner, config: ContextConfig) -> None:
        self.runner = runner
        self.scheduler = Scheduler(_limits(runner, config), runner.tokenizer, runner.slot_bytes)
        endless = tuple((token, -math.inf) for token in runner.tokenizer.eog_tokens)
        self._sampling = SamplingParams(temperature=0.0, logit_bias=endless)
        self.asked: dict[int, Job] = {}
        self.n_aside = 0
        """Tokens that were computed outside their slots."""
        self._now = 0.0
        self._events: list[JobEvent] = []

    def add(self, job_id: int, asked: Tokens, n_predict: int = N_PREDICT, **fields: Any) -> None:
        job = self.asked[job_id] = Job(job_id, asked, self._sampling, n_predict, **fields)
        self.scheduler.add(job, self._now)

    def step(self, cancel: int = -1) -> None:
        self._now += 1.0
        batch = self.scheduler.plan(self._now)
        if batch is not None:
            samples = compute(self.runner, batch)
            self.scheduler.cancel(cancel)
            self.scheduler.apply(batch, samples, self._now + 0.001)
        piece = self.scheduler.aside.plan()
        if piece is not None:
            self.n_aside += len(piece.tokens)
            if piece.is_first:
                self.runner.begin_aside(piece)
            assert self.runner.run_aside(piece, lambda: True)
            if piece.is_last:
                self.runner.land_aside(piece.slot_id)
            self.scheduler.apply_aside(piece, self._now)
        self.scheduler.check_integrity()
        self._events += self.scheduler.take_events()

    def run(self) -> dict[int, Finished]:
        """Go on until all is said; what was, by job."""
        for _ in range(2000):
            if self.scheduler.is_idle:
                break
            self.step()
        assert self.scheduler.is_idle
        assert not [event for event in self._events if isinstance(event, Failed)]
        return {event.job_id: event for event in self._events if isinstance(event, Finished)}


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.name)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    bench = Bench(request.param, tmp_path_factory.mktemp("kinds"))
    yield bench
    bench.close()


def check(bench: Bench, engine: Engine, n_cached: dict[int, int], **fields: bool) -> dict[int, Finished]:
    """Run to the end; the jobs of `n_cached` took that much from the cache and all said what they say alone."""
    said = engine.run()
    for job_id, end in said.items():
        job = engine.asked[job_id]
        assert end.tokens == bench.alone(job.prompt, job.n_predict, **fields), (job_id, end.timings)
        assert end.timings.cache_n + end.timings.prompt_n == len(job.prompt)
    assert {job_id: said[job_id].timings.cache_n for job_id in n_cached} == n_cached
    return said


def test_texts_depend_on_distant_tokens(bench: Bench) -> None:
    """What all the other tests rest on: a wrong cache is heard."""
    pairs = [(text(seed, 90), text(seed + 100, 20) + text(seed, 90)[20:]) for seed in (1, 2, 3)]
    assert any(bench.alone(one, N_PREDICT) != bench.alone(other, N_PREDICT) for one, other in pairs)


def test_same_prompt_again(bench: Bench) -> None:
    engine, asked = bench.engine(), text(3, 90)
    for job_id in (1, 2):
        engine.add(job_id, asked)
        engine.run()
    check(bench, engine, {1: 0, 2: 89 if bench.kind.can_cut else 0})


def test_conversation_goes_on(bench: Bench) -> None:
    engine, asked, n_held = bench.engine(), text(4, 50), 0
    for turn in (1, 2, 3):
        engine.add(turn, asked)
        said = check(bench, engine, {turn: n_held})[turn].tokens
        n_held = len(asked) + len(said) - 1
        asked += said + text(40 + turn, 20)


@pytest.mark.parametrize("at_once", [False, True])
def test_system_prompt_is_shared(bench: Bench, at_once: bool) -> None:
    engine, system = bench.engine(), text(5, 80)
    for job_id in (1, 2, 3):
        engine.add(job_id, system + text(50 + job_id, 15))
        if not at_once:
            engine.run()
    n_shared = 80 if bench.kind.can_cut else 0
    check(bench, engine, {1: 0, 2: n_shared, 3: n_shared})


def test_a_long_prompt_beside_others(bench: Bench) -> None:
    """Computed aside where that can be done, for the first time or after a part that is cached."""
    engine = bench.engine()
    engine.add(1, text(7, 20), n_predict=100)
    engine.step()
    engine.add(2, text(8, 150))
    check(bench, engine, {2: 0})
    n_aside = engine.n_aside
    engine.add(3, text(9, 20), n_predict=100)
    engine.step()
    engine.add(4, text(8, 100) + text(10, 120))
    check(bench, engine, {4: 100 if bench.kind.can_cut else 0})
    counts = (149, 149 + 119) if engine.runner.can_compute_aside else (0, 0)
    assert (n_aside, engine.n_aside) == counts
    assert engine.runner.can_compute_aside is (bench.kind.name in ("split", "quantised"))


def test_whole_prefix_is_shared(bench: Bench) -> None:
    """What can't be cut can still be copied as it is, as long as nobody has added to it."""
    engine, system = bench.engine(), text(5, 80)
    engine.add(1, system, n_predict=0)
    engine.run()
    for job_id in (2, 3, 4):
        engine.add(job_id, system + text(50 + job_id, 15))
    check(bench, engine, {1: 0, 2: 80, 3: 80, 4: 80})


def test_answers_fork_after_the_text(bench: Bench) -> None:
    engine, asked = bench.engine(), text(6, 100)
    engine.add(1, asked)
    for job_id in (2, 3):
        engine.add(job_id, asked, fork_of=1)
    check(bench, engine, {1: 0, 2: 100, 3: 100})


def test_more_conversations_than_slots(bench: Bench) -> None:
    engine = bench.engine(parallel=2, ctx_size=2 * N_CTX_SLOT, cache_ram=64)
    asked = {number: text(70 + number, 60 + number) for number in range(4)}
    n_held = dict.fromkeys(asked, 0)
    for turn in range(3):
        for number, tokens in asked.items():
            job_id = 10 * turn + number
            engine.add(job_id, tokens)
            said = check(bench, engine, {job_id: n_held[number]})[job_id].tokens
            n_held[number] = len(tokens) + len(said) - 1
            asked[number] = tokens + said + text(job_id, 20)


def test_prompt_cut_short(bench: Bench) -> None:
    engine, asked = bench.engine(cache_ram=64), text(8, 120)
    for job_id, n_tokens in ((1, 120), (2, 70), (3, 110)):
        engine.add(job_id, asked[:n_tokens])
        engine.run()
    can_cut = bench.kind.can_cut
    check(bench, engine, {2: 69 if can_cut else 0, 3: 109 if can_cut else 0})


def test_short_text_in_a_window_can_be_cut(bench: Bench) -> None:
    engine, asked = bench.engine(), text(9, N_WINDOW - N_PREDICT)
    for job_id in (1, 2):
        engine.add(job_id, asked)
        engine.run()
    check(bench, engine, {2: len(asked) - 1 if engine.runner.can_rollback or engine.runner.n_window else 0})


def test_cancelled_prompt_is_taken_up(bench: Bench) -> None:
    engine, asked = bench.engine(), text(10, 200)
    engine.add(1, asked)
    engine.step()
    engine.step(cancel=1)
    engine.add(2, asked)
    check(bench, engine, {2: 2 * N_BATCH})


def test_cancelled_answer_leaves_no_trace(bench: Bench) -> None:
    engine, asked = bench.engine(), text(11, 60)
    engine.add(1, asked, n_predict=50)
    engine.add(2, text(12, 60))
    for _ in range(6):
        engine.step()
    engine.step(cancel=1)
    engine.add(3, asked)
    check(bench, engine, {3: 59 if bench.kind.can_cut else 0})


def test_full_context_shifts(bench: Bench) -> None:
    """Also where nothing can be cut: a state needs no shift, and what leaves is not at the end of a window."""
    engine = bench.engine(parallel=1, ctx_size=N_CTX_SLOT, context_shift=True)
    engine.add(1, text(13, N_CTX_SLOT - 20), n_predict=60)
    end = check(bench, engine, {1: 0}, shifts=True)[1]
    assert end.truncated
    assert len(end.tokens) == 60


@pytest.mark.parametrize("cache_ram", [0, 64])
def test_preempted_answers_go_on(bench: Bench, cache_ram: int) -> None:
    engine = bench.engine(ctx_size=N_CTX_SLOT, kv_unified=True, cache_ram=cache_ram)
    for job_id in range(1, 5):
        engine.add(job_id, text(140 + job_id, 30), n_predict=100)
    check(bench, engine, dict.fromkeys(range(1, 5), 0))
    assert engine.scheduler.snapshot().n_preemptions_total > 0
