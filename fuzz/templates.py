"""A chat template from a hostile model file, and a conversation for it from a hostile client.

The input is the template's text, a zero byte, and JSON with `messages`, `tools` and `variables`.
Invariant: the template compiles or is refused with ConfigurationError; the conversation renders or is
refused with InvalidRequest; within a budget, and the prompt is text.
"""

from __future__ import annotations

import functools
from typing import Any

import orjson

from wingman.chat.conversation import read_messages, render_prompt, split_prefill
from wingman.chat.template import CHATML, ChatTemplate, Rendering
from wingman.errors import ConfigurationError, InvalidRequest

BUDGET = 100_000
_BLOCKS = (
    b"{% for m in messages %};{% endfor %};{% if tools %};{% endif %};{% else %};{% set x = ;%};{{;}};{%-;-%};"
    b"{% macro f(x) %};{% endmacro %};{% set x %};{% endset %};{% break %};{% generation %};recursive;loop(x)"
)
_WORDS = (
    b"m.content m['role'] m.tool_calls .items() .append(x) .get('x') .__class__ loop.last x f(x) messages tools "
    b"namespace(x=1) raise_exception('x') range(99999) + ~ * ** in is if [1:] ( ) 'x' 9 none |tojson |default('') "
    b"|join(',') |replace('','x') |indent(9) |map(attribute='x') |selectattr('x') |length |trim"
)
_JSON = (
    b'"role": "user" "assistant" "tool" "content": "tool_calls": "function": "arguments": "{}" "variables": '
    b"null [] {} , :"
)
TOKENS = (
    *_BLOCKS.split(b";"),
    *_WORDS.split(),
    *_JSON.split(),
    b"\x00",
    b"\xff",
    b"[" * 200,
    b"{{ " + b"(" * 200,
)

_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def one(data: bytes) -> None:
    """Check the invariant for `data`."""
    source, _, request = data.partition(b"\x00")
    template = _compiled(source)
    if template is None:
        return
    try:
        body = orjson.loads(request)
    except orjson.JSONDecodeError:
        body = None
    _check(template, body if isinstance(body, dict) else {})


@functools.lru_cache(maxsize=8)
def _compiled(source: bytes) -> ChatTemplate | None:
    try:
        return ChatTemplate(source.decode("utf-8", "replace") or CHATML, BUDGET)
    except ConfigurationError as refusal:
        refusal.message.encode()  # goes into a log
        return None


def _check(template: ChatTemplate, body: dict[str, Any]) -> None:
    messages, variables = body.get("messages"), body.get("variables")
    rendering = Rendering(
        body.get("add_generation_prompt") is not False,
        "<s>",
        "</s>",
        variables if isinstance(variables, dict) else None,
        (_TOOL,) if body.get("tools") else (),
    )
    try:
        read = read_messages(
            messages if isinstance(messages, list) else [{"role": "user", "content": "hi"}],
            knows_developer=template.knows_developer,
            typed_content=template.caps.typed_content,
        )
        prompt = render_prompt(template, split_prefill(read), rendering, adds_bos=True)
    except InvalidRequest as refusal:
        refusal.message.encode()  # goes into an answer
        return
    assert isinstance(prompt, str)
