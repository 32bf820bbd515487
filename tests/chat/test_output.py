"""What models write becomes content, thoughts and calls, however it is cut."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wingman.chat import formats
from wingman.chat.cursor import Cursor
from wingman.chat.formats import FORMATS, OutputFormat
from wingman.chat.output import Delta, OutputParser, ParsedCall, ParsedMessage, ToolCallStart, collect
from wingman.chat.reasoning import HARMONY, THINK, ReasoningMode, ReasoningTags
from wingman.chat.tools import Tool

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS = (Tool("weather", "", SCHEMA), Tool("time", "", {"type": "object", "properties": {}}))
R7B = ReasoningTags("<|START_THINKING|>", "<|END_THINKING|>")

HERMES_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
OBJECT = '{"name": "weather", "arguments": {"city": "Rome"}}'
ROME = ParsedCall("weather", '{"city": "Rome"}')


def wide(text: str) -> str:
    """With the full-width bars of DeepSeek's special tokens."""
    return text.replace("|", "\uff5c")


CALLS: dict[str, str] = {
    "hermes": HERMES_CALL,
    "llama-3": '{"name": "weather", "parameters": {"city": "Rome"}}',
    "mistral-nemo": f"[TOOL_CALLS][{OBJECT}]",
    "mistral": '[TOOL_CALLS]weather[ARGS]{"city": "Rome"}',
    "functionary-v3.1": '<function=weather>{"city": "Rome"}</function>',
    "functionary-v3.2": '>>>weather\n{"city": "Rome"}',
    "command-r7b": '<|START_ACTION|>[\n  {"tool_name": "weather", "parameters": {"city": "Rome"}}\n]<|END_ACTION|>',
    "deepseek-r1": wide(
        "<|tool▁calls▁begin|><|tool▁call▁begin|>function<|tool▁sep|>weather\n```json\n"
        '{"city": "Rome"}\n```<|tool▁call▁end|><|tool▁calls▁end|>'
    ),
    "deepseek-v3.1": wide(
        "<|tool▁calls▁begin|><|tool▁call▁begin|>weather<|tool▁sep|>"
        '{"city": "Rome"}<|tool▁call▁end|><|tool▁calls▁end|>'
    ),
    "qwen3-coder": (
        "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call>"
    ),
    "seed-oss": (
        "<seed:tool_call>\n<function=weather>\n<parameter=city>Rome</parameter>\n</function></seed:tool_call>"
    ),
    "glm-4.5": "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n</tool_call>",
    "harmony": '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Rome"}',
    "apriel": f"<tool_calls>[{OBJECT}]</tool_calls>",
    "firefunction-v2": f" functools[{OBJECT}]",
}
TWO_CALLS: dict[str, str] = {
    "hermes": f"{HERMES_CALL}\n{HERMES_CALL}\n",
    "llama-3": f"{CALLS['llama-3']}; {CALLS['llama-3']}",
    "mistral-nemo": f"[TOOL_CALLS] [{OBJECT}, {OBJECT}]",
    "mistral": CALLS["mistral"] * 2,
    "functionary-v3.2": CALLS["functionary-v3.2"] * 2,
    "deepseek-r1": CALLS["deepseek-r1"].replace(wide("<|tool▁calls▁end|>"), "")
    + CALLS["deepseek-r1"].replace(wide("<|tool▁calls▁begin|>"), "\n"),
    "qwen3-coder": f"{CALLS['qwen3-coder']}\n{CALLS['qwen3-coder']}",
}
BY_NAME = {format.name: format for format in FORMATS}


def parse(
    format: OutputFormat | None, *pieces: str, tools: Sequence[Tool] = TOOLS, **options: Any
) -> ParsedMessage:
    return collect(deltas_of(format, *pieces, tools=tools, **options))


def deltas_of(
    format: OutputFormat | None, *pieces: str, tools: Sequence[Tool] = TOOLS, **options: Any
) -> list[Delta]:
    parser = OutputParser(format, tools=tools, **options)
    deltas = [delta for piece in pieces for delta in parser.push(piece)] + parser.finish()
    assert parser.called == any(isinstance(delta, ToolCallStart) for delta in deltas)
    return deltas


def test_every_format_has_a_sample() -> None:
    assert set(CALLS) == set(BY_NAME)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("parallel", [True, False])
def test_a_call(name: str, parallel: bool) -> None:
    assert parse(BY_NAME[name], CALLS[name], parallel=parallel) == ParsedMessage("", "", (ROME,))


@pytest.mark.parametrize("name", TWO_CALLS)
def test_two_calls(name: str) -> None:
    assert parse(BY_NAME[name], TWO_CALLS[name]).tool_calls == (ROME, ROME)
    assert parse(BY_NAME[name], TWO_CALLS[name]).content == ""
    assert parse(BY_NAME[name], TWO_CALLS[name], parallel=False) == ParsedMessage("", "", (ROME,))


@pytest.mark.parametrize("name", [name for name in CALLS if name != "llama-3"])
def test_content_before_a_call(name: str) -> None:
    before = "all\n" if name == "functionary-v3.2" else ""
    message = parse(BY_NAME[name], f"{before}Let me see: {{1 < 2}}\n{CALLS[name].lstrip()}")
    assert message == ParsedMessage("Let me see: {1 < 2}\n", "", (ROME,))


@pytest.mark.parametrize("name", CALLS)
def test_a_call_of_an_unknown_tool_is_content(name: str) -> None:
    text = CALLS[name].replace("weather", "wether").lstrip()
    assert parse(BY_NAME[name], text) == ParsedMessage(text)
    assert parse(BY_NAME[name], CALLS[name], tools=()).tool_calls == ()


@pytest.mark.parametrize("name", CALLS)
def test_a_call_cut_short_keeps_its_arguments(name: str) -> None:
    text = CALLS[name]
    (call,) = parse(BY_NAME[name], text[: text.index("Rome") + 2]).tool_calls
    assert call == ParsedCall("weather", '{"city": "Ro')


@pytest.mark.parametrize(
    "text", ["", "Hi", "  Hi \n", "\n\n", "<tool_", "a <b> {c} [TOOL", "<think", '{"name": "x']
)
@pytest.mark.parametrize("format", [None, *FORMATS], ids=lambda format: format.name if format else "none")
def test_plain_text_is_content_to_the_letter(format: OutputFormat | None, text: str) -> None:
    assert parse(format, text, tags=THINK) == ParsedMessage(text)


TIME = ParsedCall("time", "{}")
OTHER_FORMS: list[tuple[OutputFormat, str, str, tuple[ParsedCall, ...]]] = [
    (formats.LLAMA, '<|python_tag|>{"name": "time", "parameters": {}}', "", (TIME,)),
    (formats.LLAMA, '<|python_tag|>time.call(zone="x")', '<|python_tag|>time.call(zone="x")', ()),
    (formats.LLAMA, '{"type": "function", "name": "time", "arguments": {}}', "", (TIME,)),
    (formats.LLAMA, 'So: {"name": "time", "parameters": {}}', 'So: {"name": "time", "parameters": {}}', ()),
    (formats.MISTRAL, "[TOOL_CALLS]time[CALL_ID]abc[ARGS]{}", "", (ParsedCall("time", "{}", "abc"),)),
    (formats.MISTRAL, "[TOOL_CALLS]time{}", "", (TIME,)),
    (formats.MISTRAL_NEMO, '[TOOL_CALLS][{"name": "time", "arguments": {}, "id": "abc"}]', "", (TIME,)),
    (formats.FUNCTIONARY_V3_2, "all\nHi >>> there", "Hi >>> there", ()),
    (formats.FUNCTIONARY_V3_2, "time\n{}>>>all\nDone", "Done", (TIME,)),
    (formats.COMMAND_R7B, "<|START_RESPONSE|>Hi<|END_RESPONSE|>", "Hi", ()),
    (
        formats.COMMAND_R7B,
        '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "time", "parameters": {}}]<|END_ACTION|>',
        "",
        (ParsedCall("time", "{}", "0"),),
    ),
    (formats.QWEN3_CODER, "Ok\n<function=time>\n</function>\n</tool_call>", "Ok\n", (TIME,)),
    (
        formats.GLM,
        '<tool_call>weather<arg_key>city</arg_key><arg_value>a\n"b"</arg_value>'
        "<arg_key>days</arg_key><arg_value>3</arg_value></tool_call>",
        "",
        (ParsedCall("weather", '{"city": "a\\n\\"b\\"", "days": 3}'),),
    ),
    (formats.HARMONY, "<|channel|>final<|message|>Hi", "Hi", ()),
    (formats.HARMONY, " to=functions.time<|channel|>analysis<|message|>{}", "", (TIME,)),
    (
        formats.HARMONY,
        "<|channel|>commentary<|message|>Wait<|end|><|start|>assistant to=functions.time"
        "<|channel|>commentary json<|message|>{}",
        "Wait",
        (TIME,),
    ),
    (formats.HERMES, '<tool_call> <tool_call>{"name":"time","arguments":{}}', "<tool_call> ", (TIME,)),
]


@pytest.mark.parametrize(("format", "text", "content", "calls"), OTHER_FORMS)
def test_other_forms(format: OutputFormat, text: str, content: str, calls: tuple[ParsedCall, ...]) -> None:
    assert parse(format, text) == ParsedMessage(content, "", calls)


MALFORMED = [
    '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
    '<tool_call>{"arguments": {}, "name": "time"}</tool_call>',
    '<tool_call>{"name": "time", "arguments": "{}"}</tool_call>',
    '<tool_call>{"name": "time", "arguments": []}</tool_call>',
    '<tool_call>{"name": "time"}</tool_call>',
    '<tool_call>{"name": "time" "arguments": {}}</tool_call>',
    "<tool_call>time</tool_call>",
    '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "' + "a" * 1000,
]


@pytest.mark.parametrize("text", MALFORMED)
def test_what_is_no_call_is_content(text: str) -> None:
    assert parse(formats.HERMES, text) == ParsedMessage(text)


@pytest.mark.parametrize(
    ("rest", "arguments", "content"),
    [
        ('"a": tru}', '{"a": tru', "}"),
        ('"a": 01}', '{"a": 0', "1}"),
        ('"a": "\n"}', '{"a": "', '\n"}'),
        ("}} Done", "{}", "} Done"),
        ("}, Done", "{}", ", Done"),
        ("}}\n</tool_cal>", "{}", "}\n</tool_cal>"),
        ('}, "arguments": {"a": 1}}</tool_call>', "{}", ', "arguments": {"a": 1}}</tool_call>'),
        ('"a":' + "[" * 100, '{"a":' + "[" * 99, "["),
    ],
)
def test_what_goes_wrong_after_the_announcement_is_content(rest: str, arguments: str, content: str) -> None:
    text = '<tool_call>{"name": "time", "arguments": {' + rest
    assert parse(formats.HERMES, text) == ParsedMessage(content, "", (ParsedCall("time", arguments),))


def test_a_broken_call_may_be_followed_by_a_good_one() -> None:
    text = f'<tool_call>{{"name": "time", "arguments": {{x {HERMES_CALL}'
    message = parse(formats.HERMES, text)
    assert message.tool_calls == (ParsedCall("time", "{"), ROME)
    assert message.content == "x "
    assert len(parse(formats.HERMES, text, parallel=False).tool_calls) == 1


def test_a_call_is_announced_before_its_arguments_are_complete() -> None:
    parser = OutputParser(formats.HERMES, tools=TOOLS)
    assert parser.push('Ok <tool_call>{"name": "weather", "arguments": ')[-1].text == "Ok "  # type: ignore[union-attr]
    assert not parser.called
    assert collect(parser.push('{"city":')).tool_calls == (ParsedCall("weather", '{"city":'),)
    assert parser.called


def test_text_parameters_are_streamed_and_others_told_by_their_schema() -> None:
    parser = OutputParser(formats.QWEN3_CODER, tools=TOOLS)
    parser.push("<tool_call>\n<function=weather>\n<parameter=city>\n")
    assert [delta.text for delta in parser.push('a\n"b"\n</par')] == ['a\\n\\"b\\"']  # type: ignore[union-attr]
    rest = "ameter>\n<parameter=days>\n3\n</parameter>\n<parameter=x>\nNaN\n</parameter>\n</function>\n</tool_call>"
    assert "".join(delta.text for delta in parser.push(rest)) == '", "days": 3, "x": "NaN"}'  # type: ignore[union-attr]
    assert parser.finish() == []


REASONING: list[tuple[str, bool, str, str]] = [
    ("<think>a b</think>c", False, "a b", "c"),
    ("\n<think>\na\n\nb\n</think>\n\nc\n", False, "a\n\nb", "c\n"),
    ("<think></think>\n\nc", False, "", "c"),
    ("<think> \n</think>c", False, "", "c"),
    ("a</think>c", True, "a", "c"),
    ("<think>a</think>c", True, "a", "c"),
    ("a", True, "a", ""),
    ("<think>a </thi", False, "a </thi", ""),
    ("c<think>a</think>", False, "", "c<think>a</think>"),
    ("c</think>", False, "", "c</think>"),
]


@pytest.mark.parametrize(("text", "starts", "reasoning", "content"), REASONING)
def test_thoughts(text: str, starts: bool, reasoning: str, content: str) -> None:
    options: dict[str, Any] = {"tags": THINK, "starts_in_reasoning": starts}
    assert parse(None, text, **options) == ParsedMessage(content, reasoning)
    assert parse(None, text, reasoning=ReasoningMode.NONE, **options) == ParsedMessage(text)
    legacy = parse(None, text, reasoning=ReasoningMode.DEEPSEEK_LEGACY, **options)
    assert legacy == ParsedMessage(text, reasoning)


def test_thoughts_and_calls() -> None:
    text = f"<think>Should I {HERMES_CALL}?</think>\n\n{HERMES_CALL}"
    assert parse(formats.HERMES, text, tags=THINK).tool_calls == (ROME,)
    assert parse(formats.HERMES, text, tags=THINK).reasoning == f"Should I {HERMES_CALL}?"
    kept = parse(formats.HERMES, text, tags=THINK, reasoning=ReasoningMode.NONE)
    assert kept == ParsedMessage(text.removesuffix(f"\n\n{HERMES_CALL}"), "", (ROME,))
    bare = parse(formats.LLAMA, f"<think>a</think>{CALLS['llama-3']}", tags=THINK)
    assert bare == ParsedMessage("", "a", (ROME,))
    interrupted = parse(
        formats.QWEN3_CODER, f"a\n{CALLS['qwen3-coder']}", tags=THINK, starts_in_reasoning=True
    )
    assert interrupted == ParsedMessage("", "a", (ROME,))
    r7b = parse(formats.COMMAND_R7B, f"<|START_THINKING|>a<|END_THINKING|>{CALLS['command-r7b']}", tags=R7B)
    assert r7b == ParsedMessage("", "a", (ROME,))


def test_harmony_thinks_more_than_once() -> None:
    text = (
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary<|message|>b<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>c<|end|><|start|>assistant<|channel|>final<|message|>d"
    )
    assert parse(formats.HARMONY, text, tags=HARMONY) == ParsedMessage("bd", "ac")


PIECES = [
    *CALLS.values(), *TWO_CALLS.values(), *(text for _, text, *_ in OTHER_FORMS), *MALFORMED,
    *(text for text, *_ in REASONING), "<think>", "</think>", "all\n", ">>>", "[TOOL_CALLS]", "<tool_call>", "}", "\\",
    '"', ",", ";", " ", "\n", "]", "é😀", "</tool_call>", "<|end|>", "to=functions.", "</parameter>", "{",
]  # fmt: skip


@st.composite
def answers(draw: st.DrawFn) -> str:
    """Anything, but often parts of calls in any order, some of them damaged."""
    parts = draw(st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=4))
    text = "".join(parts)
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(text)))
        text = text[:place] + draw(st.text(max_size=1)) + text[place + draw(st.integers(0, 3)) :]
    return text


@given(
    st.sampled_from([None, *FORMATS]),
    answers(),
    st.lists(st.integers(0, 400), max_size=5),
    st.booleans(),
    st.sampled_from(ReasoningMode),
    st.sampled_from([None, THINK, HARMONY, R7B]),
    st.booleans(),
)
def test_deltas_depend_on_the_text_alone(
    format: OutputFormat | None,
    text: str,
    cuts: list[int],
    parallel: bool,
    mode: ReasoningMode,
    tags: ReasoningTags | None,
    starts: bool,
) -> None:
    options: dict[str, Any] = {
        "parallel": parallel, "reasoning": mode, "tags": tags, "starts_in_reasoning": starts,
    }  # fmt: skip
    whole = deltas_of(format, text, **options)
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(places)]
    for cut in (deltas_of(format, *pieces, **options), deltas_of(format, *text, **options)):
        check(cut, parallel)
        assert collect(cut) == collect(whole)
        assert mode is ReasoningMode.DEEPSEEK_LEGACY or joined(cut) == joined(whole)


def joined(deltas: list[Delta]) -> list[Delta]:
    """`deltas` with neighbours of a kind joined."""
    out: list[Delta] = []
    for delta in deltas:
        last = out[-1] if out else None
        same = type(last) is type(delta) and getattr(last, "index", None) == getattr(delta, "index", None)
        if same and not isinstance(delta, ToolCallStart):
            fields = {**as_dict(delta), "text": as_dict(last)["text"] + as_dict(delta)["text"]}
            out[-1] = type(delta)(**fields)
        else:
            out.append(delta)
    return out


def as_dict(delta: Any) -> dict[str, Any]:
    return {name: getattr(delta, name) for name in delta.__slots__}


def check(deltas: list[Delta], parallel: bool) -> None:
    starts = [delta for delta in deltas if isinstance(delta, ToolCallStart)]
    assert [start.index for start in starts] == list(range(len(starts)))
    assert all(start.name in ("weather", "time") for start in starts)
    assert parallel or len(starts) <= 1
    assert all(as_dict(delta).get("text") != "" for delta in deltas)
    seen = -1
    for delta in deltas:
        if isinstance(delta, ToolCallStart):
            seen = delta.index
        else:
            assert getattr(delta, "index", seen) == seen


JSON_CALLS = [name for name in CALLS if '{"city": "Rome"}' in CALLS[name]]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(
    st.sampled_from(JSON_CALLS),
    st.dictionaries(st.text(), JSON),
    st.booleans(),
)
def test_any_arguments_arrive_as_written(name: str, value: dict[str, Any], ascii_only: bool) -> None:
    arguments = json.dumps(value, ensure_ascii=ascii_only, indent=1 if ascii_only else None)
    message = parse(BY_NAME[name], CALLS[name].replace('{"city": "Rome"}', arguments))
    assert message == ParsedMessage("", "", (ParsedCall("weather", arguments),))


@given(
    st.sampled_from(["qwen3-coder", "seed-oss", "glm-4.5"]), st.text(st.characters(exclude_categories=["Cs"]))
)
def test_any_text_parameter_arrives_as_json(name: str, city: str) -> None:
    if "</" in city:
        return
    (call,) = parse(BY_NAME[name], CALLS[name].replace("Rome", city)).tool_calls
    assert json.loads(call.arguments) == {"city": city}


LONG = [
    HERMES_CALL[:60] + "x" * 100_000,
    "<tool_call>" * 9_000,
    "<tool_call>" + " " * 100_000,
    "<think>" + " " * 100_000,
    " " * 100_000,
    "<" * 100_000,
    '<tool_call>{"name": "time", "arguments": {"a":' + "[0,1]," * 17_000,
]


@pytest.mark.parametrize("text", LONG, ids=range(len(LONG)))
def test_work_per_character_does_not_grow(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No character is held and looked at again but within the length of a marker."""
    looked_at = 0
    push = Cursor.push

    def counting(cursor: Any, piece: str) -> None:
        nonlocal looked_at
        push(cursor, piece)
        looked_at += len(cursor._text)

    monkeypatch.setattr(Cursor, "push", counting)
    parse(formats.HERMES, *text, tags=THINK)
    assert looked_at < 20 * len(text)
