"""What a chat template can express, found out by rendering small conversations with it.

Pure; run once, when a template is compiled. llama.cpp traces which values a template reads (common/jinja/caps);
here a marker must show in the output, which says the same for nearly all templates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from msgspec import Struct

_TEXT: Final = "MARKED_TEXT"
_TOOL: Final = "marked_tool"
_ABOUT: Final = "MARKED_ABOUT"
_VALUE: Final = "MARKED_VALUE"
_OTHER: Final = "OTHER_VALUE"
_THOUGHT: Final = "MARKED_THOUGHT"
_USER: Final = {"role": "user", "content": "User message"}
_SAID: Final = {"role": "assistant", "content": "Assistant message"}
_TOOLS: Final = (
    {
        "type": "function",
        "function": {
            "name": _TOOL,
            "description": _ABOUT,
            "parameters": {
                "type": "object",
                "properties": {"arg": {"type": "string", "description": "Arg description"}},
                "required": ["arg"],
            },
        },
    },
)
_MARK: Final = r"(?:<[^>]*>|\[[^\]]*\])"
_ANCHOR: Final = 64
"""Characters before an answer that are the same whatever the switch for thinking changes elsewhere."""


class Run(Protocol):
    """Renders with exactly these variables; None when the template refuses or fails."""

    def __call__(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = (), **variables: Any
    ) -> str | None:
        """`variables` whose value is None are left out."""


class TemplateCaps(Struct, frozen=True):
    """What a template supports; the defaults are those of one that knows roles and texts only."""

    string_content: bool = True
    typed_content: bool = False
    """Content may be an array of text parts."""
    system: bool = True
    developer: bool = False
    tools: bool = False
    """It describes the tools on offer."""
    tool_calls: bool = False
    parallel_tool_calls: bool = False
    needs_object_arguments: bool = False
    """Arguments of calls have to be objects, not JSON texts."""
    preserves_reasoning: bool = False
    """It can keep the reasoning of all earlier answers."""
    reasoning_effort: bool = False

    def to_dict(self) -> dict[str, bool]:
        """`chat_template_caps` of /props, under llama-server's names."""
        return {
            "supports_object_arguments": self.needs_object_arguments,
            "supports_parallel_tool_calls": self.parallel_tool_calls,
            "supports_preserve_reasoning": self.preserves_reasoning,
            "supports_reasoning_effort": self.reasoning_effort,
            "supports_string_content": self.string_content,
            "supports_system_role": self.system,
            "supports_tool_calls": self.tool_calls,
            "supports_tools": self.tools,
            "supports_typed_content": self.typed_content,
        }


class ReasoningMarks(Struct, frozen=True):
    """The texts around the reasoning in an answer; both empty when the template has none."""

    start: str = ""
    end: str = ""


def probe_caps(run: Run) -> TemplateCaps:
    """Try the template out."""
    tools, tool_calls, needs_objects = _probe_calls(run)
    return TemplateCaps(
        string_content=_shows(run([{"role": "user", "content": _TEXT}]), _TEXT),
        typed_content=_takes_parts(run),
        system=_shows(run([{"role": "system", "content": _TEXT}, _USER]), _TEXT),
        developer=_shows(run([{"role": "developer", "content": _TEXT}, _USER]), _TEXT),
        tools=tools,
        tool_calls=tool_calls,
        parallel_tool_calls=_shows(run(_called(needs_objects, _VALUE, _OTHER), _TOOLS), _OTHER),
        needs_object_arguments=needs_objects,
        preserves_reasoning=_keeps_reasoning(run),
        reasoning_effort=_heeds_effort(run),
    )


def _shows(output: str | None, marker: str) -> bool:
    return output is not None and marker in output


def _takes_parts(run: Run) -> bool:
    output = run([{"role": "user", "content": [{"type": "text", "text": _TEXT}]}])
    prints_json = re.search(r"""['"]text['"]""", output or "")
    takes_none = run([{"role": "user", "content": []}]) is not None
    return _shows(output, _TEXT) and takes_none and not prints_json


def _called(as_objects: bool, *values: str) -> list[dict[str, Any]]:
    """A conversation in which the tool was called, once for each value."""
    calls = [
        {
            "type": "function",
            "function": {
                "name": _TOOL,
                "arguments": {"arg": value} if as_objects else f'{{"arg": "{value}"}}',
            },
            "id": f"call0000{number}",
        }
        for number, value in enumerate(values, 1)
    ]
    result = {"role": "tool", "content": "Tool response", "tool_call_id": "call00001"}
    return [_USER, {"role": "assistant", "content": "", "tool_calls": calls}, result, _SAID, _USER]


def _probe_calls(run: Run) -> tuple[bool, bool, bool]:
    """Whether it describes tools, shows calls, and shows their arguments when they are objects."""
    with_objects = run(_called(True, _VALUE), _TOOLS)
    if _shows(with_objects, _VALUE) and f"'arg': '{_VALUE}'" not in (with_objects or ""):
        return _shows(with_objects, _ABOUT), True, True
    with_texts = run(_called(False, _VALUE), _TOOLS)
    return _shows(with_texts, _ABOUT), _shows(with_texts, _VALUE), False


def _keeps_reasoning(run: Run) -> bool:
    thoughts = [_SAID | {"reasoning_content": thought} for thought in (_THOUGHT, "Reasoning content")]
    output = run([_USER, thoughts[0], _USER, thoughts[1], _USER], enable_thinking=True, **keeping(True))
    return _shows(output, _THOUGHT)


def _heeds_effort(run: Run) -> bool:
    outputs = {
        run([_USER], enable_thinking=True, reasoning_effort=effort, reasoning_strength=effort)
        for effort in ("low", "medium", "high", "max", "none")
    }
    return len(outputs) > 1


def keeping(reasoning: bool) -> dict[str, Any]:
    """The variables by which templates are told to keep the reasoning of earlier answers, or to drop it."""
    return {
        "preserve_thinking": reasoning,
        "clear_thinking": not reasoning,
        "truncate_history_thinking": not reasoning,
        "drop_thinking": not reasoning,
    }


# -- reasoning ------------------------------------------------------------------------------------


def probe_reasoning(run: Run) -> ReasoningMarks:
    """The texts that the template puts around reasoning: those seen in an earlier answer, else those
    by which the start of an answer differs when thinking is switched on and off."""
    thought = _SAID | {"reasoning_content": _THOUGHT}
    answered = run([_USER, thought], enable_thinking=True, add_generation_prompt=None) or ""
    calling = _called(True, _VALUE)[1] | {"reasoning_content": _THOUGHT}
    called = run([_USER, calling], _TOOLS, enable_thinking=True, add_generation_prompt=None) or ""
    if _THOUGHT in called and _THOUGHT not in answered:
        return _marks_around(called)
    off, on = (run([_USER], enable_thinking=is_on) or "" for is_on in (False, True))
    return _marks_of_switch(_marks_around(answered), off, on)


def _marks_around(output: str) -> ReasoningMarks:
    wrapped = re.search(rf"({_MARK}\s*){_THOUGHT}(\s*{_MARK}\s*)", output)
    if wrapped is not None:
        return ReasoningMarks(wrapped[1], wrapped[2])
    ended = re.search(rf"{_THOUGHT}\s*({_MARK}\s*)", output)
    return ReasoningMarks("", ended[1]) if ended is not None else ReasoningMarks()


def _marks_of_switch(seen: ReasoningMarks, off: str, on: str) -> ReasoningMarks:
    """`seen`, completed by what the switch changes at the end of the prompt."""
    if on == off:
        return seen
    if on.startswith(off):
        return ReasoningMarks(seen.start or on[len(off) :], seen.end)
    if off.startswith(on):
        end = off[len(on) :]
        opened = re.search(rf"({_MARK})\s*{re.escape(end.strip())}\s*$", off)
        return seen if seen.end else ReasoningMarks(opened[1] if opened else seen.start, end)
    head, _, tail = off.rpartition(on[-_ANCHOR:])
    empty = re.fullmatch(rf"\s*({_MARK})\s*({_MARK})\s*", tail) if head else None
    return ReasoningMarks(seen.start or empty[1], seen.end or empty[2]) if empty else seen
