"""GBNF text and JSON schemas from a hostile client.

Invariant: whatever the text, it is accepted or refused with InvalidRequest, as a grammar and, if it
is JSON, as a schema; and the grammar made of a schema is one, under any prefix.
"""

from __future__ import annotations

import orjson

from wingman.chat.constraint import schema_grammar, schema_rules
from wingman.chat.gbnf import parse
from wingman.chat.grammar import check_grammar
from wingman.errors import InvalidRequest

_KEYWORDS = b"type properties required additionalProperties items minItems maxItems enum const anyOf oneOf allOf $ref \
$defs pattern format minLength maxLength minimum exclusiveMaximum a object array string integer number null".split()
_GBNF = b"root ::= | ( ) * + ? {2} {0,3} {2000} {3,2} [a-z] [^a] [] [^] . <[1]> ! # \\x41 \\n \\".split()
TOKENS = (
    *_GBNF, b'"a"', b'""', b'"', b"\n", b" ", b"x ::= ", b"(" * 120, b"\xc3\xa9", b"\x00", b"\xff",
    *(b'"%s":' % word for word in _KEYWORDS), *(b'"%s"' % word for word in _KEYWORDS[-8:]),
    b"{", b"}", b"[", b"]", b",", b"{}", b"0", b"-1", b"1e300", b"2001", b"true", b'"^(a|b)*$"', b'"#/$defs/a"',
)  # fmt: skip


def one(data: bytes) -> None:
    """Check the invariant for `data`."""
    text = data.decode("utf-8", "surrogateescape")
    try:
        check_grammar(text)
    except InvalidRequest as refusal:
        refusal.message.encode()  # goes into an answer
    else:
        assert parse(text).rules
    try:
        schema = orjson.loads(data)
    except orjson.JSONDecodeError:
        return
    _check_schema(schema)


def _check_schema(schema: object) -> None:
    try:
        grammar = schema_grammar(schema)
        rules = schema_rules(schema, "p")
    except InvalidRequest as refusal:
        refusal.message.encode()
        return
    assert len(parse(f"root ::= p\n{rules}").rules) == len(parse(grammar).rules) + 1
