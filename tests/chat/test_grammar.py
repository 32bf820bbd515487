"""Grammars: what GBNF is, and that nothing passes on which llama.cpp crashes or never ends."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wingman.chat import gbnf, grammar
from wingman.chat.gbnf import CharSet, parse
from wingman.chat.grammar import check_grammar
from wingman.errors import InvalidRequest

JSON = r"""
# any JSON value
root   ::= value
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""


@pytest.mark.parametrize(
    "text",
    [
        JSON,
        'root ::= "a"',
        'root ::= "a" # comment\r\n\r\nother ::= root',
        'root ::= (\n "a" |\n "b"\n)',
        'root ::= "a" |\n "b"',
        'root ::= "a"\nroot ::= "b"',
        "root ::= [a-z]+ ([ ,] [a-z]+)*",
        r'root ::= [\]\[\-\\"] [a-] [-a] [^\n] . "\x41é\U0001F600"',
        'root ::= "a"{2} "b"{2,} "c"{ 0 , 3 } "d"{2000} "e"{0,99999}',
        "root ::= ",
        'root ::= ("a"? "b"?)*',
        'root ::= "[" (root ("," root)*)? "]" | [0-9]+',
        'root ::= term ([-+] term)*\nterm ::= [a-z]+ | "(" root ")"',
        'root ::= "- " [^\\n]+ "\\n" root | "end"',
        'root ::= int | float\nint ::= [0-9]+\nfloat ::= [0-9]+ "." [0-9]+',
    ],
)
def test_grammars_pass(text: str) -> None:
    check_grammar(text)


@pytest.mark.parametrize(
    "text",
    [
        "", "  # nothing", "root", "root :=", "root = x", 'start ::= "a"', "root ::= missing", 'root ::= "a" ::= "b"',
        'root ::= "a', "root ::= [a", 'root ::= ("a"', 'root ::= "a")', 'root ::= "a" }', "root ::= *",
        'root ::= | * "a"',
        'root ::= ""+', "root ::= []*", 'root ::= "a"{0}*', 'root ::= "a"{', 'root ::= "a"{,3}', 'root ::= "a"{1,2',
        r'root ::= "\q"', r'root ::= "\x4"', r'root ::= [\d]', 'root ::= "a\\', 'root ::= "\0"', 'root ::= "\ud800"',
        'root ::= a_b', 'root ::= "a"\n| "b"', "root ::= <[1]>", "root ::= !<[1]>", "root ::= <eos>",
        "\ufeffroot ::= a",
    ],
)  # fmt: skip
def test_malformed_grammars_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^failed to parse grammar") as caught:
        check_grammar(text)
    assert caught.value.field == "grammar"
    caught.value.message.encode()


def chain(n: int, body: str) -> str:
    return "root ::= r0\n" + "".join(f"r{i} ::= {body.format(i + 1)}\n" for i in range(n)) + f'r{n} ::= "a"\n'


@pytest.mark.parametrize(
    "text",
    [
        # parsing: recursion, sums, counts out of order
        f"root ::= {'(' * 101}{')' * 101}",
        f"root ::= {'(' * 120_000}",
        'root ::= "' + "a" * gbnf.MAX_GRAMMAR_BYTES + '"',
        'root ::= "' + "é" * (gbnf.MAX_GRAMMAR_BYTES // 2) + '"',
        f'root ::= "{"a" * 1000}"' + "{2000}",
        f'root ::= "{"a" * 1000}"' + "{0,2000}",
        "root ::= " + '("a"{2000}) ' * 60,
        "root ::= " + "() " * 21_000,
        'root ::= "a"{3,2}',
        'root ::= "a"{2001}',
        'root ::= "a"{' + "9" * 5000 + "}",
        # left recursion, open and hidden
        'root ::= root "a" | "b"',
        'root ::= x "a"\nx ::= y\ny ::= "b"? root',
        'root ::= x root "y" | "z"\nx ::= y\ny ::= "" | "q"',
        'root ::= "a"\nunused ::= unused "b" | "c"',
        # no way to begin
        "root ::= root",
        'root ::= x root\nx ::= y\ny ::= "" | z\nz ::= ""',
        # too many calls, too deep
        chain(40, '{0} | {0} "x"'.replace("{0}", "r{0}")),
        chain(6000, "r{0}"),
        # ambiguity
        'root ::= ("a" | "a")+',
        'root ::= ("a"+)+ "b"',
        'root ::= ("=" | "="){1,63} "b"',
        'root ::= ("==" | "==")+ "b"',
        'root ::= ("a"?){1000}',
        'root ::= [a-z] rest\nrest ::= "-" ([a-c] | [b-d])+ | "+" rest',
        'root ::= s\ns ::= "a" s "b" | "a" s "c" | "d"',
        "root ::= " + " | ".join(['"a"'] * 1001),
    ],
    ids=range(27),
)
def test_what_llama_cpp_would_crash_on_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^failed to parse grammar"):
        check_grammar(text)


def test_a_large_grammar_may_be_accepted_unsearched() -> None:
    large = 'root ::= ("a"{1000} "b"){1000}'
    with pytest.raises(InvalidRequest, match="too many states"):
        check_grammar(large)
    check_grammar(large, must_finish=False)
    with pytest.raises(InvalidRequest, match="too ambiguous"):
        check_grammar('root ::= ("a" | "a")+', must_finish=False)


@pytest.mark.parametrize(
    ("text", "char_set"),
    [
        ("[a-c]", ((97, 99),)),
        ("[c-a]", ()),
        ("[acb]", ((97, 99),)),
        ("[a-cb-dx]", ((97, 100), (120, 120))),
        ("[^a-c]", ((0, 96), (100, 0x10FFFF))),
        ("[^c-a]", ((0, 0x10FFFF),)),
        (r"[^\x00-\U7FFFFFFF]", ()),
        ("[a-]", ((45, 45), (97, 97))),
        ("[--0]", ((45, 48),)),
        (".", ((0, 0x10FFFF),)),
        (r'"\n"', ((10, 10),)),
        (r'"\""', ((34, 34),)),
    ],
)
def test_characters(text: str, char_set: CharSet) -> None:
    parsed = parse(f"root ::= {text}")
    assert parsed.rules[parsed.root] == [[char_set]]


def test_repetitions_become_rules_as_in_llama_cpp() -> None:
    a = ((97, 97),)
    assert parse('root ::= "a"{2,4}').rules == [[[a, a, 2]], [[a], []], [[a, 1], []]]
    assert parse('root ::= "a"+').rules == [[[a, 1]], [[a, 1], []]]
    assert parse('root ::= "a"*').rules == [[[1]], [[a, 1], []]]
    assert parse('root ::= "ba"?').rules == [[[1]], [[((98, 98),), a], []]]
    assert parse('root ::= "a"{0}').rules == [[[]]]
    assert parse("root ::= [] ()").rules == [[[1]], [[]]]


TOKENS = [
    '"a"',
    '"=="',
    "[a-z]",
    "[^a]",
    ".",
    "(",
    ")",
    "|",
    "*",
    "+",
    "?",
    "{2,3}",
    "x",
    "root",
    "\n",
    "::=",
    " ",
]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(TOKENS) | st.characters(), max_size=30).map("".join))
def test_any_text_is_accepted_or_refused(text: str) -> None:
    for each in (text, f"root ::= {text}", f'root ::= {text}\nx ::= "x" {text}'):
        with contextlib.suppress(InvalidRequest):
            check_grammar(each)
            assert parse(each).rules


def test_limits_are_those_documented() -> None:
    check_grammar(f'root ::= {"(" * gbnf.MAX_DEPTH}"a"{")" * gbnf.MAX_DEPTH}')
    check_grammar('root ::= "' + "a" * 40_000 + '"')
    check_grammar(chain(grammar.MAX_LEFT_DEPTH // 10, "r{0}"))


@pytest.mark.parametrize(
    "text",
    [
        "root ::= " + " | ".join(f'[^\\x01]{{4}} "{chr(0x4E00 + i)}"' for i in range(900)),
        "root ::= [^" + "\\x01" * 2000 + "]",
        "root ::= " + " | ".join(f'c c "{chr(0x4E00 + i)}"' for i in range(200)) + "\nc ::= [^a-f]",
    ],
)
def test_what_takes_the_whole_vocabulary_too_long_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        check_grammar(text)


def test_many_words_are_no_trouble() -> None:
    check_grammar("root ::= " + " | ".join(f'"word{i}"' for i in range(500)))
