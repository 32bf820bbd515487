"""The workloads of the benchmark: what is asked, of how many servers, and which numbers count.

Data only: `bench_turns` has the functions that take a turn, `bench_serve` goes through rounds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from tools import bench_turns as turns
from tools.bench_servers import Settings, WarmUp, complete_once
from tools.bench_turns import Outcome, Turn


@dataclass(frozen=True, slots=True)
class Workload:
    """A row of the table."""

    about: str
    columns: tuple[str, ...]
    """Numbers shown; rounds are ranked by the first."""
    take: Callable[[Turn], Outcome]
    n_key: int = 1
    """So many of them are in the short table of all workloads."""
    levels: tuple[int, ...] = ()
    """Clients at once; none: those of the command line."""
    n_ctx: int = 0
    n_slots: int = 0
    """Context and slots; 0: those of the command line."""
    flags: tuple[str, ...] = ()
    n_servers: int = 1
    """Servers of a contender that run at once; 0: the turn starts what it needs."""
    warm_up: WarmUp = complete_once
    has_fixed_threads: bool = False
    """Whether Wingman takes part with each number of threads too."""
    has_reference: bool = False
    """Whether llama-cpp-python's server takes part."""

    def fit(self, settings: Settings) -> Settings:
        """The settings with what this workload wants in their place."""
        return dataclasses.replace(
            settings,
            n_ctx=self.n_ctx or settings.n_ctx,
            n_slots=self.n_slots or settings.n_slots,
            levels=self.levels or settings.levels,
        )


_STREAMED: Final = ("tokens_per_s", "first_p50_ms", "first_p95_ms", "gap_p50_ms", "gap_p95_ms", "rss_mib")

WORKLOADS: Final[Mapping[str, Workload]] = {
    "unique": Workload("distinct prompts", _STREAMED, turns.take_unique, n_key=2, has_reference=True),
    "shared": Workload(
        "a request of each client at once, all with the same 240 words before a question of their own",
        _STREAMED,
        turns.take_shared,
        n_key=3,
        levels=(8,),
        n_slots=8,
    ),
    "conversations": Workload(
        "24 conversations of three turns over four slots, the first turn of all, then the second, ...",
        ("tokens_per_s", "n_evaluated", "n_cached", "first_p50_ms", "first_p95_ms", "rss_mib"),
        turns.take_conversations,
        n_key=2,
        levels=(4,),
        n_slots=4,
    ),
    "long": Workload(
        "three streams when a prompt of 1500 words comes; TTFT is the newcomer's, gaps are the streams'",
        ("gap_max_ms", "first_p50_ms", "gap_p95_ms"),
        turns.take_long,
        n_key=2,
        levels=(4,),
        n_ctx=12_288,
        n_slots=4,
    ),
    "short": Workload(
        "more clients than slots, 8 tokens out",
        ("requests_per_s", "first_p50_ms", "first_p95_ms"),
        turns.take_short,
        levels=(32,),
        n_slots=8,
    ),
    "neighbour": Workload(
        "distinct prompts while another process keeps a core busy",
        _STREAMED,
        turns.take_neighbour,
        levels=(1, 4),
        has_fixed_threads=True,
    ),
    "twomodels": Workload(
        "distinct prompts to two servers of a kind at once; share: both together by one alone",
        ("together_share", "tokens_per_s", "alone_per_s"),
        turns.take_twomodels,
        n_key=2,
        levels=(1, 4),
        n_servers=2,
    ),
    "embeddings": Workload(
        "32 inputs of about 50 tokens in a request",
        ("inputs_per_s",),
        turns.take_embeddings,
        levels=(1,),
        flags=("--embeddings", "--pooling", "mean"),
        warm_up=turns.embed_once,
    ),
    "repetitive": Workload(
        "a text to repeat and code to edit, so that the answer stands in the prompt",
        _STREAMED,
        turns.take_repetitive,
        levels=(1, 4),
    ),
    "start": Workload(
        "from exec to a /health of 200; a start each round",
        ("ready_ms", "rss_mib"),
        turns.take_start,
        n_key=2,
        levels=(1,),
        n_ctx=16_384,
        n_slots=8,
        n_servers=0,
    ),
    "batched": Workload(
        "sequences decoded together, without a server: LlamaRunner, which samples too, and llama-batched-bench",
        ("tokens_per_s",),
        turns.take_batched,
        levels=(8,),
        n_servers=0,
    ),
}
"""Every workload by its name on the command line."""
