"""OpenAI's responses: requests become chat requests, answers become items and events."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import SseParser
from tests.support.turns import ANSWER, JSON, PIECES, events_of, make_turn, write
from wingman.api.dialects import Body
from wingman.api.dialects_schema import ResponseRequest
from wingman.api.responses import ResponseWriter
from wingman.api.responses_input import LOGPROBS, to_chat
from wingman.api.schema import ChatRequest, parse_json
from wingman.chat.conversation import read_messages
from wingman.engine.types import StopType
from wingman.errors import EngineFailure, InvalidRequest

PROPERTY = settings(deadline=None, database=None, derandomize=True, max_examples=150)
CALL = {"type": "function_call", "id": "fc_1", "call_id": "c", "name": "f", "arguments": '{"a":1}'}
OUTPUT = {"type": "function_call_output", "call_id": "c", "output": "4"}


def read(**body: Any) -> ResponseRequest:
    return parse_json(json.dumps(body).encode(), ResponseRequest)


def chat(**body: Any) -> ChatRequest:
    return to_chat(read(**body))


def texts(*content: str) -> list[Any]:
    return [{"type": "text", "text": text} for text in content]


# -- requests ---------------------------------------------------------------------------------------


def test_a_string_with_instructions() -> None:
    fields = chat(input="hi", instructions="be brief", max_output_tokens=7, temperature=0.5, min_p=0.1, n=3)
    assert fields.messages == [
        {"role": "system", "content": texts("be brief")},
        {"role": "user", "content": texts("hi")},
    ]
    assert (fields.max_tokens, fields.temperature, fields.min_p, fields.n) == (7, 0.5, 0.1, None)


def test_what_the_assistant_did_in_a_row_is_one_message() -> None:
    items = [
        {"role": "developer", "content": "d"},
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}],
        },
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "hm"}],
        },
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look"}]},
        CALL,
        {**CALL, "call_id": "e", "arguments": ""},
        OUTPUT,
        {**OUTPUT, "call_id": "e", "output": [{"type": "input_text", "text": "5"}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "sum"}], "encrypted_content": "x"},
        {"role": "user", "content": "c"},
    ]
    calls = [
        {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}},
        {"id": "e", "type": "function", "function": {"name": "f", "arguments": "{}"}},
    ]
    assert chat(input=items).messages == [
        {"role": "developer", "content": texts("d")},
        {"role": "user", "content": texts("a", "b")},
        {"role": "assistant", "content": texts("I look"), "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c", "content": texts("4")},
        {"role": "tool", "tool_call_id": "e", "content": texts("5")},
        {"role": "assistant", "content": texts("no"), "reasoning_content": "sum"},
        {"role": "user", "content": texts("c")},
    ]


def test_tools_choice_and_format() -> None:
    schema = {"type": "object"}
    fields = chat(
        input="hi", tools=[{"type": "function", "name": "f", "parameters": schema, "strict": True}],
        tool_choice={"type": "function", "name": "f"}, parallel_tool_calls=False, reasoning={"effort": "low"},
        text={"format": {"type": "json_schema", "name": "n", "schema": schema}}, store=True, user="u",
        include=[LOGPROBS], top_logprobs=3,
    )  # fmt: skip
    function = {"name": "f", "description": None, "parameters": schema}
    assert fields.tools == [{"type": "function", "function": function}]
    assert fields.tool_choice == {"type": "function", "name": "f"}
    assert fields.response_format == {"type": "json_schema", "json_schema": {"schema": schema}}
    assert (fields.parallel_tool_calls, fields.reasoning_effort) == (False, "low")
    assert (fields.logprobs, fields.top_logprobs) == (True, 3)


def user(content: Any) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": "x"}, {"role": "user", "content": content}]}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "input"),
        ({"input": 1}, "input"),
        ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "x", "conversation": {"id": "c"}}, "conversation"),
        ({"input": "x", "background": True}, "background"),
        ({"input": "x", "max_output_tokens": -1}, "max_output_tokens"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
        ({"input": [{"content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        (user(None), "input[1].content"),
        (user([{"type": "input_text", "text": 1}]), "input[1].content[0].text"),
        (user([{"type": "input_text"}]), "input[1].content[0].text"),
        (user([{"type": "input_image", "image_url": "data:"}]), "input[1].content[0].type"),
        ({"input": [{**CALL, "arguments": "{"}]}, "input[0].arguments"),
        ({"input": [{**CALL, "arguments": "[]"}]}, "input[0].arguments"),
        ({"input": [{**CALL, "call_id": None}]}, "input[0].call_id"),
        ({"input": [{**CALL, "name": ""}]}, "input[0].name"),
        ({"input": [CALL]}, "input"),
        ({"input": [{**OUTPUT, "output": None}]}, "input[0].output"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": "x", "tool_choice": {"type": "file_search"}}, "tool_choice.type"),
        ({"input": "x", "text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"input": "x", "text": {"format": {"type": "text", "schema": {"a": 2**70}}}}, "text.format.schema"),
        ({"input": "x", "text": {"format": {"type": "xml"}}}, "text.format.type"),
    ],
)
def test_refusals_name_the_field(body: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        chat(**body)
    assert error.value.field == field


@given(st.dictionaries(st.sampled_from(ResponseRequest.__struct_fields__), JSON, max_size=3), JSON)
@PROPERTY
def test_any_json_is_read_or_refused(body: dict[str, Any], input_: Any) -> None:
    try:
        fields = chat(**({"input": input_} | body))
    except InvalidRequest:
        return
    assert len(read_messages(fields.messages or (), knows_developer=False)) == len(fields.messages or ())


# -- answers ----------------------------------------------------------------------------------------


def answer(pieces: list[str], stop: StopType = StopType.EOS, **body: Any) -> tuple[list[Body], Body]:
    request = read(input="x", **body)
    writer = ResponseWriter(make_turn(), request)
    return write(writer, events_of(pieces, stop)), writer.body()


def replay(events: list[Body]) -> list[Body]:
    """The items as a client builds them from deltas alone."""
    items: list[Body] = []
    for event in events:
        match event["type"].removeprefix("response."):
            case "output_item.added":
                assert event["output_index"] == len(items)
                items.append(event["item"])
            case "content_part.added":
                items[-1]["content"].append(event["part"])
            case "output_text.delta" | "reasoning_text.delta":
                assert event["item_id"] == items[-1]["id"]
                items[-1]["content"][event["content_index"]]["text"] += event["delta"]
            case "function_call_arguments.delta":
                items[-1]["arguments"] += event["delta"]
            case "output_item.done":
                assert event["item"] == items[-1] | {"status": event["item"]["status"]}
                items[-1] = event["item"]
    return items


def test_a_whole_answer() -> None:
    _, body = answer([ANSWER], instructions="i", metadata={"k": "v"})
    thought, text, *calls = body["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "Well now."}]
    assert text["content"] == [
        {"type": "output_text", "text": "Let me look.\n", "annotations": [], "logprobs": []}
    ]
    assert [(call["name"], call["arguments"]) for call in calls] == [("weather", '{"city": "Rome"}')] * 2
    assert len({item["id"] for item in body["output"]} | {call["call_id"] for call in calls}) == 6
    assert (body["status"], body["instructions"], body["metadata"]) == ("completed", "i", {"k": "v"})
    assert body["usage"]["input_tokens_details"] == {"cached_tokens": 2}
    assert body["usage"]["total_tokens"] == 6


def test_an_answer_cut_short() -> None:
    events, body = answer(["<think>Hm", "mm"], StopType.LIMIT)
    assert body["status"] == body["output"][-1]["status"] == "incomplete"
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}
    assert events[-1]["type"] == "response.incomplete"
    assert 0 < body["usage"]["output_tokens_details"]["reasoning_tokens"] <= 2


@given(PIECES, st.sampled_from([StopType.EOS, StopType.LIMIT]))
@PROPERTY
def test_a_stream_adds_up_to_the_whole_answer(pieces: list[str], stop: StopType) -> None:
    events, body = answer(pieces, stop)
    _, whole = answer(["".join(pieces)], stop)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1]["response"] == body
    assert replay(events) == body["output"]
    assert all(item["status"] != "in_progress" for item in body["output"])

    def plain(items: list[Body]) -> list[Any]:
        return [(item["type"], item.get("content") or (item["name"], item["arguments"])) for item in items]

    assert plain(body["output"]) == plain(whole["output"])


def test_a_failure_ends_the_items_and_the_response() -> None:
    writer = ResponseWriter(make_turn(), read(input="x"))
    begun = write(writer, events_of(["Par", "is"])[:-1])
    blocks = SseParser().feed(writer.fail(EngineFailure("it broke")))
    events = [json.loads(block.data) for block in blocks]
    assert [block.event for block in blocks] == [event["type"] for event in events]
    assert [event["sequence_number"] for event in begun + events] == list(range(len(begun) + len(events)))
    failed = events[-1]["response"]
    assert (events[-1]["type"], failed["status"]) == ("response.failed", "failed")
    assert failed["error"] == {"code": "server_error", "message": "it broke"}
    assert failed["output"][0]["content"][0]["text"] == "Paris"
