"""Token probabilities on the real model, in every shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.events import read_events
from tests.support.server import ServerProcess

PROMPT = "The capital of France is"
MESSAGES = [{"role": "user", "content": "Name three colours."}]
SAMPLED = {"temperature": 1.0, "seed": 5, "top_k": 0, "top_p": 1, "min_p": 0}


def native(server: ServerProcess, **fields: Any) -> dict[str, Any]:
    return server.complete(PROMPT, **({"n_predict": 8, "return_tokens": True} | fields))


def check_item(item: dict[str, Any], n_top: int, value: str = "logprob", top: str = "top_logprobs") -> None:
    """An item's alternatives: how many, sorted, each with its bytes."""
    alternatives = item[top]
    assert len(alternatives) == n_top
    numbers = [one[value] for one in alternatives]
    assert numbers == sorted(numbers, reverse=True)
    assert len({one["id"] for one in alternatives}) == n_top
    for one in (item, *alternatives):
        assert bytes(one["bytes"]).decode("utf-8", "replace").rstrip("\ufffd") == one["token"].rstrip(
            "\ufffd"
        )


@pytest.mark.parametrize("n_probs", [1, 3, 20])
def test_before_sampling(server: ServerProcess, n_probs: int) -> None:
    body = native(server, n_probs=n_probs)
    items = body["completion_probabilities"]
    assert [item["id"] for item in items] == body["tokens"]
    assert "".join(item["token"] for item in items) == body["content"]
    for item in items:
        check_item(item, n_probs)
        assert item["logprob"] == pytest.approx(item["top_logprobs"][0]["logprob"])  # greedy
        assert item["id"] == item["top_logprobs"][0]["id"]
        assert sum(math.exp(one["logprob"]) for one in item["top_logprobs"]) <= 1 + 1e-5
        assert item["content"] == item["token"]
        assert [one["tok_str"] for one in item["probs"]] == [one["token"] for one in item["top_logprobs"]]


def test_they_are_those_of_the_model_whatever_is_sampled(server: ServerProcess) -> None:
    plain = native(server, n_probs=4, n_predict=1)["completion_probabilities"][0]["top_logprobs"]
    for sampling in (SAMPLED, {"temperature": 0.2}, {"top_k": 1}, {"logit_bias": [[plain[0]["id"], -50]]}):
        body = native(server, n_probs=4, n_predict=1, **sampling)
        item = body["completion_probabilities"][0]
        found = item["top_logprobs"]
        if "logit_bias" in sampling:
            assert item["id"] == plain[1]["id"]
        else:
            assert [one["id"] for one in found] == [one["id"] for one in plain]
            assert [one["logprob"] for one in found] == pytest.approx(
                [one["logprob"] for one in plain], abs=1e-3
            )


def test_the_whole_vocabulary_sums_to_one(
    start_server: Callable[..., ServerProcess], tiny_model: Path
) -> None:
    server = start_server("-np", "2", "--max-probs", "1000", model=tiny_model)
    body = server.complete("the world", n_predict=2, n_probs=10**6, cache_prompt=False)
    for item in body["completion_probabilities"]:
        assert len(item["top_logprobs"]) == server.get("/v1/models").json()["data"][0]["meta"]["n_vocab"]
        assert math.fsum(math.exp(one["logprob"]) for one in item["top_logprobs"]) == pytest.approx(
            1, abs=1e-4
        )
    capped = start_server("-np", "2", "--max-probs", "7", model=tiny_model)
    item = capped.complete("the world", n_predict=1, n_probs=50)["completion_probabilities"][0]
    check_item(item, 7)


def test_after_sampling(server: ServerProcess) -> None:
    body = native(server, n_probs=5, post_sampling_probs=True, **SAMPLED | {"top_k": 3})
    items = body["completion_probabilities"]
    assert [item["id"] for item in items] == body["tokens"]
    for item in items:
        check_item(item, len(item["top_probs"]), "prob", "top_probs")
        assert 1 <= len(item["top_probs"]) <= 3
        assert all(0 < one["prob"] <= 1 for one in item["top_probs"])
        assert math.fsum(one["prob"] for one in item["top_probs"]) == pytest.approx(1, abs=1e-4)
        assert item["prob"] in [one["prob"] for one in item["top_probs"] if one["id"] == item["id"]]
        assert [one["prob"] for one in item["probs"]] == [one["prob"] for one in item["top_probs"]]


def test_after_greedy_sampling_one_is_certain(server: ServerProcess) -> None:
    for item in native(server, n_probs=3, post_sampling_probs=True)["completion_probabilities"]:
        assert item["prob"] == 1.0
        assert [(one["id"], one["prob"]) for one in item["top_probs"]] == [(item["id"], 1.0)]


def test_within_a_grammar(server: ServerProcess) -> None:
    body = native(server, n_probs=3, n_predict=30, grammar='root ::= " zebra" " crossing"')
    assert body["content"] == " zebra crossing"
    items = body["completion_probabilities"]
    assert "".join(item["token"] for item in items) == body["content"]
    for item in items:
        check_item(item, 3)
        assert item["logprob"] <= item["top_logprobs"][0]["logprob"]


@pytest.mark.parametrize("fields", [{}, SAMPLED, {"post_sampling_probs": True, **SAMPLED}])
def test_a_stream_has_the_same_items(server: ServerProcess, fields: dict[str, Any]) -> None:
    request = {
        "prompt": PROMPT,
        "temperature": 0,
        "n_predict": 12,
        "n_probs": 3,
        "cache_prompt": False,
    } | fields
    whole = server.post("/completion", request).json()
    *partial, final = read_events(server, "/completion", request)
    assert "completion_probabilities" not in final
    items = [item for event in partial for item in event["completion_probabilities"]]
    assert [item["id"] for item in items] == [item["id"] for item in whole["completion_probabilities"]]
    for one, other in zip(items, whole["completion_probabilities"], strict=True):
        key = "prob" if "prob" in one else "logprob"
        assert one[key] == pytest.approx(other[key], abs=1e-3)


def test_tokens_of_a_stop_word_are_left_out(server: ServerProcess) -> None:
    body = server.complete("Count: 1, 2, 3,", n_predict=30, n_probs=2, stop=[" 6"])
    text = "".join(item["token"] for item in body["completion_probabilities"])
    assert body["content"] == " 4, 5,"
    assert text == body["content"]
    at_once = server.complete("Count: 1, 2, 3,", n_predict=30, n_probs=2, stop=[" 4"])
    assert at_once["content"] == ""
    assert not at_once.get("completion_probabilities")


def test_parts_of_characters(server: ServerProcess) -> None:
    body = server.complete("Emoji:", n_predict=12, n_probs=1, grammar='root ::= "🦜漢"')
    data = b"".join(bytes(item["bytes"]) for item in body["completion_probabilities"])
    assert data.decode() == "🦜漢" == body["content"]


@pytest.mark.parametrize("n_probs", [0, -3, None])
def test_none_asked_for(server: ServerProcess, n_probs: int | None) -> None:
    assert "completion_probabilities" not in native(server, n_probs=n_probs)


def test_logprobs_of_text_completions(client: openai.OpenAI) -> None:
    fields = {"model": "smol", "prompt": PROMPT, "temperature": 0, "max_tokens": 8, "logprobs": 2}
    whole = client.completions.create(**fields)
    found = whole.choices[0].logprobs
    assert found is not None
    assert "".join(found.tokens or []) == whole.choices[0].text
    assert found.text_offset == [len("".join(found.tokens[:end])) for end in range(8)]
    assert all(number <= 0 for number in found.token_logprobs)
    for token, number, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert len(top) == 2
        assert top[token] == pytest.approx(number)
    for item in found.content:  # as in chat
        check_item(item, 2)
    chunks = list(client.completions.create(**fields, stream=True))
    streamed = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [token for one in streamed for token in one.tokens] == found.tokens
    assert [offset for one in streamed for offset in one.text_offset] == found.text_offset
    echoed = client.completions.create(**fields, echo=True).choices[0].logprobs
    assert echoed.text_offset == [offset + len(PROMPT) for offset in found.text_offset]
    assert client.completions.create(**fields | {"logprobs": None}).choices[0].logprobs is None


def test_logprobs_of_chat(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "smol", "messages": MESSAGES, "temperature": 0, "max_tokens": 10}
    fields |= {"logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**fields)
    items = whole.choices[0].logprobs.content
    assert "".join(item.token for item in items) == whole.choices[0].message.content
    for item in items:
        assert [one.logprob for one in item.top_logprobs] == sorted(
            (one.logprob for one in item.top_logprobs), reverse=True
        )
        assert item.top_logprobs[0].token == item.token
        assert len(item.top_logprobs) == 3
        assert bytes(item.bytes).decode() == item.token
    chunks = list(client.chat.completions.create(**fields, stream=True))
    streamed = [
        item for chunk in chunks if chunk.choices[0].logprobs for item in chunk.choices[0].logprobs.content
    ]
    assert [item.token for item in streamed] == [item.token for item in items]
    for one, other in zip(streamed, items, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
    with client.chat.completions.stream(**fields | {"max_tokens": 60}) as stream:
        final = stream.get_final_completion().choices[0]
    assert "".join(item.token for item in final.logprobs.content) == final.message.content


def test_how_many_chat_gives(server: ServerProcess) -> None:
    def choice(**fields: Any) -> dict[str, Any]:
        body = {"messages": MESSAGES, "max_tokens": 2, "temperature": 0} | fields
        response = server.post("/v1/chat/completions", body)
        assert response.status_code == 200, response.text
        return dict(response.json()["choices"][0])

    assert "logprobs" not in choice()
    assert "logprobs" not in choice(logprobs=False)
    assert "logprobs" not in choice(logprobs=True, top_logprobs=0)
    assert len(choice(logprobs=True)["logprobs"]["content"][0]["top_logprobs"]) == 20
    assert len(choice(logprobs=True, top_logprobs=1)["logprobs"]["content"][0]["top_logprobs"]) == 1
    post = choice(logprobs=True, top_logprobs=5, post_sampling_probs=True)["logprobs"]["content"]
    assert [item["prob"] for item in post] == [1.0, 1.0]
    response = server.post("/v1/chat/completions", {"messages": MESSAGES, "top_logprobs": 3})
    assert response.status_code == 400
    assert "top_logprobs" in response.json()["error"]["message"]


def test_each_answer_has_its_own(server: ServerProcess) -> None:
    body = {"messages": MESSAGES, "max_tokens": 8, "n": 3, "logprobs": True, "top_logprobs": 2, **SAMPLED}
    choices = server.post("/v1/chat/completions", body).json()["choices"]
    assert len(choices) == 3
    for choice in choices:
        items = choice["logprobs"]["content"]
        data = b"".join(bytes(item["bytes"]) for item in items)
        assert data.decode("utf-8", "replace") == choice["message"]["content"]
        for item in items:
            check_item(item, 2)
    first = [choice["logprobs"]["content"][0]["top_logprobs"] for choice in choices]
    assert first[0] == first[1] == first[2]  # one prompt, one set of logits
    events = read_events(server, "/v1/chat/completions", body)
    for index, choice in enumerate(choices):
        found = [one for event in events for one in event["choices"] if one["index"] == index]
        tokens = [item["token"] for one in found for item in one.get("logprobs", {}).get("content", [])]
        assert tokens == [item["token"] for item in choice["logprobs"]["content"]]
