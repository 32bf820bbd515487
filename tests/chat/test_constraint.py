"""Schemas: the grammars llama-server makes of them, what is refused, and that a hostile one costs little.

`schema_grammars.json` holds what llama-server (b11434) reports in generation_settings.grammar for each
schema; rules that never change are kept apart, under "fixed".
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wingman.chat import keywords, pattern, schema
from wingman.chat.constraint import schema_grammar, schema_rules
from wingman.chat.gbnf import BadGrammar, CharSet, Grammar, parse
from wingman.chat.grammar import check_grammar
from wingman.errors import InvalidRequest

RECORDED = json.loads((Path(__file__).parent / "schema_grammars.json").read_text(encoding="utf-8"))
INTEGER = {"type": "integer"}
STRING = {"type": "string"}


def of_object(properties: dict[str, Any], *required: str, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), **more}


def list_of(items: Any, **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, **more}


def admits(grammar: str, text: str) -> bool:
    """Whether `text` matches, by backtracking over all derivations."""
    parsed = parse(grammar)
    return any(end == len(text) for end in ends(parsed, parsed.rules[parsed.root], text, 0, {}))


def ends(
    grammar: Grammar,
    rule: list[list[int | CharSet]],
    text: str,
    start: int,
    memo: dict[tuple[int, int], set[int]],
) -> set[int]:
    found: set[int] = set()
    for sequence in rule:
        positions = {start}
        for symbol in sequence:
            positions = {end for at in positions for end in after(grammar, symbol, text, at, memo)}
        found |= positions
    return found


def after(
    grammar: Grammar, symbol: int | CharSet, text: str, at: int, memo: dict[tuple[int, int], set[int]]
) -> set[int]:
    if not isinstance(symbol, int):
        return {at + 1} if at < len(text) and any(a <= ord(text[at]) <= b for a, b in symbol) else set()
    if (symbol, at) not in memo:
        memo[symbol, at] = ends(grammar, grammar.rules[symbol], text, at, memo)
    return memo[symbol, at]


@pytest.mark.parametrize("name", RECORDED["schemas"])
def test_the_grammar_is_that_of_llama_server(name: str) -> None:
    recorded = RECORDED["schemas"][name]
    lines = schema_grammar(recorded["schema"]).strip().split("\n")
    assert [line for line in lines if line not in RECORDED["fixed"]] == recorded["grammar"]


def test_the_fixed_rules_are_those_of_llama_server() -> None:
    lines = {f"{name} ::= {text}" for name, text in schema._RULES.items()}
    assert lines | {f"space ::= {schema._SPACE}"} == set(RECORDED["fixed"])


def test_any_object_starts_with_a_brace() -> None:
    any_object = schema_grammar({"type": "object"})
    assert schema_grammar({}) == any_object
    assert "root ::= object\n" in any_object
    assert admits(any_object, '{"a": [1, {"b": null}]}')
    assert not admits(any_object, "[]")


@pytest.mark.parametrize(
    ("given_schema", "accepted", "refused"),
    [
        ({"const": "42"}, ['"42"'], ["42", '"43"', ""]),
        ({"enum": [1, 1, 1]}, ["1"], ["2"]),
        ({"type": "integer", "minimum": 999, "maximum": 1001}, ["999", "1001"], ["998", "1002", "99"]),
        ({"type": "integer", "minimum": 10**16}, ["10000000000000001"], ["1"]),
        (of_object({'q"]\\\n': INTEGER}, 'q"]\\\n'), [r'{"q\"]\\\n":1}'], ['{"q"]":1}']),
        (of_object({"": INTEGER, "b": STRING}, "", "b"), ['{"":1,"b":""}'], ['{"":"","b":""}']),
        (
            of_object({"]": INTEGER, "^x": INTEGER, "-": INTEGER}, additionalProperties=STRING),
            ['{"]":1}', '{"^x":1}', '{"y":""}', '{"]]":""}'],
            ['{"]":""}', '{"-":""}'],
        ),
        (of_object({"k" * 500: INTEGER}, additionalProperties=STRING), ['{"kk":""}'], ['{"kk":1}']),
        (
            {"allOf": [of_object({"a": INTEGER}), of_object({"a": STRING})]},
            ['{"a":""}'],
            ['{"a":1}', '{"a":"","a":""}'],
        ),
        (
            of_object(
                {"x": {"$ref": "#/$defs/a b"}, "y": {"$ref": "#/$defs/a-b"}}, "x", "y",
                **{"$defs": {"a b": {"const": 1}, "a-b": {"const": 2}}},
            ),
            ['{"x":1,"y":2}'],
            ['{"x":1,"y":1}'],
        ),
        ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"const": 1}}}, ["1"], ["2"]),
        (of_object({"decimal_part": STRING, "n": {"type": "number"}}, "n"), ['{"n":1.5}'], ['{"n":1.""}']),
        ({"pattern": r"^ab\.*$"}, ['"ab.."', '"ab"'], ['"ab.ab."']),
        ({"pattern": "^é{2}$"}, ['"éé"'], ['"é"']),
        ({"pattern": r'^a"\\\n$'}, [r'"a\"\\\n"'], ['"a"\\"']),
        ({"pattern": r"^\u0041\x42$"}, ['"AB"'], []),
        ({"pattern": r"^.\d$"}, ['"anything"'], ["1"]),
    ],
)  # fmt: skip
def test_values(given_schema: Any, accepted: list[str], refused: list[str]) -> None:
    grammar = schema_grammar(given_schema)
    assert [text for text in accepted if not admits(grammar, text)] == []
    assert [text for text in refused if admits(grammar, text)] == []


@pytest.mark.parametrize(
    "bad",
    [
        123, None, True, "string", [],
        {"type": 123}, {"type": "hiccup"}, {"type": []}, {"type": ["string", 1]}, {"type": True},
        {"$ref": "#/$defs/x"}, {"$ref": "https://example.com/schema.json"}, {"$ref": "#"}, {"$ref": 1},
        {"$ref": "#/enum/9", "enum": [1]}, {"$ref": "#/enum/" + "9" * 5000, "enum": [1]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"$ref": "#/$defs/a"}}},
        {"anyOf": []}, {"oneOf": {}}, {"allOf": []}, {"enum": []}, {"enum": "a"},
        {"pattern": 1}, {"pattern": "^(a$"}, {"pattern": "^a)$"}, {"pattern": "^[a$"}, {"pattern": "^*a$"},
        {"pattern": "^a{3,2}$"}, {"pattern": "^a\\$"}, {"pattern": "^|*$"},
        {"properties": []}, {"properties": {"a": True}}, {"additionalProperties": 1},
        {"type": "array", "items": True}, {"type": "array", "items": INTEGER, "minItems": -1},
        {"type": "array", "minItems": 2001}, {"minLength": 3, "maxLength": 2}, {"minLength": "1"},
        {"format": 1}, {"type": "integer", "minimum": True}, {"type": "integer", "minimum": 2, "maximum": 1},
    ],
)  # fmt: skip
def test_refusals(bad: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        schema_grammar(bad)
    assert caught.value.field == "json_schema"


def nested(depth: int, wrap: Any = lambda inner: {"type": "array", "items": inner}) -> Any:
    made: Any = INTEGER
    for _ in range(depth):
        made = wrap(made)
    return made


@pytest.mark.parametrize(
    "hostile",
    [
        nested(keywords.MAX_SCHEMA_DEPTH + 2),
        nested(100_000),
        nested(100_000, lambda inner: [inner]),
        nested(12, lambda inner: {"type": ["object"] * 10, "properties": {"a": inner}}),
        nested(schema.MAX_VISIT_DEPTH + 1),
        {"enum": ["x" * keywords.MAX_SCHEMA_CHARS]},
        of_object({str(i): {"const": 1} for i in range(schema.MAX_PROPERTIES + 1)}),
        {"$ref": "#/0", **{str(i): list_of({"$ref": f"#/{i + 1}"}) for i in range(200)}, "200": INTEGER},
        {"pattern": f"^{'a' * pattern.MAX_PATTERN_CHARS}$"},
        {"pattern": "^(a|a)+$"},
        {"pattern": "^(a?){1000}$"},
        {"pattern": "^((a{1000}){1000}){1000}$"},
        of_object({"p": {"pattern": "^(a+)+$"}, **{str(i): {} for i in range(50)}}),
        {"$ref": "#/0", "0": {"anyOf": [list_of({"$ref": "#/0"}), list_of({"$ref": "#/0"}, minItems=1)]}},
    ],
    ids=range(14),
)  # fmt: skip
def test_hostile_schemas_are_refused(hostile: Any) -> None:
    with pytest.raises(InvalidRequest):
        schema_grammar(hostile)


@pytest.mark.parametrize(
    "large",
    [
        {"enum": [f"value {i}" for i in range(900)]},
        of_object({f"property{i}": INTEGER for i in range(500)}),
        of_object({f"property{i}": {} for i in range(100)}, *(f"property{i}" for i in range(100))),
        {"type": "array", "maxItems": 100, "items": {"type": "string", "maxLength": 2000}},
        of_object({"_" * i: INTEGER for i in range(1, 150)}, additionalProperties=STRING),
        {"type": "array", "minItems": 2000, "maxItems": 10**30, "items": STRING},
        {"$ref": "#/0", **{str(i): of_object({key: {"$ref": f"#/{(i + 1) % 30}"} for key in "ab"}) for i in range(30)}},
        of_object({"p": {"pattern": "^" + "(" * 50 + "a" + ")" * 50 + "$"}}),
        of_object({"p": {"pattern": "^" + "(" * 51 + "a" + ")" * 51 + "$"}}),
    ],
    ids=range(9),
)  # fmt: skip
def test_large_schemas_are_converted(large: Any) -> None:
    assert parse(schema_grammar(large)).rules


@pytest.mark.parametrize(
    "name", ["ref-recursive", "property-reserved", "pattern-counts", "additional-unicode", "formats"]
)
def test_rules_for_a_larger_grammar_begin_with_the_prefix(name: str) -> None:
    given_schema = RECORDED["schemas"][name]["schema"]
    rules = schema_rules(given_schema, "tool-0")
    names = [line.partition(" ::= ")[0] for line in rules.splitlines()]
    assert names.count("tool-0") == 1
    assert all(each == "tool-0" or each.startswith("tool-0-") for each in names)
    check_grammar(f"root ::= tool-0 tool-1\n{rules}{schema_rules(given_schema, 'tool-1')}", must_finish=False)


NAMES = st.text(max_size=4) | st.sampled_from(
    ["root", "space", "string", "-", "a b", 'a"b', "]", "additional"]
)
PATTERNS = st.text(alphabet='ab()[]|*+?{}\\.1,^-"é', max_size=12)
LEAVES = (
    st.sampled_from([INTEGER, STRING, {}, {"type": "null"}, {"format": "date"}, {"$ref": "#/$defs/d"}])
    | st.builds(lambda value: {"const": value}, st.text() | st.integers() | st.floats(allow_nan=False))
    | st.builds(lambda a, b: {"type": "integer", "minimum": a, "maximum": b}, st.integers(), st.integers())
    | st.builds(lambda text: {"pattern": f"^{text}$"}, PATTERNS)
)


def containers(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    properties = st.dictionaries(NAMES, inner, max_size=4)
    members = st.lists(inner, min_size=1, max_size=3)
    return (
        st.builds(
            lambda p, more: {"properties": p, "additionalProperties": more}, properties, inner | st.booleans()
        )
        | st.builds(lambda items, n: list_of(items, maxItems=n), inner, st.integers(0, 5))
        | st.builds(lambda key, of: {key: of}, st.sampled_from(["anyOf", "allOf"]), members)
    )


SCHEMAS = st.recursive(LEAVES, containers, max_leaves=8)


@settings(max_examples=60, deadline=None)
@given(SCHEMAS, SCHEMAS)
def test_any_schema_is_converted_or_refused(made: dict[str, Any], other: dict[str, Any]) -> None:
    given_schema = {**made, "$defs": {"d": other}}
    with contextlib.suppress(InvalidRequest):
        grammar = schema_grammar(given_schema)
        rules = schema_rules(given_schema, "p")
        assert len(parse(f"root ::= p\n{rules}").rules) == len(parse(grammar).rules) + 1


@settings(max_examples=100)
@given(
    st.integers(-1500, 1500),
    st.integers(0, 1500),
    st.integers(-1700, 1700),
    st.sampled_from(["both", "low", "high"]),
)
def test_integer_ranges_admit_what_is_within(low: int, width: int, value: int, ends_given: str) -> None:
    bounds = {"minimum": low, "maximum": low + width}
    if ends_given != "both":
        del bounds["maximum" if ends_given == "low" else "minimum"]
    within = bounds.get("minimum", value) <= value <= bounds.get("maximum", value)
    assert admits(schema_grammar({"type": "integer", **bounds}), str(value)) == within


def test_a_schema_can_not_smuggle_rules_in() -> None:
    grammar = schema_grammar(of_object({'x" | root\nroot ::= "y': {"enum": ['"\nroot ::= "z"\n']}}))
    assert [line for line in grammar.splitlines() if line.startswith("root ::=")] == [
        'root ::= "{" space  (x-root-root-y-kv )? space "}"'
    ]
    with pytest.raises(BadGrammar):
        parse(grammar + "x")
