"""The queue of inputs to be embedded: batches within limits, in order, each input its own vector."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from wingman.engine.embedding import EmbeddingQueue, EmbedItem
from wingman.engine.types import Embedded, EmbedJob, Failed, FailureKind

N_MAX = 12
INPUTS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=N_MAX), min_size=1, max_size=6)


def vector(item: EmbedItem) -> bytes:
    return struct.pack(f"<{len(item.tokens)}f", *item.tokens)


def queue_of(*jobs: list[list[int]]) -> EmbeddingQueue:
    queue = EmbeddingQueue(N_MAX, n_inputs=3, max_step_s=1.0)
    for job_id, inputs in enumerate(jobs):
        queue.add(EmbedJob(job_id, tuple(map(tuple, inputs))))
    return queue


@given(st.lists(INPUTS, max_size=5), st.data())
def test_every_input_gets_its_vector(jobs: list[list[list[int]]], data: st.DataObject) -> None:
    queue = queue_of(*jobs)
    cancelled: set[int] = set()
    seen: list[tuple[int, int]] = []
    events: list[Embedded | Failed] = []
    while batch := queue.plan(is_alone=data.draw(st.booleans())):
        assert len(batch) <= 3
        assert sum(len(item.tokens) for item in batch) <= N_MAX
        seen += [(item.job_id, item.index) for item in batch]
        left = sorted(set(range(len(jobs))) - cancelled - {event.job_id for event in events})
        if left and data.draw(st.integers(0, 4)) == 0:
            cancelled.add(data.draw(st.sampled_from(left)))
            queue.cancel(max(cancelled))
            queue.cancel(99)
        queue.apply(batch, [vector(item) for item in batch], 1.0)
        events += queue.take_events()
    assert seen == sorted(seen), "the oldest come first"
    assert queue.is_idle
    for event in events:
        assert isinstance(event, Embedded)
        inputs = jobs[event.job_id]
        assert event.vectors == tuple(struct.pack(f"<{len(one)}f", *one) for one in inputs)


@given(st.lists(INPUTS, min_size=1, max_size=5))
def test_without_cancels_all_are_answered_in_as_few_batches_as_fit(jobs: list[list[list[int]]]) -> None:
    queue = queue_of(*jobs)
    n_batches = 0
    n_inputs = sum(map(len, jobs))
    previous: list[EmbedItem] = []
    while batch := queue.plan(is_alone=True):
        n_batches += 1
        if previous:
            is_full = len(previous) == 3
            n_tokens = sum(len(item.tokens) for item in (*previous, batch[0]))
            assert is_full or n_tokens > N_MAX, "the next input would have fitted"
        queue.apply(batch, [vector(item) for item in batch], 1.0)
        previous = batch
    assert n_batches <= n_inputs
    assert sorted(event.job_id for event in queue.take_events()) == list(range(len(jobs)))


def test_a_failed_batch_ends_its_jobs_only() -> None:
    queue = queue_of([[1] * 11, [2]], [[3]], [[4] * 12])
    batch = queue.plan(is_alone=True)
    assert [item.job_id for item in batch] == [0, 0]
    queue.fail(batch, "broken")
    assert queue.take_events() == (Failed(0, FailureKind.ENGINE, "broken"),)
    assert [item.job_id for item in queue.plan(is_alone=True)] == [1]
    queue.end_all()
    assert [event.job_id for event in queue.take_events()] == [1, 2]
    assert queue.is_idle
    assert queue.plan(is_alone=True) == []


def test_beside_generations_a_batch_takes_about_a_step() -> None:
    queue = queue_of([[1] * 4] * 8)
    assert len(queue.plan(is_alone=False)) == 1, "nothing is known of this machine's speed yet"
    batch = queue.plan(is_alone=True)
    assert len(batch) == 3
    queue.apply(batch, [b""] * 3, elapsed_s=1.5)
    assert len(queue.plan(is_alone=False)) == 2
