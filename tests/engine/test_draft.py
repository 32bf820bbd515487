"""The draft model beside tiny served ones: what it proposes, keeps, takes back and refuses."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tools.tinymodel import write_bert, write_llama
from wingman.config import ContextConfig, ModelConfig
from wingman.engine.drafting import NO_DRAFT, Draft, DraftRequest
from wingman.engine.llama.binding import lib
from wingman.engine.llama.draft import DraftModel, check_vocabularies
from wingman.engine.llama.model import LlamaModel
from wingman.engine.runner import RunnerFailure
from wingman.errors import DraftMisfit, ModelLoadFailure

CONTEXT = ContextConfig(ctx_size=768, parallel=3, threads=1, batch_size=64, ubatch_size=64)
N_CTX_SLOT = 256
PROMPT = [1, *range(300, 340)]


@pytest.fixture(scope="module")
def target(tiny_model: Path) -> Iterator[LlamaModel]:
    model = LlamaModel(ModelConfig(model=tiny_model))
    yield model
    model.close()


@pytest.fixture
def drafter(target: LlamaModel, tiny_model: Path) -> Iterator[DraftModel]:
    model = DraftModel(target, ModelConfig(model=tiny_model), CONTEXT)
    yield model
    model.close()


def fresh(target: LlamaModel, request: DraftRequest) -> Draft:
    """The draft of a model that has seen nothing before."""
    model = DraftModel(target, ModelConfig(model=target.path), CONTEXT)
    try:
        return model.draft([request])[0]
    finally:
        model.close()


def greedy(model: LlamaModel, tokens: Sequence[int], count: int) -> list[int]:
    """What the model says, computed by the library's plainest means, a whole text for each token."""
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = N_CTX_SLOT, 1, 1
    context = lib.llama_init_from_model(model.handle, params)
    said = list(tokens)
    for _ in range(count):
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        array = (lib.llama_token * len(said))(*said)
        assert lib.llama_decode(context, lib.llama_batch_get_one(array, len(said))) == 0
        logits: Any = lib.llama_get_logits_ith(context, -1)
        said.append(max(range(model.tokenizer.n_tokens), key=logits.__getitem__))
    lib.llama_free(context)
    return said[len(tokens) :]


def test_drafts_what_the_same_model_says(drafter: DraftModel, target: LlamaModel) -> None:
    assert drafter.draft([DraftRequest(0, PROMPT, 8)]) == [Draft(greedy(target, PROMPT, 8), 0)]


def test_slots_draft_together_and_apart_alike(drafter: DraftModel, target: LlamaModel) -> None:
    texts = [PROMPT, PROMPT[:7], [1, 320, 310]]
    drafts = drafter.draft([DraftRequest(slot, text, 6 - slot) for slot, text in enumerate(texts)])
    assert [draft.tokens for draft in drafts] == [
        greedy(target, text, 6 - slot) for slot, text in enumerate(texts)
    ]


def test_cache_follows_the_text(drafter: DraftModel, target: LlamaModel) -> None:
    """Drafts that are taken, cut short, refused, or given up for another text."""
    rng = random.Random(0)
    text = list(PROMPT)
    for _ in range(25):
        request = DraftRequest(1, list(text), rng.randrange(1, 9))
        found = drafter.draft([request])[0]
        assert found == fresh(target, request)
        text += found.tokens[: rng.randrange(len(found.tokens) + 1)]
        text.append(rng.randrange(300, 400))
        if rng.random() < 0.2:
            text[rng.randrange(1, len(text)) :] = [rng.randrange(300, 400)]


def test_taken_drafts_are_not_computed_again(drafter: DraftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    found = drafter.draft([DraftRequest(0, PROMPT, 4)])[0]
    counted: list[int] = []
    decode = lib.llama_decode

    def count(context: Any, batch: Any) -> int:
        counted.append(batch.n_tokens)
        return int(decode(context, batch))

    monkeypatch.setattr(lib, "llama_decode", count)
    drafter.draft([DraftRequest(0, PROMPT + found.tokens + [350], 3)])
    assert counted == [2, 1, 1]


def test_long_texts_are_caught_up_with_in_pieces(drafter: DraftModel, target: LlamaModel) -> None:
    long = [1, *(300 + index % 90 for index in range(150))]
    requests = [DraftRequest(0, long, 2), DraftRequest(1, PROMPT, 2)]
    drafts = [drafter.draft(requests) for _ in range(4)]
    assert [one[1] for one in drafts] == [Draft(greedy(target, PROMPT, 2), 0)] * 4
    assert [one[0] for one in drafts] == [NO_DRAFT] * 3 + [Draft(greedy(target, long, 2), 0)]


def test_slots_that_share_a_cache_draft_until_it_is_full(target: LlamaModel, tiny_model: Path) -> None:
    shared = ContextConfig(
        ctx_size=N_CTX_SLOT, parallel=4, kv_unified=True, threads=1, batch_size=64, ubatch_size=64
    )
    model = DraftModel(target, ModelConfig(model=tiny_model), shared)
    texts = [[1, *(300 + (slot * 31 + index * 7) % 90 for index in range(61))] for slot in range(4)]
    expected = [fresh(target, DraftRequest(0, text, 4)) for text in texts]
    for slot, text in enumerate(texts):  # each leaves its text there; four do not fit
        assert model.draft([DraftRequest(slot, text, 4)]) == [expected[slot]]
    drafts = model.draft([DraftRequest(slot, text, 4) for slot, text in enumerate(texts)])
    assert drafts.count(NO_DRAFT) == 1
    assert all(draft in (NO_DRAFT, own) for draft, own in zip(drafts, expected, strict=True))
    long = DraftRequest(2, [1, *(300 + index % 90 for index in range(N_CTX_SLOT - 4))], 1000)
    assert len([model.draft([long])[0] for _ in range(4)][-1].tokens) == 4
    model.close()


def test_doubtful_guesses_end_a_draft(drafter: DraftModel) -> None:
    all_of_it = drafter.draft([DraftRequest(0, PROMPT, 8)])[0]
    some = drafter.draft([DraftRequest(0, PROMPT, 8, p_min=0.2)])[0]
    assert some.tokens == all_of_it.tokens[: len(some.tokens)]
    assert drafter.draft([DraftRequest(0, PROMPT, 8, p_min=1.0)]) == [NO_DRAFT]


def test_end_of_text_ends_a_draft(
    drafter: DraftModel, target: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = greedy(target, PROMPT, 8)
    monkeypatch.setattr(drafter._model.tokenizer, "is_eog", {said[2]}.__contains__)
    assert drafter.draft([DraftRequest(0, PROMPT, 8)])[0].tokens == said[: said.index(said[2]) + 1]


def test_full_slots_get_no_more(drafter: DraftModel) -> None:
    assert drafter._generating().n_ctx_slot == N_CTX_SLOT
    text = [1, *(300 + index % 90 for index in range(N_CTX_SLOT - 3))]
    for _ in range(4):
        drafter.draft([DraftRequest(0, text, 1)])
    assert len(drafter.draft([DraftRequest(0, text, 20)])[0].tokens) == 3
    assert drafter.draft([DraftRequest(0, [*text, 300, 300, 300], 20)]) == [NO_DRAFT]


@pytest.mark.parametrize(("tokens", "n_max"), [([], 4), (PROMPT, 0), ([1, 10**6], 4)])
def test_nothing_to_draft(drafter: DraftModel, tokens: list[int], n_max: int) -> None:
    assert drafter.draft([DraftRequest(0, tokens, n_max)]) == [NO_DRAFT]
    assert drafter.draft([]) == []


def test_starts_over_after_a_failure(drafter: DraftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    request = DraftRequest(0, PROMPT, 4)
    before = drafter.draft([request])
    with monkeypatch.context() as patch:
        patch.setattr(lib, "llama_decode", lambda *_: 1)
        with pytest.raises(RunnerFailure):
            drafter.draft([request])
    assert drafter.draft([request]) == before


def test_other_models_are_refused(target: LlamaModel, tmp_path: Path) -> None:
    other = write_llama(tmp_path / "more.gguf", knows_repositories=True)
    DraftModel(target, ModelConfig(model=other), CONTEXT).close()  # two tokens more do no harm
    with pytest.raises(DraftMisfit, match="does not generate"):
        DraftModel(target, ModelConfig(model=write_bert(tmp_path / "bert.gguf")), CONTEXT)
    with pytest.raises(ModelLoadFailure, match="not a file"):
        DraftModel(target, ModelConfig(model=tmp_path / "none.gguf"), CONTEXT)


@pytest.mark.parametrize(
    ("name", "answers", "message"),
    [
        ("llama_vocab_type", (1, 2), "different types"),
        ("llama_model_is_recurrent", (True, True), "taken back"),
        ("llama_vocab_bos", (1, 2), "different bos"),
        ("llama_vocab_get_add_eos", (False, True), "different eos"),
        ("llama_vocab_get_text", (b"a", b"b"), "token 5 is another"),
    ],
)
def test_differences_are_named(
    target: LlamaModel, monkeypatch: pytest.MonkeyPatch, name: str, answers: tuple[Any, Any], message: str
) -> None:
    sides = iter(answers)
    monkeypatch.setattr(lib, name, lambda *_: next(sides))
    with pytest.raises(DraftMisfit, match=message):
        DraftModel(target, ModelConfig(model=target.path), CONTEXT)


def test_sizes_may_differ_a_little(target: LlamaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = LlamaModel(ModelConfig(model=target.path))
    monkeypatch.setattr(draft.tokenizer, "n_tokens", target.tokenizer.n_tokens - 128)
    check_vocabularies(target, draft)
    monkeypatch.setattr(draft.tokenizer, "n_tokens", target.tokenizer.n_tokens - 129)
    with pytest.raises(DraftMisfit, match="tokens"):
        check_vocabularies(target, draft)
    draft.close()
