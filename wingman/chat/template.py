"""Chat templates: a list of messages -> the prompt text a model was trained on.

Templates come from model files, so they are hostile input: they run in jinja2's immutable sandbox
with capped output and nothing of ours in reach. Rendering happens in the engine's executor.
The environment follows transformers' apply_chat_template, which templates are written for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn, Protocol

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from wingman.errors import ConfigurationError, InvalidRequest

CHATML: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""What a model without a template gets, as in llama-server."""
MAX_PROMPT_CHARS: Final = 16 * 1024 * 1024
"""Output cap: no context is as long, and a template could multiply its input."""

Message = Mapping[str, Any]


class _TemplateRefusal(Exception):
    """A template called raise_exception: the conversation has a form it does not support."""


@dataclass(frozen=True, slots=True)
class Rendering:
    """What a template is given besides the messages."""

    add_generation_prompt: bool = True
    bos_token: str = ""
    eos_token: str = ""
    variables: Mapping[str, Any] | None = None


class Template(Protocol):
    """Anything that renders conversations; thread-safe."""

    source: str
    knows_developer: bool

    def render(self, messages: Sequence[Message], rendering: Rendering) -> str:
        """The prompt text. Raises InvalidRequest when it can't express the messages."""


class ChatTemplate:
    """A compiled template; `render` may be called from several threads."""

    def __init__(self, source: str) -> None:
        """Compile. Raises ConfigurationError when the text is no valid template."""
        self.source = source
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], autoescape=False
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = time.strftime
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigurationError(f"the chat template is broken: {error}") from error
        self.knows_developer = "developer" in source

    def render(self, messages: Sequence[Message], rendering: Rendering) -> str:
        """The prompt text. Raises InvalidRequest when the template can't express the messages."""
        given = dict(rendering.variables or {})
        given |= {
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": rendering.add_generation_prompt,
            "bos_token": rendering.bos_token,
            "eos_token": rendering.eos_token,
        }
        try:
            parts = []
            size = 0
            for part in self._template.generate(given):
                size += len(part)
                if size > MAX_PROMPT_CHARS:
                    raise InvalidRequest("the chat template made an endless prompt", "messages")
                parts.append(part)
        except _TemplateRefusal as error:
            raise InvalidRequest(
                f"the model's chat template refuses this conversation: {error}", "messages"
            ) from None
        except InvalidRequest:
            raise
        except Exception:  # noqa: BLE001 - a template may fail in any way on what a client sends
            message = "the model's chat template can't render this conversation"
            raise InvalidRequest(message, "messages") from None
        return "".join(parts)


ApplyFamily = Callable[[str, Sequence[tuple[str, str]], bool], str | None]


class FamilyTemplate:
    """A template family that llama.cpp builds in, named or recognised in a template's text; `apply`
    renders (role, content) pairs."""

    knows_developer = False

    def __init__(self, source: str, apply: ApplyFamily) -> None:
        """Raises ConfigurationError when no family fits `source`."""
        self.source = source
        self._apply = apply
        if apply(source, [("user", "hi")], True) is None:
            raise ConfigurationError(f"no built-in chat template fits {source[:40]!r}")

    def render(self, messages: Sequence[Message], rendering: Rendering) -> str:
        """The prompt text; raises InvalidRequest when the family can't express the messages."""
        pairs = [(str(message["role"]), str(message["content"])) for message in messages]
        text = self._apply(self.source, pairs, rendering.add_generation_prompt)
        if text is None:
            raise InvalidRequest("the chat template can't render this conversation", "messages")
        return text


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise _TemplateRefusal(str(message)[:500])
