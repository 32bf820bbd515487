"""Chat messages as clients send them -> messages as templates take them.

Pure. Refusals name the message, because a broken history comes back with every request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct

from wingman.chat.template import Rendering, Template, text_of
from wingman.errors import InvalidRequest

_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
_MEDIA_PARTS = frozenset({"image_url", "input_image", "input_audio", "input_video", "video_url", "file"})
_OPTIONAL_TEXTS = ("reasoning_content", "name", "tool_call_id")


class Conversation(Struct, frozen=True):
    """Messages ready for a template, and the beginning of an answer to be continued, "" when none."""

    messages: tuple[dict[str, Any], ...]
    prefill: str = ""
    prefill_reasoning: str = ""


def read_messages(
    raw: Sequence[Any], *, knows_developer: bool, typed_content: bool = False
) -> tuple[dict[str, Any], ...]:
    """Check and normalise `messages`: role, content and, where given, reasoning_content, name, tool_call_id
    and tool_calls with their arguments as JSON text. Content is a text, or stays an array of text parts
    when `typed_content`. Raises InvalidRequest naming the part at fault."""
    return tuple(
        _read_message(message, f"messages[{index}]", knows_developer, typed_content)
        for index, message in enumerate(raw)
    )


def _read_message(raw: Any, where: str, knows_developer: bool, typed_content: bool) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        raise InvalidRequest(f"{where} must be an object", "messages")
    content = raw.get("content")
    calls = _read_calls(raw, where)
    if content is None and not calls:
        raise InvalidRequest(f"{where}.content is required", f"{where}.content")
    parts = _read_content(content, f"{where}.content")
    message = {
        "role": _read_role(raw, where, knows_developer),
        "content": parts if typed_content else text_of(parts),
    }
    message |= {key: text for key in _OPTIONAL_TEXTS if (text := _read_text(raw, where, key))}
    return message | {"tool_calls": calls} if calls else message


def _read_role(raw: Mapping[str, Any], where: str, knows_developer: bool) -> str:
    role = raw.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequest(f"{where}.role must be a string", f"{where}.role")
    if role == "developer" and not knows_developer:
        return "system"
    return "tool" if role == "function" else role


def _read_text(raw: Mapping[str, Any], where: str, key: str) -> str:
    """The text under `key`, "" when it is absent or null."""
    text = raw.get(key)
    if text is not None and not isinstance(text, str):
        raise InvalidRequest(f"{where}.{key} must be a string", f"{where}.{key}")
    return text or ""


# -- content --------------------------------------------------------------------------------------


def _read_content(content: Any, where: str) -> str | list[dict[str, str]]:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        raise InvalidRequest(f"{where} must be a string or an array of parts", where)
    return [_read_part(part, f"{where}[{index}]") for index, part in enumerate(content)]


def _read_part(part: Any, where: str) -> dict[str, str]:
    if not isinstance(part, Mapping):
        raise InvalidRequest(f"{where} must be an object", where)
    kind = part.get("type")
    if not isinstance(kind, str):
        raise InvalidRequest(f"{where}.type must be a string", f"{where}.type")
    if kind in _TEXT_PARTS:
        text = part.get("text")
        if not isinstance(text, str):
            raise InvalidRequest(f"{where}.text must be a string", f"{where}.text")
        return {"type": "text", "text": text}
    if kind in _MEDIA_PARTS:
        raise InvalidRequest(f"{where}: this model takes no {kind} input", where)
    raise InvalidRequest(f"{where}.type is unknown", f"{where}.type")


# -- calls ----------------------------------------------------------------------------------------


def _read_calls(raw: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """`tool_calls`, or the older `function_call` as the only one; [] when there are none."""
    legacy = raw.get("function_call")
    calls = raw.get("tool_calls")
    if calls is None and legacy is not None and raw.get("role") == "assistant":
        return [{"type": "function", "function": _read_function(legacy, f"{where}.function_call")}]
    if calls is None:
        return []
    if not isinstance(calls, list | tuple):
        raise InvalidRequest(f"{where}.tool_calls must be an array", f"{where}.tool_calls")
    return [_read_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)]


def _read_call(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise InvalidRequest(f"{where} must be an object", where)
    if call.get("type", "function") != "function":
        raise InvalidRequest(f"{where}.type must be function", f"{where}.type")
    function = _read_function(call.get("function"), f"{where}.function")
    identity = _read_text(call, where, "id")
    return {"type": "function", "function": function} | ({"id": identity} if identity else {})


def _read_function(function: Any, where: str) -> dict[str, str]:
    if not isinstance(function, Mapping):
        raise InvalidRequest(f"{where} must be an object", where)
    name = _read_text(function, where, "name")
    if not name:
        raise InvalidRequest(f"{where}.name is required", f"{where}.name")
    arguments = function.get("arguments")
    if isinstance(arguments, Mapping):
        arguments = _dump(arguments, f"{where}.arguments")
    if not isinstance(arguments, str):
        raise InvalidRequest(f"{where}.arguments must be a string or an object", f"{where}.arguments")
    return {"name": name, "arguments": arguments}


def _dump(arguments: Mapping[str, Any], where: str) -> str:
    try:
        return json.dumps(arguments, ensure_ascii=False, separators=(",", ":"))
    except (ValueError, RecursionError):
        raise InvalidRequest(f"{where} can't be written as JSON", where) from None


# -- prompts --------------------------------------------------------------------------------------


def split_prefill(messages: tuple[dict[str, Any], ...]) -> Conversation:
    """Take a trailing assistant message off, to be continued instead of answered.

    Raises InvalidRequest for two of them in a row or one with tool calls.
    """
    if not messages or messages[-1]["role"] != "assistant":
        return Conversation(messages)
    last = messages[-1]
    if len(messages) > 1 and messages[-2]["role"] == "assistant":
        raise InvalidRequest("messages can't end with two assistant messages", "messages")
    if last.get("tool_calls"):
        raise InvalidRequest("an assistant message with tool calls can't be continued", "messages")
    return Conversation(messages[:-1], text_of(last["content"]), last.get("reasoning_content", ""))


def render_prompt(
    template: Template, conversation: Conversation, rendering: Rendering, *, adds_bos: bool
) -> str:
    """The prompt text; a BOS that the tokenizer adds anyway is not repeated."""
    messages, content, reasoning = conversation.messages, conversation.prefill, conversation.prefill_reasoning
    if content or reasoning:
        text = template.resume(messages, rendering, reasoning, content)
    else:
        text = template.render(messages, rendering)
    return text.removeprefix(rendering.bos_token) if adds_bos else text
