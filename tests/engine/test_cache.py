"""Who gets which prefix and who makes room: the books of the cache alone, and jobs that wait for each other."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.runner import EOS, next_token, solo_output
from tests.support.scheduler import GREEDY, Machine
from wingman.engine.cache import CacheLimits, KvCache, Reuse
from wingman.engine.runner import KvCopy, KvDrop, KvPark, KvRemove, KvRestore
from wingman.engine.sequence import Sequence
from wingman.engine.types import Job, Started

A = tuple(range(100, 140))
B = tuple(range(200, 240))


def make_cache(**fields: object) -> KvCache:
    """Three slots, a byte a token; sharing pays from 4 tokens on."""
    limits = {"n_slots": 3, "n_total": 300, "min_shared": 4, "parked_bytes": 100} | fields
    cache = KvCache(CacheLimits(**limits), lambda slot_id: len(cache.slots[slot_id].tokens))  # type: ignore[arg-type]
    return cache


def fill(cache: KvCache, *held: tuple[int, ...]) -> None:
    """Give the slots tokens, the first being the least recently used."""
    for slot, tokens in zip(cache.slots, held, strict=False):
        slot.tokens[:] = tokens
        slot.last_used = slot.id + 1.0


def chosen(cache: KvCache, prompt: tuple[int, ...], id_slot: int = -1, n_forks: int = 0) -> list[int] | None:
    slots = cache.choose(prompt, id_slot, n_forks)
    return None if slots is None else [slot.id for slot in slots]


class TestChoose:
    def test_longest_common_prefix_wins(self) -> None:
        cache = make_cache()
        fill(cache, B, A[:20], A[:30])
        assert chosen(cache, A) == [2]

    def test_too_little_in_common_takes_the_least_recently_used(self) -> None:
        cache = make_cache(similarity=0.5)
        fill(cache, B, A[:20], A[:19])
        assert chosen(cache, A) == [0], "half of it is not more than half of it"
        assert chosen(cache, A[:39]) == [1]

    def test_similarity_can_be_off(self) -> None:
        cache = make_cache(similarity=0.0)
        fill(cache, B, A, A)
        assert chosen(cache, A) == [0]

    def test_an_empty_slot_spares_what_another_holds(self) -> None:
        cache = make_cache()
        fill(cache, A + B, (), ())
        assert chosen(cache, A) == [1]
        fill(cache, A + B[:3])
        assert chosen(cache, A) == [0], "what it would lose is not worth a copy"
        fill(cache, A + B[:4])
        assert chosen(cache, A) == [1]

    def test_slot_asked_for(self) -> None:
        cache = make_cache()
        fill(cache, A)
        assert chosen(cache, A, id_slot=2) == [2]
        cache.slots[2].is_reserved = True
        assert chosen(cache, A, id_slot=2) is None
        assert chosen(cache, A) == [0]

    def test_forks_get_slots_beside_each_other_or_wait(self) -> None:
        cache = make_cache()
        fill(cache, A, B)
        assert chosen(cache, A, n_forks=1) == [0, 1], "they are computed together"
        assert chosen(cache, A, n_forks=2) == [0, 1, 2]
        assert chosen(cache, A, n_forks=3) is None
        cache.slots[1].is_reserved = True
        assert chosen(cache, A, n_forks=2) is None

    @pytest.mark.parametrize("limits", [{"is_unified": True}, {"parked_bytes": 0}])
    def test_forks_get_empty_slots_first_where_places_do_not_matter_or_cost_a_cache(
        self, limits: Any
    ) -> None:
        cache = make_cache(**limits)
        fill(cache, A, B)
        assert chosen(cache, A, n_forks=1) == [0, 2]
        assert chosen(cache, A, n_forks=2) == [0, 2, 1]

    @pytest.mark.parametrize(
        ("busy", "expected"),
        [({2}, 3), ({0, 2}, 1), ({4, 5}, 3), ({1, 3, 4}, 2), ({0, 1, 4, 5}, 3), (set(), 5)],
    )
    def test_a_prompt_enters_beside_those_that_are_busy(self, busy: set[int], expected: int) -> None:
        cache = make_cache(n_slots=6)
        fill(cache, B, B, B, (), B, A)
        for slot_id in busy:
            cache.slots[slot_id].sequence = Sequence(Job(id=slot_id, prompt=A, sampling=GREEDY), 0.0)
        assert chosen(cache, A) == [expected], "the place counts first, then the prefix, then who is empty"

    def test_what_does_not_fit_the_host_memory_is_not_given_up_for_a_place(self) -> None:
        cache = make_cache(n_slots=4, parked_bytes=30)
        fill(cache, (), B, (), A)
        cache.slots[0].sequence = Sequence(Job(id=0, prompt=A, sampling=GREEDY), 0.0)
        assert chosen(cache, A) == [3], "its own, and nobody loses 40 bytes"
        assert chosen(cache, A[:3]) == [2]
        assert chosen(make_cache(), A) == [0]


class TestReuse:
    def test_own_prefix(self) -> None:
        cache = make_cache(parked_bytes=0)
        fill(cache, A)
        assert cache.reuse(cache.slots[0], A[:20] + B, ()) == Reuse(20, "its slot had it")
        assert cache.take_ops() == (KvRemove(0, 20),)
        assert tuple(cache.slots[0].tokens) == A[:20]

    def test_last_token_is_computed(self) -> None:
        cache = make_cache()
        fill(cache, A)
        assert cache.reuse(cache.slots[0], A, ()).n_tokens == len(A) - 1

    @pytest.mark.parametrize(("n_other", "n_cached"), [(13, 10), (14, 14)])
    def test_copy_when_it_spares_enough(self, n_other: int, n_cached: int) -> None:
        cache = make_cache()
        fill(cache, A[:10], A[:n_other])
        assert cache.reuse(cache.slots[0], A, ()).n_tokens == n_cached
        assert cache.has_ops is (n_cached == 14)
        assert cache.take_ops() == ((KvCopy(1, 0, 14),) if n_cached == 14 else ())

    def test_what_is_lost_is_parked_and_comes_back(self) -> None:
        cache = make_cache()
        fill(cache, A)
        assert cache.reuse(cache.slots[0], B, ()) == Reuse(0, "nobody has it")
        assert cache.take_ops() == (KvPark(0, 0), KvRemove(0, 0))
        cache.slots[0].tokens[:] = B
        assert cache.n_obtainable(A, ()) == len(A) - 1
        assert cache.reuse(cache.slots[1], A, ()) == Reuse(len(A) - 1, "restored from host memory")
        assert cache.take_ops() == (KvRestore(0, 1, len(A) - 1),)
        assert cache.parked.n_hits == 1

    def test_a_slot_is_preferred_to_host_memory(self) -> None:
        cache = make_cache()
        fill(cache, A, A[:30])
        cache.parked.add(A[:30], (), 30, can_cut=True)
        cache.parked.add((*A[:20], 1), (), 20, can_cut=True)
        assert cache.reuse(cache.slots[2], A[:30], ()).reason == "copied from slot 0"

    def test_adapters_are_kept_apart(self) -> None:
        cache = make_cache()
        fill(cache, A)
        assert cache.reuse(cache.slots[1], A, (1.0,)) == Reuse(0, "slot 0 computed it with other adapters")
        assert cache.slots[1].lora == (1.0,)
        assert cache.n_obtainable(A, (1.0,)) == 0

    def test_whole_or_nothing_where_it_cannot_be_cut(self) -> None:
        cache = make_cache(can_cut=False)
        fill(cache, A)
        assert (
            cache.reuse(cache.slots[1], A[:20] + B, ()).reason == "slot 0 holds more than it and can't be cut"
        )
        assert cache.reuse(cache.slots[1], A + B, ()) == Reuse(len(A), "copied from slot 0")
        assert cache.reuse(cache.slots[0], A, ()).n_tokens == 0

    @pytest.mark.parametrize(("n_window", "n_cached"), [(39, 0), (40, 20)])
    def test_short_enough_for_the_window(self, n_window: int, n_cached: int) -> None:
        cache = make_cache(can_cut=False, n_window=n_window)
        fill(cache, A)
        assert cache.reuse(cache.slots[1], A[:20] + B, ()).n_tokens == n_cached

    def test_no_copy_into_a_full_pool(self) -> None:
        cache = make_cache(is_unified=True, n_total=79)
        fill(cache, A)
        assert cache.reuse(cache.slots[1], (*A, 1), ()) == Reuse(0, "there is no room for a copy")
        cache = make_cache(is_unified=True, n_total=80)
        fill(cache, A)
        assert cache.reuse(cache.slots[1], (*A, 1), ()).n_tokens == 40

    def test_restored_as_a_whole_only_where_it_fits(self) -> None:
        for n_total, n_cached in ((79, 0), (80, 20)):
            cache = make_cache(is_unified=True, n_total=n_total)
            fill(cache, B)
            cache.parked.add(A, (), 40, can_cut=True)
            assert cache.reuse(cache.slots[1], A[:20] + B, ()).n_tokens == n_cached


class TestParking:
    def test_budget_drops_the_least_recently_used(self) -> None:
        cache = make_cache(parked_bytes=80)
        fill(cache, A, B, tuple(range(50)))
        cache.release(cache.slots[0])
        cache.release(cache.slots[1])
        cache.take_ops()
        assert cache.parked.n_bytes == 80
        cache.release(cache.slots[2])
        assert cache.take_ops() == (KvDrop(0), KvDrop(1), KvPark(2, 2), KvRemove(2, 0))

    @pytest.mark.parametrize("budget", [0, 39])
    def test_too_large_is_not_parked(self, budget: int) -> None:
        cache = make_cache(parked_bytes=budget)
        fill(cache, A)
        cache.release(cache.slots[0])
        assert cache.take_ops() == (KvRemove(0, 0),)

    def test_nothing_is_kept_twice(self) -> None:
        cache = make_cache()
        fill(cache, A, A[:30])
        cache.release(cache.slots[1])
        assert cache.take_ops() == (KvRemove(1, 0),), "the other slot has it"
        cache.release(cache.slots[0])
        cache.slots[1].tokens[:] = A[:30]
        cache.release(cache.slots[1])
        assert cache.take_ops() == (KvPark(0, 0), KvRemove(0, 0), KvRemove(1, 0)), "host memory has it"

    def test_other_adapters_or_no_way_to_cut_are_not_the_same(self) -> None:
        cache = make_cache()
        fill(cache, A, A)
        cache.slots[0].lora = (1.0,)
        cache.release(cache.slots[1])
        assert KvPark(1, 0) in cache.take_ops()
        cache = make_cache(can_cut=False)
        fill(cache, A, A[:30])
        cache.release(cache.slots[1])
        assert KvPark(1, 0) in cache.take_ops()

    @pytest.mark.parametrize(("n_held", "n_parked"), [(3, 0), (4, 1)])
    def test_a_few_tokens_are_not_worth_it(self, n_held: int, n_parked: int) -> None:
        cache = make_cache()
        fill(cache, A[:n_held], A[:n_held] if n_held == 3 else (*A[:1], *B[:n_held]))
        cache.release(cache.slots[0])
        cache.reuse(cache.slots[1], B if n_held == 3 else A[:1] + B, ())
        assert cache.parked.n_entries == n_parked

    def test_clear_forgets_all(self) -> None:
        cache = make_cache()
        fill(cache, A, B)
        cache.release(cache.slots[0])
        cache.clear()
        assert not cache.has_ops
        assert cache.n_held == cache.parked.n_entries == cache.n_obtainable(A, ()) == 0


class TestRoom:
    def test_split_streams_have_their_own(self) -> None:
        cache = make_cache(n_total=10)
        fill(cache, A)
        assert cache.make_room(1000)
        assert cache.n_held == 40

    def test_least_recently_used_go_first(self) -> None:
        cache = make_cache(is_unified=True, n_total=100)
        fill(cache, A, B, tuple(range(20)))
        cache.slots[0].last_used = 9.0
        assert cache.make_room(0)
        assert cache.n_held == 100, "no more than needed"
        assert cache.make_room(1)
        assert [len(slot.tokens) for slot in cache.slots] == [40, 0, 20]

    def test_reserved_slots_stay(self) -> None:
        cache = make_cache(is_unified=True, n_total=100)
        fill(cache, A, B, tuple(range(20)))
        for slot in cache.slots:
            slot.is_reserved = True
        assert not cache.make_room(1)
        assert cache.n_held == 100


# -- jobs ------------------------------------------------------------------------------------------


def endless(seed: int, n_predict: int) -> list[int]:
    """A prompt whose answer does not end by itself."""
    for start in range(seed, seed + 1000):
        prompt = [1, start % 250 + 3, start // 250 + 3, 9]
        held = list(prompt)
        while len(held) < len(prompt) + n_predict and next_token(held) != EOS:
            held.append(next_token(held))
        if len(held) == len(prompt) + n_predict:
            return prompt
    raise AssertionError


def said(machine: Machine, job_id: int, prompt: list[int], n_predict: int) -> tuple[int, int]:
    """Checks a job's tokens; how many of its prompt were cached and how many computed."""
    end = machine.finished(job_id)
    assert list(end.tokens) == solo_output(prompt, n_predict, 64)
    assert end.timings.cache_n + end.timings.prompt_n == len(prompt)
    return end.timings.cache_n, machine.n_evaluated(job_id, len(prompt))


SYSTEM = [1, *range(10, 40)]


class TestWaiting:
    def test_a_prefix_on_its_way_is_waited_for(self) -> None:
        machine = Machine(n_slots=3, n_batch=8)
        prompts = {job_id: [*SYSTEM, 50 + job_id, 60] for job_id in (1, 2, 3)}
        for job_id, prompt in prompts.items():
            machine.add(job_id, prompt, n_predict=3)
        machine.run()
        assert [said(machine, *item, 3) for item in prompts.items()] == [(0, 33), (31, 2), (31, 2)]

    def test_waiters_form_a_chain(self) -> None:
        machine = Machine(n_slots=3, n_batch=8)
        first, second, third = SYSTEM, [*SYSTEM[:17], *range(60, 90)], [*SYSTEM[:17], *range(60, 80), 7]
        for job_id, prompt in enumerate((first, second, third), 1):
            machine.add(job_id, prompt, n_predict=3)
        machine.run()
        assert said(machine, 2, second, 3) == (17, 30)
        assert said(machine, 3, third, 3) == (37, 1)

    def test_too_little_is_not_waited_for(self) -> None:
        machine = Machine(n_slots=2, n_batch=64)
        for job_id in (1, 2):
            machine.add(job_id, [*SYSTEM[:15], 50 + job_id], n_predict=1)
        batch = machine.step()
        assert batch is not None
        assert len(batch.chunks) == 2

    @pytest.mark.parametrize("fields", [{"lora": (1.0,)}, {"cache_prompt": False}])
    def test_nothing_to_wait_for(self, fields: dict[str, object]) -> None:
        machine = Machine(n_slots=2, n_batch=64)
        machine.add(1, SYSTEM, n_predict=1)
        machine.add(2, SYSTEM, n_predict=1, **fields)
        machine.run()
        assert machine.finished(2).timings.cache_n == 0

    @pytest.mark.parametrize("end", ["cancel", "fail"])
    def test_who_is_waited_for_goes_away(self, end: str) -> None:
        machine = Machine(n_slots=2, n_batch=8)
        prompt = [*SYSTEM, 50]
        machine.add(1, SYSTEM, n_predict=3)
        machine.add(2, prompt, n_predict=3)
        for _ in range(2):
            machine.step()
        if end == "cancel":
            machine.scheduler.cancel(1)
        else:
            machine.step(fails=True)
        machine.run()
        assert said(machine, 2, prompt, 3) == ((16, 16) if end == "cancel" else (0, 32))


class TestRoomForJobs:
    def make(self, parked_bytes: int = 0) -> Machine:
        return Machine(n_slots=3, n_ctx_slot=64, n_ctx=48, is_unified=True, parked_bytes=parked_bytes)

    @pytest.mark.parametrize("parked_bytes", [0, 10_000])
    def test_the_youngest_gives_way_and_goes_on(self, parked_bytes: int) -> None:
        machine = self.make(parked_bytes)
        prompts = {job_id: endless(100 * job_id, 30) for job_id in (1, 2, 3)}
        for job_id, prompt in prompts.items():
            machine.add(job_id, prompt, n_predict=30)
        machine.run()
        for job_id, prompt in prompts.items():
            assert said(machine, job_id, prompt, 30)[0] == 0
        assert machine.scheduler.snapshot().n_preemptions_total >= 2
        ends = [e.job_id for e in machine.events if hasattr(e, "stop_type")]
        assert ends == [1, 2, 3], "the oldest is never held up"
        assert [e.job_id for e in machine.events if isinstance(e, Started)] == [1, 2, 3]

    def test_restored_together_none_waits_for_the_other(self) -> None:
        """Both were once let in at once and kept each other's reserve."""
        machine = Machine(
            n_slots=4, n_ctx_slot=128, n_ctx=128, is_unified=True, parked_bytes=10_000, min_shared=4
        )
        for job_id in range(1, 5):
            machine.add(job_id, endless(100 * job_id, 50), n_predict=50)
        machine.run()
        assert sum(len(machine.finished(job_id).tokens) for job_id in range(1, 5)) == 200

    def test_one_that_fills_the_pool_alone_ends(self) -> None:
        machine = self.make()
        machine.add(1, endless(5, 60), n_predict=60)
        machine.run()
        end = machine.finished(1)
        assert end.truncated
        assert end.n_held == 48

    def test_idle_conversations_go_before_anybody_is_preempted(self) -> None:
        machine = self.make(10_000)
        machine.add(1, list(SYSTEM), n_predict=0)
        machine.run()
        prompt = endless(5, 30)
        machine.add(2, prompt, n_predict=30, id_slot=1)
        machine.run()
        assert machine.finished(2).tokens == tuple(solo_output(prompt, 30, 64))
        assert machine.scheduler.snapshot().n_preemptions_total == 0
        assert list(machine.runner.parked.values()) == [SYSTEM]
