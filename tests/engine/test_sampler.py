"""Samplers on a real, tiny vocabulary: grammars, triggers, probabilities, forks, compiled parts."""

from __future__ import annotations

import dataclasses
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.runner import compute
from wingman.chat.grammar import check_grammar
from wingman.config import ContextConfig, ModelConfig, SamplingParams
from wingman.engine.llama import parts as parts_module
from wingman.engine.llama.binding import lib
from wingman.engine.llama.runner import LlamaRunner
from wingman.engine.runner import Batch, Chunk, Fork, KvRemove, SamplerStart
from wingman.engine.types import Constraint, TokenProb
from wingman.errors import InvalidRequest

GREEDY = SamplingParams(temperature=0.0)
PROMPT = (1, 300, 301)


@pytest.fixture(scope="module")
def runner(tiny_model: Path) -> Iterator[LlamaRunner]:
    runner = LlamaRunner(ModelConfig(model=tiny_model), ContextConfig(ctx_size=512, parallel=2, threads=1))
    yield runner
    runner.close()


@dataclass
class Output:
    """What a slot said; `ending` is "eos", "stuck" or "length"."""

    tokens: list[int] = field(default_factory=list)
    probs: list[TokenProb] = field(default_factory=list)
    text: bytes = b""
    ending: str = "length"


def generate(
    runner: LlamaRunner,
    params: SamplingParams,
    constraint: Constraint | None = None,
    n_predict: int = 60,
    n_probs: int = 0,
    post: bool = False,
) -> Output:
    output = Output()
    samplers: tuple[SamplerStart, ...] = (SamplerStart(0, params, PROMPT, constraint, n_probs, post),)
    tokens, position = PROMPT, 0
    kv: tuple[KvRemove, ...] = (KvRemove(0, 0), KvRemove(1, 0))
    while len(output.tokens) < n_predict:
        samples = compute(runner, Batch(kv, samplers, (Chunk(0, 1, tokens, position, True),), 0.0))
        kv, samplers, position = (), (), position + len(tokens)
        if 0 in samples.stuck:
            output.ending = "stuck"
            break
        tokens = tuple(samples.tokens[0])
        output.tokens += tokens
        output.probs += samples.probs.get(0, ())
        if runner.tokenizer.is_eog(tokens[0]):
            output.ending = "eos"
            break
        output.text += runner.tokenizer.piece(tokens[0])
    return output


# -- grammars -------------------------------------------------------------------------------------


def both(gbnf: str, regex: str) -> tuple[str, str]:
    return gbnf, regex


LEAVES = st.one_of(
    st.text("ab 1\u00e9\u4e2d", min_size=1, max_size=4).map(lambda text: both(f'"{text}"', re.escape(text))),
    st.sampled_from([both("[a-c]", "[a-c]"), both("[ -~]", "[ -~]"), both("[0-9]", "[0-9]")]),
)  # fmt: skip
LANGUAGES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map(
            lambda parts: both(" ".join(p[0] for p in parts), "".join(p[1] for p in parts))
        ),
        st.lists(inner, min_size=2, max_size=3).map(
            lambda parts: both(f"({' | '.join(p[0] for p in parts)})", f"(?:{'|'.join(p[1] for p in parts)})")
        ),
        inner.map(lambda part: both(f"({part[0]})?", f"(?:{part[1]})?")),
        inner.map(lambda part: both(f"({part[0]}){{1,2}}", f"(?:{part[1]}){{1,2}}")),
    ),
    max_leaves=5,
)
"""Finite languages, as a grammar and as a regular expression."""


@settings(max_examples=80, deadline=None)
@given(language=LANGUAGES, temperature=st.sampled_from([0.0, 1.0, 5.0]), seed=st.integers(0, 2**32 - 2))
def test_output_belongs_to_the_grammar(
    runner: LlamaRunner, language: tuple[str, str], temperature: float, seed: int
) -> None:
    grammar = f"root ::= {language[0]}"
    try:
        check_grammar(grammar)
    except InvalidRequest:
        return  # ambiguous ones are not taken
    params = SamplingParams(temperature=temperature, seed=seed, top_k=0, top_p=1.0, min_p=0.0)
    output = generate(runner, params, Constraint(grammar), n_predict=300)
    assert output.ending == "eos"
    assert re.fullmatch(language[1], output.text.decode("utf-8")), (grammar, output.text)


NOTHING = Constraint("root ::= [^\\x00-\\UFFFFFFFF]")
CHAINS = {
    "greedy": GREEDY,
    "default": SamplingParams(seed=1),
    "no links": SamplingParams(seed=1, samplers=()),
    "temperature": SamplingParams(seed=1, samplers=("temperature",), temperature=2.0, dynatemp_range=1.0),
    "top_k": SamplingParams(seed=1, samplers=("top_k",), top_k=3),
    "top_p": SamplingParams(seed=1, samplers=("top_p", "min_p"), top_p=0.5, min_p=0.2, min_keep=2),
    "typ_p": SamplingParams(seed=1, samplers=("typ_p",), typical_p=0.5),
    "sigma": SamplingParams(seed=1, samplers=("top_n_sigma",), top_n_sigma=1.0),
    "xtc": SamplingParams(seed=1, samplers=("xtc",), xtc_probability=1.0, xtc_threshold=0.01),
    "penalties": SamplingParams(seed=1, repeat_penalty=1.5, presence_penalty=0.5, dry_multiplier=1.0),
    "mirostat": SamplingParams(seed=1, mirostat=1),
    "mirostat 2": SamplingParams(seed=1, mirostat=2),
    "adaptive": SamplingParams(seed=1, samplers=("adaptive_p",), adaptive_target=0.5),
    "infill": SamplingParams(seed=1, samplers=("top_k", "infill"), top_k=40),
}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("post", [False, True])
def test_a_grammar_that_allows_nothing_ends_the_output(runner: LlamaRunner, name: str, post: bool) -> None:
    output = generate(runner, CHAINS[name], NOTHING, n_probs=3, post=post)
    assert output.ending == "stuck"
    assert len(output.tokens) < 4, "at most the beginning of a character"
    assert generate(runner, GREEDY, n_predict=3).tokens, "the runtime goes on"


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("post", [False, True])
def test_every_chain_obeys_a_grammar(runner: LlamaRunner, name: str, post: bool) -> None:
    output = generate(runner, CHAINS[name], Constraint('root ::= "ab" [0-9]{2}'), n_probs=3, post=post)
    assert output.ending == "eos"
    assert re.fullmatch(rb"ab[0-9]{2}", output.text)
    assert [prob.token for prob in output.probs] == output.tokens


def test_a_grammar_whose_tokens_are_all_forbidden_ends_the_output(runner: LlamaRunner) -> None:
    pieces = {token: runner.tokenizer.piece(token) for token in range(runner.info.n_vocab)}
    biases = tuple((token, float("-inf")) for token, piece in pieces.items() if piece == b"b")
    params = SamplingParams(seed=1, logit_bias=biases)
    output = generate(runner, params, Constraint('root ::= "ab"'))
    assert output.ending in ("stuck", "eos")
    assert output.text in (b"a", b"ab")


# -- lazy grammars --------------------------------------------------------------------------------


def test_a_lazy_grammar_binds_from_its_trigger_on(runner: LlamaRunner) -> None:
    constraint = Constraint('root ::= "a" "b"{3} "c"', is_lazy=True, trigger_texts=("a",))
    n_bound = 0
    for seed in range(60):
        params = SamplingParams(seed=seed, temperature=3.0, top_k=0, top_p=1.0, min_p=0.0)
        output = generate(runner, params, constraint, n_predict=80)
        start = output.text.find(b"a")
        token = _token_at(runner, output, start)
        if start >= 0 and token.endswith(b"a"):  # else the token says more than the grammar allows
            assert output.ending in ("eos", "length")
            assert b"abbbc".startswith(output.text[start:])
            n_bound += output.text[start:] == b"abbbc"
    assert n_bound > 3


def _token_at(runner: LlamaRunner, output: Output, place: int) -> bytes:
    length = 0
    for token in output.tokens:
        piece = runner.tokenizer.piece(token)
        length += len(piece)
        if length > place:
            return piece
    return b""


def test_a_trigger_token_begins_the_grammar(runner: LlamaRunner) -> None:
    (token,) = runner.tokenizer.tokenize("<|im_start|>", add_special=False, parse_special=True)
    constraint = Constraint('root ::= "<|im_start|>" "b"{2}', is_lazy=True, trigger_tokens=(token,))
    params = SamplingParams(seed=1, logit_bias=((token, 100.0),))
    output = generate(runner, params, constraint)
    assert output.tokens[0] == token
    assert (output.text, output.ending) == (b"bb", "eos")


# -- probabilities ----------------------------------------------------------------------------------


def test_probabilities_before_sampling_are_the_softmax_of_the_logits(runner: LlamaRunner) -> None:
    start = SamplerStart(0, GREEDY, PROMPT, None, 5)
    samples = compute(runner, Batch((KvRemove(0, 0),), (start,), (Chunk(0, 1, PROMPT, 0, True),), 0.0))
    assert runner._context is not None
    pointer = lib.llama_get_logits_ith(runner._context.handle, -1)
    logits = np.ctypeslib.as_array(pointer, (runner.info.n_vocab,)).astype(np.float64)
    expected = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    (prob,) = samples.probs[0]
    assert [prob.token] == samples.tokens[0] == [int(logits.argmax())]
    assert prob.value == pytest.approx(expected[prob.token], abs=1e-4)
    order = np.argsort(-expected, kind="stable")[:5]
    assert [token for token, _ in prob.top] == order.tolist()
    assert [value for _, value in prob.top] == pytest.approx(expected[order].tolist(), abs=1e-4)


def test_all_probabilities_sum_to_one(runner: LlamaRunner) -> None:
    output = generate(runner, SamplingParams(seed=3), n_predict=4, n_probs=10**6)
    for prob in output.probs:
        assert len(prob.top) == runner.info.n_vocab
        assert sum(np.exp(value) for _, value in prob.top) == pytest.approx(1, abs=1e-3)
        assert dict(prob.top)[prob.token] == pytest.approx(prob.value)


@pytest.mark.parametrize("name", sorted(set(CHAINS) - {"greedy", "mirostat"}))
def test_probabilities_after_sampling_are_what_the_chain_left(runner: LlamaRunner, name: str) -> None:
    output = generate(runner, CHAINS[name], n_predict=10, n_probs=10**6, post=True)
    for prob in output.probs:
        values = [value for _, value in prob.top]
        assert values == sorted(values, reverse=True)
        assert sum(values) == pytest.approx(1, abs=1e-3)
        assert dict(prob.top)[prob.token] == pytest.approx(prob.value)


def test_what_is_asked_for_does_not_change_what_is_said(runner: LlamaRunner) -> None:
    for name, params in CHAINS.items():
        plain = generate(runner, params, n_predict=20).tokens
        assert generate(runner, params, n_predict=20, n_probs=4).tokens == plain, name
        assert generate(runner, params, n_predict=20, n_probs=4, post=True).tokens == plain, name


# -- forks and parts ----------------------------------------------------------------------------------


def test_forks_say_what_they_would_say_alone(runner: LlamaRunner) -> None:
    seeds = {0: SamplingParams(seed=5, temperature=2.0), 1: SamplingParams(seed=6, temperature=2.0)}
    alone = {slot: generate(runner, params, n_predict=6).tokens for slot, params in seeds.items()}
    starts = tuple(SamplerStart(slot, params, PROMPT) for slot, params in seeds.items())
    kv = (KvRemove(0, 0), KvRemove(1, 0))
    samples = compute(runner, Batch(kv, starts, (Chunk(0, 1, PROMPT, 0, True),), 0.0, (Fork(0, 1, 2),)))
    said = {slot: [*samples.tokens[slot]] for slot in seeds}
    while min(map(len, said.values())) < min(6, *map(len, alone.values())):
        at = len(PROMPT) + len(said[0]) - 1
        chunks = tuple(Chunk(slot, slot, (tokens[-1],), at, True) for slot, tokens in said.items())
        samples = compute(runner, Batch((), (), chunks, 0.0))
        for slot in seeds:
            said[slot] += samples.tokens[slot]
    for slot in seeds:
        assert said[slot] == alone[slot][: len(said[slot])]


def test_compiled_parts_are_bounded_and_made_again(
    runner: LlamaRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts_module, "MAX_PARTS", 2)
    grammars = [Constraint(f'root ::= "{letter}"') for letter in "abcde"]
    for constraint in grammars:
        runner.parts.prepare(SamplingParams(dry_multiplier=1.0), constraint)
        assert len(runner.parts._kept) <= 2
    for constraint, letter in zip(grammars, b"abcde", strict=True):
        assert generate(runner, GREEDY, constraint).text == bytes([letter])


def test_a_broken_grammar_is_an_invalid_request_and_not_kept(runner: LlamaRunner) -> None:
    n_kept = len(runner.parts._kept)
    with pytest.raises(InvalidRequest, match="grammar"):
        runner.parts.prepare(GREEDY, Constraint("root ::= ("))
    assert len(runner.parts._kept) == n_kept


# -- biases -----------------------------------------------------------------------------------------


def test_greedy_with_biases_says_what_the_chain_says(runner: LlamaRunner) -> None:
    plain = generate(runner, GREEDY, n_predict=12).tokens
    rng = random.Random(7)
    for _ in range(20):
        forbidden = [(token, -math.inf) for token in rng.sample(plain, 2)]
        others = [(rng.randrange(runner.info.n_vocab), rng.uniform(-20, 20)) for _ in range(6)]
        biases = tuple(forbidden + others + others[:1])
        greedy = dataclasses.replace(GREEDY, logit_bias=biases)
        # a temperature this low leaves the chain one token, and takes the long way
        chain = dataclasses.replace(greedy, temperature=1e-6, top_k=0, min_p=0.0, top_p=1.0)
        said = generate(runner, greedy, n_predict=12, n_probs=3)
        assert said.tokens == generate(runner, chain, n_predict=12).tokens
        assert not {token for token, _ in forbidden} & set(said.tokens)
