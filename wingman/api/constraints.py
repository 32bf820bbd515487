"""grammar, json_schema and response_format of a request -> the Constraint of its jobs.

In the engine's executor: schemas are converted and grammars checked before anything native sees
them. All errors are InvalidRequest naming the field.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Final

import orjson

from wingman.api.ranges import INT32_MAX
from wingman.api.schema import GenerationFields
from wingman.api.settings import TRIGGER_TOKEN, TRIGGER_WORD
from wingman.chat.constraint import schema_grammar, schema_rules
from wingman.chat.fence import answer_grammar
from wingman.chat.formats import OutputFormat
from wingman.chat.grammar import check_grammar
from wingman.chat.reasoning import ReasoningTags
from wingman.chat.toolgrammar import call_grammar, optional_thoughts
from wingman.chat.tools import Tool, ToolChoice, ToolMode
from wingman.engine.types import Constraint
from wingman.errors import InvalidRequest

ANY_OBJECT: Final = {"type": "object"}
N_CACHED: Final = 64
"""Grammars that are kept: clients send the same schema or tools with every request, and analysing one
takes up to a second."""
MAX_TRIGGERS: Final = 64
MAX_TRIGGER_CHARS: Final = 256
"""Trigger texts of a lazy grammar; every token is searched for all of them."""


def read_constraint(fields: GenerationFields, default: Constraint | None) -> Constraint | None:
    """The constraint of a native or text request: `grammar`, else `json_schema`, else `response_format`, else
    the default."""
    if fields.grammar:
        return _from_grammar(fields)
    if fields.json_schema is not None:
        return Constraint(_schema_grammar(fields.json_schema, "json_schema"))
    schema = read_response_format(fields.response_format)
    return default if schema is None else Constraint(_schema_grammar(schema, "response_format"))


def read_chat_constraint(
    fields: GenerationFields,
    tags: ReasoningTags | None,
    default: Constraint | None,
    *,
    starts_in_reasoning: bool,
) -> Constraint | None:
    """The constraint of a chat request without tools: `response_format`, else `grammar` or `json_schema`,
    else the default."""
    schema = read_chat_schema(fields)
    if schema is None:
        return read_constraint(fields, default)
    with _naming(_schema_field(fields)):
        return Constraint(_answer_grammar(_dumped(schema), tags, starts_in_reasoning))


def _schema_field(fields: GenerationFields) -> str:
    """The field that the schema of a chat request came in."""
    return "json_schema" if read_response_format(fields.response_format) is None else "response_format"


def read_chat_schema(fields: GenerationFields) -> Any:
    """The JSON schema a chat answer has to match, or None: `response_format`, else `json_schema`."""
    if fields.grammar and fields.json_schema is not None:
        raise InvalidRequest("Field 'json_schema': excludes grammar", "json_schema")
    schema = read_response_format(fields.response_format)
    return fields.json_schema if schema is None else schema


def read_call_constraint(
    fields: GenerationFields,
    format: OutputFormat,
    choice: ToolChoice,
    *,
    parallel: bool,
    tags: ReasoningTags | None,
    starts_in_reasoning: bool,
) -> Constraint | None:
    """The constraint of a chat request with tools: from the start when a call is required, else where a call
    begins; with a schema the answer is a call or matches it."""
    schema = read_chat_schema(fields)
    is_required = choice.mode is ToolMode.REQUIRED
    if not is_required and schema is None and not format.triggers:
        return None
    described = orjson.dumps([tool.as_json()["function"] for tool in choice.tools])
    is_whole = is_required or schema is not None
    grammar = _call_grammar(format, described, parallel, is_whole, tags, starts_in_reasoning)
    if is_required:
        return Constraint(grammar)
    if schema is None:
        return Constraint(grammar, True, format.triggers)
    thoughts = optional_thoughts(tags, inside=starts_in_reasoning)
    either = [f"root ::= calls | {thoughts} space answer", grammar.replace("root ::=", "calls ::=", 1)]
    text = "\n".join((*either, schema_rules(schema, "answer")))
    check_grammar(text, "response_format", must_finish=False)
    return Constraint(text)


@lru_cache(N_CACHED)
def _call_grammar(
    format: OutputFormat,
    described: bytes,
    parallel: bool,
    required: bool,
    tags: ReasoningTags | None,
    starts_in_reasoning: bool,
) -> str:
    tools = tuple(Tool(**tool) for tool in orjson.loads(described))
    return call_grammar(
        format,
        tools,
        parallel=parallel,
        required=required,
        tags=tags,
        starts_in_reasoning=starts_in_reasoning,
    )


@lru_cache(N_CACHED)
def _check(grammar: str) -> None:
    check_grammar(grammar)


def _schema_grammar(schema: Any, field: str) -> str:
    with _naming(field):
        return _converted(_dumped(schema))


@contextmanager
def _naming(field: str) -> Iterator[None]:
    """Refusals name the field at fault."""
    try:
        yield
    except InvalidRequest as error:
        raise InvalidRequest(f"Field '{field}': {error.message}", field) from None


@lru_cache(N_CACHED)
def _answer_grammar(schema: bytes, tags: ReasoningTags | None, starts_in_reasoning: bool) -> str:
    return answer_grammar(orjson.loads(schema), tags, starts_in_reasoning=starts_in_reasoning)


def _dumped(schema: Any) -> bytes:
    try:
        return orjson.dumps(schema)
    except orjson.JSONEncodeError:
        raise InvalidRequest("is nested too deeply or holds numbers beyond 64 bits") from None


@lru_cache(N_CACHED)
def _converted(schema: bytes) -> str:
    return schema_grammar(orjson.loads(schema))


def read_response_format(raw: Any) -> Any:
    """The schema in OpenAI's `response_format`, None for plain text; an absent one stands for any object. A
    value that is no object is ignored, as llama-server does."""
    if not isinstance(raw, dict) or raw.get("type") in (None, "text"):
        return None
    if raw["type"] == "json_object":
        schema = raw.get("schema")
    elif raw["type"] == "json_schema":
        wrapper = raw.get("json_schema")
        schema = wrapper.get("schema") if isinstance(wrapper, dict) else None
    else:
        message = "Field 'response_format.type': must be text, json_object or json_schema"
        raise InvalidRequest(message, "response_format.type")
    return schema or ANY_OBJECT


def _from_grammar(fields: GenerationFields) -> Constraint:
    assert fields.grammar is not None
    _check(fields.grammar)
    if not fields.grammar_lazy:
        return Constraint(fields.grammar)
    triggers = fields.grammar_triggers or []
    if not triggers or len(triggers) > MAX_TRIGGERS:
        message = f"Field 'grammar_triggers': a lazy grammar needs 1 to {MAX_TRIGGERS} of them"
        raise InvalidRequest(message, "grammar_triggers")
    words: list[str] = []
    tokens: list[int] = []
    for index, trigger in enumerate(triggers):
        _read_trigger(trigger, f"grammar_triggers[{index}]", words, tokens)
    return Constraint(fields.grammar, True, tuple(words), tuple(tokens))


def _read_trigger(raw: Any, where: str, words: list[str], tokens: list[int]) -> None:
    kind = raw.get("type") if isinstance(raw, dict) else None
    if kind == TRIGGER_WORD and isinstance(raw.get("value"), str):
        if not 0 < len(raw["value"]) <= MAX_TRIGGER_CHARS:
            raise InvalidRequest(f"Field '{where}.value': has 1 to {MAX_TRIGGER_CHARS} characters", where)
        words.append(raw["value"])
    elif kind == TRIGGER_TOKEN and type(raw.get("token")) is int and 0 <= raw["token"] <= INT32_MAX:
        tokens.append(raw["token"])
    else:
        raise InvalidRequest(
            f"Field '{where}': must be a word, {{type: 1, value}}, or a token, {{type: 0, token}}", where
        )
