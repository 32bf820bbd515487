"""Shortcuts through a large vocabulary say what the long way says, token for token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wingman.config import ModelConfig, SamplingParams
from wingman.engine.llama import chain as chain_module
from wingman.engine.llama.candidates import Candidates, likeliest
from wingman.engine.llama.chain import Chain
from wingman.engine.llama.model import LlamaModel
from wingman.engine.llama.parts import LlamaParts
from wingman.engine.llama.sampler import Sampler
from wingman.engine.runner import SamplerStart
from wingman.engine.types import Constraint

DEFAULT = SamplingParams(seed=7)
HISTORY = [*range(200, 290), 204, 205]
CHAINS = {
    "default": DEFAULT,
    "hot": replace(DEFAULT, temperature=3.0, top_p=1.0, min_p=0.0),
    "one": replace(DEFAULT, top_k=1),
    "penalties": replace(DEFAULT, repeat_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.2),
    "dry": replace(DEFAULT, dry_multiplier=0.8, dry_penalty_last_n=90),
    "cold penalties": replace(DEFAULT, temperature=0.0, repeat_penalty=1.1),
    "biases": replace(DEFAULT, logit_bias=((300, 50.0), (301, 50.0), (302, float("-inf")))),
    "xtc": replace(DEFAULT, xtc_probability=0.5, dynatemp_range=0.5, typical_p=0.8),
    "adaptive": replace(DEFAULT, samplers=("top_k", "adaptive_p"), adaptive_target=0.3),
}
WHOLE = {
    "no top-k": replace(DEFAULT, top_k=0),
    "large top-k": replace(DEFAULT, top_k=10**6),
    "late top-k": replace(DEFAULT, samplers=("min_p", "top_k")),
    "sigma": replace(DEFAULT, top_n_sigma=1.0),
    "mirostat": replace(DEFAULT, mirostat=2),
    "long memory": replace(DEFAULT, repeat_penalty=1.5, repeat_last_n=-1),
    "two biases of one token": replace(DEFAULT, logit_bias=((300, 50.0), (300, -20.0))),
}


@pytest.fixture(scope="module")
def model(starter_model: Path) -> Iterator[LlamaModel]:
    model = LlamaModel(ModelConfig(model=starter_model))
    yield model
    model.close()


@pytest.fixture(scope="module")
def parts(model: LlamaModel) -> Iterator[LlamaParts]:
    parts = LlamaParts(model.vocab, 4096)
    yield parts
    parts.close()


@pytest.fixture
def candidates(model: LlamaModel) -> Candidates:
    return Candidates(model.tokenizer.n_tokens)


def logits_of_a_kind(step: int, n_vocab: int) -> npt.NDArray[np.float32]:
    """Smooth ones, ones with many ties, and ones of which few are finite, in turn."""
    random = np.random.default_rng(step)
    smooth = random.normal(0, 3, n_vocab)
    few = np.where(random.random(n_vocab) < 0.999, -np.inf, smooth)
    return np.asarray((smooth, np.round(smooth * 4) / 4, few)[step % 3], np.float32)


@given(
    logits=st.lists(st.integers(-20, 20), min_size=1, max_size=300),
    n_wanted=st.integers(1, 12),
    n_forbidden=st.integers(0, 300),
)
def test_the_likeliest_are_all_there(logits: list[int], n_wanted: int, n_forbidden: int) -> None:
    row = np.array(logits, np.float32)
    row[:n_forbidden] = -np.inf
    ids = likeliest(row, n_wanted)
    assert len(ids) >= min(n_wanted, len(row))
    assert (np.diff(ids) > 0).all()
    left_out = np.delete(row, ids)
    n_finite = int((row > -np.inf).sum())
    assert (left_out < row[ids].min()).all() or (n_finite <= len(ids) and (left_out == -np.inf).all())


@settings(max_examples=5)
@given(seed=st.integers(0, 99), n_wanted=st.integers(1, 500))
def test_few_more_than_the_likeliest_are_there(seed: int, n_wanted: int) -> None:
    row = np.random.default_rng(seed).normal(size=49152).astype(np.float32)
    assert n_wanted <= len(likeliest(row, n_wanted)) <= 2 * n_wanted + 10


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_with_a_shortcut_says_the_same(
    name: str, model: LlamaModel, parts: LlamaParts, candidates: Candidates
) -> None:
    short, whole = (Chain(CHAINS[name], HISTORY, parts, model.vocab, 4096) for _ in range(2))
    assert short.n_few is not None
    whole.n_few = None
    said = []
    for step in range(60):
        logits = logits_of_a_kind(step, candidates.n_vocab)
        tokens = [chain.choose(logits, candidates) for chain in (short, whole)]
        assert tokens[0] == tokens[1], step
        for chain in (short, whole):
            chain.accept(tokens[0])
        said.append(tokens[0])
    assert len(set(said)) > 1
    short.close()
    whole.close()


@pytest.mark.parametrize("name", WHOLE)
def test_other_chains_see_the_whole_vocabulary(name: str, model: LlamaModel, parts: LlamaParts) -> None:
    chain = Chain(WHOLE[name], HISTORY, parts, model.vocab, 4096)
    assert chain.n_few is None
    chain.close()


def test_the_infill_sampler_sees_few(
    model: LlamaModel, parts: LlamaParts, candidates: Candidates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain_module, "MAX_INFILL", 20)
    params = replace(DEFAULT, samplers=("infill",))
    chain = Chain(params, (), parts, model.vocab, 4096)
    chain.choose(logits_of_a_kind(0, candidates.n_vocab), candidates)
    assert len(candidates.left) <= 20
    chain.close()


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        ("root ::= [0-9]*", "12"),
        ('root ::= " "? [a-zA-Z ]*', " the"),
        ("root ::= [^\\x00]*", ""),
        ('root ::= "{" [ \\n]* "\\"a\\":" [ ]* [0-9]', '{ "'),
        ("root ::= [\\u4e00-\\u9fff\\u00e9\\U0001F600-\\U0001F64F]*", "\u4e2d"),
        ('root ::= "<|im_end|>" "x"', "<"),
        ("root ::= [\\u0080-\\uffff]+", "\u00e9"),
    ],
)
def test_a_grammar_allows_the_same_by_heads(
    grammar: str, text: str, model: LlamaModel, parts: LlamaParts, candidates: Candidates
) -> None:
    bound = parts.grammar(Constraint(grammar), candidates)
    tokens = model.tokenizer.spell(text.encode()) or []
    assert bool(tokens) == bool(text)
    for at in range(len(tokens) + 1):  # also in the middle of a character
        everything = bound.among(np.arange(candidates.n_vocab))
        assert bound.among_all().tolist() == everything.tolist()
        assert all(bound.allows(token) for token in everything[:5].tolist())
        if at < len(tokens):
            assert tokens[at] in everything
            bound.accept(tokens[at])
    bound.close()


@pytest.mark.parametrize("name", ["greedy", *CHAINS])
def test_asking_a_grammar_about_few_says_the_same(
    name: str, model: LlamaModel, parts: LlamaParts, candidates: Candidates
) -> None:
    params = CHAINS.get(name, SamplingParams(temperature=0.0))
    start = SamplerStart(0, params, HISTORY, Constraint('root ::= " "? [a-z ]*'))
    few, whole = (Sampler(start, parts, candidates, model.vocab, model.tokenizer, 4096) for _ in range(2))
    for step in range(9):
        logits = logits_of_a_kind(step, candidates.n_vocab)
        grammar = whole._grammar
        assert grammar is not None
        allowed = grammar.among(np.arange(candidates.n_vocab))
        permitted = np.full_like(logits, -np.inf)
        permitted[allowed] = logits[allowed]
        assert few._choose(few._permitted(logits, grammar)) == whole._choose(permitted), step
    few.close()
    whole.close()
