"""Chat templates: a list of messages -> the prompt text a model was trained on.

The prompts are those of llama-server: messages are brought into the form that a template takes, which is
found out by probing it (`capabilities`) and by its text (`dialects`). Templates come from model files, so
they are hostile input and run in `sandbox`. Rendering happens in the engine's executor.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

from msgspec import Struct
from msgspec.structs import replace

from wingman.chat.capabilities import (
    ReasoningMarks,
    TemplateCaps,
    keeping,
    probe_caps,
    probe_reasoning,
)
from wingman.chat.dialects import dialect_of
from wingman.chat.sandbox import (
    MAX_COST,
    PROBE_COST,
    OutOfBudget,
    TemplateRefusal,
    compile_template,
    run_template,
)
from wingman.errors import ConfigurationError, InvalidRequest

CHATML: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""What a model without a template gets, as in llama-server."""
MAX_DEPTH: Final = 100
"""Deepest nesting of what a template is given: schemas of tools are far below."""
MAX_VARIABLES: Final = 64
_RESERVED: Final = frozenset(
    "messages tools bos_token eos_token add_generation_prompt range dict namespace raise_exception "
    "strftime_now loop self caller varargs kwargs".split()
)
"""Names that a client's variables can't take."""
_PATCHES: Final = (
    (
        '{%- if "<|channel|>analysis<|message|>" in message.content or '
        '"<|channel|>final<|message|>" in message.content %}',
        "{%- if false %}",
    ),
    (
        "{%- if (message['content'] is none or message['content'] == '' or message['content']|length == 0) and "
        "(message['tool_calls'] is not defined or message['tool_calls'] is none or "
        "message['tool_calls']|length == 0) %}",
        "{%- if false %}",
    ),
)
"""Checks in well-known templates (gpt-oss, Mistral) that refuse good conversations; llama.cpp leaves them out."""

Message = Mapping[str, Any]


class Rendering(Struct, frozen=True):
    """What a template is given besides the messages; `tools` are OpenAI's, `variables` the client's."""

    add_generation_prompt: bool = True
    bos_token: str = ""
    eos_token: str = ""
    variables: Mapping[str, Any] | None = None
    tools: tuple[Mapping[str, Any], ...] = ()


class Template(Protocol):
    """Anything that renders conversations; thread-safe."""

    source: str
    knows_developer: bool
    caps: TemplateCaps
    marks: ReasoningMarks

    def render(self, messages: Sequence[Message], rendering: Rendering) -> str:
        """The prompt text. Raises InvalidRequest when it can't express the messages."""

    def resume(self, messages: Sequence[Message], rendering: Rendering, reasoning: str, content: str) -> str:
        """The prompt text with the beginning of the answer. Raises InvalidRequest as `render` does."""


class ChatTemplate:
    """A compiled template; `render` may be called from several threads."""

    def __init__(self, source: str, budget: int = MAX_COST) -> None:
        """Compile and probe. Raises ConfigurationError when the text is no valid template."""
        self.source = source
        self._budget = budget
        for refused, patch in _PATCHES:
            source = source.replace(refused, patch)
        try:
            self._template = compile_template(source)
        except Exception as error:  # noqa: BLE001 - deep nesting and odd literals fail in the compiler
            raise ConfigurationError(f"the chat template is broken: {str(error)[:500]}") from None
        self._dialect = dialect_of(source)
        self.caps = probe_caps(self._try)
        self.marks = self._dialect.marks or probe_reasoning(self._try)
        self.knows_developer = self.caps.developer and "developer" in source

    def render(self, messages: Sequence[Message], rendering: Rendering) -> str:
        """The prompt text. Raises InvalidRequest when the template can't express the messages."""
        prompt = self._render(messages, rendering)
        return self._dialect.mend(prompt, rendering.add_generation_prompt) if self._dialect.mend else prompt

    def resume(self, messages: Sequence[Message], rendering: Rendering, reasoning: str, content: str) -> str:
        """The prompt text with the beginning of the answer. Raises InvalidRequest as `render` does."""
        closed = replace(rendering, add_generation_prompt=False)
        prompt = self.render(messages, closed)
        opening = self._dialect.opening
        if opening is None:
            opened = self._render(messages, replace(rendering, add_generation_prompt=True))
            opening = _added(self._render(messages, closed), opened)
            start = self.marks.start.strip()
            opening = opening.partition(start)[0] if start else opening
        return prompt + opening + self._begin(reasoning, content)

    def _begin(self, reasoning: str, content: str) -> str:
        """An unfinished answer after its opening: without content it is still reasoning."""
        start, end = self.marks.start, self.marks.end
        if not start:
            return content
        if self._dialect.has_short_end and not reasoning:
            return end + content
        return start + reasoning + (end + content if content or not reasoning else "")

    def _render(self, messages: Sequence[Message], rendering: Rendering) -> str:
        try:
            adapted = _adapt(messages, self.caps)
            if self._dialect.rewrite is not None:
                adapted = self._dialect.rewrite(adapted)
            return run_template(self._template, self._variables(adapted, rendering), self._budget)
        except TemplateRefusal as error:
            message = f"the model's chat template refuses this conversation: {error}"
            raise InvalidRequest(message, "messages") from None
        except OutOfBudget:
            message = "the model's chat template does too much work for this conversation"
            raise InvalidRequest(message, "messages") from None
        except InvalidRequest:
            raise
        except Exception:  # noqa: BLE001 - a template may fail in any way on what a client sends
            message = "the model's chat template can't render this conversation"
            raise InvalidRequest(message, "messages") from None

    def _variables(self, messages: list[dict[str, Any]], rendering: Rendering) -> dict[str, Any]:
        given = _read_variables(rendering.variables or {})
        variables: dict[str, Any] = {
            "enable_thinking": bool(self.marks.start or self.marks.end),
            "preserve_reasoning": True,
            "date_string": time.strftime("%d %b %Y"),
            "datetime": time.strftime("%b %d %Y"),
        } | given
        if isinstance(variables["preserve_reasoning"], bool):
            variables = keeping(variables["preserve_reasoning"]) | variables
        if isinstance(given.get("reasoning_effort"), str):
            variables.setdefault("reasoning_strength", given["reasoning_effort"])
        variables |= {
            "messages": messages,
            "bos_token": rendering.bos_token,
            "eos_token": rendering.eos_token,
        }
        if rendering.tools:
            variables["tools"] = [_read_tool(tool) for tool in rendering.tools]
        if rendering.add_generation_prompt:
            variables["add_generation_prompt"] = True
        return variables

    def _try(self, messages: Sequence[Message], tools: Sequence[Any] = (), **variables: Any) -> str | None:
        """What it makes of exactly this; None when it refuses or fails."""
        base = {"bos_token": "", "eos_token": "", "add_generation_prompt": True, "tools": list(tools)}
        given = base | variables | {"messages": _copied(messages)}
        try:
            variables = {name: value for name, value in given.items() if value is not None}
            return run_template(self._template, variables, PROBE_COST)
        except Exception:  # noqa: BLE001 - see _render
            return None


def _added(before: str, after: str) -> str:
    """What is left of `after` from where it differs."""
    shared = next((n for n, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(before))
    return after[shared:]


def _adapt(messages: Sequence[Message], caps: TemplateCaps) -> list[dict[str, Any]]:
    """Copies of the messages, in the form that the template takes."""
    adapted = [_adapt_message(message, f"messages[{index}]", caps) for index, message in enumerate(messages)]
    if caps.system or not adapted or adapted[0]["role"] != "system":
        return adapted
    first, *others = adapted
    if others:
        others[0] |= {"content": f"{text_of(first['content'])}\n{text_of(others[0]['content'])}"}
    return others


def _adapt_message(message: Message, where: str, caps: TemplateCaps) -> dict[str, Any]:
    adapted: dict[str, Any] = _copied(message)
    content = adapted.get("content") or ""
    if not caps.typed_content:
        content = text_of(content)
    elif not caps.string_content and isinstance(content, str):
        content = [{"type": "text", "text": content}]
    adapted["content"] = content
    if caps.needs_object_arguments:
        for index, call in enumerate(adapted.get("tool_calls", ())):
            function = call["function"]
            function["arguments"] = _parse_arguments(function["arguments"], f"{where}.tool_calls[{index}]")
    return adapted


def _parse_arguments(arguments: Any, where: str) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        where = f"{where}.function.arguments"
        raise InvalidRequest(f"{where} must be JSON for this model's chat template", where) from None


def text_of(content: Any) -> str:
    """The text of a message's content: text parts are joined by line breaks."""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _read_tool(tool: Message) -> dict[str, Any]:
    """The parts of a tool that templates know, in the usual order."""
    function = tool["function"]
    return {
        "type": "function",
        "function": {
            "name": function["name"],
            "description": function.get("description") or "",
            "parameters": _copied(function.get("parameters") or {}),
        },
    }


def _read_variables(variables: Message) -> dict[str, Any]:
    if len(variables) > MAX_VARIABLES:
        raise InvalidRequest(
            f"there may be at most {MAX_VARIABLES} template variables", "chat_template_kwargs"
        )
    read = {
        name: _copied(value)
        for name, value in variables.items()
        if name.isidentifier() and name not in _RESERVED
    }
    if not isinstance(read.get("enable_thinking", True), bool):
        field = "chat_template_kwargs.enable_thinking"
        raise InvalidRequest(f"{field} must be true or false", field)
    return read


def _copied(value: Any, depth: int = 0) -> Any:
    """A deep copy: templates may change lists. Raises OutOfBudget beyond MAX_DEPTH."""
    if depth > MAX_DEPTH:
        raise OutOfBudget
    if isinstance(value, Mapping):
        return {key: _copied(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(item, depth + 1) for item in value]
    return value


ApplyFamily = Callable[[str, Sequence[tuple[str, str]], bool], str | None]


class FamilyTemplate:
    """A template family that llama.cpp builds in, named or recognised in a template's text; `apply`
    renders (role, content) pairs."""

    knows_developer = False
    caps = TemplateCaps()
    marks = ReasoningMarks()

    def __init__(self, source: str, apply: ApplyFamily) -> None:
        """Raises ConfigurationError when no family fits `source`."""
        self.source = source
        self._apply = apply
        if apply(source, [("user", "hi")], True) is None:
            raise ConfigurationError(f"no built-in chat template fits {source[:40]!r}")

    def render(self, messages: Sequence[Message], rendering: Rendering) -> str:
        """The prompt text; raises InvalidRequest when the family can't express the messages."""
        pairs = [(str(message["role"]), text_of(message.get("content") or "")) for message in messages]
        text = self._apply(self.source, pairs, rendering.add_generation_prompt)
        if text is None:
            raise InvalidRequest("the chat template can't render this conversation", "messages")
        return text

    def resume(self, messages: Sequence[Message], rendering: Rendering, reasoning: str, content: str) -> str:
        """The prompt text and the content; families know no reasoning."""
        return self.render(messages, replace(rendering, add_generation_prompt=True)) + content
