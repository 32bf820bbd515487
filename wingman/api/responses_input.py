"""A request to /v1/responses -> a chat request. Pure; refusals name fields as the client spells them.

Items are OpenAI's: what the assistant thought, said and called in a row becomes one message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
import orjson

from wingman.api.dialects import History, derive_chat, invalid, require, shown
from wingman.api.dialects_schema import InputItem, InputPart, ResponseRequest, ResponseTool, TextFormat
from wingman.api.schema import ChatRequest

CHAT_WORDS: Final = (
    (r"^messages.*", "input"),
    (r"\.function\b", ""),
    (r"^response_format$", "text.format.schema"),
    (r"^logprobs$", "include"),
)
"""Fields of a chat request in the spelling of this one; its messages are counted in another way."""
LOGPROBS: Final = "message.output_text.logprobs"
"""The value of `include` that asks for probabilities."""
_TEXT_PARTS: Final = frozenset({"input_text", "output_text", "text", "reasoning_text", "summary_text"})
_NEEDS_A_STORE: Final = ("previous_response_id", "conversation", "prompt", "background")


def to_chat(request: ResponseRequest) -> ChatRequest:
    """The chat request that says the same; raises InvalidRequest naming the field at fault."""
    for field in _NEEDS_A_STORE:
        if getattr(request, field):
            raise invalid(field, "can't be used, for nothing is stored here; send the whole input")
    require(request, "", ("input",))
    wants_probs = LOGPROBS in (request.include or ())
    return derive_chat(
        request,
        request.max_output_tokens,
        "max_output_tokens",
        messages=_read_input(request),
        tools=_read_tools(request.tools or ()),
        tool_choice=_read_choice(request),
        parallel_tool_calls=request.parallel_tool_calls,
        response_format=_read_format(request.text.format if request.text else None),
        reasoning_effort=request.reasoning.effort if request.reasoning else None,
        chat_template_kwargs=request.chat_template_kwargs,
        logprobs=wants_probs,
        top_logprobs=(request.top_logprobs or 1) if wants_probs else None,
    )


# -- input ------------------------------------------------------------------------------------------


def _read_input(request: ResponseRequest) -> list[dict[str, Any]]:
    history = History()
    if request.instructions:
        history.add("system", [request.instructions])
    if isinstance(request.input, str):
        history.add("user", [request.input])
    else:
        for index, item in enumerate(request.input or ()):
            _read_item(item, f"input[{index}]", history)
    return history.messages("input")


def _read_item(item: InputItem, where: str, history: History) -> None:
    kind = item.type or "message"
    if kind not in _ITEMS:
        raise invalid(f"{where}.type", f"items of type {shown(kind)} are not taken; nothing is stored here")
    read, needs = _ITEMS[kind]
    require(item, where, needs)
    read(item, where, history)


def _read_message(item: InputItem, where: str, history: History) -> None:
    assert item.role is not None
    texts = _texts(item.content, f"{where}.content")
    if item.role == "assistant":
        history.say(item.role, texts)
    else:
        history.add(item.role, texts)


def _read_thoughts(item: InputItem, where: str, history: History) -> None:
    texts = _texts(item.content, f"{where}.content") or _texts(item.summary, f"{where}.summary")
    if texts:
        history.think(texts)


def _read_call(item: InputItem, where: str, history: History) -> None:
    assert item.call_id is not None
    assert item.name is not None
    arguments = item.arguments or "{}"
    try:
        is_object = isinstance(orjson.loads(arguments), dict)
    except ValueError:
        is_object = False
    if not is_object:
        raise invalid(f"{where}.arguments", "must be the text of a JSON object")
    if not item.name:
        raise invalid(f"{where}.name", "must not be empty")
    history.call(item.call_id, item.name, arguments)


def _read_output(item: InputItem, where: str, history: History) -> None:
    assert item.call_id is not None
    history.result(item.call_id, _texts(item.output, f"{where}.output"))


_ITEMS: Final[dict[str, tuple[Callable[[InputItem, str, History], None], Sequence[str]]]] = {
    "message": (_read_message, ("role", "content")),
    "reasoning": (_read_thoughts, ()),
    "function_call": (_read_call, ("call_id", "name", "arguments")),
    "function_call_output": (_read_output, ("call_id", "output")),
}
"""How an item of a type is read, and the fields it can't do without."""


def _texts(content: str | list[InputPart] | None, where: str) -> list[str]:
    if content is None or isinstance(content, str):
        return [content] if content is not None else []
    return [_text(part, f"{where}[{index}]") for index, part in enumerate(content)]


def _text(part: InputPart, where: str) -> str:
    field = "refusal" if part.type == "refusal" else "text"
    if part.type not in _TEXT_PARTS and field == "text":
        raise invalid(f"{where}.type", f"this model takes no {shown(part.type)} parts")
    require(part, where, (field,))
    text: str = getattr(part, field)
    return text


# -- tools and format -------------------------------------------------------------------------------


def _read_tools(tools: Sequence[ResponseTool]) -> list[dict[str, Any]]:
    return [_read_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]


def _read_tool(tool: ResponseTool, where: str) -> dict[str, Any]:
    if tool.type != "function":
        raise invalid(f"{where}.type", f"there is no {shown(tool.type)} here; only functions can be called")
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


def _read_choice(request: ResponseRequest) -> Any:
    choice = request.tool_choice
    if choice is None or isinstance(choice, str):
        return choice
    if choice.type not in ("function", "allowed_tools"):
        raise invalid(
            "tool_choice.type", f"there is no {shown(choice.type)} here; only functions can be called"
        )
    return msgspec.to_builtins(choice)


def _read_format(text_format: TextFormat | None) -> dict[str, Any] | None:
    if text_format is None:
        return None
    _refuse_unwritable(text_format.schema, "text.format.schema")
    if text_format.type != "json_schema":
        return {"type": text_format.type}
    require(text_format, "text.format", ("schema",))
    return {"type": "json_schema", "json_schema": {"schema": text_format.schema}}


def _refuse_unwritable(value: Any, where: str) -> None:
    """Refuse what can't be written into the answer, which repeats it."""
    try:
        orjson.dumps(value)
    except orjson.JSONEncodeError:
        raise invalid(where, "is nested too deeply or holds numbers beyond 64 bits") from None
