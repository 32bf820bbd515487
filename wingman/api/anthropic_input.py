"""A request to /v1/messages -> a chat request. Pure; refusals name fields as the client spells them.

Messages of one role in a row are one turn. Results of tools come first in a turn, for templates want them
right behind the calls. A trailing message of the assistant is the beginning of the answer.
"""

from __future__ import annotations

import re
from typing import Any, Final

from wingman.api.dialects import History, derive_chat, invalid, require, shown
from wingman.api.dialects_schema import Block, InputMessage, MessageRequest, MessageTool, MessageToolChoice
from wingman.api.schema import ChatRequest

CHAT_WORDS: Final = (
    (r"^messages.*", "messages"),
    (r"\.function\b", ""),
    (r"\.parameters\b", ".input_schema"),
    (r"^response_format$", "output_config.format.schema"),
    (r"^stop$", "stop_sequences"),
)
"""Fields of a chat request in the spelling of this one; its messages are counted in another way."""
_BLOCKS: Final = {
    "text": ("user assistant system", ("text",)),
    "tool_use": ("assistant", ("id", "name", "input")),
    "tool_result": ("user", ("tool_use_id",)),
    "thinking": ("assistant", ("thinking",)),
    "redacted_thinking": ("assistant", ()),
}
"""Whose messages a type of block is for, and the fields it can't do without."""
_CHOICES: Final = {"auto": "auto", "any": "required", "none": "none"}
_THINKING: Final = {"enabled": True, "disabled": False}
_REQUEST_HASH: Final = re.compile(r"(?<=^x-anthropic-billing-header:)[^\n]*\bcch=[^;\n]*")
"""A header that Anthropic's own client puts before its system prompt, up to a value that is new with every
request: with it no prompt would be the beginning of another, and nothing could be reused."""


def to_chat(request: MessageRequest) -> ChatRequest:
    """The chat request that says the same; raises InvalidRequest naming the field at fault."""
    require(request, "", ("messages",))
    output, choice = request.output_config, request.tool_choice
    return derive_chat(
        request,
        request.max_tokens,
        "max_tokens",
        messages=_read_messages(request),
        tools=[_read_tool(tool, f"tools[{index}]") for index, tool in enumerate(request.tools or ())],
        tool_choice=_read_choice(choice),
        parallel_tool_calls=False if choice and choice.disable_parallel_tool_use else None,
        stop=request.stop_sequences,
        response_format=_read_format(output.format.schema if output and output.format else None),
        reasoning_effort=output.effort if output else None,
        chat_template_kwargs=_read_thinking(request),
    )


def _read_messages(request: MessageRequest) -> list[dict[str, Any]]:
    history = History()
    if request.system:
        history.add("system", [_REQUEST_HASH.sub("", text) for text in _texts(request.system, "system")])
    for index, message in enumerate(request.messages or ()):
        _read_message(message, f"messages[{index}]", history)
    return history.messages("messages")


def _read_message(message: InputMessage, where: str, history: History) -> None:
    require(message, where, ("role", "content"))
    role = message.role or ""
    if isinstance(message.content, str):
        return history.say(role, [message.content])
    blocks = [(f"{where}.content[{index}]", block) for index, block in enumerate(message.content or ())]
    for place, block in sorted(blocks, key=lambda pair: pair[1].type != "tool_result"):
        _check_block(block, place, role)
        _read_block(block, place, role, history)
    return None


def _check_block(block: Block, where: str, role: str) -> None:
    if block.type not in _BLOCKS:
        raise invalid(f"{where}.type", f"this model takes no {shown(block.type)} blocks")
    roles, needs = _BLOCKS[block.type]
    if role not in roles.split():
        raise invalid(f"{where}.type", f"{block.type} blocks can't be in a message of role {role}")
    require(block, where, needs)


def _read_block(block: Block, where: str, role: str, history: History) -> None:
    match block.type:
        case "text":
            history.say(role, [block.text or ""])
        case "thinking":
            history.think([block.thinking or ""])
        case "tool_use":
            if not block.name:
                raise invalid(f"{where}.name", "must not be empty")
            history.call(block.id or "", block.name, block.input or {})
        case "tool_result":
            error = ["Error:"] if block.is_error else []
            history.result(block.tool_use_id or "", error + _texts(block.content, f"{where}.content"))


def _texts(content: str | list[Block] | None, where: str) -> list[str]:
    """The texts of a system prompt or of a tool's result."""
    if content is None or isinstance(content, str):
        return [content] if content else []
    for index, block in enumerate(content):
        if block.type != "text":
            raise invalid(f"{where}[{index}].type", f"this model takes no {shown(block.type)} blocks here")
        require(block, f"{where}[{index}]", ("text",))
    return [block.text or "" for block in content]


def _read_tool(tool: MessageTool, where: str) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise invalid(
            f"{where}.type", f"there is no {shown(tool.type or '')} here; only custom tools can be called"
        )
    require(tool, where, ("name", "input_schema"))
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": function}


def _read_choice(choice: MessageToolChoice | None) -> Any:
    if choice is None:
        return None
    if choice.type != "tool":
        return _CHOICES[choice.type]
    require(choice, "tool_choice", ("name",))
    return {"type": "function", "function": {"name": choice.name}}


def _read_format(schema: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if schema is None else {"type": "json_schema", "json_schema": {"schema": schema}}


def _read_thinking(request: MessageRequest) -> dict[str, Any] | None:
    """Variables for the template; whoever says nothing about thinking gets what it does by itself."""
    if request.thinking is None or request.thinking.type not in _THINKING:
        return request.chat_template_kwargs
    return {"enable_thinking": _THINKING[request.thinking.type]} | (request.chat_template_kwargs or {})
