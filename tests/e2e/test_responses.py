"""OpenAI's responses by the `openai` package as a stranger."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from protocol import SseParser
from tests.support.server import ServerProcess
from wingman.api.responses_input import LOGPROBS

QUESTION = "What is the capital of France? Answer with one word."
FIELDS: dict[str, Any] = {"model": "smol", "input": QUESTION, "temperature": 0, "max_output_tokens": 30}
TOOL = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}


@pytest.fixture
def responses(server: ServerProcess) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client.responses


def test_create(responses: Any) -> None:
    answer = responses.create(
        **FIELDS, instructions="You are terse.", metadata={"a": "b"}, store=False, user="u"
    )
    assert "Paris" in answer.output_text
    assert answer.id.startswith("resp_")
    assert answer.output[0].id.startswith("msg_")
    assert (answer.status, answer.error, answer.incomplete_details) == ("completed", None, None)
    assert (answer.model, answer.instructions, answer.metadata) == ("smol", "You are terse.", {"a": "b"})
    assert (answer.temperature, answer.max_output_tokens, answer.text.format.type) == (0, 30, "text")
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


def test_the_stream_equals_the_answer(responses: Any) -> None:
    whole = responses.create(**FIELDS)
    events = list(responses.create(**FIELDS, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 1
    assert "".join(deltas) == whole.output_text == events[-1].response.output_text
    assert events[-1].type == "response.completed"
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens
    with responses.stream(**FIELDS) as stream:
        assert [event.type for event in stream] == [event.type for event in events]
        assert stream.get_final_response().output_text == whole.output_text


def test_cut_short(responses: Any) -> None:
    fields = FIELDS | {"max_output_tokens": 2}
    whole = responses.create(**fields)
    assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    *_, last = responses.create(**fields, stream=True)
    assert last.type == "response.incomplete"
    assert last.response.output_text == whole.output_text


def test_the_same_prompt_as_a_chat(responses: Any, server: ServerProcess) -> None:
    items = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    count = server.post("/chat/completions/input_tokens", {"messages": items}).json()["input_tokens"]
    body = {"instructions": "Be brief.", "input": QUESTION}
    for path in ("/v1/responses/input_tokens", "/responses/input_tokens"):
        expected = {"object": "response.input_tokens", "input_tokens": count}
        assert server.post(path, body).json() == server.post(path, {"input": items}).json() == expected
    assert responses.create(**FIELDS | body).usage.input_tokens == count


class City(BaseModel):
    name: str
    country: str


def test_parse(responses: Any) -> None:
    answer = responses.parse(model="smol", input="Where is Paris?", temperature=0, text_format=City)
    assert isinstance(answer.output_parsed, City)
    assert answer.text.format.type == "json_schema"


def test_a_call_and_its_output(responses: Any) -> None:
    fields = FIELDS | {"tools": [TOOL], "max_output_tokens": 100, "input": "Weather in Rome?"}
    first = responses.create(**fields, tool_choice="required")
    call = first.output[-1]
    assert (call.type, call.name) == ("function_call", "get_weather")
    assert isinstance(json.loads(call.arguments)["city"], str)
    with responses.stream(**fields, tool_choice={"type": "function", "name": "get_weather"}) as stream:
        kinds = {event.type for event in stream}
        streamed = stream.get_final_response().output[-1]
    assert {"response.function_call_arguments.delta", "response.function_call_arguments.done"} <= kinds
    assert (streamed.name, streamed.arguments) == (call.name, call.arguments)
    history = [{"role": "user", "content": fields["input"]}, *(item.to_dict() for item in first.output)]
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    second = responses.create(**fields | {"input": [*history, output]}, tool_choice="none")
    assert second.output_text


def test_logprobs(responses: Any) -> None:
    fields = FIELDS | {"include": [LOGPROBS], "top_logprobs": 2}
    [content] = responses.create(**fields).output[0].content
    assert "".join(item.token for item in content.logprobs) == content.text
    assert all(len(item.top_logprobs) == 2 for item in content.logprobs)
    events = responses.create(**fields, stream=True)
    streamed = [
        item.token
        for event in events
        if event.type == "response.output_text.delta"
        for item in event.logprobs
    ]
    assert streamed == [item.token for item in content.logprobs]


def test_errors_become_the_packages_exceptions(responses: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="nothing is stored") as error:
        responses.create(**FIELDS, previous_response_id="resp_1")
    assert error.value.param == "previous_response_id"
    with pytest.raises(openai.BadRequestError, match="web_search"):
        responses.create(**FIELDS, tools=[{"type": "web_search"}])
    with pytest.raises(openai.BadRequestError, match="exceeds the available context size"):
        responses.create(**FIELDS | {"input": "word " * 3000}, stream=True)


def test_named_events_with_what_llama_server_adds(server: ServerProcess) -> None:
    body = {"input": QUESTION, "max_output_tokens": 3, "stream": True, "return_progress": True}
    text = server.post("/responses", body | {"timings_per_token": True, "cache_prompt": False}).content
    events = SseParser().feed(text)
    assert all(json.loads(event.data)["type"] == event.event for event in events)
    bodies = [json.loads(event.data) for event in events]
    assert any("prompt_progress" in body for body in bodies if body["type"] == "response.in_progress")
    assert all("timings" in body for body in bodies if body["type"] == "response.output_text.delta")
    assert bodies[-1]["timings"]["predicted_n"] == 3
