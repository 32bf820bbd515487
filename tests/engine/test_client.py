"""The loop's side of an engine, on a scripted model: delivery, refusal, cancellation, slow readers."""

from __future__ import annotations

import asyncio
import dataclasses
import struct
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import pytest
from msgspec import structs

from tests.support.runner import ScriptedRunner, solo_output
from wingman.config import ContextConfig, ModelConfig, SamplingParams
from wingman.engine.client import Engine
from wingman.engine.runner import Samples
from wingman.engine.types import Finished, Job, SlotJob, SlotMove, TextDelta
from wingman.errors import (
    ContextOverflow,
    EngineFailure,
    InvalidRequest,
    NotSupported,
    Overloaded,
    SlowReader,
    Unavailable,
)

CONTEXT = ContextConfig(parallel=2, max_queue=2, max_queue_tokens=40)


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    engine = Engine(ModelConfig(), CONTEXT, lambda *_: ScriptedRunner())
    await engine.load()
    yield engine
    await engine.close()


def job(engine: Engine, prompt: list[int], **fields: Any) -> Job:
    return Job(id=engine.new_job_id(), prompt=tuple(prompt), sampling=SamplingParams(), **fields)


async def test_a_stream_delivers_every_token_once(engine: Engine) -> None:
    one = job(engine, [1, 40, 41], n_predict=20, stream=True)
    tokens: list[int] = []
    text = ""
    async with engine.submit(one) as stream:
        async for event in stream:
            if isinstance(event, TextDelta):
                tokens += event.tokens
                text += event.text
            else:
                assert isinstance(event, Finished)
                assert event.text == text
    assert tokens == solo_output(one.prompt, 20, 64)
    assert (engine.n_running, engine.n_waiting) == (0, 0)


async def test_a_job_that_does_not_stream_posts_its_end_only(engine: Engine) -> None:
    one = job(engine, [1, 40, 41], n_predict=10)
    async with engine.submit(one) as stream:
        events = [event async for event in stream]
    assert [type(event) for event in events] == [Finished]


async def test_refusals_name_their_reason(engine: Engine) -> None:
    with pytest.raises(ContextOverflow):
        engine.submit(job(engine, [1] * 64))
    with pytest.raises(InvalidRequest):
        engine.submit(job(engine, []))
    with pytest.raises(InvalidRequest):
        engine.submit(job(engine, [1], id_slot=2))
    assert engine.n_waiting == 0


async def test_the_queue_is_bounded_in_requests(engine: Engine) -> None:
    streams = [engine.submit(job(engine, [1, 5 + i], n_predict=3)) for i in range(4)]
    with pytest.raises(Overloaded):
        engine.submit(job(engine, [1, 9], n_predict=3))
    for stream in streams:
        async with stream:
            (await stream.results())[0]
    async with engine.submit(job(engine, [1, 9], n_predict=3)) as stream:
        (await stream.results())[0]


async def test_the_queue_is_bounded_in_tokens(engine: Engine) -> None:
    streams = [engine.submit(job(engine, [1, 5], n_predict=3)) for _ in range(2)]
    with pytest.raises(Overloaded, match="--max-queue-tokens"):
        engine.submit(job(engine, [1] * 50))
    for stream in streams:
        stream.close()


async def test_leaving_cancels_and_a_second_close_is_harmless(engine: Engine) -> None:
    stream = engine.submit(job(engine, [1, 4, 4, 4], stream=True))
    stream.close()
    stream.close()
    async with engine.submit(job(engine, [1, 7], n_predict=1)) as other:
        (await other.results())[0]
    assert (engine.n_running, engine.n_waiting) == (0, 0)
    assert all(not slot.is_busy for slot in engine.snapshot.slots)


async def test_unread_deltas_are_merged_and_bounded() -> None:
    engine = Engine(ModelConfig(), dataclasses.replace(CONTEXT, max_unread=4096), lambda *_: ScriptedRunner())
    await engine.load()
    one = job(engine, [1, 40, 41], n_predict=20, stream=True)
    stream = engine.submit(one)
    for size in (4000, 200):
        stream.deliver(TextDelta(one.id, "x" * size, (5,), 1))
        stream.deliver(TextDelta(one.id, "y", (6,), 2))
    with pytest.raises(SlowReader, match="--max-unread"):
        await stream.results()
    assert engine.n_running + engine.n_waiting == 0
    await engine.close()


async def test_draining_refuses_new_jobs_and_ends_old_ones() -> None:
    engine = Engine(ModelConfig(), dataclasses.replace(CONTEXT, parallel=1), lambda *_: Endless())
    await engine.load()
    running = engine.submit(job(engine, [1, 4, 4, 4], stream=True))
    waiting = engine.submit(job(engine, [1, 5]))
    drain = asyncio.create_task(engine.drain(0.05))
    await asyncio.sleep(0)
    with pytest.raises(Unavailable):
        engine.submit(job(engine, [1, 6]))
    assert ((await running.results())[0]).stop_type.value == "limit"
    with pytest.raises(Unavailable):
        (await waiting.results())[0]
    await drain
    await engine.close()


class Endless(ScriptedRunner):
    """Never ends by itself: its context is huge, its steps take a while, and EOS is avoided."""

    def __init__(self) -> None:
        super().__init__(n_slots=1, n_ctx_slot=1_000_000)

    def run(self, batch: Any) -> Any:
        time.sleep(0.001)  # as a real step would, so that the loop gets its turn
        samples = super().run(batch)
        return Samples({slot: [max(token, 3) for token in run] for slot, run in samples.tokens.items()})


class Untidy(ScriptedRunner):
    """Is never done with what can wait; notes how far it is at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.tidied = threading.Event()
        self.noted: list[int] = []

    def tidy(self) -> bool:
        time.sleep(0.001)  # as native code would, without the interpreter's lock
        self.n_tidied += 1
        self.tidied.set()
        return True

    def run(self, batch: Any) -> Samples:
        self.noted.append(self.n_tidied)
        return super().run(batch)


async def test_what_can_wait_is_done_between_requests_alone() -> None:
    runner = Untidy()
    engine = Engine(ModelConfig(), CONTEXT, lambda *_: runner)
    await engine.load()
    for _ in range(2):
        n_steps = len(runner.noted)
        runner.tidied.clear()
        assert await asyncio.to_thread(runner.tidied.wait, 10)
        async with engine.submit(job(engine, [1, 40, 41], n_predict=20)) as stream:
            assert len((await stream.results())[0].tokens) > 1
        assert len(set(runner.noted[n_steps:])) == 1
    await engine.close()


class Gated(ScriptedRunner):
    """Waits within each batch of embeddings until it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def embed(self, inputs: Sequence[Sequence[int]], n_piece: int) -> Iterator[list[bytes]]:
        assert self.gate.wait(30)
        return super().embed(inputs, n_piece)


@pytest.fixture
async def gated() -> AsyncIterator[tuple[Engine, Gated]]:
    runner = Gated()
    engine = Engine(ModelConfig(), CONTEXT, lambda *_: runner)
    await engine.load()
    yield engine, runner
    runner.gate.set()
    await engine.close()


def value(data: bytes) -> float:
    return float(struct.unpack("<f", data)[0])


async def test_requests_for_embeddings_share_batches_and_keep_apart(gated: tuple[Engine, Gated]) -> None:
    engine, runner = gated
    requests = [((1, 2), (3,)), ((4, 5, 6),), ((7,), (8,), (9,))]
    tasks = [asyncio.create_task(engine.embed(inputs)) for inputs in requests]
    await asyncio.sleep(0)
    runner.gate.set()
    for task, inputs in zip(tasks, requests, strict=True):
        assert [value(vector) for vector in await task] == [float(sum(one)) for one in inputs]
    assert sum(runner.embedded) == 6


async def test_leaving_while_embeddings_wait_frees_their_place(gated: tuple[Engine, Gated]) -> None:
    engine, runner = gated
    tasks = [asyncio.create_task(engine.embed(((token,),))) for token in (1, 2, 3)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="--max-queue"):
        await engine.embed(((4,),))
    tasks[1].cancel()
    await asyncio.wait(tasks[1:2])
    last = asyncio.create_task(engine.embed(((5,),)))
    await asyncio.sleep(0)
    runner.gate.set()
    assert [value(vector) for task in (tasks[0], tasks[2], last) for vector in await task] == [1, 3, 5]


async def test_a_failed_batch_of_embeddings_is_an_error(gated: tuple[Engine, Gated]) -> None:
    engine, runner = gated
    runner.gate.set()
    with pytest.raises(EngineFailure):
        await engine.embed(((1,) * 33,))  # the scripted runner takes 32
    assert [value(vector) for vector in await engine.embed(((2,),))] == [2]


async def test_draining_ends_embeddings_that_wait(gated: tuple[Engine, Gated]) -> None:
    engine, runner = gated
    first = asyncio.create_task(engine.embed(((1,),)))
    await asyncio.sleep(0)
    second = asyncio.create_task(engine.embed(((2,),)))
    await asyncio.sleep(0)
    drain = asyncio.create_task(engine.drain(0))
    await asyncio.sleep(0)
    with pytest.raises(Unavailable):
        await engine.embed(((3,),))
    runner.gate.set()
    results = await asyncio.gather(first, second, return_exceptions=True)
    assert all(isinstance(result, tuple | Unavailable) for result in results)
    await drain


def change(engine: Engine, move: SlotMove, slot_id: int = 0, **fields: Any) -> SlotJob:
    return SlotJob(engine.new_job_id(), slot_id, move, **fields)


async def test_a_slot_is_saved_erased_and_restored(engine: Engine) -> None:
    prompt = [1, 40, 41, 42]
    async with engine.submit(job(engine, prompt, n_predict=2, id_slot=0)) as stream:
        (done,) = await stream.results()
    saved = await engine.change_slot(change(engine, SlotMove.SAVE))
    assert saved.tokens == (*prompt, *done.tokens[:-1])
    erased = await engine.change_slot(change(engine, SlotMove.ERASE))
    assert erased.tokens == saved.tokens
    assert (await engine.change_slot(change(engine, SlotMove.SAVE))).tokens == ()
    await engine.change_slot(change(engine, SlotMove.RESTORE, 1, tokens=saved.tokens, state=saved.state))
    async with engine.submit(job(engine, [*saved.tokens, 9], n_predict=1)) as stream:
        (again,) = await stream.results()
    assert (again.slot_id, again.timings.cache_n) == (1, len(saved.tokens))


async def test_a_state_that_does_not_fit_is_an_invalid_request(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="the slot is empty now"):
        await engine.change_slot(change(engine, SlotMove.RESTORE, tokens=(1,), state=b"odd"))
    async with engine.submit(job(engine, [1, 7], n_predict=1)) as stream:
        assert len(await stream.results()) == 1


async def test_leaving_while_a_change_waits_lets_others_in() -> None:
    engine = Engine(ModelConfig(), dataclasses.replace(CONTEXT, parallel=1), lambda *_: Endless())
    await engine.load()
    async with engine.submit(job(engine, [1, 4, 4, 4], stream=True)) as running:
        await anext(running.steps())
        waiting = asyncio.create_task(engine.change_slot(change(engine, SlotMove.ERASE)))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
    async with engine.submit(job(engine, [1, 5], n_predict=1)) as after:
        assert len(await after.results()) == 1
    await engine.close()


async def test_changes_that_wait_are_bounded_and_end_with_the_engine() -> None:
    context = dataclasses.replace(CONTEXT, parallel=1, max_queue=1)
    engine = Engine(ModelConfig(), context, lambda *_: Endless())
    await engine.load()
    running = engine.submit(job(engine, [1, 4, 4, 4], stream=True))
    await anext(running.steps())
    waiting = [asyncio.create_task(engine.change_slot(change(engine, SlotMove.ERASE))) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await engine.change_slot(change(engine, SlotMove.ERASE))
    await engine.close()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(result) for result in results] == [Unavailable] * 3
    with pytest.raises(Unavailable):
        await engine.change_slot(change(engine, SlotMove.ERASE))
    with pytest.raises(Unavailable):
        await running.results()


async def test_a_model_that_only_embeds_has_no_slots_and_no_jobs() -> None:
    runner = ScriptedRunner()
    runner.info = structs.replace(runner.info, can_generate=False)
    engine = Engine(ModelConfig(), CONTEXT, lambda *_: runner)
    await engine.load()
    with pytest.raises(NotSupported):
        engine.submit(job(engine, [1]))
    with pytest.raises(NotSupported):
        await engine.change_slot(change(engine, SlotMove.SAVE))
    await engine.close()


async def test_more_answers_than_can_ever_wait_are_refused(engine: Engine) -> None:
    first = job(engine, [1, 5])
    forks = [structs.replace(first, id=engine.new_job_id(), fork_of=first.id) for _ in range(4)]
    with pytest.raises(InvalidRequest, match="--max-queue"):
        engine.submit(first, *forks)
    async with engine.submit(*(structs.replace(one, n_predict=3) for one in (first, forks[0]))) as stream:
        results = await stream.results()
    assert [list(result.tokens) for result in results] == [solo_output([1, 5], 3, 64)] * 2
    assert [result.is_fork for result in results] == [False, True]


class Hanging(ScriptedRunner):
    """Stays in its second step until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.may_go_on = threading.Event()

    def run(self, batch: Any) -> Samples:
        if self.n_steps:
            assert self.may_go_on.wait(10)
        return super().run(batch)


async def test_what_a_step_gave_is_heard_while_the_next_one_is_computed() -> None:
    runner = Hanging()
    engine = Engine(ModelConfig(), CONTEXT, lambda *_: runner)
    await engine.load()
    async with engine.submit(job(engine, [1, 40, 41], n_predict=3, stream=True)) as stream:
        async with asyncio.timeout(10):
            async for event in stream:
                if isinstance(event, TextDelta):
                    break
        assert not runner.may_go_on.is_set()
        runner.may_go_on.set()
    await engine.close()
