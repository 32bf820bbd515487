"""A cache that all slots share and that is too small for everybody: nobody waits for ever, nobody is refused
who fits alone, and what comes out is right."""

from __future__ import annotations

from tests.support.runner import _hash
from tests.support.scheduler import Machine
from wingman.engine.types import Failed, Finished, Progress, TextDelta

N_CTX = 128


def text(seed: int, n_tokens: int) -> list[int]:
    """A prompt that shares nothing with those of other seeds."""
    return [3 + (seed * 37 + index * 7) % 200 for index in range(n_tokens)]


class Talkative(Machine):
    """A model that never ends by itself."""

    def __init__(self, n_slots: int, n_ctx: int = N_CTX, n_batch: int = 32, **limits: object) -> None:
        super().__init__(n_slots, n_ctx, n_batch, n_ctx=n_ctx, is_unified=True, **limits)
        self.runner.choose = lambda _, held: 3 + _hash(held) % 256  # type: ignore[method-assign]

    def ended(self) -> set[int]:
        return {event.job_id for event in self.events if isinstance(event, Finished | Failed)}

    def failures(self) -> list[Failed]:
        return [event for event in self.events if isinstance(event, Failed)]


def test_who_gave_way_is_not_passed_by_newcomers_for_ever() -> None:
    machine = Talkative(4, parked_bytes=10**6)
    machine.add(1, text(1, 20), n_predict=70)
    machine.add(2, text(2, 20), n_predict=70)
    n_newcomers = 0
    for step in range(1500):
        if step % 5 == 0 and len(machine.scheduler._queue) < 2:
            n_newcomers += 1
            machine.add(10 + n_newcomers, text(10 + n_newcomers, 8), n_predict=12)
        machine.step()
        if 2 in machine.ended():
            break
    assert machine.scheduler.snapshot().n_preemptions_total
    assert 2 in machine.ended()


def test_what_lies_in_a_slot_that_waits_does_not_keep_others_out() -> None:
    machine = Talkative(2, n_batch=64, parked_bytes=0)
    system = text(5, 30)
    machine.add(1, text(1, 10), n_predict=80)
    machine.add(2, system, n_predict=80)
    while 1 not in machine.ended():
        machine.step()
    machine.add(3, [*system, *text(9, 3)], n_predict=3)
    machine.run()
    assert machine.ended() == {1, 2, 3}
    assert not machine.failures()


def test_a_prompt_that_fits_alone_waits_for_those_that_hold_a_prefix() -> None:
    machine = Talkative(3, n_ctx=64, n_batch=16)
    base = text(1, 30)
    machine.add(1, base, n_predict=1)
    machine.run()
    machine.add(2, text(2, 60), n_predict=1)
    machine.add(3, [*base, *text(3, 8)], n_predict=1)
    machine.run()
    assert not machine.failures()


def test_the_youngest_gives_way_to_the_oldest() -> None:
    machine = Talkative(2, n_ctx=64, n_batch=16)
    first, second = text(1, 30), text(2, 30)
    machine.add(1, first, n_predict=1)
    machine.add(2, second, n_predict=1)
    machine.run()
    machine.add(3, [*first, *text(3, 30)], n_predict=1)
    machine.add(4, [*second, *text(4, 8)], n_predict=1)
    batch = machine.step()
    assert batch is None or 4 not in {chunk.job_id for chunk in batch.chunks}
    machine.run()
    assert machine.ended() == {1, 2, 3, 4}
    assert not machine.failures()


def test_progress_is_told_of_a_prompt_once() -> None:
    machine = Talkative(3)
    machine.add(1, text(1, 20), n_predict=80)
    machine.add(2, text(2, 20), n_predict=80, stream=True, return_progress=True)
    machine.run()
    own = [event for event in machine.events if event.job_id == 2]
    first = next(index for index, event in enumerate(own) if isinstance(event, TextDelta))
    assert machine.scheduler.snapshot().n_preemptions_total
    assert not any(isinstance(event, Progress) for event in own[first:])


def test_adapters_of_those_who_wait_get_no_turn() -> None:
    machine = Talkative(3)
    machine.add(1, text(1, 20), n_predict=80, lora=(1.0,))
    machine.add(2, text(2, 20), n_predict=80, lora=(2.0,))
    n_empty = 0
    while not machine.scheduler.is_idle:
        n_empty += machine.step() is None
    assert n_empty < 5


def test_a_preempted_answer_is_what_it_would_be_alone() -> None:
    machine = Talkative(3)
    for job_id in (1, 2, 3):
        machine.add(job_id, text(job_id, 20), n_predict=60)
    machine.run()
    assert machine.scheduler.snapshot().n_preemptions_total
    for job_id in (1, 2, 3):
        end, held = machine.finished(job_id), text(job_id, 20)
        for _ in range(60):
            held.append(machine.runner.choose(0, held))
        assert not end.truncated
        assert list(end.tokens) == held[20:]
