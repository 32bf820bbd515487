"""What the keywords of one JSON schema say, as llama-server understands them.

Owns the reading of values that a stranger wrote, each checked as it is read; `wingman.chat.schema`
calls it, on any thread. Every function raises InvalidRequest (field "json_schema") for what is no
schema, and returns plain values.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any, TypeAlias

from wingman.errors import InvalidRequest

MAX_SCHEMA_CHARS = 65_536
"""Text of a schema, roughly; the largest tool schemas seen in the wild have some 30 000 characters."""
MAX_SCHEMA_DEPTH = 128
"""Nested JSON containers: generated schemas stay below 30, two to a level; json's encoder recurses."""
MAX_REPEATS = 2_000
"""Least length or count: llama.cpp refuses to copy a symbol more often than that."""
_INT64 = 2**63
"""Bounds at or beyond are no bounds, as they don't fit llama-server's integers."""
_NO_LIMIT = 10**9
"""Larger counts are written as this, which to llama.cpp means no limit."""
_TYPES = frozenset("object array string integer number boolean null".split())
_INDEX = re.compile("[0-9]{1,9}")
_FORMATS = {name: f"{name}-string" for name in ("date", "time", "date-time")} | dict.fromkeys(
    ("uuid", "uuid1", "uuid2", "uuid3", "uuid4", "uuid5"), "uuid"
)

Schema: TypeAlias = dict[str, Any]


def check_size(schema: Any) -> None:
    """Raise InvalidRequest when `schema` is too large or too deep, without recursion."""
    size = 0
    todo = [(schema, 0)]
    while todo:
        value, depth = todo.pop()
        size += len(value) + 2 if isinstance(value, str) else 2
        if size > MAX_SCHEMA_CHARS or depth > MAX_SCHEMA_DEPTH:
            raise invalid("the schema is too large or nested too deep")
        if isinstance(value, dict):
            todo += [(part, depth + 1) for item in value.items() for part in item]
        elif isinstance(value, list):
            todo += [(part, depth + 1) for part in value]


def kind_of(schema: Any) -> str:
    """Which conversion `schema` needs; its keywords are looked at in llama-server's order."""
    if not isinstance(schema, dict):
        raise invalid("a schema must be an object")
    type_ = schema.get("type")
    if "$ref" in schema:
        return "ref"
    if "oneOf" in schema or "anyOf" in schema:
        return "union"
    if isinstance(type_, list):
        return "types"
    if "const" in schema or "enum" in schema:
        return "const" if "const" in schema else "enum"
    if type_ is None or type_ == "":
        return _untyped_kind(schema)
    if not isinstance(type_, str) or type_ not in _TYPES:
        raise invalid(f"unrecognized type {json.dumps(type_)[:40]}")
    if "allOf" in schema and (type_ == "string" or (type_ == "object" and not _describes_object(schema))):
        return "all"
    return type_


def _untyped_kind(schema: Schema) -> str:
    if _describes_object(schema):
        return "object"
    if "allOf" in schema:
        return "all"
    if "items" in schema or "prefixItems" in schema:
        return "array"
    if not schema.keys().isdisjoint(("pattern", "minLength", "maxLength")) or format_rule(schema):
        return "string"
    return "any"


def _describes_object(schema: Schema) -> bool:
    return "properties" in schema or schema.get("additionalProperties", True) is not True


def format_rule(schema: Schema) -> str | None:
    """The rule for `format`, None when there is none or it is not a known one."""
    form = schema.get("format", "")
    if not isinstance(form, str):
        raise invalid("format must be a string")
    return _FORMATS.get(form)


def counts(schema: Schema, least_key: str, most_key: str) -> tuple[int, int | None]:
    """A least and a greatest length or count, None for no limit."""
    least, most = schema.get(least_key, 0), schema.get(most_key)
    for key, value in ((least_key, least), (most_key, 0 if most is None else most)):
        if type(value) is not int or value < 0:
            raise invalid(f"{key} must be a non-negative integer")
    if least > MAX_REPEATS:
        raise invalid(f"{least_key} is more than {MAX_REPEATS}")
    if most is not None and most < least:
        raise invalid(f"{most_key} is less than {least_key}")
    return least, None if most is None else min(most, _NO_LIMIT)


def bound(schema: Schema, key: str, to_integer: Callable[[float], int]) -> int | None:
    """A bound as the next integer within it, None when there is none to speak of."""
    value = schema.get(key)
    if value is None and key not in schema:
        return None
    if type(value) is not int and (type(value) is not float or not math.isfinite(value)):
        raise invalid(f"{key} must be a number")
    integer = to_integer(value)
    return integer if -_INT64 < integer < _INT64 - 1 else None


def non_empty(schema: Schema, key: str) -> list[Any]:
    """The array under `key`."""
    values = schema[key]
    if not isinstance(values, list) or not values:
        raise invalid(f"{key} must be a non-empty array")
    return values


def pointed(document: Any, ref: Any) -> Any:
    """What the JSON pointer in `ref` (RFC 6901), like #/$defs/name, refers to in `document`."""
    if not isinstance(ref, str) or not ref.startswith("#/"):
        raise invalid("$ref must point into the same document, like #/$defs/name")
    target = document
    for step in ref[2:].split("/"):
        unescaped = step.replace("~1", "/").replace("~0", "~")
        if isinstance(target, dict) and (step in target or unescaped in target):
            target = target[step if step in target else unescaped]
        elif isinstance(target, list) and _INDEX.fullmatch(step) and int(step) < len(target):
            target = target[int(step)]
        else:
            raise invalid(f"can't resolve $ref {json.dumps(ref)[:80]}")
    return target


def invalid(reason: str) -> InvalidRequest:
    """The refusal of a schema, to be raised."""
    return InvalidRequest(f"invalid JSON schema: {reason}", "json_schema")
