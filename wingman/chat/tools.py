"""Tools as clients offer them, and the choice among them.

Refusals name the field at fault. Templates that know no tools get them by `polyfill`, as text in the
conversation: the form is Hermes', which `formats.HERMES` reads back. Pure; sizes are bounded here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, Final

import orjson
from msgspec import Struct

from wingman.errors import InvalidRequest

MAX_TOOLS: Final = 128
"""As in OpenAI's API."""
MAX_NAME_CHARS: Final = 128
MAX_JSON_BYTES: Final = 512 * 1024
"""JSON of all tools, or of one call's arguments: more than any context holds."""
_NAME: Final = re.compile(rf"[a-zA-Z0-9_.:/-]{{1,{MAX_NAME_CHARS}}}")
_NO_PARAMETERS: Final[dict[str, Any]] = {"type": "object", "properties": {}}

Message = Mapping[str, Any]


class Tool(Struct, frozen=True):
    """A function that the model may call; `parameters` is a JSON schema of its arguments, an object."""

    name: str
    description: str
    parameters: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """The form that templates take."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}

    def is_text(self, parameter: str) -> bool:
        """Whether `parameter` can be nothing but a string."""
        properties = self.parameters.get("properties")
        schema = properties.get(parameter) if isinstance(properties, Mapping) else None
        if not isinstance(schema, Mapping):
            return False
        options = schema.get("enum", ())
        only_strings = isinstance(options, list) and options and all(isinstance(o, str) for o in options)
        return schema.get("type") == "string" or ("type" not in schema and bool(only_strings))


class ToolMode(Enum):
    """Whether the model may or must call a tool."""

    NONE = "none"
    AUTO = "auto"
    REQUIRED = "required"


class ToolChoice(Struct, frozen=True):
    """What the model may do: `tools` are those it may call, none when the mode is NONE."""

    mode: ToolMode = ToolMode.NONE
    tools: tuple[Tool, ...] = ()


def read_tools(tools: Any, functions: Any = None) -> tuple[Tool, ...]:
    """The tools of a request: `tools`, or if there are none the older `functions`.

    Raises InvalidRequest naming the field at fault.
    """
    field, raw = ("functions", functions) if not tools and functions else ("tools", tools)
    if raw is None:
        return ()
    if not isinstance(raw, list):
        raise InvalidRequest(f"'{field}' must be an array", field)
    if len(raw) > MAX_TOOLS:
        raise InvalidRequest(f"'{field}' has more than {MAX_TOOLS} entries", field)
    _check_size(raw, field)
    if field == "tools":
        found = [_read_tool(item, f"tools[{index}]") for index, item in enumerate(raw)]
    else:
        found = [_read_function(item, f"functions[{index}]") for index, item in enumerate(raw)]
    if len({tool.name for tool in found}) < len(found):
        raise InvalidRequest(f"'{field}' has two entries with the same name", field)
    return tuple(found)


def _check_size(raw: Any, field: str) -> None:
    """Refuse what is too large or too deep to be written again."""
    try:
        size = len(orjson.dumps(raw))
    except TypeError:
        raise InvalidRequest(f"'{field}' is nested too deep", field) from None
    if size > MAX_JSON_BYTES:
        raise InvalidRequest(f"'{field}' is larger than {MAX_JSON_BYTES} bytes", field)


def _read_tool(raw: Any, where: str) -> Tool:
    if not isinstance(raw, Mapping):
        raise InvalidRequest(f"{where} must be an object", where)
    if raw.get("type", "function") != "function":
        raise InvalidRequest(f"{where}.type must be 'function'", f"{where}.type")
    return _read_function(raw.get("function"), f"{where}.function")


def _read_function(raw: Any, where: str) -> Tool:
    if not isinstance(raw, Mapping):
        raise InvalidRequest(f"{where} must be an object", where)
    name = raw.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        message = f"{where}.name must be 1 to {MAX_NAME_CHARS} letters, digits or any of _ . : / -"
        raise InvalidRequest(message, f"{where}.name")
    description = raw.get("description") or ""
    if not isinstance(description, str):
        raise InvalidRequest(f"{where}.description must be a string", f"{where}.description")
    parameters = raw.get("parameters") or _NO_PARAMETERS
    if not isinstance(parameters, dict):
        raise InvalidRequest(f"{where}.parameters must be a JSON schema", f"{where}.parameters")
    return Tool(name, description, parameters)


def read_choice(tool_choice: Any, function_call: Any, tools: tuple[Tool, ...]) -> ToolChoice:
    """The choice of a request: `tool_choice`, or if there is none the older `function_call`.

    Without either it is auto. Raises InvalidRequest for an unknown word or tool, and when a call is
    required but no tool is given. Values of unknown form mean auto, as in llama-server.
    """
    field, raw = ("tool_choice", tool_choice)
    if raw is None and function_call is not None:
        field, raw = ("function_call", function_call)
    mode, names = _read_mode(raw, field)
    if mode is ToolMode.REQUIRED and not tools:
        raise InvalidRequest(f"'{field}' requires a call, but there are no tools", field)
    unknown = (names or set()) - {tool.name for tool in tools}
    if unknown:
        raise InvalidRequest(f"'{field}' names a tool that is not among the tools", field)
    chosen = tuple(tool for tool in tools if names is None or tool.name in names)
    if mode is ToolMode.NONE or not chosen:
        return ToolChoice()
    return ToolChoice(mode, chosen)


def _read_mode(raw: Any, field: str) -> tuple[ToolMode, set[str] | None]:
    """The mode, and the names of the tools it is about; None for all."""
    if isinstance(raw, str):
        try:
            return ToolMode(raw), None
        except ValueError:
            raise InvalidRequest(f"'{field}' must be auto, none or required", field) from None
    if not isinstance(raw, Mapping):
        return ToolMode.AUTO, None
    if raw.get("type") == "allowed_tools":
        allowed = raw.get("allowed_tools", raw)
        if not isinstance(allowed, Mapping) or not isinstance(allowed.get("tools"), list):
            raise InvalidRequest(f"'{field}' must list the allowed tools", field)
        mode = ToolMode.REQUIRED if allowed.get("mode") == "required" else ToolMode.AUTO
        return mode, {_read_name(item, field) for item in allowed["tools"]}
    if field == "function_call" or raw.get("type") == "function":
        return ToolMode.REQUIRED, {_read_name(raw, field)}
    return ToolMode.AUTO, None


def _read_name(raw: Any, field: str) -> str:
    """The name in {"function": {"name": ...}} or {"name": ...}."""
    function = raw.get("function", raw) if isinstance(raw, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise InvalidRequest(f"'{field}' must name a function", field)
    return name


_PROMPT: Final = """You can call tools. These are the tools:
{tools}

To call a tool, write its name and arguments as JSON, like this:
<tool_call>
{{"name": "{name}", "arguments": {example}}}
</tool_call>
{rule}"""
_RULES: Final = {
    ToolMode.AUTO: "Call a tool only if it is needed. If not, answer in plain words.",
    ToolMode.REQUIRED: "Answer with a tool call and nothing else.",
}


def polyfill(messages: Sequence[Message], choice: ToolChoice) -> tuple[dict[str, Any], ...]:
    """Messages that say everything about tools in words, for a template that knows none.

    The tools join a first system message, or become one; calls and results in the history become text.
    `messages` are as `read_messages` makes them.
    """
    told = [_tell(message) for message in messages]
    if choice.mode is ToolMode.NONE:
        return tuple(told)
    prompt = _prompt(choice)
    if told and told[0].get("role") == "system":
        first = {**told[0], "content": f"{told[0]['content']}\n\n{prompt}"}
        return (first, *told[1:])
    return ({"role": "system", "content": prompt}, *told)


def _prompt(choice: ToolChoice) -> str:
    tools = "\n".join(json.dumps(tool.as_json()["function"], ensure_ascii=False) for tool in choice.tools)
    first = choice.tools[0]
    example = json.dumps(_example(first.parameters), ensure_ascii=False)
    return _PROMPT.format(tools=tools, name=first.name, example=example, rule=_RULES[choice.mode])


def _example(schema: Mapping[str, Any]) -> dict[str, str]:
    """Arguments with a placeholder for each required property: small models copy the form they see."""
    required = schema.get("required")
    names = [name for name in required if isinstance(name, str)] if isinstance(required, list) else []
    return dict.fromkeys(names, "...")


def _tell(message: Message) -> dict[str, Any]:
    """A message without tool calls or tool roles."""
    told = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
    content = message.get("content") or ""
    if message.get("role") in ("tool", "function"):
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    calls = [_write_call(call["function"]) for call in message.get("tool_calls", ())]
    told["content"] = "\n".join(([content] if content else []) + calls) if calls else content
    return told


def _write_call(function: Mapping[str, Any]) -> str:
    name, arguments = json.dumps(function["name"], ensure_ascii=False), function["arguments"] or "{}"
    return f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>'
