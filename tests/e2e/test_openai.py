"""The `openai` package as a stranger: sync, async, streamed and not."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.support.server import ServerProcess

MESSAGES = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="smol", messages=MESSAGES, temperature=0, max_tokens=20)
    choice = answer.choices[0]
    assert "Paris" in (choice.message.content or "")
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert answer.model == "smol"
    assert answer.id.startswith("chatcmpl-")
    assert answer.system_fingerprint.startswith("b")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_stream_equals_the_answer(client: openai.OpenAI) -> None:
    fields = {"model": "smol", "messages": MESSAGES, "temperature": 0, "max_tokens": 30}
    whole = client.chat.completions.create(**fields)
    chunks = list(
        client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    )
    first, *middle, finish, last = chunks
    assert first.choices[0].delta.role == "assistant"
    assert first.choices[0].delta.content is None
    assert all(chunk.choices[0].delta.role is None for chunk in middle)
    assert all(chunk.choices[0].delta.content for chunk in middle)
    assert "".join(chunk.choices[0].delta.content for chunk in middle) == whole.choices[0].message.content
    assert finish.choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_stream_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="smol", messages=MESSAGES, temperature=0, max_tokens=20
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert "Paris" in (final.choices[0].message.content or "")
    assert final.choices[0].message.role == "assistant"


async def test_async_chat(server: ServerProcess) -> None:
    async with openai.AsyncOpenAI(base_url=server.url, api_key="none") as client:  # base URL without /v1
        stream = await client.chat.completions.create(
            model="smol", messages=MESSAGES, temperature=0, max_completion_tokens=20, stream=True
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert "Paris" in text


def test_text_completion(client: openai.OpenAI) -> None:
    fields = {"model": "smol", "prompt": "The capital of France is", "temperature": 0, "max_tokens": 12}
    whole = client.completions.create(**fields)
    assert whole.object == "text_completion"
    assert whole.choices[0].text.strip().startswith("Paris")
    assert whole.choices[0].finish_reason == "length"
    chunks = list(client.completions.create(**fields, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 12
    echoed = client.completions.create(**fields, echo=True)
    assert echoed.choices[0].text == fields["prompt"] + whole.choices[0].text


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["smol"]
    assert client.models.retrieve("smol").id == "smol"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")


def test_errors_become_the_packages_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="exceeds the available context size"):
        client.completions.create(model="smol", prompt="word " * 3000)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="smol", prompt="x", extra_body={"temperature": "hot"})
    with pytest.raises(openai.BadRequestError, match="'n'"):
        client.chat.completions.create(model="smol", messages=MESSAGES, n=9)


def test_roles_parts_and_prefill(client: openai.OpenAI, server: ServerProcess) -> None:
    parts = [{"type": "text", "text": "You are"}, {"type": "text", "text": "a pirate."}]
    one = client.chat.completions.create(
        model="smol", messages=[{"role": "developer", "content": parts}, *MESSAGES], max_tokens=1
    )
    other = client.chat.completions.create(
        model="smol", messages=[{"role": "system", "content": "You are\na pirate."}, *MESSAGES], max_tokens=1
    )
    assert one.usage.prompt_tokens == other.usage.prompt_tokens
    prefilled = client.chat.completions.create(
        model="smol", messages=[*MESSAGES, {"role": "assistant", "content": "The capital of France is"}],
        temperature=0, max_tokens=3,
    )  # fmt: skip
    assert prefilled.choices[0].message.content.startswith(" Paris")


def test_fields_that_clients_send_and_we_do_not_use(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="whatever", messages=MESSAGES, max_tokens=2, user="u", metadata={"a": "b"}, store=False,
        service_tier="auto", parallel_tool_calls=True, modalities=["text"], logprobs=False, presence_penalty=0,
        response_format={"type": "text"}, reasoning_effort="low", prompt_cache_key="k", seed=1, n=1, stop=None,
        extra_body={"top_k": -1, "frobnicate": {"x": 1}, "stream": None},
    )  # fmt: skip
    assert answer.usage.completion_tokens == 2
