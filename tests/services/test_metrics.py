"""What Prometheus is told of an engine, and monitors with it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.runner import model_info
from tests.support.watched import WatchedEngine, watched
from wingman.engine.types import SlotView, Snapshot
from wingman.services.metrics import EngineCollector
from wingman.services.readings import Reading, system_of


@pytest.mark.parametrize(("n_ctx", "share"), [(None, 0.25), (512, 0.5), (256, 1.0), (128, 1.0)])
def test_share_of_the_cache_that_is_in_use(n_ctx: int | None, share: float) -> None:
    slots = tuple(SlotView(index, None, is_busy=False, n_held=128) for index in range(2))
    engine: Any = WatchedEngine(model_info(2, 512, n_ctx), snapshot=Snapshot(slots=slots))
    lines = EngineCollector(engine).exposition().decode().splitlines()
    assert f"llamacpp:kv_cache_usage_ratio {share}" in lines
    assert "llamacpp:kv_cache_tokens 256.0" in lines
    assert Reading(watched(engine)).body(0.0)["kv_cache_usage_ratio"] == share
    assert system_of(watched(engine))["ctx_size"] == (n_ctx or 1024)
