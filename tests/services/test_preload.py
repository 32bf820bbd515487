"""A model that loads ahead of its engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from wingman.config import ContextConfig, ModelConfig
from wingman.engine.llama import weights
from wingman.engine.llama.runner import LlamaRunner
from wingman.errors import ModelLoadFailure
from wingman.services import preload as preload_module
from wingman.services.preload import Preload


def _on(_: float) -> bool:
    return True


@pytest.fixture
def preload(tiny_model: Path) -> Preload:
    return Preload(ModelConfig(model=tiny_model), ContextConfig(ctx_size=64))


def test_the_first_engine_that_wants_just_this_takes_it(preload: Preload, tiny_model: Path) -> None:
    model = ModelConfig(model=tiny_model)
    context = ContextConfig(ctx_size=64, cache_ram=7)  # which the server fills in later
    with_layers = dataclasses.replace(model, n_gpu_layers=3)
    runners = [preload.make_runner(one, context, _on) for one in (with_layers, model, model)]
    preload.close()
    assert [runner.n_ctx for runner in runners] == [runners[0].n_ctx] * 3  # none was closed
    assert len({id(runner) for runner in runners}) == 3
    for runner in runners:
        runner.close()


def test_what_nobody_takes_is_freed(preload: Preload, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[LlamaRunner] = []
    close = LlamaRunner.close

    def note(self: LlamaRunner) -> None:
        closed.append(self)
        close(self)

    monkeypatch.setattr(LlamaRunner, "close", note)
    preload._thread.join()
    preload.close()
    assert len(closed) == 1


def test_a_taker_that_gives_up_ends_the_load(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_slowly(_: ModelConfig, on_progress: Callable[[float], bool]) -> None:
        while on_progress(0.5):
            pass
        raise ModelLoadFailure("the load was cancelled")

    monkeypatch.setattr(weights, "load_weights", load_slowly)
    monkeypatch.setattr(preload_module, "_QUICK_BYTES", 0)
    model, context = ModelConfig(model=tiny_model), ContextConfig()
    with pytest.raises(ModelLoadFailure, match="cancelled"):
        Preload(model, context).make_runner(model, context, lambda _: False)
    Preload(model, context).close()


def test_a_file_that_is_no_model_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(60))
    for name in ("bad.gguf", "none.gguf"):
        with pytest.raises(ModelLoadFailure, match=name):
            Preload(ModelConfig(model=tmp_path / name), ContextConfig())


@pytest.mark.parametrize("is_long", [False, True])
def test_only_long_loads_are_followed(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, is_long: bool
) -> None:
    followed = []
    load = weights.load_weights

    def note(model: ModelConfig, on_progress: Callable[[float], bool] | None) -> weights.Weights:
        followed.append(on_progress is not None)
        return load(model, on_progress)

    monkeypatch.setattr(weights, "load_weights", note)
    monkeypatch.setattr(preload_module, "_QUICK_BYTES", 0 if is_long else 1 << 30)
    model, context = ModelConfig(model=tiny_model), ContextConfig(ctx_size=64)
    Preload(model, context).make_runner(model, context, _on).close()
    assert followed == [is_long]
