"""A loaded model as the monitor sees it, with numbers that a test sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from msgspec.structs import replace

from tests.support.runner import ScriptedVocabulary, model_info
from wingman.config import SamplingParams
from wingman.engine.runner import Tokenizer
from wingman.engine.stats import EngineStats
from wingman.engine.types import Job, ModelInfo, SlotView, Snapshot
from wingman.errors import Unavailable
from wingman.services.readings import MonitoredModel

T = TypeVar("T")
METADATA = {
    "general.architecture": "llama", "general.name": "Tiny \u00e9", "llama.block_count": "30",
    "llama.attention.head_count": "9", "llama.attention.head_count_kv": "3", "llama.rope.dimension_count": "64",
    "llama.feed_forward_length": "1536", "llama.rope.freq_base": "100000.000000",
    "tokenizer.chat_template": "secret",
}  # fmt: skip


def scripted_info() -> ModelInfo:
    return replace(model_info(2, 512), path="/models/a[-]b[=]tiny.Q4_1.gguf", metadata=METADATA, ftype="Q4_1")


@dataclass
class WatchedEngine:
    """Does nothing; what it shows is set from outside."""

    info: ModelInfo = field(default_factory=scripted_info)
    tokenizer: Tokenizer = field(default_factory=ScriptedVocabulary)
    snapshot: Snapshot = Snapshot(slots=(SlotView(0, None, is_busy=False), SlotView(1, None, is_busy=False)))
    n_running: int = 0
    n_waiting: int = 0
    jobs: dict[int, Job] = field(default_factory=dict)
    is_closing: bool = False

    def last_job(self, slot_id: int) -> Job | None:
        return self.jobs.get(slot_id)

    async def work(self, n_bytes: int, function: Callable[..., T], *args: Any) -> T:
        if self.is_closing:
            raise Unavailable("the server is shutting down")
        return function(*args)

    def begin(self, prompt: str = "hello") -> None:
        """One request is in slot 0."""
        job = Job(7, tuple(3 + byte for byte in prompt.encode()), SamplingParams())
        self.jobs[0] = job
        self.n_running = 1
        self.show(n_tokens=0)

    def show(self, n_tokens: int, *, is_busy: bool = True) -> None:
        """The request has got that far, a token every 10 ms, 2 of them for choosing it."""
        stats = EngineStats()
        for _ in range(n_tokens - 1):
            stats.token_gap.observe(0.01)
        for _ in range(min(n_tokens, 1)):
            stats.first_token.observe(0.5)
        slot = SlotView(0, 7, is_busy, n_prompt=5, n_processed=5, n_decoded=n_tokens, n_held=5 + n_tokens)
        self.snapshot = Snapshot(
            slots=(slot, SlotView(1, None, is_busy=False)),
            n_steps=self.snapshot.n_steps + 1,
            sample_seconds_total=n_tokens * 0.002,
            first_token=stats.first_token.view(),
            token_gap=stats.token_gap.view(),
        )

    def end(self, n_tokens: int) -> None:
        """The request is done."""
        self.n_running = 0
        self.show(n_tokens, is_busy=False)
        self.snapshot = replace(self.snapshot, prompt_tokens_total=5, prompt_seconds_total=0.5)


def watched(engine: WatchedEngine, alias: str = "tiny") -> MonitoredModel:
    return MonitoredModel(alias, engine, loaded_at=1000.0, load_s=0.25, tensor_types={"Q4_1": 210, "F32": 61})
