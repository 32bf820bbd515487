"""Several answers to one prompt, several prompts in one request, on the real model."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import openai
import pytest

from tests.support.events import chat_text, read_events
from tests.support.server import ServerProcess

PROMPT = "Once upon a time in a small village by the sea there lived"
SAMPLED = {"temperature": 1.2, "top_k": 0, "seed": 11, "n_predict": 16, "cache_prompt": False}
PROMPTS = ["The sky is", "One, two,", "A cat and a"]


def together(server: ServerProcess, path: str = "/completion", **fields: Any) -> Any:
    response = server.post(path, {"prompt": PROMPT} | SAMPLED | fields)
    assert response.status_code == 200, response.text
    return response.json()


def alone(server: ServerProcess, **fields: Any) -> dict[str, Any]:
    body = together(server, **fields)
    assert isinstance(body, dict)
    return body


@pytest.mark.parametrize("n", [2, 4, 8])
def test_answers_are_those_of_requests_with_the_next_seeds(server: ServerProcess, n: int) -> None:
    bodies = together(server, n=n, return_tokens=True)
    assert [body["index"] for body in bodies] == list(range(n))
    assert [body["generation_settings"]["seed"] for body in bodies] == list(range(11, 11 + n))
    assert len({body["id_slot"] for body in bodies}) == n
    expected = [alone(server, seed=11 + index, return_tokens=True)["tokens"] for index in range(n)]
    first = [tokens[0] for tokens in expected]  # sampled from the very same logits
    assert [body["tokens"][0] for body in bodies] == first
    assert [body["tokens"] for body in bodies] == expected
    assert len({body["content"] for body in bodies}) > 1


def test_the_prompt_is_evaluated_once(server: ServerProcess) -> None:
    bodies = together(server, n=4, prompt=PROMPT + " seven others" * 20)
    n_prompt = bodies[0]["tokens_evaluated"]
    assert bodies[0]["timings"]["prompt_n"] + bodies[0]["timings"]["cache_n"] == n_prompt
    assert [body["tokens_evaluated"] for body in bodies] == [n_prompt] * 4
    for body in bodies:
        assert body["timings"]["prompt_n"] + body["timings"]["cache_n"] == n_prompt
    assert sum(body["timings"]["prompt_n"] for body in bodies) <= n_prompt + 3
    assert all(body["tokens_cached"] == n_prompt + body["tokens_predicted"] - 1 for body in bodies)


def test_every_fork_goes_on_from_its_own_cache(server: ServerProcess) -> None:
    bodies = together(server, n=3)
    for body in bodies:
        again = alone(
            server,
            prompt=PROMPT + body["content"] + " and",
            id_slot=body["id_slot"],
            cache_prompt=True,
            n_predict=1,
        )
        assert again["id_slot"] == body["id_slot"]
        assert again["timings"]["cache_n"] >= body["tokens_evaluated"]


def test_greedy_answers_are_equal(server: ServerProcess) -> None:
    bodies = together(server, n=3, temperature=0)
    assert len({body["content"] for body in bodies}) == 1


def test_random_seeds_differ(server: ServerProcess) -> None:
    contents = [body["content"] for body in together(server, n=4, seed=-1)]
    assert len(set(contents)) > 1


def test_n_cmpl_is_the_native_spelling(server: ServerProcess) -> None:
    assert together(server, n_cmpl=2) == together(server, n=2) or len(together(server, n_cmpl=2)) == 2
    assert len(together(server, n_cmpl=3, n=2)) == 3


def test_several_prompts(server: ServerProcess) -> None:
    bodies = together(server, prompt=PROMPTS, temperature=0)
    assert [body["index"] for body in bodies] == [0, 1, 2]
    assert [body["prompt"] for body in bodies] == PROMPTS
    for prompt, body in zip(PROMPTS, bodies, strict=True):
        assert body["content"] == alone(server, prompt=prompt, temperature=0)["content"]


def test_one_prompt_in_a_list_is_one_object(server: ServerProcess) -> None:
    assert alone(server, prompt=[PROMPTS[0]])["content"] == alone(server, prompt=PROMPTS[0])["content"]


def test_several_prompts_with_several_answers(server: ServerProcess) -> None:
    bodies = together(server, prompt=PROMPTS, n=2)
    assert [body["index"] for body in bodies] == list(range(6))
    assert [body["prompt"] for body in bodies] == [prompt for prompt in PROMPTS for _ in range(2)]
    for index, body in enumerate(bodies):
        expected = alone(server, prompt=PROMPTS[index // 2], seed=11 + index % 2)
        assert body["content"] == expected["content"]


def test_more_prompts_than_slots_wait_their_turn(server: ServerProcess) -> None:
    prompts = [f"Number {index} is" for index in range(20)]
    bodies = together(server, prompt=prompts, n_predict=3, temperature=0)
    assert [body["prompt"] for body in bodies] == prompts
    assert bodies[17]["content"] == alone(server, prompt=prompts[17], n_predict=3, temperature=0)["content"]


@pytest.mark.parametrize("fields", [{"n": 3}, {"prompt": PROMPTS}, {"prompt": PROMPTS, "n": 2}])
def test_native_streams(server: ServerProcess, fields: dict[str, Any]) -> None:
    bodies = together(server, **fields)
    events = read_events(server, "/completion", {"prompt": PROMPT} | SAMPLED | fields)
    texts = [""] * len(bodies)
    ended: list[int] = []
    for event in events:
        assert event["index"] not in ended
        texts[event["index"]] += event["content"]
        if event["stop"]:
            ended.append(event["index"])
            assert event["prompt"] == bodies[event["index"]]["prompt"]
    assert texts == [body["content"] for body in bodies]
    assert sorted(ended) == list(range(len(bodies)))


def test_chat(client: openai.OpenAI, server: ServerProcess) -> None:
    messages: Any = [{"role": "user", "content": "Tell me a joke."}]
    fields: dict[str, Any] = {
        "model": "smol",
        "messages": messages,
        "max_tokens": 20,
        "temperature": 1.2,
        "seed": 3,
    }
    whole = client.chat.completions.create(**fields, n=3)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    singles = [client.chat.completions.create(**fields | {"seed": 3 + index}) for index in range(3)]
    texts = [choice.message.content for choice in whole.choices]
    assert texts == [one.choices[0].message.content for one in singles]
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == singles[0].usage.prompt_tokens
    assert whole.usage.completion_tokens == sum(one.usage.completion_tokens for one in singles)
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    body = fields | {"n": 3, "stream_options": {"include_usage": True}}
    events = read_events(server, "/v1/chat/completions", body)
    *chunks, last = events
    assert [chunk["choices"][0]["index"] for chunk in chunks[:3]] == [0, 1, 2]
    assert all(chunk["choices"][0]["delta"]["role"] == "assistant" for chunk in chunks[:3])
    assert [chat_text(chunks, index=index) for index in range(3)] == texts
    reasons = [choice["index"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    assert sorted(reasons) == [0, 1, 2]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == whole.usage.completion_tokens
    with client.chat.completions.stream(**fields | {"max_tokens": 300}, n=2) as stream:
        for _ in stream:
            pass
    assert len(stream.get_final_completion().choices) == 2


def test_text_completions(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "smol", "max_tokens": 8, "temperature": 1.2, "seed": 3}
    whole = client.completions.create(prompt=PROMPTS, n=2, **fields)
    assert [choice.index for choice in whole.choices] == list(range(6))
    singles = [
        client.completions.create(prompt=prompt, **fields | {"seed": 3 + index})
        for prompt in PROMPTS
        for index in range(2)
    ]
    assert [choice.text for choice in whole.choices] == [one.choices[0].text for one in singles]
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in singles[::2])
    assert whole.usage.completion_tokens == sum(one.usage.completion_tokens for one in singles)
    chunks = list(client.completions.create(prompt=PROMPTS, n=2, stream=True, **fields))
    texts = Counter[int]()
    streamed = [""] * 6
    for chunk in chunks:
        (choice,) = chunk.choices
        streamed[choice.index] += choice.text
        texts[choice.index] += choice.finish_reason is not None
    assert streamed == [choice.text for choice in whole.choices]
    assert dict(texts) == dict.fromkeys(range(6), 1)
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_tools_for_each_answer(server: ServerProcess) -> None:
    parameters = {"type": "object", "properties": {"d": {"enum": ["up", "down"]}}, "required": ["d"]}
    body = {
        "messages": [{"role": "user", "content": "Go up."}],
        "tools": [{"type": "function", "function": {"name": "go", "parameters": parameters}}],
        "tool_choice": "required", "parallel_tool_calls": False, "n": 2, "max_tokens": 80, "seed": 1,
    }  # fmt: skip
    choices = server.post("/v1/chat/completions", body).json()["choices"]
    ids = [choice["message"]["tool_calls"][0]["id"] for choice in choices]
    assert len(set(ids)) == 2
    events = read_events(server, "/v1/chat/completions", body)
    for index in range(2):
        found = [one for event in events for one in event["choices"] if one["index"] == index]
        parts = [part for one in found for part in one["delta"].get("tool_calls", [])]
        assert [part["function"]["name"] for part in parts if "name" in part["function"]] == ["go"]
        assert found[-1]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("fields", [{"n": 9}, {"n": 0}, {"n": -1}, {"n_cmpl": 1000}, {"n": "2"}, {"n": [2]}])
@pytest.mark.parametrize("path", ["/completion", "/v1/completions", "/v1/chat/completions"])
def test_impossible_counts(server: ServerProcess, path: str, fields: dict[str, Any]) -> None:
    body = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "n_predict": 1} | fields
    response = server.post(path, body)
    assert response.status_code == 400, response.text
    assert f"'{next(iter(fields))}'" in response.json()["error"]["message"]


def test_a_bad_prompt_among_several_is_named(server: ServerProcess) -> None:
    for bad in ({}, "word " * 3000, [10**9]):
        response = server.post("/completion", {"prompt": ["good", bad], "n_predict": 1})
        assert response.status_code == 400
    assert server.post("/completion", {"prompt": [5, [5]], "n_predict": 1}).status_code == 400
    server.wait_idle()


def test_a_client_that_leaves_frees_every_slot(server: ServerProcess) -> None:
    body = {"prompt": PROMPTS, "n": 2, "n_predict": -1, "ignore_eos": True, "stream": True}
    with server.client.stream("POST", "/completion", json=body) as response:
        lines = response.iter_lines()
        for _ in range(20):
            next(lines)
        assert server.get("/health").json()["slots_processing"] == 6
    server.wait_idle()
    assert together(server, n=8, n_predict=2)[7]["tokens_predicted"] == 2


def test_forks_wait_for_enough_slots(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("-np", "2", "-c", "1024")
    expected = together(server, n=2)
    results: list[Any] = []

    def ask(fields: dict[str, Any]) -> None:
        results.append((fields, together(server, **fields)))

    requests: list[dict[str, Any]] = [
        {"n": 2},
        {"n": 1, "prompt": "Rain"},
        {"n": 2},
        {"n": 1, "prompt": "Snow"},
    ]
    threads = [threading.Thread(target=ask, args=(fields,)) for fields in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for fields, bodies in results:
        if fields["n"] == 2:
            assert [body["content"] for body in bodies] == [body["content"] for body in expected]
