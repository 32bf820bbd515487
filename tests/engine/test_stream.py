"""The events of several jobs for one reader: merged, bounded, in order, cancelled together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wingman.config import SamplingParams
from wingman.engine.stream import JobStream
from wingman.engine.types import (
    Failed,
    FailureKind,
    Finished,
    Job,
    JobEvent,
    Progress,
    Started,
    StopType,
    TextDelta,
    Timings,
    TokenProb,
)
from wingman.errors import EngineFailure, InvalidRequest, SlowReader, Unavailable, WingmanError

N_JOBS = 3


def stream_of(n_jobs: int = N_JOBS, max_unread: int = 1000) -> tuple[JobStream, list[int]]:
    forgotten: list[int] = []
    jobs = tuple(Job(job_id, (1,), SamplingParams()) for job_id in range(n_jobs))
    return JobStream(jobs, max_unread, forgotten.append), forgotten


def delta(job_id: int, text: str, token: int = 5) -> TextDelta:
    return TextDelta(job_id, text, (token,), token, None, (TokenProb(token, -1.0, ()),))


def finished(job_id: int) -> Finished:
    timings = Timings(0, 1, 1.0, 1, 1.0)
    return Finished(job_id, 0, "", (), 1, 1, StopType.EOS, "", False, False, timings)


@given(st.lists(st.tuples(st.integers(0, N_JOBS - 1), st.text("ab", max_size=3), st.booleans()), max_size=30))
async def test_what_is_read_is_what_was_delivered(steps: list[tuple[int, str, bool]]) -> None:
    stream, _ = stream_of()
    sent: dict[int, list[TextDelta]] = {job_id: [] for job_id in range(N_JOBS)}
    read: dict[int, list[TextDelta]] = {job_id: [] for job_id in range(N_JOBS)}
    ends: list[int] = []

    def take(events: list[JobEvent]) -> None:
        assert len(events) <= 2 * N_JOBS, "one delta and one end of each job at most"
        for event in events:
            if isinstance(event, TextDelta):
                read[event.job_id].append(event)
            else:
                ends.append(event.job_id)

    steps_of = stream.steps()
    for job_id, text, reads in steps:
        event = delta(job_id, text, len(sent[job_id]))
        sent[job_id].append(event)
        stream.deliver(event)
        if reads:
            take(await anext(steps_of))
    for job_id in range(N_JOBS):
        stream.deliver(finished(job_id))
    async for events in steps_of:
        take(events)
    assert ends == list(range(N_JOBS))
    for job_id in range(N_JOBS):
        assert "".join(one.text for one in read[job_id]) == "".join(one.text for one in sent[job_id])
        assert [t for one in read[job_id] for t in one.tokens] == list(range(len(sent[job_id])))
        assert [p.token for one in read[job_id] for p in one.probs] == list(range(len(sent[job_id])))
        if sent[job_id]:
            assert read[job_id][-1].n_decoded == sent[job_id][-1].n_decoded


async def test_events_keep_their_order_within_a_job() -> None:
    stream, _ = stream_of(2)
    stream.deliver(Started(0, 4))
    stream.deliver(delta(0, "a"))
    stream.deliver(delta(1, "x"))
    stream.deliver(Progress(0, 9, 0, 9, 1.0))
    stream.deliver(delta(0, "b"))
    stream.deliver(delta(1, "y"))
    stream.deliver(finished(1))
    stream.deliver(finished(0))
    events = [event async for event in stream]
    assert [(type(e).__name__, e.job_id, getattr(e, "text", None)) for e in events] == [
        ("TextDelta", 0, "a"), ("TextDelta", 1, "xy"), ("Progress", 0, None), ("TextDelta", 0, "b"),
        ("Finished", 1, ""), ("Finished", 0, ""),
    ]  # fmt: skip
    assert stream.slot_ids == {0: 4}


async def test_results_are_in_the_order_of_the_jobs() -> None:
    stream, forgotten = stream_of()
    for job_id in (2, 0, 1):
        stream.deliver(finished(job_id))
    async with stream:
        assert [result.job_id for result in await stream.results()] == [0, 1, 2]
    assert forgotten == [0, 1, 2]


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (FailureKind.ENGINE, EngineFailure),
        (FailureKind.INVALID, InvalidRequest),
        (FailureKind.UNAVAILABLE, Unavailable),
    ],
)
async def test_one_failure_ends_all(kind: FailureKind, error: type[WingmanError]) -> None:
    stream, forgotten = stream_of()
    stream.deliver(finished(0))
    stream.deliver(Failed(1, kind, "why"))
    with pytest.raises(error, match="why"):
        async with stream:
            await stream.results()
    assert forgotten == [0, 1, 2]


async def test_what_came_before_a_failure_is_read_and_nothing_that_came_after() -> None:
    stream, _ = stream_of(2)
    for event in (delta(0, "a"), Failed(1, FailureKind.ENGINE, "why"), delta(0, "b"), finished(0)):
        stream.deliver(event)
    steps_of = stream.steps()
    assert await anext(steps_of) == [delta(0, "a")]
    with pytest.raises(EngineFailure):
        await anext(steps_of)


async def test_the_backlog_of_all_jobs_together_is_bounded() -> None:
    stream, forgotten = stream_of(max_unread=10)
    steps_of = stream.steps()
    for job_id in range(2):
        stream.deliver(delta(job_id, "x" * 5))
    assert len(await anext(steps_of)) == 2, "what was read counts no more"
    for job_id in range(2):
        stream.deliver(delta(job_id, "x" * 5))
    assert forgotten == []
    stream.deliver(delta(2, "x"))
    assert forgotten == [0, 1, 2]
    with pytest.raises(SlowReader, match="--max-unread"):
        await anext(steps_of)


async def test_unread_probabilities_count_too() -> None:
    stream, forgotten = stream_of(1, max_unread=1000)
    top = tuple((token, -1.0) for token in range(100))
    for _ in range(2):
        stream.deliver(TextDelta(0, "", (1,), 1, None, (TokenProb(1, -1.0, top),)))
    assert forgotten == [0]


async def test_what_came_before_a_failure_is_read_before_it() -> None:
    stream, _ = stream_of()
    stream.deliver(delta(0, "said"))
    stream.deliver(Failed(1, FailureKind.ENGINE, "why"))
    events = stream.__aiter__()
    assert await anext(events) == delta(0, "said")
    with pytest.raises(EngineFailure):
        await anext(events)
