"""Messages of any form are read or refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from wingman.chat.conversation import read_messages, split_prefill
from wingman.errors import InvalidRequest

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def read(*raw: Any, typed_content: bool = False) -> tuple[dict[str, Any], ...]:
    return read_messages(raw, knows_developer=False, typed_content=typed_content)


@pytest.mark.parametrize("kind", [[], {}, None, 5, "smell"])
def test_a_part_of_unknown_type_is_refused(kind: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read({"role": "user", "content": [{"type": kind, "text": "a"}]})
    assert caught.value.field == "messages[0].content[0].type"


def test_text_parts_are_joined_by_lines_unless_wanted_apart() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b", "x": 1}]
    message = {"role": "user", "content": parts}
    assert read(message)[0]["content"] == "a\nb"
    kept = read(message, typed_content=True)[0]["content"]
    assert kept == [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read({"role": "user", "content": "a"}, typed_content=True)[0]["content"] == "a"


def test_calls_are_normalised() -> None:
    as_object = {"function": {"name": "f", "arguments": {"é": [1]}, "extra": 1}}
    raw = {"role": "assistant", "content": None, "tool_calls": [CALL, as_object], "name": "", "audio": 1}
    (message,) = read(raw)
    assert message == {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "f", "arguments": "{}"}, "id": "1"},
            {"type": "function", "function": {"name": "f", "arguments": '{"é":[1]}'}},
        ],
    }


def test_the_older_function_calls_are_tool_calls() -> None:
    calling, result = read(
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "ok"},
    )
    assert calling["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
    assert result == {"role": "tool", "content": "ok", "name": "f"}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"role": 5}, "role"),
        ({"content": 5}, "content"),
        ({"content": None}, "content"),
        ({"content": None, "tool_calls": []}, "content"),
        ({"content": [{"type": "text"}]}, "content[0].text"),
        ({"content": [{"type": "image_url"}]}, "content[0]"),
        ({"content": ["a"]}, "content[0]"),
        ({"reasoning_content": 5}, "reasoning_content"),
        ({"name": {}}, "name"),
        ({"tool_call_id": 1}, "tool_call_id"),
        ({"tool_calls": {}}, "tool_calls"),
        ({"tool_calls": "x"}, "tool_calls"),
        ({"tool_calls": [5]}, "tool_calls[0]"),
        ({"tool_calls": [CALL, CALL | {"type": "custom"}]}, "tool_calls[1].type"),
        ({"tool_calls": [CALL | {"id": 7}]}, "tool_calls[0].id"),
        ({"tool_calls": [{"type": "function"}]}, "tool_calls[0].function"),
        ({"tool_calls": [{"function": {"arguments": "{}"}}]}, "tool_calls[0].function.name"),
        ({"tool_calls": [{"function": {"name": "f"}}]}, "tool_calls[0].function.arguments"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": 5}}]}, "tool_calls[0].function.arguments"),
        ({"function_call": "f"}, "function_call"),
    ],
)
def test_what_is_wrong_is_refused_by_name(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read({"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"} | change)
    assert caught.value.field == f"messages[1].{field}"


def test_a_message_that_is_no_object_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"messages\[0\]"):
        read("hi")


def test_a_trailing_answer_is_split_off() -> None:
    user = {"role": "user", "content": "hi"}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "So,"}], "reasoning_content": "hm"}
    conversation = split_prefill(read(user, answer, typed_content=True))
    assert conversation.prefill == "So,"
    assert conversation.prefill_reasoning == "hm"
    assert [message["role"] for message in conversation.messages] == ["user"]
    assert split_prefill(read(user)).prefill == ""
    for wrong in ((answer, answer), (answer | {"tool_calls": [CALL]},)):
        with pytest.raises(InvalidRequest):
            split_prefill(read(user, *wrong))
