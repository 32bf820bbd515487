"""Templates: what they render, in the forms llama-server gives to messages, and that a hostile one can do
nothing."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wingman.chat.conversation import read_messages, render_prompt, split_prefill
from wingman.chat.template import CHATML, ChatTemplate, FamilyTemplate, Rendering
from wingman.engine.llama.families import apply_family, family_names
from wingman.errors import ConfigurationError, InvalidRequest

HI: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
OPEN = "{% if add_generation_prompt %}<a>{% endif %}"
LOOP = "{% for m in messages %}<{{ m.role }}>"
END = "{% endfor %}" + OPEN
STRICT = (
    LOOP
    + "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    + "{% endif %}{{ m.content | trim }}"
    + END
)
PARTS = LOOP + "{% for p in m.content %}{% if p.type == 'text' %}({{ p.text }}){% endif %}{% endfor %}" + END
EITHER = (
    LOOP
    + "{% if m.content is string %}{{ m.content }}{% else %}"
    + "{% for p in m.content %}({{ p.text }}){% endfor %}{% endif %}"
    + END
)
CALLS = (
    "{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    + LOOP
    + "{{ m.content }}{% for c in m.tool_calls %}[{{ c.id }} {{ c.function.name }}"
    + "{% for k, v in c.function.arguments.items() %} {{ k }}={{ v | tojson }}{% endfor %}]{% endfor %}"
    + "{% if m.role == 'tool' %}={{ m.tool_call_id }}{% endif %}"
    + END
)
TEXT_CALLS = (
    "{% for t in tools or [] %}{{ t.function.name }}: {{ t.function.description }}{% endfor %}"
    + LOOP
    + "{{ m.content }}{% for c in m.tool_calls or [] %}{{ '[' ~ c.function.name + c.function.arguments + ']' }}"
    + "{% endfor %}"
    + END
)
THINK = (
    LOOP
    + "{% if m.reasoning_content and (preserve_thinking or loop.last) %}<think>\n{{ m.reasoning_content }}\n"
    + "</think>\n\n{% endif %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>"
    + "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
QUEUE = (
    "{% set ns = namespace(ids=[], text='') %}{% macro put(x) %}({{ x }}){% endmacro %}"
    + "{% for m in messages %}{% set _ = ns.ids.append(m.role) %}{% set ns.text = ns.text + put(m.content) %}"
    + "{% endfor %}{{ ns.ids.pop(0) }}{{ ns.text[:100] }}{{ effort | default('none') }}"
    + "{% for k, v in (given | default({}, true)) | items %}{{ k ~ '=' ~ v }}{% endfor %}"
)
TEMPLATES = {
    "chatml": CHATML, "strict": STRICT, "parts": PARTS, "either": EITHER, "calls": CALLS,
    "text calls": TEXT_CALLS, "think": THINK, "queue": QUEUE,
}  # fmt: skip
COMPILED = {name: ChatTemplate(source) for name, source in TEMPLATES.items()}
TOOL = {
    "type": "function",
    "function": {"name": "f", "strict": True, "parameters": {"type": "object", "properties": {}}},
}
CALLED: list[dict[str, Any]] = [
    *HI,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1, null]}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "ok"},
]


def render(name: str, raw: list[dict[str, Any]], **rendering: Any) -> str:
    template = COMPILED[name]
    messages = read_messages(
        raw, knows_developer=template.knows_developer, typed_content=template.caps.typed_content
    )
    return render_prompt(template, split_prefill(messages), Rendering(**rendering), adds_bos=False)


def test_chatml() -> None:
    assert render("chatml", HI) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert render("chatml", HI, add_generation_prompt=False).endswith("<|im_end|>\n")


def test_blocks_are_trimmed_as_in_transformers() -> None:
    source = (
        "{% for m in messages %}\n    {%- if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\nend"
    )
    assert ChatTemplate(source).render(HI, Rendering()) == "hi\nend"


def test_variables_bos_tojson_and_loop_controls() -> None:
    source = "{{ bos_token }}{% for m in messages %}{{ m | tojson }}{{ x }}{% break %}{% endfor %}"
    rendering = Rendering(bos_token="<s>", variables={"x": "é", "messages": "not these"})
    assert ChatTemplate(source).render([*HI, *HI], rendering) == '<s>{"role": "user", "content": "hi"}é'


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ none }}{{ missing.a.b }}{{ 'a' + none }}{{ none ~ 'b' ~ 1 }}", "ab1"),
        ("{{ missing + 'a' }}{{ 'n' + 1 }}{{ missing | length }}{{ 'x' in missing }}", "an10False"),
        ("{{ none | default('d') }}{{ '' | default('e', true) }}{{ none | items | length }}", "de0"),
        ("{{ {'k': missing} | tojson }}{{ '<é>' | tojson }}", '{"k": null}"<é>"'),
        ("{{ messages | map(attribute='role') | tojson }}", '["user"]'),
        ("{{ {'copy': 1}.copy }}{{ 'a{}b'.format(2) }}{{ 'a b'.split(' ')[-1] }}", "1a2bb"),
        ("{% generation %}said{% endgeneration %}{{ '<b>' | safe + '<' }}", "said<b><"),
        ("{% for i in range(5) if i % 2 %}{{ loop.index }}{{ loop.last }}{% endfor %}", "1False2True"),
        ("{{ [1, 2, 3][1:] | join(',') }}{{ 'abc'[::-1] }}{{ 2 ** 3 + 7 % 4 - 1 * 2 }}", "2,3cba9"),
        ("{{ tools is defined }}{{ add_generation_prompt is defined }}{{ date_string | length }}", "FalseTrue11"),
    ],
)  # fmt: skip
def test_the_language_is_as_lenient_as_llama_cpp(source: str, text: str) -> None:
    assert ChatTemplate(source).render(HI, Rendering()) == text


# -- messages in the form a template takes --------------------------------------------------------


def test_what_templates_can_do_is_found_out() -> None:
    assert not COMPILED["strict"].caps.system
    assert not COMPILED["parts"].caps.string_content
    assert COMPILED["either"].caps.string_content
    assert COMPILED["either"].caps.typed_content
    assert COMPILED["calls"].caps.to_dict() == {
        "supports_object_arguments": True,
        "supports_parallel_tool_calls": True,
        "supports_preserve_reasoning": False,
        "supports_reasoning_effort": False,
        "supports_string_content": True,
        "supports_system_role": True,
        "supports_tool_calls": True,
        "supports_tools": True,
        "supports_typed_content": False,
    }
    assert COMPILED["text calls"].caps.tools
    assert not COMPILED["text calls"].caps.needs_object_arguments
    assert COMPILED["think"].caps.preserves_reasoning
    assert not COMPILED["chatml"].caps.tools
    assert ChatTemplate("{{ reasoning_effort }}").caps.reasoning_effort


def test_content_takes_the_form_of_the_template() -> None:
    raw = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert "a\nb" in render("chatml", raw)
    assert render("either", raw) == "<user>(a)(b)<a>"
    assert render("either", HI) == "<user>hi<a>"
    assert render("parts", HI) == "<user>(hi)<a>"


def test_a_system_message_joins_the_next_where_there_is_no_such_role() -> None:
    assert render("strict", [{"role": "system", "content": "be"}, *HI]) == "<user>be\nhi<a>"
    assert render("strict", [{"role": "system", "content": "be"}]) == "<a>"


def test_tools_and_calls() -> None:
    function = '{"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}}'
    expected = f'{{"type": "function", "function": {function}}}'
    expected += "<user>hi<assistant>[1 f x=[1, null]]<tool>ok=1<a>"
    assert render("calls", CALLED, tools=(TOOL,)) == expected
    assert render("text calls", CALLED) == '<user>hi<assistant>[f{"x": [1, null]}]<tool>ok<a>'


def test_arguments_that_are_no_json_are_refused_where_objects_are_needed() -> None:
    broken = [*HI, {"role": "assistant", "function_call": {"name": "f", "arguments": "{"}}, *HI]
    with pytest.raises(InvalidRequest) as caught:
        render("calls", broken)
    assert caught.value.field == "messages[1].tool_calls[0].function.arguments"
    assert "[f{]" in render("text calls", broken)


def test_developer_is_system_unless_the_template_knows_it() -> None:
    raw = [{"role": "developer", "content": "x"}, *HI]
    assert "<|im_start|>system\nx" in render("chatml", raw)
    knows = ChatTemplate(LOOP + "{% if m.role == 'developer' %}D{% endif %}{{ m.content }}{% endfor %}")
    assert knows.knows_developer
    assert read_messages(raw, knows_developer=True)[0]["role"] == "developer"


def test_rendering_changes_nothing_that_it_is_given() -> None:
    ids = ["a"]
    source = "{% set _ = ids.append('b') %}{{ ids | join }}"
    assert ChatTemplate(source).render(HI, Rendering(variables={"ids": ids})) == "ab"
    assert ids == ["a"]


# -- reasoning and prefill ------------------------------------------------------------------------


def test_thinking_is_on_and_reasoning_kept_unless_told_otherwise() -> None:
    raw = [*HI, {"role": "assistant", "content": "so", "reasoning_content": "hm"}, *HI]
    assert render("think", raw) == "<user>hi<assistant><think>\nhm\n</think>\n\nso<user>hi<assistant>"
    forget = {"preserve_reasoning": False, "enable_thinking": False}
    expected = "<user>hi<assistant>so<user>hi<assistant><think>\n\n</think>\n\n"
    assert render("think", raw, variables=forget) == expected
    with pytest.raises(InvalidRequest):
        render("think", raw, variables={"enable_thinking": "no"})


def test_an_answer_is_continued() -> None:
    so = {"role": "assistant", "content": "So,"}
    assert render("chatml", [*HI, so]).endswith("assistant\nSo,")
    assert render("think", [*HI, so]) == "<user>hi<assistant><think>\n\n</think>\n\nSo,"
    thought = so | {"reasoning_content": "hm"}
    assert render("think", [*HI, thought]) == "<user>hi<assistant><think>\nhm\n</think>\n\nSo,"
    assert render("think", [*HI, thought | {"content": ""}]) == "<user>hi<assistant><think>\nhm"


@pytest.mark.parametrize(
    ("signs", "expected"),
    [
        ("<|channel|>", "<user>hi<|start|>assistant<|channel|>analysis<|message|>hm<|end|>"
                        "<|start|>assistant<|channel|>final<|message|>So,"),
        ("<tool_call><function=<parameter=<think>", "<user>hi<|im_start|>assistant\n<think>\nhm\n</think>\n\nSo,"),
        ("laguna_glm_thinking", "<user>hi<a><think>hm</think>So,"),
    ],
)  # fmt: skip
def test_families_of_templates_begin_an_answer_in_their_own_way(signs: str, expected: str) -> None:
    template = ChatTemplate("{# " + signs + " #}" + LOOP + "{{ m.content }}" + END)
    conversation = split_prefill((HI[0], {"role": "assistant", "content": "So,", "reasoning_content": "hm"}))
    assert render_prompt(template, conversation, Rendering(), adds_bos=False) == expected


def test_harmony_has_thinking_and_no_return_token() -> None:
    source = "{# <|channel|> #}{% for m in messages %}{{ m.thinking }}{{ m.content }}<|return|>{% endfor %}"
    raw = ({"role": "assistant", "content": "so", "reasoning_content": "hm"}, HI[0])
    text = ChatTemplate(source).render(raw, Rendering(add_generation_prompt=False))
    assert text == "hmso<|return|>hi<|end|>"


def test_gemma_joins_calls_results_and_answer() -> None:
    source = (
        "{# '<|tool_call>call:' #}{% for m in messages %}{{ m.role }}{{ m.tool_responses | tojson }}"
        "{{ m.content }};{% endfor %}"
    )
    raw = [*CALLED, {"role": "assistant", "content": "done"}, *HI]
    text = ChatTemplate(source).render(read_messages(raw, knows_developer=False), Rendering())
    assert text == 'usernullhi;assistant[{"name": "f", "response": "ok"}]done;usernullhi;'


def test_results_are_put_in_the_order_of_the_calls() -> None:
    source = "{# dsml_token DSML tool_calls #}" + LOOP + "{{ m.content }}" + END
    calls = [{"id": name, "function": {"name": "f", "arguments": "{}"}} for name in "ab"]
    results = [{"role": "tool", "tool_call_id": name, "content": name} for name in "ba"]
    raw = [{"role": "assistant", "tool_calls": calls}, *results, *HI]
    text = ChatTemplate(source).render(read_messages(raw, knows_developer=False), Rendering())
    assert text == "<assistant><tool>a<tool>b<user>hi<a>"


def test_bos_is_not_repeated() -> None:
    messages = read_messages([*HI, {"role": "assistant", "content": "So,"}], knows_developer=False)
    template = ChatTemplate("{{ bos_token }}" + CHATML)
    text = render_prompt(template, split_prefill(messages), Rendering(bos_token="<s>"), adds_bos=True)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nSo,"
    kept = render_prompt(template, split_prefill(messages), Rendering(bos_token="<s>"), adds_bos=False)
    assert kept.startswith("<s>")


# -- hostile templates and data -------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.clear() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ messages | map(attribute='__class__') | first }}{{ ''.x.y() }}",
        "{{ 'x'.center(9) }}",
        "{{ (1).to_bytes(9) }}",
        "{{ '%999999999d' % 1 }}",
    ],
)
def test_nothing_of_ours_is_in_reach(source: str) -> None:
    with pytest.raises(InvalidRequest):
        ChatTemplate(source).render(HI, Rendering())


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10000000) %}x{% endfor %}",
        "{% for i in range(90000) %}{% for j in range(90000) %}{{ 'x' * 1000 }}{% endfor %}{% endfor %}",
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
        "{% for i in range(90000) %}{% for j in range(90000) if false %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}",
        "{% for x in [[]] recursive %}{% if loop.depth < 40 %}{{ loop([[]]) }}{{ loop([[]]) }}{% endif %}"
        "{% endfor %}",
        "{{ 'x' * 10 ** 9 }}",
        "{{ [1] * 10 ** 9 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ ('x' * 9000).replace('', 'y' * 9000) }}",
        "{{ ('x' * 9000) | replace('x', 'y' * 9000) }}",
        "{{ ('y' * 9000).join(['z'] * 9000) }}",
        "{{ 'x' | indent(10 ** 9) }}",
        "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% set ns = namespace(s=['x']) %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}"
        "{% endfor %}",
        *(
            "{% set ns = namespace(a='x', b='y') %}{% for i in range(99) %}{% set ns.a = [ns.a, ns.a] %}"
            "{% set ns.b = {'x': ns.b, 'y': ns.b} %}{% endfor %}" + use
            for use in (
                "{{ ns.a }}",
                "{{ ns.b | tojson }}",
                "{{ ns.b | string }}",
                "{{ ns.a == ns.b }}",
                "{{ ns.a is eq(ns.b) }}",
                "{{ [ns.a] | sort }}",
                "{{ 'x' + ns.a }}",
            )
        ),
        "{{ ('x ' * 4000000).split() }}",
        "{{ ('x' * 4000000) | list }}",
        "{{ ('{}' * 9000).format(*(['x' * 9000] * 9000)) }}",
        "{% set ns = namespace(s=7) %}{% for i in range(99) %}{% set ns.s = ns.s * ns.s %}{% endfor %}",
        "{% set s = 'x' * 9000000 %}{% for i in range(90000) %}{% set t = s[1:] %}{% endfor %}",
        "{% set s = 'x' * 9000000 %}{% for i in range(90000) %}{% set t = 'y' in s %}{% endfor %}",
    ],
)
def test_the_work_of_a_render_is_bounded(source: str) -> None:
    with pytest.raises(InvalidRequest, match=r"too much work|can't render"):
        ChatTemplate(source, budget=200_000).render(HI, Rendering())


def test_a_long_conversation_is_within_the_bounds() -> None:
    raw = [{"role": role, "content": "x" * 500} for _ in range(1500) for role in ("user", "assistant")]
    text = render("queue", [*raw, *HI])
    assert text.startswith("user(xxx")


def test_raise_exception_reaches_the_client() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        render("strict", [*HI, *HI])


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ 'x' | nonsense }}", "{{ " + "(" * 5000, "{% include 'x' %"]
)
def test_a_template_that_does_not_compile_is_a_configuration_error(source: str) -> None:
    with pytest.raises(ConfigurationError):
        ChatTemplate(source)


def test_too_many_or_too_deep_variables_are_refused() -> None:
    nested: Any = "x"
    for _ in range(200):
        nested = [nested]
    for variables in ({f"v{n}": n for n in range(100)}, {"given": nested}):
        with pytest.raises(InvalidRequest):
            render("queue", HI, variables=variables)
    assert (
        render("queue", HI, variables={" meter": 1, "range": 2, "a b": 3, "effort": "low"}) == "user(hi)low"
    )


KEYS = st.sampled_from(
    "role content tool_calls function_call function name arguments id type text tool_call_id reasoning_content "
    "enable_thinking given effort x".split()
)
TEXTS = st.sampled_from(
    ["user", "assistant", "system", "tool", "function", "developer", "text", "{}"]
) | st.text(st.characters(codec="utf-8"), max_size=5)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=20,
)
MESSAGE_FIELDS: dict[str, Any] = {
    "role": TEXTS,
    "content": TEXTS | VALUES,
}
CALL = st.fixed_dictionaries(
    {"function": st.fixed_dictionaries({"name": TEXTS, "arguments": TEXTS | VALUES})},
    optional={"type": st.just("function") | VALUES, "id": TEXTS | VALUES},
)
OPTIONAL_FIELDS = {
    "tool_calls": st.lists(CALL | VALUES, max_size=2),
    "reasoning_content": TEXTS,
    "name": VALUES,
}
MESSAGES = st.lists(st.fixed_dictionaries(MESSAGE_FIELDS, optional=OPTIONAL_FIELDS) | VALUES, max_size=4)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(TEMPLATES)), MESSAGES, st.none() | st.dictionaries(KEYS, VALUES, max_size=3))
def test_any_json_renders_or_is_refused(name: str, raw: list[Any], variables: dict[str, Any] | None) -> None:
    try:
        text = render(name, raw, variables=variables)
    except InvalidRequest:
        return
    assert isinstance(text, str)


# -- built-in families ----------------------------------------------------------------------------


def test_families() -> None:
    assert {"chatml", "llama3", "command-r"} <= set(family_names())
    llama3 = FamilyTemplate("llama3", apply_family)
    assert llama3.render(HI, Rendering()).endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert llama3.resume(HI, Rendering(), "", "So,").endswith("\n\nSo,")
    recognised = FamilyTemplate("{{ '<|im_start|>' }}", apply_family)
    assert recognised.render(HI, Rendering()) == ChatTemplate(CHATML).render(HI, Rendering())
    with pytest.raises(ConfigurationError):
        FamilyTemplate("{{ 'nothing known' }}", apply_family)
