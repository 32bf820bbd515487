"""JSON schema -> GBNF.

Owns which schemas are understood and which text each becomes; the API layer calls it, on any
thread, and hands the text to the engine. The target is llama-server (b11434): the same rules in the
same text, because white space that a grammar admits is white space that a model writes, and greedy
output under a schema is to be equal token for token. That is why llama-cpp-python's own converter is
not used: it puts white space after each value instead of before, and at most one blank of it.

Where llama-server goes wrong this module does not follow: property names that need escaping in a
character class, an empty property name, two references whose names differ only in punctuation, one
property in two members of allOf, bounds that exclude every value (refused), values repeated in an
enum (given once), open ranges beyond 16 digits.

A schema comes from a stranger, so its size, depth and the work it causes are bounded, references
never leave the document, and the finished grammar passes `check_grammar`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from msgspec import Struct

from wingman.chat.integers import integer_range
from wingman.chat.keywords import (
    Schema,
    bound,
    check_size,
    counts,
    format_rule,
    invalid,
    kind_of,
    non_empty,
    pointed,
)
from wingman.chat.pattern import escape_literal, pattern_body, repetition

MAX_VISIT_DEPTH = 64
"""Nested schemas, references followed: four Python frames each."""
MAX_SCHEMAS = 5_000
"""Schemas converted: lists of types repeat what they hold, so work can grow faster than the text."""
MAX_PROPERTIES = 500
"""Properties of one object; each costs a state that llama.cpp tries at every token."""
_MAX_TRIE_DEPTH = 60
"""Characters of a key that another key must not equal: each is a nested group in the grammar."""
_RULES = {
    "array": '"[" space ( value ("," space value)* )? space "]"',
    "boolean": '("true" | "false")',
    "char": r'[^"\\\x7F\x00-\x1F] | [\\] (["\\bfnrt] | "u" [0-9a-fA-F]{4})',
    "date": '[0-9]{4} "-" ( "0" [1-9] | "1" [0-2] ) "-" ( "0" [1-9] | [1-2] [0-9] | "3" [0-1] )',
    "date-string": r'"\"" date "\""',
    "date-time": 'date "T" time',
    "date-time-string": r'"\"" date-time "\""',
    "decimal-part": "[0-9]{1,16}",
    "integer": '("-"? integral-part)',
    "integral-part": "[0] | [1-9] [0-9]{0,15}",
    "null": '"null"',
    "number": '("-"? integral-part) ("." decimal-part)? ([eE] [-+]? integral-part)?',
    "object": '"{" space ( string ":" space value ("," space string ":" space value)* )? space "}"',
    "string": r'"\"" char* "\""',
    "time": (
        '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ( "." [0-9]{3} )? '
        '( "Z" | ( "+" | "-" ) ( [01] [0-9] | "2" [0-3] ) ":" [0-5] [0-9] )'
    ),
    "time-string": r'"\"" time "\""',
    "uuid": (
        r'"\"" [0-9a-fA-F]{8} "-" [0-9a-fA-F]{4} "-" [0-9a-fA-F]{4} "-" [0-9a-fA-F]{4} '
        r'"-" [0-9a-fA-F]{12} "\""'
    ),
    "value": "object | array | string | number | boolean | null",
}
_SPACE = r'| " " | "\n"{1,2} [ \t]{0,20}'
_NAMES = re.compile(r'"(?:\\.|[^"\\])*+"|\[(?:\\.|[^\]\\])*+\]|\{[^}]*+\}|([a-zA-Z0-9-]+)', re.DOTALL)
"""Names of rules in a rule's text (group 1); literals, classes and counts are skipped."""
_NEEDS = {name: [m[1] for m in _NAMES.finditer(text) if m[1] in _RULES] for name, text in _RULES.items()}
_NOT_IN_NAMES = re.compile("[^a-zA-Z0-9-]+")
_CLASS_ESCAPES = {"]": r"\]", "[": r"\[", "-": r"\-", "^": r"\x5E"}
_ESCAPED_IN_JSON = re.compile(r'["\\\x00-\x1F]')


class Conversion(Struct, frozen=True):
    """Texts of rules by name; `root` is the first to match, `patterns` are those made from a pattern."""

    rules: dict[str, str]
    patterns: frozenset[str]

    def text(self, prefix: str = "") -> str:
        """GBNF; with a `prefix`, `root` is called that and any other rule `prefix`-name."""
        names = {name: f"{prefix}-{name}" if prefix else name for name in self.rules}
        names["root"] = prefix or "root"

        def renamed(match: re.Match[str]) -> str:
            return names[match[1]] if match[1] else match[0]

        lines = [f"{names[name]} ::= {_NAMES.sub(renamed, self.rules[name])}\n" for name in self.rules]
        return "".join(sorted(lines))


def convert(schema: Any) -> Conversion:
    """The rules for `schema`; `{}` means any object.

    Raises InvalidRequest (field "json_schema") for what is no schema, too large or not supported.
    """
    check_size(schema)
    converter = _Converter(schema)
    converter.visit({"type": "object"} if schema == {} else schema, "")
    return Conversion(converter.rules, frozenset(converter.patterns))


class _Converter:
    """One conversion. Rule names are paths of property names; equal text under one name is one rule."""

    def __init__(self, document: Any) -> None:
        self.rules = {"space": _SPACE}
        self.patterns: set[str] = set()
        self._document = document
        self._named: dict[tuple[str, str], str] = {("space", _SPACE): "space"}
        self._n_same: dict[str, int] = {}
        self._refs: dict[str, str] = {}
        self._resolving: list[str] = []
        self._n_schemas = 0
        self._depth = 0

    def visit(self, schema: Any, name: str) -> str:
        """Add the rules of `schema`, whose path is `name` ("" for the whole); the name of its rule."""
        self._n_schemas += 1
        if self._n_schemas > MAX_SCHEMAS or self._depth > MAX_VISIT_DEPTH:
            raise invalid("the schema is too large or nested too deep")
        self._depth += 1
        rule = _CONVERSIONS[kind_of(schema)](self, schema, name)
        self._depth -= 1
        return rule

    # -- rules -----------------------------------------------------------------

    def _add(self, name: str, text: str) -> str:
        """Add a rule called `name`, or something like it when another rule is; the name it got."""
        name = _NOT_IN_NAMES.sub("-", name)
        if (name, text) not in self._named:
            self._named[name, text] = unused = self._unused(name, self._resolving[:-1])
            self.rules[unused] = text
        return self._named[name, text]

    def _unused(self, name: str, reserved: Sequence[str]) -> str:
        unused, n = name, self._n_same.get(name, 0)
        while unused in self.rules or unused in reserved:
            unused, n = f"{name}{n}", n + 1
        self._n_same[name] = n
        return unused

    def _builtin(self, name: str, called: str | None = None) -> str:
        rule = self._add(called or name, _RULES[name])
        for needed in _NEEDS[name]:
            if needed not in self.rules:
                self._builtin(needed)
        return rule

    # -- conversions -----------------------------------------------------------

    def _plain(self, schema: Schema, name: str) -> str:
        """A type that is a rule of the same name, spelled out when it is the whole schema."""
        return self._builtin(schema["type"], None if name else "root")

    def _any(self, schema: Schema, name: str) -> str:
        return self._add(_rule_name(name), self._builtin("value"))

    def _const(self, schema: Schema, name: str) -> str:
        return self._add(_rule_name(name), _json_literal(schema["const"]))

    def _enum(self, schema: Schema, name: str) -> str:
        values = schema["enum"]
        if not isinstance(values, list) or not values:
            raise invalid("enum must be a non-empty array")
        return self._add(_rule_name(name), f"({_alternatives(map(_json_literal, values))})")

    def _union(self, schema: Schema, name: str) -> str:
        members = non_empty(schema, "oneOf" if "oneOf" in schema else "anyOf")
        return self._union_of(members, name)

    def _types(self, schema: Schema, name: str) -> str:
        return self._union_of([{**schema, "type": each} for each in non_empty(schema, "type")], name)

    def _union_of(self, members: list[Any], name: str) -> str:
        path = f"{name}-" if name else "alternative-"
        rules = [self.visit(member, f"{path}{i}") for i, member in enumerate(members)]
        return self._add(_rule_name(name), _alternatives(rules))

    def _ref(self, schema: Schema, name: str) -> str:
        ref, target = schema["$ref"], pointed(self._document, schema["$ref"])
        return self._add(_rule_name(name), self._refs.get(ref) or self._resolve(ref, target))

    def _resolve(self, ref: str, target: Any) -> str:
        """The rule of what `ref` points to; its name is reserved until then, as cycles refer to it."""
        reserved = self._unused(_NOT_IN_NAMES.sub("-", "ref" + ref[1:]), self._resolving)
        self._refs[ref] = reserved
        self._resolving.append(reserved)
        self._refs[ref] = self.visit(target, reserved)
        self._resolving.pop()
        return self._refs[ref]

    def _string(self, schema: Schema, name: str) -> str:
        rule_name = _rule_name(name)
        pattern = schema.get("pattern", "")
        if not isinstance(pattern, str):
            raise invalid("pattern must be a string")
        if pattern:
            return self._pattern(pattern, rule_name)
        least, most = counts(schema, "minLength", "maxLength")
        form = format_rule(schema)
        if form == "uuid":
            return self._builtin(form, None if name else "root")
        if form is not None:
            return self._add(rule_name, self._builtin(form))
        if least or most is not None:
            text = repetition(self._builtin("char"), least, most)
            return self._add(rule_name, rf'"\"" {text} "\""')
        return self._builtin("string", None if name else "root")

    def _pattern(self, pattern: str, rule_name: str) -> str:
        n_rules = len(self.rules)
        body = pattern_body(pattern, rule_name, self._add)
        if body is None:
            self._forget(n_rules)
            return self._add(rule_name, self._builtin("string"))
        rule = self._add(rule_name, rf'"\"" ({body}) "\""')
        self.patterns.add(rule)
        return rule

    def _forget(self, n_rules: int) -> None:
        """Drop all but the first `n_rules` rules."""
        if dropped := set(list(self.rules)[n_rules:]):
            self.rules = {name: text for name, text in self.rules.items() if name not in dropped}
            self._named = {key: name for key, name in self._named.items() if name not in dropped}

    def _integer(self, schema: Schema, name: str) -> str:
        low = bound(schema, "minimum", math.ceil)
        if low is None and (below := bound(schema, "exclusiveMinimum", math.floor)) is not None:
            low = below + 1
        high = bound(schema, "maximum", math.floor)
        if high is None and (above := bound(schema, "exclusiveMaximum", math.ceil)) is not None:
            high = above - 1
        if low is None and high is None:
            return self._builtin("integer", None if name else "root")
        if low is not None and high is not None and low > high:
            raise invalid("no integer is within the bounds")
        return self._add(_rule_name(name), f"({integer_range(low, high)})")

    def _array(self, schema: Schema, name: str) -> str:
        items = schema.get("items", schema.get("prefixItems", {}))
        if isinstance(items, list):
            return self._tuple(items, name)
        least, most = counts(schema, "minItems", "maxItems")
        if kind_of(items) == "any" and (least, most) == (0, None):
            return self._builtin("array", None if name else "root")
        text = repetition(self.visit(items, _joined(name, "item")), least, most, '"," space')
        return self._add(_rule_name(name), f'"[" space {text} space "]"')

    def _tuple(self, items: list[Any], name: str) -> str:
        rules = [self.visit(item, _joined(name, f"tuple-{i}")) for i, item in enumerate(items)]
        text = ' "," space '.join(rules)
        return self._add(_rule_name(name), f'"[" space {text} space "]"')

    def _object(self, schema: Schema, name: str) -> str:
        properties = schema.get("properties", {})
        if not isinstance(properties, dict):
            raise invalid("properties must be an object")
        more = schema.get("additionalProperties", "properties" not in schema)
        if more is True:
            more = {}
        if more is not False and not isinstance(more, dict):
            raise invalid("additionalProperties must be a boolean or a schema")
        if not properties and isinstance(more, dict) and kind_of(more) == "any":
            return self._add(_rule_name(name), self._builtin("object"))
        names = schema.get("required")
        required = {each for each in names if isinstance(each, str)} if isinstance(names, list) else set()
        return self._members(properties, required, more, name)

    def _all(self, schema: Schema, name: str) -> str:
        """Members of allOf: the values common to its enums, else the properties of its objects together."""
        members = non_empty(schema, "allOf")
        properties: Schema = {}
        required: set[str] = set()
        n_with: dict[str, int] = {}
        for part, is_required in self._parts(members):
            found = part.get("properties", {}) if kind_of(part) == "object" else {}
            if not isinstance(found, dict):
                raise invalid("properties must be an object")
            properties |= found
            required.update(found if is_required else ())
            if kind_of(part) == "enum":
                for literal in map(_json_literal, non_empty(part, "enum")):
                    n_with[literal] = n_with.get(literal, 0) + 1
        common = [literal for literal in sorted(n_with) if n_with[literal] == len(members)]
        if common:
            return self._add(_rule_name(name), f"({_alternatives(common)})")
        return self._members(properties, required, False, name)

    def _parts(self, members: list[Any]) -> Iterable[tuple[Schema, bool]]:
        """Members of an allOf and whether their properties are required: those of an anyOf are not."""
        for member in members:
            if kind_of(member) == "union":
                choices = non_empty(member, "oneOf" if "oneOf" in member else "anyOf")
                yield from ((self._target(choice), False) for choice in choices)
            else:
                yield self._target(member), True

    def _target(self, schema: Any) -> Schema:
        for _ in range(MAX_VISIT_DEPTH):
            if kind_of(schema) != "ref":
                return dict(schema)
            schema = pointed(self._document, schema["$ref"])
        raise invalid("a $ref leads round in a circle")

    # -- objects ---------------------------------------------------------------

    def _members(self, properties: Schema, required: set[str], more: Schema | bool, name: str) -> str:
        """An object with `properties`, those `required` first, then any others in their order."""
        if len(properties) > MAX_PROPERTIES:
            raise invalid(f"an object has more than {MAX_PROPERTIES} properties")
        pairs = {key: self._pair(key, schema, name) for key, schema in properties.items()}
        first = [pairs[key] for key in properties if key in required]
        optional = [(key, pairs[key]) for key in properties if key not in required]
        choices = self._choices(optional, self._other_pair(list(properties), more, name), name)
        text = '"{" space '
        if first:
            text += ' "," space '.join(first) + (f' ( "," space ( {choices} ) )?' if choices else "")
        elif choices:
            text += f" ({choices} )?"
        else:
            return self._add(_rule_name(name), '"{" space "}"')
        return self._add(_rule_name(name), f'{text} space "}}"')

    def _pair(self, key: str, schema: Any, name: str) -> str:
        path = _joined(name, key)
        value = self.visit(schema, path)
        return self._add(f"{path}-kv", f'{_json_literal(key)} space ":" space {value}')

    def _other_pair(self, keys: list[str], schema: Schema | bool, name: str) -> str | None:
        """The rule of a pair whose key is none of `keys`, None when there must not be one."""
        if isinstance(schema, bool):
            return None
        path = _joined(name, "additional")
        is_any = kind_of(schema) == "any"
        value = self._builtin("value") if is_any else self.visit(schema, f"{path}-value")
        if keys:
            self._builtin("char")
            key = self._add(f"{path}-k", _other_key(keys))
        else:
            key = self._builtin("string")
        return self._add(f"{path}-kv", f'{key} ":" space {value}')

    def _choices(self, optional: list[tuple[str, str]], other: str | None, name: str) -> str:
        """Each way to begin with one of the optional pairs and to go on with later ones."""
        choices = [f'{other} ( "," space {other} )*'] if other else []
        later = f'( "," space {other} )*' if other else ""
        for key, pair in reversed(optional):
            rest = f" {self._add(f'{_joined(name, key)}-rest', later)}" if later else ""
            choices.append(pair + rest)
            later = f'( "," space {pair} )?{rest}'
        return " | ".join(reversed(choices))


_CONVERSIONS: dict[str, Callable[[_Converter, Schema, str], str]] = {
    "all": _Converter._all,
    "any": _Converter._any,
    "array": _Converter._array,
    "boolean": _Converter._plain,
    "const": _Converter._const,
    "enum": _Converter._enum,
    "integer": _Converter._integer,
    "null": _Converter._plain,
    "number": _Converter._plain,
    "object": _Converter._object,
    "ref": _Converter._ref,
    "string": _Converter._string,
    "types": _Converter._types,
    "union": _Converter._union,
}


def _rule_name(name: str) -> str:
    """The rule for the path `name`, out of the way of the fixed rules."""
    return f"{name}-" if name == "root" or _NOT_IN_NAMES.sub("-", name) in _RULES else name or "root"


def _joined(name: str, part: str) -> str:
    return f"{name}-{part}" if name else part or "-"


def _json_literal(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f'"{escape_literal(text)}"'


def _alternatives(texts: Iterable[str]) -> str:
    """Each text once: equal alternatives double llama.cpp's work at each repetition."""
    return " | ".join(dict.fromkeys(texts))


def _other_key(keys: list[str]) -> str:
    """A JSON string that is none of `keys`. A long one or one that JSON escapes may come again."""
    trie: dict[str, Any] = {}
    for key in keys:
        if len(key) <= _MAX_TRIE_DEPTH and not _ESCAPED_IN_JSON.search(key):
            node = trie
            for char in key:
                node = node.setdefault(char, {})
    inside = f"( {_unlike(trie)} )" if trie else "char+"
    return f'["] {inside}{"" if "" in keys else "?"} ["]'


def _unlike(trie: dict[str, Any]) -> str:
    """What follows a common start: something that leads to none of the words of `trie`."""
    branches = []
    for char in sorted(trie):
        rest = f"({_unlike(trie[char])})" if trie[char] else "char+"
        branches.append(f"[{_CLASS_ESCAPES.get(char, char)}] {rest}")
    excluded = "".join(_CLASS_ESCAPES.get(char, char) for char in sorted(trie))
    return " | ".join([*branches, f'[^"{excluded}] char*'])
