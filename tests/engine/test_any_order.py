"""Jobs, forks, slot changes, cancellation and failures in any order, against a scripted runner.

Whatever happens around it, a job that finishes has exactly what it would get alone.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.support.runner import entries, solo_output
from tests.support.scheduler import Machine
from wingman.engine.types import (
    Constraint,
    Drafting,
    DraftKind,
    Failed,
    FailureKind,
    Finished,
    Job,
    SlotChanged,
    SlotJob,
    SlotMove,
    TextDelta,
)

N_SLOTS = 3
N_CTX_SLOT = 48
LORAS = ((), (1.0,), (2.0,))
BOUND = Constraint('root ::= "a"')


class AnyOrder(RuleBasedStateMachine):
    """Every slot has room of its own."""

    limits: dict[str, object] = {}
    drafting = Drafting()

    def __init__(self) -> None:
        super().__init__()
        self.machine = Machine(N_SLOTS, N_CTX_SLOT, n_batch=8, **self.limits)
        self.jobs: dict[int, Job] = {}
        self.slot_jobs: dict[int, SlotJob] = {}
        self.gone: set[int] = set()
        """Ids that were cancelled."""
        self.failed: set[int] = set()
        self.n_failed_steps = 0
        self.n_ids = 0
        self.saved: list[tuple[SlotChanged, tuple[float, ...]]] = []

    def _new_id(self) -> int:
        self.n_ids += 1
        return self.n_ids

    @rule(
        prompt=st.lists(st.integers(3, 9), min_size=1, max_size=20),
        n_predict=st.integers(-1, 12),
        flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
        id_slot=st.integers(-1, N_SLOTS - 1),
        n_answers=st.integers(1, N_SLOTS),
        lora=st.sampled_from(LORAS),
    )
    def add(
        self,
        prompt: list[int],
        n_predict: int,
        flags: tuple[bool, bool, bool],
        id_slot: int,
        n_answers: int,
        lora: tuple[float, ...],
    ) -> None:
        stream, cache, is_bound = flags
        leader = self.n_ids + 1
        for index in range(n_answers):
            job_id = self._new_id()
            self.jobs[job_id] = self.machine.add(
                job_id,
                [1, *prompt],
                n_predict=n_predict,
                stream=stream,
                cache_prompt=cache,
                id_slot=-1 if index else id_slot,
                lora=lora,
                constraint=BOUND if is_bound else None,
                fork_of=leader if index else None,
                drafting=self.drafting,
            )

    @rule(slot=st.integers(0, N_SLOTS - 1), move=st.sampled_from([SlotMove.SAVE, SlotMove.ERASE]))
    def change(self, slot: int, move: SlotMove) -> None:
        job_id = self._new_id()
        self.slot_jobs[job_id] = self.machine.change(job_id, slot, move)

    @precondition(lambda self: self.saved)
    @rule(slot=st.integers(0, N_SLOTS - 1), is_damaged=st.booleans(), data=st.data())
    def restore(self, slot: int, is_damaged: bool, data: st.DataObject) -> None:
        saved, lora = data.draw(st.sampled_from(self.saved))
        state = saved.state + b"x" * is_damaged
        job_id = self._new_id()
        self.slot_jobs[job_id] = self.machine.change(
            job_id, slot, SlotMove.RESTORE, tokens=saved.tokens, state=state, lora=lora
        )

    @rule()
    def step(self) -> None:
        self.machine.step()

    @rule()
    def fail_a_step(self) -> None:
        if self.machine.step(fails=True) is not None:
            self.n_failed_steps += 1

    @precondition(lambda self: self.n_ids > 12)
    @rule()
    def fail_aside(self) -> None:
        self.machine.fail_aside()

    @precondition(lambda self: self.n_ids)
    @rule(data=st.data(), during=st.booleans())
    def cancel(self, data: st.DataObject, during: bool) -> None:
        job_id = data.draw(st.integers(1, self.n_ids))
        if not during:
            self.machine.scheduler.cancel(job_id)
        elif self.machine.step(cancel=job_id) is None:
            return
        if job_id not in self._ended():
            self.gone.add(job_id)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.jobs)))
        if job_id not in self._ended() | self.gone:
            self.failed.add(job_id)
        self.machine.scheduler.fail(job_id, FailureKind.ENGINE, "scripted")
        self.machine.collect()

    def _ended(self) -> set[int]:
        kinds = Finished | Failed | SlotChanged
        return {event.job_id for event in self.machine.events if isinstance(event, kinds)}

    @invariant()
    def the_scheduler_knows_what_the_cache_holds(self) -> None:
        scheduler = self.machine.scheduler
        scheduler.check_integrity()
        if not scheduler._cache.has_ops:
            held = [list(slot.tokens) for slot in scheduler._cache.slots]
            assert [[entry % 300 for entry in cache] for cache in self.machine.runner.cache] == held

    @invariant()
    def what_was_saved_is_what_the_slot_holds(self) -> None:
        for event in self.machine.events[:]:
            job = self.slot_jobs.get(event.job_id)
            is_save = job is not None and job.move is SlotMove.SAVE and isinstance(event, SlotChanged)
            if is_save and all(event is not saved for saved, _ in self.saved):
                candidates = [lora for lora in LORAS if _state(event.tokens, lora) == event.state]
                assert candidates, "the state is not that of the tokens"
                self.saved.append((event, candidates[0]))

    def teardown(self) -> None:
        self.machine.run()
        self._check_ends()
        for job_id in self._finished():
            job, end = self.jobs[job_id], self.machine.finished(job_id)
            self._check_output(job, end)
            if job.stream:
                deltas = [e for e in self.machine.events if isinstance(e, TextDelta) and e.job_id == job.id]
                assert "".join(delta.text for delta in deltas) == end.text
                assert [token for delta in deltas for token in delta.tokens] == list(end.tokens)
            self._check_evaluations(job)
        assert all(not slot.is_busy for slot in self.machine.scheduler.snapshot().slots)
        assert not any(slot.is_reserved for slot in self.machine.scheduler._cache.slots)

    def _finished(self) -> set[int]:
        return {event.job_id for event in self.machine.events if isinstance(event, Finished)}

    def _check_ends(self) -> None:
        ends = [e for e in self.machine.events if isinstance(e, Finished | Failed | SlotChanged)]
        everybody = self.jobs.keys() | self.slot_jobs.keys()
        assert sorted(end.job_id for end in ends) == sorted(everybody - self.gone)
        if not self.n_failed_steps:
            damaged = {i for i, job in self.slot_jobs.items() if len(job.state) % 4}
            refused = {end.job_id for end in ends if isinstance(end, Failed)}
            assert refused == (damaged | self.failed) - self.gone

    def _check_output(self, job: Job, end: Finished) -> None:
        alone = solo_output(job.prompt, job.n_predict, N_CTX_SLOT, job.lora, job.constraint is not None)
        assert list(end.tokens) == alone

    def _check_evaluations(self, job: Job) -> None:
        """A prompt with several answers is evaluated once, unless the one that evaluates it goes."""
        is_undisturbed = job.fork_of in self._finished() and not self.n_failed_steps
        if is_undisturbed:
            assert self.machine.n_evaluated(job.id, len(job.prompt)) == 0


def _state(tokens: tuple[int, ...], lora: tuple[float, ...]) -> bytes:
    runner = Machine(1, N_CTX_SLOT).runner
    runner.cache[0] = entries(tokens, lora)
    return runner.save_slot(0)


class AnyOrderUnified(AnyOrder):
    """All share a cache that holds two full slots: an answer may be cut short, but never be wrong."""

    limits = {"n_ctx": 2 * N_CTX_SLOT, "is_unified": True}

    def _check_ends(self) -> None:
        restores = {i for i, job in self.slot_jobs.items() if job.move is SlotMove.RESTORE}
        ends = [e for e in self.machine.events if isinstance(e, Finished | Failed | SlotChanged)]
        everybody = self.jobs.keys() | self.slot_jobs.keys()
        assert sorted(end.job_id for end in ends) == sorted(everybody - self.gone)
        if not self.n_failed_steps:
            refused = {end.job_id for end in ends if isinstance(end, Failed)}
            assert refused <= restores | self.failed

    def _check_output(self, job: Job, end: Finished) -> None:
        if not end.truncated:
            super()._check_output(job, end)
        alone = solo_output(job.prompt, job.n_predict, N_CTX_SLOT, job.lora, job.constraint is not None)
        assert list(end.tokens) == alone[: len(end.tokens)]


class AnyOrderNoRollback(AnyOrder):
    """A cache that can't forget its last tokens."""

    limits = {"can_rollback": False, "min_shared": 1, "parked_bytes": 400}


class AnyOrderWindow(AnyOrder):
    """A cache that can forget its last tokens while it holds few."""

    limits = {"can_rollback": False, "n_window": 12, "min_shared": 2, "parked_bytes": 400}


class AnyOrderShared(AnyOrder):
    """Every prefix is shared, and host memory holds a few sequences."""

    limits = {"min_shared": 1, "parked_bytes": 400}


class AnyOrderUnifiedShared(AnyOrderUnified):
    """The same in a cache that all share."""

    limits = {"n_ctx": 2 * N_CTX_SLOT, "is_unified": True, "min_shared": 2, "parked_bytes": 600}


class AnyOrderGuessed(AnyOrder):
    """Tokens are guessed ahead, sometimes rightly."""

    drafting = Drafting(DraftKind.MODEL, n_max=4)


class AnyOrderAside(AnyOrder):
    """Long prompts are computed outside their slots while others generate."""

    limits = {"can_compute_aside": True, "min_shared": 2, "parked_bytes": 400}


class AnyOrderAsideGuessed(AnyOrderAside):
    """The same, and tokens are guessed ahead."""

    drafting = Drafting(DraftKind.MODEL, n_max=4)


class AnyOrderUnifiedGuessed(AnyOrderUnified):
    """The same where room is short."""

    limits = {"n_ctx": 2 * N_CTX_SLOT, "is_unified": True, "min_shared": 2, "parked_bytes": 600}
    drafting = Drafting(DraftKind.MODEL, n_max=4)


SETTINGS = settings(max_examples=80, stateful_step_count=40, deadline=None, report_multiple_bugs=False)
for case in (
    AnyOrder, AnyOrderUnified, AnyOrderNoRollback, AnyOrderWindow, AnyOrderShared, AnyOrderUnifiedShared,
    AnyOrderGuessed, AnyOrderUnifiedGuessed, AnyOrderAside, AnyOrderAsideGuessed,
):  # fmt: skip
    case.TestCase.settings = SETTINGS
TestAnyOrder = AnyOrder.TestCase
TestAnyOrderUnified = AnyOrderUnified.TestCase
TestAnyOrderNoRollback = AnyOrderNoRollback.TestCase
TestAnyOrderWindow = AnyOrderWindow.TestCase
TestAnyOrderShared = AnyOrderShared.TestCase
TestAnyOrderUnifiedShared = AnyOrderUnifiedShared.TestCase
TestAnyOrderGuessed = AnyOrderGuessed.TestCase
TestAnyOrderAside = AnyOrderAside.TestCase
TestAnyOrderAsideGuessed = AnyOrderAsideGuessed.TestCase
TestAnyOrderUnifiedGuessed = AnyOrderUnifiedGuessed.TestCase
