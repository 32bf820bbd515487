"""Thread counts found on a simulated machine: steps take as long as threads, neighbours and chance make them."""

import random
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wingman.engine.cores import CoreShares, cgroup_cores, usable_cores
from wingman.engine.threads import ThreadChoice, ThreadGovernor
from wingman.options import parse_threads


@dataclass
class Machine:
    """Cores, neighbours that never rest, and measured times that spread by 15%."""

    n_cores: int
    seed: int
    n_neighbours: int = 0
    now: float = 0.0

    def __post_init__(self):
        self.random = random.Random(self.seed)

    def step(self, n_tokens, n_threads, n_held=0):
        """Seconds, and the share of them on a core."""
        seconds = 5e-3 * n_tokens**0.95 * (1 + n_held / 4000) / n_threads**0.8 + 5e-4
        seconds *= max(0.6, self.random.gauss(1, 0.15))
        n_over = n_threads + self.n_neighbours - self.n_cores
        share = self.random.uniform(0.93, 1)
        if self.n_neighbours and n_over > 0:
            is_long = n_tokens >= 32
            waits = self.random.uniform(1.5, 2.2) if is_long else self.random.expovariate(1 / 14)
            seconds, share = seconds * (1 + n_over * waits), self.random.uniform(0.2, 0.6)
        self.now += seconds
        return seconds, share


def work(machine, steps, governor=None, n_threads=0):
    """Time for steps of (tokens, tokens held before), and the counts they got."""
    start, counts = machine.now, []
    for n_tokens, n_held in steps:
        counts.append(governor.choose(n_tokens) if governor else n_threads)
        seconds, share = machine.step(n_tokens, counts[-1], n_held)
        if governor:
            governor.observe(n_tokens, seconds, machine.now, share)
    return machine.now - start, counts


DECODE = [(1, i % 1000) for i in range(1500)]
PREFILL = [(256, i % 8 * 256) for i in range(100)]
MIXED = [(n, 300) for i in range(40) for n in (200, 90, *[1 + i % 5] * 40)]
WORKLOADS = pytest.mark.parametrize("steps", [DECODE, PREFILL, MIXED], ids=["decode", "prefill", "mixed"])


@WORKLOADS
@pytest.mark.parametrize("n_cores", [2, 4, 16])
def test_a_quiet_machine_is_used_in_full(steps, n_cores):
    ours = [work(Machine(n_cores, seed), steps, ThreadGovernor(n_cores))[0] for seed in range(8)]
    full = [work(Machine(n_cores, seed), steps, n_threads=n_cores)[0] for seed in range(8)]
    assert sum(ours) <= 1.02 * sum(full)


@WORKLOADS
@pytest.mark.parametrize("n_cores", [2, 4, 16])
def test_a_neighbour_costs_little_more_than_its_core(steps, n_cores):
    ours = best = 0.0
    for seed in range(8):
        ours += work(Machine(n_cores, seed, 1), steps, ThreadGovernor(n_cores))[0]
        best += min(work(Machine(n_cores, seed, 1), steps, n_threads=n)[0] for n in (n_cores, n_cores - 1))
    assert ours <= best / 0.9


@pytest.mark.parametrize("n_cores", [2, 4, 16])
def test_the_count_falls_within_steps_and_comes_back_within_seconds(n_cores):
    n_falls, back_s = [], []
    for seed in range(20):
        machine, governor = Machine(n_cores, seed), ThreadGovernor(n_cores)
        work(machine, DECODE[:300], governor)
        machine.n_neighbours = 1
        counts = work(machine, DECODE[:300], governor)[1]
        n_falls.append(next(i for i, count in enumerate(counts) if count < n_cores))
        machine.n_neighbours = 0
        left_at = machine.now
        while machine.now < left_at + 20 and governor.choose(1) < n_cores:
            work(machine, [(1, 300)] * 5, governor)
        back_s.append(machine.now - left_at)
    assert sorted(n_falls)[17] <= 5
    assert sorted(back_s)[10] <= 2.5


def test_one_slow_step_is_no_reason():
    governor = ThreadGovernor(4)
    times = [5e-3] * 20 + [0.5] + [5e-3] * 20
    for i, seconds in enumerate(times):
        assert governor.choose(1) == 4
        assert governor.observe(1, seconds, i * 0.01, 0.3 if seconds > 0.1 else 1.0) is None


def test_a_context_that_grows_is_no_neighbour():
    governor = ThreadGovernor(4)
    for i in range(4000):
        assert governor.choose(1) == 4
        governor.observe(1, 5e-3 * (1 + i / 200), i * 0.1)


def test_a_search_in_vain_becomes_rare():
    """A GPU computes while the thread sleeps: fewer threads change nothing."""
    governor = ThreadGovernor(8)
    n_fewer = 0
    for i in range(20_000):
        n_fewer += governor.choose(1) < 8
        governor.observe(1, 5e-3, i * 5e-3, 0.1)
    assert n_fewer < 200
    assert governor.n_changes == 0


def test_the_end_of_a_search_says_what_was_measured():
    governor = ThreadGovernor(2)
    choices: list[ThreadChoice | None] = []
    for i in range(9):
        seconds = 0.01 if governor.choose(1) == 1 else 0.005 if i < 5 else 0.1
        choices.append(governor.observe(1, seconds, i * 0.1))
    assert [choice is not None for choice in choices] == [False] * 8 + [True]
    assert str(choices[-1]) == (
        "threads for generation 2 -> 1: slow steps; a step takes 100.0 ms with 2, 10.0 with 1"
    )


@given(
    n_max=st.integers(1, 64),
    steps=st.lists(
        st.tuples(
            st.integers(0, 5000), st.floats(0, 1e3), st.floats(0, 1), st.integers(-1, 80), st.floats(0, 100)
        ),
        max_size=300,
    ),
)
def test_counts_stay_within_the_limit_whatever_is_measured(n_max, steps):
    governor, now = ThreadGovernor(n_max), 0.0
    for n_tokens, seconds, share, n_limit, pause in steps:
        count = governor.choose(n_tokens, n_limit)
        assert 1 <= count <= (min(n_max, n_limit) if n_limit > 0 else n_max)
        now += seconds + pause
        choice = governor.observe(n_tokens, seconds, now, share)
        if choice is not None:
            assert choice.n_tried != choice.n_before
            assert governor.choose(n_tokens, n_limit) == choice.n_after


@given(st.integers(1, 64), st.integers(0, 64), st.lists(st.tuples(st.integers(1, 600), st.floats(0.001, 9))))
def test_given_counts_are_never_changed(n_fixed, n_batch, steps):
    governor = ThreadGovernor(4, n_fixed, n_batch)
    for i, (n_tokens, seconds) in enumerate(steps):
        assert governor.choose(n_tokens, 2) == (n_fixed if n_tokens == 1 else n_batch or n_fixed)
        assert governor.observe(n_tokens, seconds, i, 0.1) is None


@pytest.mark.parametrize(("n_busy", "share"), [(0, 8), (1, 8), (2, 4), (3, 2), (20, 1)])
def test_engines_that_compute_share_the_cores(n_busy, share):
    cores = CoreShares(8)
    engines = [object() for _ in range(n_busy)]
    for engine in engines * 2:
        cores.enter(engine)
    assert cores.share == share
    for engine in engines * 2:
        cores.leave(engine)
    assert cores.share == 8


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b", {"cpu.max": "max 100000", "a/cpu.max": "200000 100000", "a/b/cpu.max": "max 1"}, 2.0),
        ("4:cpu,cpuacct:/x", {"cpu/x/cpu.cfs_quota_us": "50000", "cpu/x/cpu.cfs_period_us": "100000"}, 0.5),
        ("0::/", {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, float("inf")),
        ("nonsense", {"cpu.max": "\x00 7 8"}, float("inf")),
        ("0::/../../etc", {}, float("inf")),
    ],
)
def test_the_quota_of_control_groups(tmp_path, own, files, cores):
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cgroup_cores(tmp_path, tmp_path / "own") == cores


def test_there_is_a_core():
    assert usable_cores() >= 1


@pytest.mark.parametrize(("text", "count"), [("auto", 0), ("0", 0), ("-1", 0), ("6", 6)])
def test_threads_as_text(text, count):
    assert parse_threads(text) == count
