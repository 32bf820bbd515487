"""Long prompts computed aside: when, by whom they are interrupted, how they end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.runner import ScriptedRunner, _hash, entries, solo_output
from tests.support.scheduler import Machine
from wingman.config import ContextConfig, ModelConfig, SamplingParams
from wingman.engine.aside import MAX_FAILURES
from wingman.engine.client import Engine
from wingman.engine.lifecycle import JobState
from wingman.engine.pace import MIN_STRETCH_S, TURN_SHARE, stretch_s
from wingman.engine.runner import AsidePiece, RunnerFailure
from wingman.engine.stream import JobStream
from wingman.engine.thread import Message
from wingman.engine.types import Failed, Finished, Job, Progress, StepOutput, TextDelta
from wingman.errors import Unavailable

LONG = [3 + index % 7 for index in range(30)]
TALK = [1, 50, 60]


def machine(n_slots: int = 3, **limits: Any) -> Machine:
    """What generates in the first slot never ends by itself."""
    made = Machine(n_slots, n_batch=8, can_compute_aside=True, **limits)
    made.runner.choose = (  # type: ignore[method-assign]
        lambda _, held: 3 + _hash(held) % 256
    )
    return made


def said_alone(prompt: list[int], n_predict: int) -> list[int]:
    held, output = entries(prompt), []
    for _ in range(n_predict):
        output.append(3 + _hash(held) % 256)
        held += entries(output[-1:])
    return output


def test_a_long_prompt_beside_others_is_computed_aside() -> None:
    one = machine()
    one.add(1, TALK, n_predict=40, stream=True)
    one.step()
    one.add(2, LONG, n_predict=3)
    one.run()
    assert [len(piece.tokens) for piece in one.pieces] == [8, 8, 8, 5]
    assert [(piece.is_first, piece.is_last) for piece in one.pieces] == [
        (True, False), (False, False), (False, False), (False, True),
    ]  # fmt: skip
    assert one.n_evaluated(2, len(LONG)) == 1, "the last token joins a step"
    assert list(one.finished(2).tokens) == said_alone(LONG, 3)
    assert list(one.finished(1).tokens) == said_alone(TALK, 40)
    assert all(any(chunk.job_id == 1 for chunk in batch.chunks) for batch in one.batches[:30])
    assert one.finished(2).timings.prompt_n == len(LONG)


def test_alone_or_short_it_is_computed_in_the_steps() -> None:
    one = machine()
    one.add(1, LONG, n_predict=20)
    one.step()
    one.add(2, [1, 9, 9, 8], n_predict=3)
    one.run()
    assert not one.pieces
    assert list(one.finished(1).tokens) == said_alone(LONG, 20)


def test_a_further_long_prompt_waits_for_the_first() -> None:
    one = machine()
    one.add(1, TALK, n_predict=60)
    one.step()
    one.add(2, LONG, n_predict=3)
    one.add(3, LONG[::-1], n_predict=3)
    one.run()
    assert [piece.job_id for piece in one.pieces] == [2, 2, 2, 2, 3, 3, 3, 3]
    assert one.n_evaluated(3, len(LONG)) == 1
    assert list(one.finished(3).tokens) == said_alone(LONG[::-1], 3)


def test_those_who_wait_are_computed_when_nobody_generates_any_more() -> None:
    one = machine()
    one.add(1, TALK, n_predict=5)
    one.step()
    one.add(2, LONG, n_predict=3)
    one.add(3, LONG[::-1], n_predict=3)
    one.run()
    assert [piece.job_id for piece in one.pieces] == [2, 2, 2, 2, 3, 3, 3, 3]
    assert [len(one.finished(job_id).tokens) for job_id in (1, 2, 3)] == [5, 3, 3]


def test_a_single_token_has_nothing_to_compute_aside() -> None:
    one = Machine(2, n_batch=1, can_compute_aside=True)
    one.add(1, TALK, n_predict=5)
    while one.scheduler._jobs[1].state is not JobState.DECODE:
        one.step()
    one.add(2, [1], n_predict=2)
    one.run()
    assert not one.pieces
    assert list(one.finished(2).tokens) == solo_output([1], 2, 64)


def test_a_far_shorter_prompt_does_not_wait() -> None:
    one = machine()
    one.add(1, TALK, n_predict=60)
    one.step()
    one.add(2, LONG + LONG[::-1][:25], n_predict=3)
    one.step()
    one.add(3, [1, *LONG[:11]], n_predict=3)
    one.run()
    assert {piece.job_id for piece in one.pieces} == {2}
    ended = [event.job_id for event in one.events if isinstance(event, Finished)]
    assert ended.index(3) < ended.index(2)
    assert list(one.finished(3).tokens) == said_alone([1, *LONG[:11]], 3)


def test_it_goes_on_from_what_is_cached() -> None:
    one = machine(min_shared=4)
    one.add(1, LONG[:12], n_predict=1)
    one.run()
    one.add(2, TALK, n_predict=40)
    one.step()
    one.add(3, LONG, n_predict=3, stream=True, return_progress=True)
    one.run()
    assert [piece.position for piece in one.pieces] == [12, 20, 28]
    assert one.finished(3).timings.cache_n == 12
    assert list(one.finished(3).tokens) == said_alone(LONG, 3)
    done = [event.processed for event in one.events if isinstance(event, Progress)]
    assert done == sorted(set(done))
    assert {12, 20, 28, 29, 30} == set(done)


@pytest.mark.parametrize(("n_common", "n_cached"), [(20, 20), (8, 0)])
def test_others_wait_for_it_only_if_they_share_most_of_it(n_common: int, n_cached: int) -> None:
    one = machine(min_shared=4)
    one.add(1, TALK, n_predict=60)
    one.step()
    one.add(2, LONG, n_predict=3)
    one.step()
    other = [*LONG[:n_common], 99, 98]
    one.add(3, other, n_predict=3)
    one.run()
    assert one.finished(3).timings.cache_n == n_cached
    assert list(one.finished(3).tokens) == said_alone(other, 3)


def test_a_job_that_is_cancelled_leaves_room_for_the_next() -> None:
    one = machine()
    one.add(1, TALK, n_predict=60)
    one.step()
    one.add(2, LONG)
    for _ in range(4):
        one.step()
    assert one.scheduler.aside.is_wanted(one.pieces[-1])
    one.scheduler.cancel(2)
    assert not one.scheduler.aside.is_wanted(one.pieces[-1])
    one.add(3, LONG[::-1], n_predict=3)
    one.run()
    assert {piece.job_id for piece in one.pieces} == {2, 3}
    assert not any(chunk.job_id == 2 for batch in one.batches for chunk in batch.chunks)
    assert list(one.finished(3).tokens) == said_alone(LONG[::-1], 3)


def test_what_cannot_be_computed_aside_is_computed_in_the_steps() -> None:
    one = machine()
    one.add(1, TALK, n_predict=60)
    one.step()
    one.add(2, LONG, n_predict=3)
    one.add(3, LONG[::-1], n_predict=3)
    for _ in range(12):
        one.step()
    assert one.runner.n_aside
    one.fail_aside()
    one.run()
    assert {piece.job_id for piece in one.pieces} == {2, 3}, "the next is tried again"
    assert one.n_evaluated(2, len(LONG)) == len(LONG)
    assert list(one.finished(2).tokens) == said_alone(LONG, 3)
    assert list(one.finished(3).tokens) == said_alone(LONG[::-1], 3)
    assert one.finished(2).timings.prompt_n == len(LONG)


def test_after_some_failures_it_is_not_tried_again() -> None:
    one = machine(n_slots=6)
    one.add(1, TALK, n_predict=60)
    one.step()
    for job_id in range(2, 7):
        one.add(job_id, [job_id, *LONG], n_predict=3)
    while len(one.pieces) < MAX_FAILURES:
        one.step()
        one.fail_aside()
    one.run()
    assert [piece.job_id for piece in one.pieces] == [2, 3, 4]
    for job_id in range(2, 7):
        assert list(one.finished(job_id).tokens) == said_alone([job_id, *LONG], 3)


def test_much_that_is_cached_is_not_moved_for_little() -> None:
    one = machine(n_ctx_slot=400, min_shared=4)
    held = LONG * 10
    one.add(1, held, n_predict=1)
    one.run()
    one.add(2, TALK, n_predict=40)
    one.step()
    one.add(3, [*held, *range(70, 79)], n_predict=3)
    one.run()
    assert not one.pieces
    assert one.finished(3).timings.prompt_n == 9


def test_a_step_that_fails_starts_the_prompt_again() -> None:
    one = machine()
    one.add(1, TALK, n_predict=60)
    one.step()
    one.add(2, LONG, n_predict=3)
    for _ in range(4):
        one.step()
    one.step(fails=True)
    one.run()
    assert [event.job_id for event in one.events if isinstance(event, Failed)] == [1]
    assert list(one.finished(2).tokens) == said_alone(LONG, 3)


def test_others_get_their_share_of_the_time() -> None:
    assert stretch_s(0.0, 0.25) == MIN_STRETCH_S
    stretch = stretch_s(0.02, 0.25)
    assert 0.02 / (stretch + 0.02) == pytest.approx(TURN_SHARE)
    assert stretch_s(1.0, 0.25) == 0.25
    assert stretch_s(0.2, 0.25, is_busy=True) == pytest.approx(0.1)


# -- on the engine thread -------------------------------------------------------------------------------


class Slow(ScriptedRunner):
    """A model that takes its time, most of it aside. `hooks` run where it may be paused, one each time."""

    def __init__(self) -> None:
        super().__init__(n_slots=2, n_ctx_slot=4000, n_batch=8)
        self.said_at: list[int] = []
        """Tokens computed aside when one of the first slot was sampled."""
        self.can_compute_aside = True
        self.hooks: list[Callable[[], None]] = []
        self.fails: set[str] = set()
        self.has_begun, self.has_given_up = threading.Event(), threading.Event()

    def begin_aside(self, piece: AsidePiece) -> None:
        if "begin" in self.fails:
            raise RunnerFailure("no memory")
        super().begin_aside(piece)

    def land_aside(self, slot_id: int) -> None:
        if "land" in self.fails:
            self.cache[slot_id] = [1, 2, 3]
            raise RunnerFailure("no memory")
        super().land_aside(slot_id)

    def choose(self, slot_id: int, held: Any) -> int:
        time.sleep(0.001)
        if slot_id == 0:
            self.said_at.append(self.n_aside)
        return 3 + _hash(held[-5:]) % 256

    def run_aside(self, piece: AsidePiece, goes_on: Callable[[], bool]) -> bool:
        for _ in self.computing_aside(piece):
            time.sleep(0.005)
            self.has_begun.set()
            if self.hooks:
                self.hooks.pop(0)()
            if not goes_on():
                self.has_given_up.set()
                return False
        return True


async def loaded(runner: Slow) -> Engine:
    engine = Engine(ModelConfig(), ContextConfig(parallel=2), lambda *_: runner)
    await engine.load()
    return engine


def job(engine: Engine, prompt: list[int], **fields: Any) -> Job:
    return Job(id=engine.new_job_id(), prompt=tuple(prompt), sampling=SamplingParams(), **fields)


async def talking(engine: Engine) -> JobStream:
    """A stream that has begun."""
    talk = engine.submit(job(engine, TALK, n_predict=3000, stream=True))
    async for _ in talk:
        break
    return talk


async def test_a_stream_goes_on_while_a_long_prompt_is_computed() -> None:
    runner = Slow()
    engine = await loaded(runner)
    seen: list[int] = []
    async with await talking(engine) as talk:
        async with engine.submit(job(engine, LONG * 3, n_predict=2)) as long:
            waiting = asyncio.create_task(long.results())
            async for event in talk:
                seen += [runner.n_aside] * isinstance(event, TextDelta)
                if waiting.done():
                    break
            (end,) = await waiting
    assert isinstance(end, Finished)
    assert runner.n_aside == len(LONG * 3) - 1
    assert len({n for n in seen if 0 < n < runner.n_aside}) > 5, "tokens came while it was computed"
    await engine.close()


async def test_who_leaves_ends_the_computation() -> None:
    runner = Slow()
    engine = await loaded(runner)
    async with await talking(engine):
        long = engine.submit(job(engine, LONG * 30, n_predict=2))
        assert await asyncio.to_thread(runner.has_begun.wait, 10)
        long.close()
        assert await asyncio.to_thread(runner.has_given_up.wait, 10)
        async with engine.submit(job(engine, LONG * 2, n_predict=2)) as next_one:
            (end,) = await next_one.results()
    assert len(end.tokens) == 2
    assert runner.n_aside < len(LONG * 30)
    await engine.close()


async def test_a_shutdown_does_not_wait_for_it() -> None:
    runner = Slow()
    engine = await loaded(runner)
    talk = await talking(engine)
    long = engine.submit(job(engine, LONG * 100, n_predict=2))  # 15 s
    assert await asyncio.to_thread(runner.has_begun.wait, 10)
    assert await engine.close()
    assert runner.is_closed
    assert runner.n_aside < 1000
    with pytest.raises(Unavailable):
        await long.results()
    talk.close()


@pytest.mark.parametrize("what", ["begin", "land"])
async def test_without_memory_for_it_everybody_is_still_answered(what: str) -> None:
    runner = Slow()
    runner.fails = {what}
    engine = await loaded(runner)
    async with await talking(engine):
        for _ in range(MAX_FAILURES + 1):
            async with engine.submit(job(engine, LONG, n_predict=2, cache_prompt=False)) as long:
                (end,) = await long.results()
            held = entries(LONG)
            first = 3 + _hash(held[-5:]) % 256
            assert list(end.tokens) == [first, 3 + _hash([*held, first][-5:]) % 256]
    assert runner.n_aside == (what == "land") * MAX_FAILURES * (len(LONG) - 1)
    await engine.close()


async def test_what_the_others_say_is_posted_before_the_prompt_goes_on() -> None:
    runner = Slow()
    engine = await loaded(runner)
    posted_at: list[int] = []
    post = engine._thread._post

    def watch(message: Message) -> None:
        if isinstance(message, StepOutput):
            posted_at.extend(runner.n_aside for event in message.events if isinstance(event, TextDelta))
        post(message)

    async with await talking(engine):
        async with engine.submit(job(engine, LONG * 3, n_predict=1)) as long:
            assert await asyncio.to_thread(runner.has_begun.wait, 10)
            engine._thread._post = watch
            await long.results()
    assert await engine.close()
    meanwhile = [n for n in posted_at if 0 < n < len(LONG * 3) - 1]
    assert len(meanwhile) > 5
    said_at = [n for n in runner.said_at if meanwhile[0] <= n <= meanwhile[-1]]
    assert meanwhile == said_at[-len(meanwhile) :]
    assert set(said_at) == set(meanwhile)


async def test_an_engine_that_breaks_in_a_pause_says_so() -> None:
    def fall_over() -> None:
        raise ZeroDivisionError

    runner = Slow()
    runner.hooks = [lambda: None, fall_over]
    engine = await loaded(runner)
    talk = await talking(engine)
    long = engine.submit(job(engine, LONG, n_predict=2))
    with pytest.raises(Unavailable):
        await long.results()
    assert await engine.wait_stopped() is not None
    talk.close()
    await engine.close()


def test_scripted_models_say_the_same_alone() -> None:
    """What the other tests compare with."""
    assert said_alone(TALK, 1) == [3 + _hash(entries(TALK)) % 256]
    assert len(solo_output(LONG, 3, 64)) <= 3
