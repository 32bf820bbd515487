"""Tool calls and thoughts on the real model: by the prompt we make, and by templates that know them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.events import chat_text, read_events
from tests.support.server import ServerProcess

PATH = "/v1/chat/completions"


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {
        "type": "function",
        "function": {"name": name, "description": f"Does {name}.", "parameters": parameters},
    }


WEATHER = tool("get_weather", city={"type": "string", "maxLength": 20}, unit={"enum": ["C", "F"]})
TIME = tool("get_time", zone={"enum": ["UTC", "CET"]})
MESSAGES = [{"role": "user", "content": "What is the weather in Paris?"}]

HERMES_TEMPLATE = """{%- if tools %}<|im_start|>system
You may call functions: <tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools>
Write each call as <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>
{%- if message.role == "tool" %}user
<tool_response>{{ message.content }}</tool_response>
{%- else %}{{ message.role }}
{{ message.content or "" }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}
{%- endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

THINKING_TEMPLATE = """{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content.split("</think>")[-1] }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is not defined or enable_thinking %}<think>
{% endif %}{% endif %}"""


def template_server(model: Path, folder: Path, template: str) -> ServerProcess:
    path = folder / "template.jinja"
    path.write_text(template)
    return ServerProcess(["--model", str(model), "--chat-template-file", str(path), "-np", "2", "-c", "2048"])


@pytest.fixture(scope="module")
def hermes(starter_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with template_server(starter_model, tmp_path_factory.mktemp("hermes"), HERMES_TEMPLATE) as process:
        yield process


@pytest.fixture(scope="module")
def thinker(starter_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with template_server(starter_model, tmp_path_factory.mktemp("thinker"), THINKING_TEMPLATE) as process:
        yield process


@pytest.fixture(scope="module", params=["polyfill", "hermes"])
def speaker(request: pytest.FixtureRequest, server: ServerProcess) -> ServerProcess:
    """A server whose prompt about tools is ours, and one whose template makes it."""
    if request.param == "polyfill":
        return server
    return request.getfixturevalue("hermes")  # type: ignore[no-any-return]


def body(**fields: Any) -> dict[str, Any]:
    return {"messages": MESSAGES, "tools": [WEATHER, TIME], "temperature": 0, "max_tokens": 120} | fields


def ask(server: ServerProcess, **fields: Any) -> dict[str, Any]:
    """The only choice of an answer."""
    response = server.post(PATH, body(**fields))
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return dict(choice)


def calls_of(choice: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Names and arguments of the calls, whose form is checked."""
    message = choice["message"]
    assert message["role"] == "assistant"
    calls = message.get("tool_calls", [])
    assert all(call["type"] == "function" and len(call["id"]) >= 8 for call in calls)
    assert len({call["id"] for call in calls}) == len(calls)
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


def check_weather(arguments: dict[str, Any]) -> None:
    assert set(arguments) == {"city", "unit"}
    assert len(arguments["city"]) <= 20
    assert arguments["unit"] in ("C", "F")


def test_required(speaker: ServerProcess) -> None:
    choice = ask(speaker, tool_choice="required", tools=[WEATHER], parallel_tool_calls=False)
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == ""
    ((name, arguments),) = calls_of(choice)
    assert name == "get_weather"
    check_weather(arguments)


def test_a_named_tool(speaker: ServerProcess) -> None:
    named = {"type": "function", "function": {"name": "get_time"}}
    choice = ask(speaker, tool_choice=named, parallel_tool_calls=False)
    ((name, arguments),) = calls_of(choice)
    assert (name, set(arguments)) == ("get_time", {"zone"})


def test_none_gives_plain_text_and_no_prompt_about_tools(speaker: ServerProcess) -> None:
    choice = ask(speaker, tool_choice="none", max_tokens=24)
    assert calls_of(choice) == []
    assert choice == ask(speaker, tools=None, max_tokens=24)


def test_auto_calls_only_in_the_form_of_calls(speaker: ServerProcess) -> None:
    choice = ask(speaker, tools=[WEATHER], tool_choice="auto")
    calls = calls_of(choice)
    for _, arguments in calls:
        check_weather(arguments)
    assert (choice["finish_reason"] == "tool_calls") == bool(calls)
    assert "<tool_call>" not in choice["message"]["content"]


def test_auto_may_call(speaker: ServerProcess) -> None:
    """A history of calls leads the model to make another; the format's trigger constrains it then."""
    history: list[dict[str, Any]] = []
    for city in ("Paris", "Oslo", "Rome"):
        called = {"name": "get_weather", "arguments": json.dumps({"city": city, "unit": "C"})}
        call = {"id": "c", "type": "function", "function": called}
        history += [
            {"role": "user", "content": f"What is the weather in {city}?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ]
    fields: dict[str, Any] = {
        "messages": [*history, {"role": "user", "content": "What is the weather in Madrid?"}],
        "tools": [WEATHER],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
    }
    choice = ask(speaker, **fields)
    assert choice["finish_reason"] == "tool_calls", choice["message"]["content"]
    ((name, arguments),) = calls_of(choice)
    assert name == "get_weather"
    check_weather(arguments)
    events = read_events(speaker, PATH, body(**fields))
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("seed", range(3))
def test_calls_are_well_formed_at_any_temperature(speaker: ServerProcess, seed: int) -> None:
    wild = {"temperature": 2, "top_k": 0, "top_p": 1, "min_p": 0, "seed": seed}
    choice = ask(speaker, tool_choice="required", parallel_tool_calls=False, **wild)
    ((name, arguments),) = calls_of(choice)
    if name == "get_weather":
        check_weather(arguments)
    else:
        assert (name, set(arguments)) == ("get_time", {"zone"})


def test_streamed_calls(speaker: ServerProcess) -> None:
    fields = body(tool_choice="required", parallel_tool_calls=False)
    whole = ask(speaker, **fields)
    events = read_events(speaker, PATH, fields)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": None}
    deltas = [event["choices"][0]["delta"] for event in events[1:-1]]
    parts = [part for delta in deltas for part in delta.get("tool_calls", [])]
    first, *rest = parts
    assert (first["index"], first["type"]) == (0, "function")
    assert first["id"]
    assert first["function"]["arguments"] == ""
    assert all(set(part) == {"index", "function"} for part in rest)
    assert all(set(part["function"]) == {"arguments"} for part in rest)
    (called,) = whole["message"]["tool_calls"]
    assert first["function"]["name"] == called["function"]["name"]
    assert "".join(part["function"]["arguments"] for part in parts) == called["function"]["arguments"]
    assert len(rest) > 3
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert events[-1]["choices"][0]["delta"] == {}


def test_parallel_calls_are_numbered(speaker: ServerProcess) -> None:
    fields = body(tool_choice="required", parallel_tool_calls=True, tools=[TIME])
    whole = ask(speaker, **fields)
    names = [name for name, _ in calls_of(whole)] if whole["finish_reason"] == "tool_calls" else []
    events = read_events(speaker, PATH, fields)
    parts = [part for event in events for part in event["choices"][0]["delta"].get("tool_calls", [])]
    indexes = [part["index"] for part in parts]
    assert indexes == sorted(indexes)
    started = [part for part in parts if "id" in part]
    assert [part["index"] for part in started] == list(range(len(started)))
    if names:
        assert [part["function"]["name"] for part in started] == names


def test_a_cut_off_call_ends_with_length(speaker: ServerProcess) -> None:
    fields = body(tool_choice="required", max_tokens=14, tools=[WEATHER])
    choice = ask(speaker, **fields)
    assert choice["finish_reason"] == "length"
    events = read_events(speaker, PATH, fields)
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    parts = [part for event in events for part in event["choices"][0]["delta"].get("tool_calls", [])]
    written = "".join(part["function"]["arguments"] for part in parts)
    calls = choice["message"].get("tool_calls", [])
    assert "".join(call["function"]["arguments"] for call in calls) == written


def test_results_of_calls_reach_the_model(speaker: ServerProcess) -> None:
    arguments = '{"city": "Paris", "unit": "C"}'
    history = [
        *MESSAGES,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": arguments},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "Sunny, 31 degrees."},
    ]
    prompt = speaker.post("/apply-template", {"messages": history, "tools": [WEATHER]}).json()["prompt"]
    assert "Sunny, 31 degrees." in prompt
    assert '"city": "Paris"' in prompt.replace('":"', '": "')
    assert "get_weather" in prompt.split("What is the weather in Paris?")[1]
    choice = ask(speaker, messages=history, tools=[WEATHER], tool_choice="none", max_tokens=40)
    assert choice["message"]["content"]


def test_legacy_functions(speaker: ServerProcess) -> None:
    functions = [WEATHER["function"], TIME["function"]]
    fields = {"tools": None, "functions": functions, "function_call": {"name": "get_time"}}
    choice = ask(speaker, **fields)
    assert choice["finish_reason"] == "function_call"
    call = choice["message"]["function_call"]
    assert call["name"] == "get_time"
    assert set(json.loads(call["arguments"])) == {"zone"}
    assert "tool_calls" not in choice["message"]
    events = read_events(speaker, PATH, body(**fields))
    deltas = [event["choices"][0]["delta"].get("function_call", {}) for event in events]
    assert [delta["name"] for delta in deltas if "name" in delta] == ["get_time"]
    assert "".join(delta.get("arguments", "") for delta in deltas) == call["arguments"]
    assert events[-1]["choices"][0]["finish_reason"] == "function_call"


def test_schema_beside_tools(speaker: ServerProcess) -> None:
    wanted = {"type": "json_schema", "json_schema": {"schema": {"const": "sunny"}}}
    choice = ask(speaker, response_format=wanted, tools=[TIME], parallel_tool_calls=False)
    if choice["finish_reason"] == "tool_calls":
        assert calls_of(choice)[0][0] == "get_time"
    else:
        assert json.loads(choice["message"]["content"]) == "sunny"


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"grammar": 'root ::= "a"'}, "grammar"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "unknown"}}}, "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"tools": {}, "tool_choice": "required"}, "tool"),
        ({"tools": "all"}, "tools"),
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0]"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0]"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [tool("bad", x={"type": "hiccup"})], "tool_choice": "required"}, "tools"),
        ({"logprobs": True, "stream": True}, "logprobs"),
    ],
)
def test_refusals(speaker: ServerProcess, fields: dict[str, Any], where: str) -> None:
    response = speaker.post(PATH, body(**fields))
    assert response.status_code == 400, response.text
    assert where in response.json()["error"]["message"]


def test_the_package_runs_a_conversation_with_tools(client: openai.OpenAI) -> None:
    asked: list[Any] = list(MESSAGES)
    fields = {"model": "smol", "tools": [WEATHER], "temperature": 0, "max_tokens": 120}
    first = client.chat.completions.create(
        messages=asked, tool_choice="required", parallel_tool_calls=False, **fields
    )
    message = first.choices[0].message
    assert message.tool_calls is not None
    with client.chat.completions.stream(
        messages=asked, tool_choice="required", parallel_tool_calls=False, **fields
    ) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls"
    assert streamed.message.tool_calls[0].function.arguments == message.tool_calls[0].function.arguments
    asked += [
        message,
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Snow, -3 degrees."},
    ]
    last = client.chat.completions.create(messages=asked, **fields)
    assert last.choices[0].message.content or last.choices[0].message.tool_calls


class TestThoughts:
    ASKED = {"messages": MESSAGES, "temperature": 0, "max_tokens": 60}

    @pytest.fixture
    def closing(self, thinker: ServerProcess) -> dict[str, Any]:
        """A request whose answer has thoughts and then content: the model is made to write both."""
        return self.ASKED | {"grammar": 'root ::= "I think." "</think>" "\\n\\n" "Sunny."'}

    def test_auto(self, thinker: ServerProcess, closing: dict[str, Any]) -> None:
        message = thinker.post(PATH, closing).json()["choices"][0]["message"]
        assert message == {"role": "assistant", "content": "Sunny.", "reasoning_content": "I think."}
        events = read_events(thinker, PATH, closing)
        assert chat_text(events) == "Sunny."
        assert chat_text(events, "reasoning_content") == "I think."
        assert all(len(event["choices"][0]["delta"]) == 1 for event in events[1:-1])

    def test_none(self, thinker: ServerProcess, closing: dict[str, Any]) -> None:
        body = closing | {"reasoning_format": "none"}
        message = thinker.post(PATH, body).json()["choices"][0]["message"]
        assert "reasoning_content" not in message
        assert message["content"].endswith("I think.</think>\n\nSunny.")
        assert chat_text(read_events(thinker, PATH, body)) == message["content"]

    def test_unfinished_thoughts(self, thinker: ServerProcess) -> None:
        body = self.ASKED | {"max_tokens": 12}
        choice = thinker.post(PATH, body).json()["choices"][0]
        assert choice["finish_reason"] == "length"
        assert choice["message"]["content"] == ""
        assert choice["message"]["reasoning_content"]
        events = read_events(thinker, PATH, body)
        assert chat_text(events, "reasoning_content") == choice["message"]["reasoning_content"]
        assert chat_text(events) == ""

    def test_thinking_can_be_turned_off(self, thinker: ServerProcess) -> None:
        for fields in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
            message = thinker.post(PATH, self.ASKED | fields).json()["choices"][0]["message"]
            assert message["content"]
            assert "reasoning_content" not in message

    def test_thoughts_of_the_history_are_for_the_template(self, thinker: ServerProcess) -> None:
        history = [*MESSAGES, {"role": "assistant", "content": "secret</think>Sunny."}, *MESSAGES]
        prompt = thinker.post("/apply-template", {"messages": history}).json()["prompt"]
        assert "secret" not in prompt
        assert prompt.endswith("<think>\n")

    def test_unknown_format(self, thinker: ServerProcess) -> None:
        response = thinker.post(PATH, self.ASKED | {"reasoning_format": "loud"})
        assert response.status_code == 400
        assert "reasoning_format" in response.json()["error"]["message"]
