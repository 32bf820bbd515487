"""JSON schemas of requests -> checked GBNF.

Owns the order: convert, then check what comes out like any stranger's grammar. The API layer calls
it in the engine's executor, as a schema of the largest size takes some tenths of a second.
"""

from __future__ import annotations

from typing import Any

from wingman.chat.grammar import check_grammar
from wingman.chat.schema import Conversion, convert


def schema_grammar(schema: Any) -> str:
    """GBNF whose rule `root` admits what `schema` does; `{}` means any object, as in llama-server.

    Raises InvalidRequest (field "json_schema") for what is no schema, too large or not supported.
    """
    text = _converted(schema).text()
    check_grammar(text, "json_schema", must_finish=False)
    return text


def schema_rules(schema: Any, prefix: str) -> str:
    """The same rules for a larger grammar: `root` is called `prefix`, any other rule `prefix`-name.

    Raises as `schema_grammar` does; the larger grammar has yet to pass `check_grammar`.
    """
    return _converted(schema).text(prefix)


def _converted(schema: Any) -> Conversion:
    """The conversion of `schema`, whose patterns are checked on their own.

    In the whole they may lie beyond what the search for ambiguity reaches, and a pattern is the one
    place where a schema can be as ambiguous as a grammar.
    """
    conversion = convert(schema)
    if conversion.patterns:
        choices = [f'"{i}:" ({conversion.rules[name]})' for i, name in enumerate(conversion.patterns)]
        rules = {**conversion.rules, "root": " | ".join(choices)}
        check_grammar(Conversion(rules, frozenset()).text(), "json_schema")
    return conversion
