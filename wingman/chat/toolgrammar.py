"""GBNF grammars that leave a model nothing to write but well-formed tool calls.

The rows of `wingman.chat.formats` are rendered element by element; arguments follow each tool's JSON
schema. A grammar for a required call starts with the answer, and lets the model think first; any
other is lazy: it takes over at one of the format's triggers, so it starts with that text.
GBNF as in llama.cpp's grammars/README.md. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Final

from wingman.chat.constraint import schema_rules
from wingman.chat.formats import (
    Arguments,
    CallId,
    CallObject,
    Element,
    Literal,
    Name,
    OutputFormat,
    Parameters,
    Space,
)
from wingman.chat.grammar import check_grammar
from wingman.chat.reasoning import ReasoningTags
from wingman.chat.tools import Tool
from wingman.errors import InvalidRequest

_SPACE: Final = r"space ::= [ \n]{0,8}"
"""Bounded: a model in doubt writes white space for ever."""


def call_grammar(
    format: OutputFormat,
    tools: Sequence[Tool],
    *,
    parallel: bool,
    required: bool,
    tags: ReasoningTags | None = None,
    starts_in_reasoning: bool = False,
) -> str:
    """A grammar with a rule `root`: calls of `tools`, just one unless `parallel`.

    It is for the whole answer when `required`, else for what begins with a trigger of the format.
    Raises InvalidRequest when a tool's schema can't be followed.
    """
    head, body = (format.call[:1], format.call[1:]) if format.prompt_opens_call else ((), format.call)
    opening, closing = _constant(format.opening), _constant(format.closing)
    first = "tool" if required else "call"
    separator = f"space {_quote(format.separator)}" if format.separator else "space"
    more = f"({separator} call)*" if parallel else ""
    thoughts = optional_thoughts(tags, inside=starts_in_reasoning) if required else ""
    rules = [
        f"root ::= {thoughts} {'space' if required else ''} {opening} {first} {more} {closing}",
        f"call ::= {_constant(head)} tool",
        "tool ::= " + " | ".join(f"tool-{index}" for index in range(len(tools))),
    ]
    if thoughts and tags:
        rules += until("thoughts", tags.close)
    for index, tool in enumerate(tools):
        rules += _tool_rules(body, tool, f"tool-{index}")
    for element in body:
        if isinstance(element, Parameters):
            rules += until("text", _end(element))
    text = "\n".join((*rules, _SPACE))
    check_grammar(text, "tools", must_finish=False)
    return text


def optional_thoughts(tags: ReasoningTags | None, *, inside: bool) -> str:
    """An expression for thoughts before an answer, using a rule `thoughts`; `inside`: the prompt opened them."""
    if tags is None:
        return ""
    return "thoughts" if inside else f"(space {_quote(tags.open)} thoughts)?"


def _tool_rules(elements: Sequence[Element], tool: Tool, name: str) -> Iterator[str]:
    """The rule `name`, a call of `tool`, and those it uses."""
    yield f"{name} ::= " + " ".join(_element(element, tool, name) for element in elements)
    properties = tool.parameters.get("properties")
    for element in elements:
        if isinstance(element, Arguments | CallObject):
            yield _schema_rules(tool, tool.parameters, f"{name}-arguments")
        elif isinstance(element, Parameters) and isinstance(properties, dict):
            for index, (key, schema) in enumerate(properties.items()):
                yield from _parameter(element, tool, key, f"{name}-{index}")
                if not tool.is_text(key):
                    value = _with_definitions(schema, tool.parameters)
                    yield _schema_rules(tool, value, f"{name}-{index}-value")


def _schema_rules(tool: Tool, schema: Any, prefix: str) -> str:
    try:
        return schema_rules(schema, prefix)
    except InvalidRequest as refusal:
        raise InvalidRequest(f"Field 'tools': tool {tool.name}: {refusal.message}", "tools") from None


def _element(element: Element, tool: Tool, name: str) -> str:
    match element:
        case Name():
            return _quote(tool.name)
        case Arguments():
            return f"{name}-arguments"
        case CallObject():
            call = f"{_key(element.name)} {_quote(json.dumps(tool.name))} space {_quote(',')} space"
            return f'"{{" space {call} {_key(element.arguments[0])} {name}-arguments space "}}"'
        case Parameters():
            return _parameters(tool, name)
    return _constant((element,))


def _constant(elements: Sequence[Element]) -> str:
    """An expression for elements that are the same for all tools."""
    parts = []
    for element in elements:
        match element:
            case Literal(texts, in_grammar=True):
                parts.append("(" + " | ".join(map(_quote, texts)) + ")")
            case Space():
                parts.append("space")
            case CallId(open):
                parts.append(f"({_quote(open)} [a-zA-Z0-9]{{9}})?")
    return " ".join(parts)


def _key(name: str) -> str:
    return f'{_quote(json.dumps(name))} space ":" space'


def _parameters(tool: Tool, name: str) -> str:
    """Parameters in the order of the schema, which is how models write them."""
    required = tool.parameters.get("required")
    needed = required if isinstance(required, list) else []
    properties = tool.parameters.get("properties")
    keys = list(properties) if isinstance(properties, dict) else []
    return " ".join(f"({name}-{i} space){'' if key in needed else '?'}" for i, key in enumerate(keys))


def _parameter(shape: Parameters, tool: Tool, key: str, name: str) -> Iterator[str]:
    between = " space ".join(map(_quote, shape.between)) + (r' "\n"' if shape.padded else "")
    value = "text" if tool.is_text(key) else f"{name}-value {_quote(_end(shape))}"
    yield f"{name} ::= {_quote(shape.before + key)} {between} {value}"


def _end(shape: Parameters) -> str:
    return "\n" * shape.padded + shape.after


def _with_definitions(schema: Any, root: dict[str, Any]) -> Any:
    """`schema` with what its references may point to."""
    if not isinstance(schema, dict):
        return schema
    return {key: root[key] for key in ("$defs", "definitions") if key in root} | schema


def until(name: str, end: str) -> Iterator[str]:
    """Rules by which `name` is any text up to and with the first `end`.

    A grammar can't say "not", so this is the automaton of Knuth, Morris and Pratt: rule `name-i` has
    just seen the first i characters of `end`.
    """
    yield f"{name} ::= {name}-0"
    chars = sorted(set(end))
    others = "".join(map(_escape, chars))
    for seen in range(len(end)):
        ways = [f"[^{others}] {name}-0"]
        for char in chars:
            now = _overlap(end, end[:seen] + char)
            ways.append(f"[{_escape(char)}]" + (f" {name}-{now}" if now < len(end) else ""))
        yield f"{name}-{seen} ::= {' | '.join(ways)}"


def _overlap(text: str, seen: str) -> int:
    """How many characters at the start of `text` end `seen`."""
    return next(n for n in range(min(len(text), len(seen)), -1, -1) if seen.endswith(text[:n]))


def _escape(char: str) -> str:
    return f"\\U{ord(char):08X}"


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
