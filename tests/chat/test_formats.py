"""Templates are recognised, and a grammar admits the calls of its format and nothing else."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

from wingman.chat import formats
from wingman.chat.formats import FORMATS, OutputFormat, detect_format
from wingman.chat.gbnf import parse
from wingman.chat.output import OutputParser, collect
from wingman.chat.reasoning import HARMONY, THINK, ReasoningTags, detect_reasoning
from wingman.chat.toolgrammar import call_grammar
from wingman.chat.tools import Tool
from wingman.errors import InvalidRequest

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
TOOLS = (Tool("weather", "", SCHEMA), Tool("time", "", {"type": "object", "properties": {}}))
R7B = ReasoningTags("<|START_THINKING|>", "<|END_THINKING|>")


def wide(text: str) -> str:
    """With the full-width bars of DeepSeek's special tokens."""
    return text.replace("|", "\uff5c")


HERMES_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 3}}\n</tool_call>'
CODER_CALL = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call>"
)
CALLS: list[tuple[OutputFormat, str]] = [
    (formats.HERMES, HERMES_CALL),
    (formats.MISTRAL_NEMO, '[TOOL_CALLS][{"name": "time", "arguments": {}}]'),
    (formats.MISTRAL, '[TOOL_CALLS]weather[CALL_ID]abcdef123[ARGS]{"city": "Rome"}'),
    (formats.FUNCTIONARY_V3_1, "<function=time>{}</function>"),
    (formats.COMMAND_R7B, '<|START_ACTION|>[\n    {"tool_name": "time", "parameters": {}}\n]<|END_ACTION|>'),
    (
        formats.DEEPSEEK_R1,
        wide("<|tool▁calls▁begin|><|tool▁call▁begin|>function<|tool▁sep|>time\n```json\n{}\n```")
        + wide("<|tool▁call▁end|><|tool▁calls▁end|>"),
    ),
    (
        formats.DEEPSEEK_V3_1,
        wide("<|tool▁calls▁begin|><|tool▁call▁begin|>time<|tool▁sep|>{}<|tool▁call▁end|><|tool▁calls▁end|>"),
    ),
    (formats.QWEN3_CODER, CODER_CALL),
    (
        formats.QWEN3_CODER,
        CODER_CALL.replace("</function>", "<parameter=days>\n3\n</parameter>\n</function>"),
    ),
    (formats.SEED, CODER_CALL.replace("tool_call", "seed:tool_call").replace("\nRome\n", "Rome")),
    (formats.GLM, "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>a\n<</arg_value>\n</tool_call>"),
    (formats.HARMONY, "<|channel|>commentary to=functions.time <|constrain|>json<|message|>{}"),
    (formats.APRIEL, '<tool_calls>[{"name": "time", "arguments": {}}]</tool_calls>'),
    (formats.FIREFUNCTION, 'functools[{"name": "time", "arguments": {}}]'),
]
REQUIRED_CALLS = [
    *CALLS,
    (formats.LLAMA, '{"name": "weather", "parameters": {"city": "Rome"}}'),
    (formats.FUNCTIONARY_V3_2, 'weather\n{"city": "Rome"}'),
]


def admits(grammar: str, text: str) -> bool:
    """Whether the whole of `text` matches; stacks of what is still to come, as in llama.cpp."""
    parsed = parse(grammar)

    def expand(stacks: set[tuple[Any, ...]]) -> set[tuple[Any, ...]]:
        out, todo = set(), list(stacks)
        while todo:
            stack = todo.pop()
            if stack and isinstance(stack[0], int):
                todo += [(*sequence, *stack[1:]) for sequence in parsed.rules[stack[0]]]
            else:
                out.add(stack)
        return out

    stacks = expand({(parsed.root,)})
    for char in map(ord, text):
        taking = [stack for stack in stacks if stack and any(low <= char <= high for low, high in stack[0])]
        stacks = expand({stack[1:] for stack in taking})
    return () in stacks


def grammar_of(format: OutputFormat, **options: Any) -> str:
    return call_grammar(format, TOOLS, **{"parallel": False, "required": False, **options})


@pytest.mark.parametrize(("format", "call"), CALLS)
@pytest.mark.parametrize("parallel", [False, True])
def test_a_lazy_grammar_begins_with_a_trigger(format: OutputFormat, call: str, parallel: bool) -> None:
    assert call.startswith(format.triggers)
    grammar = grammar_of(format, parallel=parallel)
    assert admits(grammar, call)
    for wrong in (
        f"x{call}",
        f"{call}x",
        call[:-1],
        call.replace("time", "tame").replace("weather", "wether"),
    ):
        assert not admits(grammar, wrong)


@pytest.mark.parametrize(("format", "call"), REQUIRED_CALLS)
def test_a_required_call_may_follow_thoughts_only(format: OutputFormat, call: str) -> None:
    plain = grammar_of(format, required=True)
    assert admits(plain, call)
    assert not admits(plain, f"Hi {call}")
    assert not admits(plain, "")
    assert not admits(plain, f"<think>a</think>{call}")
    thinking = grammar_of(format, required=True, tags=THINK)
    assert admits(thinking, call)
    assert admits(thinking, f"<think>\na </th <</think>\n\n{call}")
    assert not admits(thinking, f"<think>a</think>b</think>{call}")
    inside = grammar_of(format, required=True, tags=THINK, starts_in_reasoning=True)
    assert admits(inside, f"a\n</think>\n{call}")
    assert not admits(inside, call)


def test_more_than_one_call_only_if_parallel() -> None:
    functionary = (formats.FUNCTIONARY_V3_2, "time\n{}>>>time\n{}")
    llama = (formats.LLAMA, '{"name": "time", "parameters": {}}; {"name": "time", "parameters": {}}')
    for format, calls in ((formats.HERMES, f"{HERMES_CALL}\n{HERMES_CALL}"), functionary, llama):
        assert admits(grammar_of(format, required=True, parallel=True), calls)
        assert not admits(grammar_of(format, required=True), calls)


def test_arguments_follow_the_schema() -> None:
    grammar = grammar_of(formats.HERMES)
    for arguments in ('{"city": 5}', '{"days": 3}', '{"city": "Rome", "x": 1}', "{}", "[]"):
        assert not admits(grammar, HERMES_CALL.replace('{"city": "Rome", "days": 3}', arguments))
    coder = grammar_of(formats.QWEN3_CODER)
    assert not admits(coder, "<tool_call>\n<function=weather>\n</function>\n</tool_call>")
    assert admits(coder, "<tool_call>\n<function=time>\n</function>\n</tool_call>")


def test_references_of_a_parameter_are_resolved() -> None:
    schema = {"properties": {"n": {"$ref": "#/$defs/count"}}, "$defs": {"count": {"type": "integer"}}}
    grammar = call_grammar(formats.QWEN3_CODER, [Tool("f", "", schema)], parallel=False, required=False)
    call = "<tool_call>\n<function=f>\n<parameter=n>\n12\n</parameter>\n</function>\n</tool_call>"
    assert admits(grammar, call)
    assert not admits(grammar, call.replace("12", "a"))


@pytest.mark.parametrize("format", [formats.HERMES, formats.QWEN3_CODER])
def test_a_bad_schema_is_refused(format: OutputFormat) -> None:
    tool = Tool("f", "", {"type": "object", "properties": {"a": {"type": "hiccup"}}})
    with pytest.raises(InvalidRequest, match="tool f") as caught:
        call_grammar(format, [tool], parallel=False, required=True)
    assert caught.value.field == "tools"


@pytest.mark.parametrize(("format", "call"), REQUIRED_CALLS)
def test_what_a_grammar_admits_is_a_call(format: OutputFormat, call: str) -> None:
    parser = OutputParser(format, tools=TOOLS)
    message = collect(parser.push(call) + parser.finish())
    assert (message.content, len(message.tool_calls)) == ("", 1)


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_no_marker_begins_with_another(format: OutputFormat) -> None:
    for tags in (None, THINK, R7B, HARMONY):
        texts = {*format.beginnings, *format.dropped, *((tags.open,) if tags else ())}
        assert not any(a.startswith(b) or b.startswith(a) for a, b in combinations(texts, 2))


TEMPLATES = [
    ("{{ '<|im_start|>' }}", formats.HERMES, None),
    ("within <tool_call></tool_call> XML tags ... content.split('</think>')", formats.HERMES, THINK),
    ("<|start_header_id|> {\"name\": function name, \"parameters\": dictionary}", formats.LLAMA, None),
    ("[TOOL_CALLS][ {{ tool_call }}", formats.MISTRAL_NEMO, None),
    ("[TOOL_CALLS]{{ name }}[ARGS] [THINK]", formats.MISTRAL, ReasoningTags("[THINK]", "[/THINK]")),
    (">>>${recipient}\\n${content}", formats.FUNCTIONARY_V3_2, None),
    ("<function=example_function_name>{", formats.FUNCTIONARY_V3_1, None),
    ("<|START_THINKING|> <|START_ACTION|>", formats.COMMAND_R7B, R7B),
    (wide("<|tool▁sep|>") + "'```json' </think>", formats.DEEPSEEK_R1, THINK),
    (wide("<|tool▁sep|>"), formats.DEEPSEEK_V3_1, None),
    ("<seed:tool_call>\\n<function=a>\\n<parameter=b>", formats.SEED, None),
    ("<tool_call>\\n<function=a>\\n<parameter=b>", formats.QWEN3_CODER, None),
    ("<tool_call>{function-name}\\n<arg_key>", formats.GLM, None),
    ("<|channel|>analysis", formats.HARMONY, HARMONY),
]  # fmt: skip


@pytest.mark.parametrize(("source", "format", "tags"), TEMPLATES)
def test_templates_are_recognised(source: str, format: OutputFormat, tags: ReasoningTags | None) -> None:
    assert detect_format(source) is format
    assert detect_reasoning(source) == tags


def test_preserved_tokens_and_prompts_that_open_thoughts() -> None:
    assert formats.HERMES.preserved == ("<tool_call>", "</tool_call>")
    assert formats.MISTRAL.preserved == ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
    assert {"<|channel|>", "<|message|>", "<|start|>"} <= set(formats.HARMONY.preserved)
    assert THINK.opened_by("<|im_start|>assistant\n<think>\n")
    assert not THINK.opened_by("<think></think>\n")
