"""Tools and choices of any form are read or refused by name; templates without tools get them as text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wingman.chat.conversation import read_messages
from wingman.chat.formats import HERMES
from wingman.chat.output import OutputParser, ParsedCall, collect
from wingman.chat.tools import Tool, ToolChoice, ToolMode, polyfill, read_choice, read_tools
from wingman.errors import InvalidRequest

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Look.", "parameters": SCHEMA}}
TIME = {"type": "function", "function": {"name": "time", "strict": True}}
TOOLS = read_tools([WEATHER, TIME])


def named(name: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def test_tools() -> None:
    no_parameters = {"type": "object", "properties": {}}
    assert (Tool("weather", "Look.", SCHEMA), Tool("time", "", no_parameters)) == TOOLS
    assert TOOLS[0].as_json() == WEATHER
    assert read_tools(None) == read_tools([]) == read_tools(None, []) == ()
    assert read_tools(None, [WEATHER["function"]]) == TOOLS[:1]


REFUSED_TOOLS: list[tuple[Any, str]] = [
    ({}, "tools"),
    ("x", "tools"),
    ([5], "tools[0]"),
    ([{"type": "web_search"}], "tools[0].type"),
    ([{"type": []}], "tools[0].type"),
    ([WEATHER, {"type": "function"}], "tools[1].function"),
    ([named(None)], "tools[0].function.name"),
    ([named("a b")], "tools[0].function.name"),
    ([named("a" * 129)], "tools[0].function.name"),
    ([named("a\n")], "tools[0].function.name"),
    ([{"function": {"name": "a", "description": 5}}], "tools[0].function.description"),
    ([{"function": {"name": "a", "parameters": "x"}}], "tools[0].function.parameters"),
    ([TIME, TIME], "tools"),
    ([named(f"f{i}") for i in range(129)], "tools"),
    ([{"function": {"name": "a", "description": "x" * 600_000}}], "tools"),
    ([{"function": {"name": "a", "parameters": json.loads('{"a":' * 400 + "1" + "}" * 400)}}], "tools"),
]


@pytest.mark.parametrize(("tools", "field"), REFUSED_TOOLS, ids=range(len(REFUSED_TOOLS)))
def test_refused_tools(tools: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_tools(tools)
    assert caught.value.field == field


def test_refused_functions_are_named_so() -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_tools(None, [{"name": ""}])
    assert caught.value.field == "functions[0].name"


ONLY_TIME = {"mode": "required", "tools": [named("time")]}
CHOICES: list[tuple[Any, Any, ToolMode, str]] = [
    (None, None, ToolMode.AUTO, "weather time"),
    ("auto", "none", ToolMode.AUTO, "weather time"),
    ("none", None, ToolMode.NONE, ""),
    ("required", None, ToolMode.REQUIRED, "weather time"),
    (named("time"), None, ToolMode.REQUIRED, "time"),
    ({"type": "function", "name": "time"}, None, ToolMode.REQUIRED, "time"),
    ({"type": "allowed_tools", "allowed_tools": ONLY_TIME}, None, ToolMode.REQUIRED, "time"),
    ({"type": "allowed_tools", "mode": "auto", "tools": [named("time")]}, None, ToolMode.AUTO, "time"),
    ({"type": "custom"}, None, ToolMode.AUTO, "weather time"),
    (5, None, ToolMode.AUTO, "weather time"),
    (None, "none", ToolMode.NONE, ""),
    (None, {"name": "weather"}, ToolMode.REQUIRED, "weather"),
]  # fmt: skip


@pytest.mark.parametrize(("choice", "call", "mode", "names"), CHOICES)
def test_choices(choice: Any, call: Any, mode: ToolMode, names: str) -> None:
    tools = tuple(tool for tool in TOOLS if tool.name in names.split())
    assert read_choice(choice, call, TOOLS) == ToolChoice(mode, tools)


def test_without_tools_the_choice_is_none() -> None:
    assert read_choice(None, None, ()) == read_choice("auto", None, ()) == ToolChoice()


@pytest.mark.parametrize(
    ("choice", "tools"),
    [
        ("any", TOOLS),
        ("", TOOLS),
        ("required", ()),
        (named("time"), ()),
        (named("wether"), TOOLS),
        (named(None), TOOLS),
        ({"type": "function"}, TOOLS),
        ({"type": "allowed_tools"}, TOOLS),
        ({"type": "allowed_tools", "tools": ["time"]}, TOOLS),
        ({"type": "allowed_tools", "tools": [named("x")]}, TOOLS),
    ],
)
def test_refused_choices(choice: Any, tools: tuple[Tool, ...]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_choice(choice, None, tools)
    assert caught.value.field == "tool_choice"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from(["function", "time", "auto", "allowed_tools"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from("type name function parameters tools mode tool_calls arguments".split()), inner),
    max_leaves=12,
)  # fmt: skip


@given(JSON, JSON, JSON)
def test_any_json_is_read_or_refused(tools: Any, choice: Any, calls: Any) -> None:
    for step in (
        lambda: read_choice(choice, calls, read_tools(tools)),
        lambda: read_choice(choice, calls, TOOLS),
        lambda: polyfill(
            read_messages([{"role": "assistant", "content": "", "tool_calls": calls}], knows_developer=False),
            ToolChoice(),
        ),
    ):
        try:
            step()
        except InvalidRequest as refusal:
            assert refusal.field  # noqa: PT017 - not raising is fine too


CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "sunny"},
]


def test_polyfill_tells_everything_as_text() -> None:
    first, user, assistant, result = polyfill(HISTORY, ToolChoice(ToolMode.AUTO, TOOLS))
    assert first["role"] == "system"
    assert '{"name": "weather", "arguments": {"city": "..."}}' in first["content"]
    assert json.dumps(WEATHER["function"]) in first["content"]
    assert user == HISTORY[0]
    assert assistant == {
        "role": "assistant",
        "content": '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>',
    }
    assert result == {"role": "user", "content": "<tool_response>\nsunny\n</tool_response>"}


def test_polyfill_joins_a_system_message() -> None:
    messages = [{"role": "system", "content": "Be brief."}, *HISTORY]
    told = polyfill(messages, ToolChoice(ToolMode.REQUIRED, TOOLS[1:]))
    assert len(told) == len(messages)
    assert told[0]["content"].startswith("Be brief.\n\n")
    assert "weather" not in told[0]["content"]
    assert polyfill(messages, ToolChoice())[0] == messages[0]


def test_what_polyfill_writes_is_read_back() -> None:
    (message,) = polyfill(HISTORY[1:2], ToolChoice())
    parser = OutputParser(HERMES, tools=TOOLS)
    read = collect(parser.push(message["content"]) + parser.finish())
    assert read.tool_calls == (ParsedCall("weather", '{"city": "Rome"}'),)
