"""The loop's side of an engine, on a scripted model: delivery, refusal, cancellation, slow readers."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.support.runner import ScriptedRunner, solo_output
from wingman.config import ContextConfig, ModelConfig, SamplingParams
from wingman.engine.client import Engine
from wingman.engine.runner import Samples
from wingman.engine.types import Finished, Job, TextDelta
from wingman.errors import ContextOverflow, InvalidRequest, Overloaded, SlowReader, Unavailable

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
        return Samples({slot: max(token, 3) for slot, token in samples.tokens.items()})
