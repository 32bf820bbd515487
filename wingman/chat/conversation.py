"""Chat messages as clients send them -> messages as templates take them.

Pure. Refusals name the message, because a broken history comes back with every request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wingman.chat.template import Rendering, Template
from wingman.errors import InvalidRequest

_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
_MEDIA_PARTS = frozenset({"image_url", "input_image", "input_audio", "input_video", "video_url", "file"})


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages ready for a template, and the assistant text to be continued, "" when none."""

    messages: tuple[dict[str, Any], ...]
    prefill: str = ""


def read_messages(raw: Sequence[Any], *, knows_developer: bool) -> tuple[dict[str, Any], ...]:
    """Check and normalise `messages`; raises InvalidRequest naming the one at fault."""
    return tuple(_read_message(message, index, knows_developer) for index, message in enumerate(raw))


def _read_message(raw: Any, index: int, knows_developer: bool) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(raw, Mapping):
        raise InvalidRequest(f"{where} must be an object", "messages")
    role = raw.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequest(f"{where}.role must be a string", f"{where}.role")
    message = {key: value for key, value in raw.items() if value is not None}
    if role == "developer" and not knows_developer:
        message["role"] = "system"
    content = raw.get("content")
    if content is None and not raw.get("tool_calls"):
        raise InvalidRequest(f"{where}.content is required", f"{where}.content")
    message["content"] = _read_content(content, f"{where}.content")
    return message


def _read_content(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise InvalidRequest(f"{where} must be a string or an array of parts", where)
    return "\n".join(_read_part(part, f"{where}[{index}]") for index, part in enumerate(content))


def _read_part(part: Any, where: str) -> str:
    if not isinstance(part, Mapping):
        raise InvalidRequest(f"{where} must be an object", where)
    kind = part.get("type")
    if not isinstance(kind, str):
        raise InvalidRequest(f"{where}.type must be a string", f"{where}.type")
    if kind in _TEXT_PARTS:
        text = part.get("text")
        if not isinstance(text, str):
            raise InvalidRequest(f"{where}.text must be a string", f"{where}.text")
        return text
    if kind in _MEDIA_PARTS:
        raise InvalidRequest(f"{where}: this model takes no {kind} input", where)
    raise InvalidRequest(f"{where}.type is unknown", f"{where}.type")


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
    return Conversation(messages[:-1], last["content"])


def render_prompt(
    template: Template, conversation: Conversation, rendering: Rendering, *, adds_bos: bool
) -> str:
    """The prompt text; a BOS that the tokenizer adds anyway is not repeated."""
    text = template.render(conversation.messages, rendering)
    if adds_bos and rendering.bos_token:
        text = text.removeprefix(rendering.bos_token)
    return text + conversation.prefill
