"""Several tokens at once: runs that follow a draft, and all sequences of a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wingman.config import ContextConfig, ModelConfig, SamplingParams
from wingman.engine.llama.runner import LlamaRunner
from wingman.engine.llama.sampler import Sampler, draw_all
from wingman.engine.runner import Batch, Chunk, KvRemove, SamplerStart
from wingman.engine.types import Constraint

PROMPT = (1, 300, 301)
WILD = SamplingParams(seed=4, temperature=3.0, top_k=0, top_p=1.0, min_p=0.0)
STARTS = {
    "greedy": (SamplingParams(temperature=0.0), None),
    "chain": (replace(WILD, repeat_penalty=1.3), None),
    "grammar": (WILD, Constraint('root ::= "a"{3} [0-9]{9}')),
}


@pytest.fixture(scope="module")
def runner(tiny_model: Path) -> Iterator[LlamaRunner]:
    runner = LlamaRunner(ModelConfig(model=tiny_model), ContextConfig(ctx_size=512, parallel=2, threads=1))
    yield runner
    runner.close()


def decode(runner: LlamaRunner, tokens: Sequence[int]) -> tuple[Any, int]:
    """Compute tokens of an empty slot with logits for each; the context and the first one's index."""
    assert runner._context is not None
    runner._context.edit_cache(KvRemove(0, 0))
    chunks = tuple(Chunk(0, 1, (token,), at, wants_sample=True) for at, token in enumerate(tokens))
    return runner._context.handle, runner._context.decode(Batch((), (), chunks, 0.0))[0]


def sampler(runner: LlamaRunner, name: str) -> Sampler:
    params, constraint = STARTS[name]
    runner._start_sampler(SamplerStart(0, params, PROMPT, constraint, n_probs=2))
    return runner._samplers[0]


def one_by_one(runner: LlamaRunner, name: str, n_tokens: int) -> tuple[int, ...]:
    drawing = sampler(runner, name)
    said: tuple[int, ...] = ()
    while len(said) < n_tokens:
        context, first = decode(runner, PROMPT + said)
        said += (drawing.draw(context, first + len(PROMPT) + len(said) - 1).token,)
    return said


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("n_right", range(5))
def test_a_run_ends_where_the_draft_is_wrong(runner: LlamaRunner, name: str, n_right: int) -> None:
    said = one_by_one(runner, name, 6)
    draft = (*said[:n_right], (said[n_right] + 1) % 256, *said[n_right + 1 : 4])[:4]
    drawing = sampler(runner, name)
    context, first = decode(runner, PROMPT + draft)
    run = drawing.draw_run(context, first + len(PROMPT) - 1, draft)
    assert tuple(draw.token for draw in run) == said[: n_right + 1]
    assert all(draw.prob is not None and draw.prob.token == draw.token for draw in run)
    context, first = decode(runner, PROMPT + said[: n_right + 1])
    (after,) = drawing.draw_run(context, first + len(PROMPT) + n_right, ())
    assert after.token == said[n_right + 1], "the sampler stands where it would have stood"


def test_a_run_ends_when_the_grammar_allows_nothing(runner: LlamaRunner) -> None:
    runner._start_sampler(
        SamplerStart(0, SamplingParams(temperature=0.0), PROMPT, Constraint("root ::= [^\\x00-\\UFFFFFFFF]"))
    )
    context, first = decode(runner, (*PROMPT, 7, 8))
    assert [draw.token for draw in runner._samplers[0].draw_run(context, first + 2, (7, 8))][-1] == -1


def test_all_sequences_draw_in_their_order(runner: LlamaRunner) -> None:
    said = one_by_one(runner, "chain", 3)
    drawing = sampler(runner, "chain")
    context, first = decode(runner, PROMPT + said[:2])
    last = first + len(PROMPT) - 1
    runs = draw_all(context, [(drawing, last, said[:1]), (drawing, last + 2, ())])
    assert [tuple(draw.token for draw in run) for run in runs] == [said[:2], said[2:3]]
    assert draw_all(context, []) == []
