"""The output layer is left out of embeddings only where that changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from wingman.config import ContextConfig, ModelConfig
from wingman.engine.llama import embedder
from wingman.engine.llama.runner import LlamaRunner

INPUTS = [[1, 300, 301, 302], [5, 6], list(range(10, 90))]
CONTEXT = ContextConfig(ctx_size=256, parallel=1, threads=1, embeddings=True)


def vectors(runner: LlamaRunner) -> list[bytes]:
    return [vector for piece in runner.embed(INPUTS, 32) for vector in piece]


def test_without_the_output_layer_vectors_are_the_same(tiny_model: Path) -> None:
    runner = LlamaRunner(ModelConfig(model=tiny_model), CONTEXT)
    try:
        stop = runner._open_embedder()._head_stop
        assert stop.is_on
        without = vectors(runner)
        stop.is_on = False
        assert vectors(runner) == without
    finally:
        runner.close()


def test_a_model_whose_vectors_lie_elsewhere_is_computed_whole(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = LlamaRunner(ModelConfig(model=tiny_model), CONTEXT)
    right = vectors(runner)
    runner.close()
    monkeypatch.setattr(embedder, "_HIDDEN", {b"l_out-0"})  # far below
    runner = LlamaRunner(ModelConfig(model=tiny_model), CONTEXT)
    try:
        assert not runner._open_embedder()._head_stop.is_on
        assert vectors(runner) == right
    finally:
        runner.close()


@pytest.mark.parametrize("n_most", [1, 2, 5])
def test_inputs_may_be_limited_to_a_few_tokens(tiny_model: Path, n_most: int) -> None:
    context = ContextConfig(ctx_size=256, parallel=1, threads=1, embeddings=True, max_embed_tokens=n_most)
    runner = LlamaRunner(ModelConfig(model=tiny_model), context)
    try:
        assert runner.info.embedding.n_max == n_most
        found = [vector for piece in runner.embed([[5] * n_most], 32) for vector in piece]
        assert [len(vector) for vector in found] == [4 * runner.info.embedding.n_dims]
    finally:
        runner.close()
