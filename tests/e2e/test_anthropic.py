"""Anthropic's messages by the `anthropic` package as a stranger."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from tests.support.server import ServerProcess

QUESTION = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
FIELDS: dict[str, Any] = {
    "model": "smol", "messages": QUESTION, "max_tokens": 30, "extra_body": {"temperature": 0},
}  # fmt: skip
TOOL = {
    "name": "get_weather",
    "description": "The weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


@pytest.fixture
def messages(server: ServerProcess) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client.messages


def test_create(messages: Any) -> None:
    answer = messages.create(**FIELDS, system="You are terse.", metadata={"user_id": "u"})
    [block] = answer.content
    assert (block.type, "Paris" in block.text) == ("text", True)
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", "smol")
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    assert answer.id.startswith("msg_")
    assert answer.usage.output_tokens > 0


def test_the_stream_equals_the_answer(messages: Any) -> None:
    whole = messages.create(**FIELDS)
    with messages.stream(**FIELDS) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == whole.content[0].text
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens
    kinds = [event.type for event in messages.create(**FIELDS, stream=True)]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}


def test_usage_counts_cached_tokens_apart(messages: Any) -> None:
    count = messages.count_tokens(model="smol", messages=QUESTION).input_tokens
    messages.create(**FIELDS)
    usage = messages.create(**FIELDS).usage
    assert usage.input_tokens + usage.cache_read_input_tokens == count
    assert usage.cache_read_input_tokens > 0
    assert usage.cache_creation_input_tokens == 0


def test_why_it_ends(messages: Any) -> None:
    cut = messages.create(**FIELDS | {"max_tokens": 2})
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 2)
    stopped = messages.create(**FIELDS, stop_sequences=["France", "Paris"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "France")
    assert "France" not in stopped.content[0].text


def test_turns_of_one_role_and_prefill(messages: Any) -> None:
    start = {"role": "assistant", "content": "The capital of France"}
    conversation = [{"role": "user", "content": "Hello."}, *QUESTION, start, {"role": "assistant", "content": [
        {"type": "text", "text": "is the city of"},
    ]}]  # fmt: skip
    answer = messages.create(**FIELDS | {"messages": conversation, "max_tokens": 3})
    assert "Paris" in answer.content[0].text


def test_a_call_and_its_result(messages: Any) -> None:
    asked = {"role": "user", "content": "Weather in Rome?"}
    fields = FIELDS | {"tools": [TOOL], "messages": [asked], "max_tokens": 100}
    whole = messages.create(**fields, tool_choice={"type": "any"})
    call = whole.content[-1]
    assert (whole.stop_reason, call.type, call.name) == ("tool_use", "tool_use", "get_weather")
    assert isinstance(call.input["city"], str)
    with messages.stream(**fields, tool_choice={"type": "tool", "name": "get_weather"}) as stream:
        assert any(event.type == "input_json" for event in stream)
        final = stream.get_final_message()
    assert (final.content[-1].input, final.stop_reason) == (call.input, "tool_use")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny"}]}
    history = [asked, {"role": "assistant", "content": [block.to_dict() for block in whole.content]}]
    fields["messages"] = [*history, {"role": "user", "content": [result]}]
    answer = messages.create(**fields, tool_choice={"type": "none"})
    assert answer.content[0].type == "text"


def test_errors_become_the_packages_exceptions(messages: Any, server: ServerProcess) -> None:
    with pytest.raises(anthropic.BadRequestError) as error:
        messages.create(**FIELDS | {"messages": [{"role": "user", "content": [{"type": "text"}]}]})
    body: Any = error.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["message"] == "Field 'messages[0].content[0].text': is required"
    with pytest.raises(anthropic.BadRequestError, match="exceeds the available context size"):
        messages.create(**FIELDS | {"messages": [{"role": "user", "content": "word " * 3000}]}, stream=True)
    for path, broken in (("/v1/messages", {"messages": QUESTION}), ("/v1/messages/count_tokens", {})):
        answer = server.post(path, broken)
        assert (answer.status_code, answer.json()["type"]) == (400, "error")
        assert answer.json()["error"]["param"] in ("max_tokens", "messages")
