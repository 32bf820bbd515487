"""Anthropic's messages: requests become chat requests, answers become blocks and events."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import SseParser
from tests.support.turns import ANSWER, JSON, PIECES, events_of, make_turn, write
from wingman.api.anthropic import MessageWriter
from wingman.api.anthropic_input import CHAT_WORDS, to_chat
from wingman.api.dialects import Body, respelled
from wingman.api.dialects_schema import MessageRequest
from wingman.api.schema import ChatRequest, parse_json
from wingman.chat.conversation import read_messages
from wingman.chat.tools import read_tools
from wingman.engine.types import StopType
from wingman.errors import EngineFailure, InvalidRequest

PROPERTY = settings(deadline=None, database=None, derandomize=True, max_examples=150)
USE = {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}
RESULT = {"type": "tool_result", "tool_use_id": "t", "content": "4"}
HI = {"role": "user", "content": "hi"}


def chat(**body: Any) -> ChatRequest:
    return to_chat(parse_json(json.dumps({"messages": [HI]} | body).encode(), MessageRequest))


def texts(*content: str) -> list[Any]:
    return [{"type": "text", "text": text} for text in content]


# -- requests ---------------------------------------------------------------------------------------


def test_a_conversation_with_a_tool() -> None:
    system = [
        {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "b"},
    ]
    messages = [
        HI,
        {"role": "user", "content": texts("there")},
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "hm", "signature": ""}, *texts("ok"), USE],
        },
        {"role": "user", "content": [*texts("and?"), {**RESULT, "is_error": True}]},
        {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}, *texts("So")]},
    ]
    calls = [{"id": "t", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
    assert chat(system=system, messages=messages).messages == [
        {"role": "system", "content": texts("a", "b")},
        {"role": "user", "content": texts("hi", "there")},
        {"role": "assistant", "content": texts("ok"), "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "t", "content": texts("Error:", "4")},
        {"role": "user", "content": texts("and?")},
        {"role": "assistant", "content": texts("So")},
    ]


def test_fields() -> None:
    schema = {"type": "object"}
    fields = chat(
        max_tokens=9, stop_sequences=["a"], top_k=3, temperature=0, stream=True, metadata={"user_id": "u"},
        tools=[{"name": "f", "input_schema": schema, "cache_control": None}], n=2, n_predict=1,
        tool_choice={"type": "tool", "name": "f", "disable_parallel_tool_use": True},
        thinking={"type": "disabled"}, output_config={"format": {"type": "json_schema", "schema": schema}},
    )  # fmt: skip
    assert (fields.max_tokens, fields.n_predict, fields.n) == (9, None, None)
    assert (fields.stop, fields.top_k, fields.temperature, fields.stream) == (["a"], 3, 0, True)
    assert fields.tools == [
        {"type": "function", "function": {"name": "f", "description": None, "parameters": schema}}
    ]
    assert fields.tool_choice == {"type": "function", "function": {"name": "f"}}
    assert fields.parallel_tool_calls is False
    assert fields.chat_template_kwargs == {"enable_thinking": False}
    assert fields.response_format == {"type": "json_schema", "json_schema": {"schema": schema}}


@pytest.mark.parametrize(("choice", "read"), [("auto", "auto"), ("any", "required"), ("none", "none")])
def test_choices(choice: str, read: str) -> None:
    assert chat(tool_choice={"type": choice}).tool_choice == read


@pytest.mark.parametrize(
    ("thinking", "read"), [("enabled", {"enable_thinking": True}), ("adaptive", None), (None, None)]
)
def test_thinking(thinking: str | None, read: Any) -> None:
    fields = chat(thinking=thinking and {"type": thinking, "budget_tokens": 1024})
    assert fields.chat_template_kwargs == read


def test_the_hash_of_a_request_does_not_spoil_the_cache() -> None:
    one, other = (
        chat(
            system=[{"type": "text", "text": f"x-anthropic-billing-header: v=1; cch={value};You are"}]
        ).messages
        for value in ("a5145", "00fff")
    )
    assert one == other
    assert chat(system="about cch=a5145;").messages == [
        {"role": "system", "content": texts("about cch=a5145;")},
        {"role": "user", "content": texts("hi")},
    ]


def blocks(role: str, *content: Any) -> dict[str, Any]:
    return {"messages": [HI, {"role": role, "content": list(content)}]}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"messages": None}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        (blocks("user", {"type": "image", "source": {}}), "messages[1].content[0].type"),
        (blocks("user", {"type": "text"}), "messages[1].content[0].text"),
        (blocks("user", {"type": "text", "text": 1}), "messages[1].content[0].text"),
        (blocks("user", *texts("x"), {"type": "tool_result"}), "messages[1].content[1].tool_use_id"),
        (
            blocks("user", {**RESULT, "content": [{"type": "image"}]}),
            "messages[1].content[0].content[0].type",
        ),
        (blocks("user", USE), "messages[1].content[0].type"),
        (blocks("assistant", RESULT), "messages[1].content[0].type"),
        (blocks("assistant", {**USE, "input": []}), "messages[1].content[0].input"),
        (blocks("assistant", {**USE, "name": ""}), "messages[1].content[0].name"),
        (blocks("assistant", USE), "messages"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"stop_sequences": [1]}, "stop_sequences[0]"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
    ],
)
def test_refusals_name_the_field(body: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        chat(**body)
    assert error.value.field == field


def test_refusals_of_the_chat_are_respelled() -> None:
    with pytest.raises(InvalidRequest) as error, respelled(CHAT_WORDS):
        read_tools(chat(tools=[{"name": "a b", "input_schema": {}}]).tools)
    assert error.value.field == "tools[0].name"
    assert error.value.message.startswith("tools[0].name must be")


@given(st.dictionaries(st.sampled_from(MessageRequest.__struct_fields__), JSON, max_size=3), JSON)
@PROPERTY
def test_any_json_is_read_or_refused(body: dict[str, Any], content: Any) -> None:
    try:
        fields = chat(**({"messages": [{"role": "assistant", "content": content}, HI]} | body))
    except InvalidRequest:
        return
    assert len(read_messages(fields.messages or (), knows_developer=False)) == len(fields.messages or ())


# -- answers ----------------------------------------------------------------------------------------


def answer(
    pieces: list[str], stop: StopType = StopType.EOS, word: str = "", stops: list[str] | None = None
) -> tuple[list[Body], Body]:
    writer = MessageWriter(make_turn(stop=stops))
    return write(writer, events_of(pieces, stop, word)), writer.body()


def replay(events: list[Body]) -> Body:
    """The message as a client builds it from the stream."""
    message: Body = {}
    written = ""
    for event in events:
        match event["type"]:
            case "message_start":
                message = event["message"]
            case "content_block_start":
                assert event["index"] == len(message["content"])
                message["content"].append(event["content_block"])
                written = ""
            case "content_block_delta":
                delta = dict(event["delta"])
                kind = delta.pop("type")
                [(field, text)] = delta.items()
                block = message["content"][event["index"]]
                if kind == "input_json_delta":
                    written += text
                else:
                    block[field] += text
            case "content_block_stop" if written and written.endswith("}"):
                message["content"][event["index"]]["input"] = json.loads(written)
            case "message_delta":
                message |= event["delta"] | {"usage": event["usage"]}
    return message


def test_a_whole_answer() -> None:
    _, body = answer([ANSWER])
    thought, text, *calls = body["content"]
    assert thought == {"type": "thinking", "thinking": "Well now.", "signature": ""}
    assert text == {"type": "text", "text": "Let me look.\n"}
    assert [(call["name"], call["input"]) for call in calls] == [("weather", {"city": "Rome"})] * 2
    assert calls[0]["id"] != calls[1]["id"]
    assert (body["stop_reason"], body["stop_sequence"]) == ("tool_use", None)
    assert body["usage"] == {
        "input_tokens": 3, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 2, "output_tokens": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("stop", "word", "reason"),
    [
        (StopType.EOS, "", ("end_turn", None)),
        (StopType.LIMIT, "", ("max_tokens", None)),
        (StopType.WORD, "a", ("stop_sequence", "a")),
        (StopType.WORD, "a stop word of the server", ("end_turn", None)),
    ],
)
def test_stop_reasons(stop: StopType, word: str, reason: tuple[str, str | None]) -> None:
    events, body = answer(["P"], stop, word, ["a"])
    assert (body["stop_reason"], body["stop_sequence"]) == reason
    assert events[-2]["delta"] == {"stop_reason": reason[0], "stop_sequence": reason[1]}


def test_a_call_cut_short_has_no_input() -> None:
    _, body = answer(['<tool_call>\n{"name": "weather", "arguments": {"city": "Ro'], StopType.LIMIT)
    assert body["content"][0]["input"] == {}
    assert body["stop_reason"] == "max_tokens"


@given(PIECES, st.sampled_from([StopType.EOS, StopType.LIMIT]))
@PROPERTY
def test_a_stream_adds_up_to_the_whole_answer(pieces: list[str], stop: StopType) -> None:
    events, body = answer(pieces, stop)
    _, whole = answer(["".join(pieces)], stop)
    assert events[0]["type"] == "message_start"
    assert events[-1] == {"type": "message_stop"}
    assert replay(events) == body
    plain = [{**block, "id": ""} for block in body["content"]]
    assert plain == [{**block, "id": ""} for block in whole["content"]]
    assert body["stop_reason"] == whole["stop_reason"]


def test_a_failure_is_an_error_event() -> None:
    [event] = SseParser().feed(MessageWriter(make_turn()).fail(EngineFailure("it broke")))
    assert event.event == "error"
    assert json.loads(event.data) == {
        "type": "error", "error": {"type": "api_error", "message": "it broke", "code": 500},
    }  # fmt: skip
