"""Templates: what they render, and that a hostile one can do nothing."""

from __future__ import annotations

import pytest

from wingman.chat.conversation import read_messages, render_prompt, split_prefill
from wingman.chat.template import CHATML, ChatTemplate, FamilyTemplate, Rendering
from wingman.engine.llama.families import apply_family, family_names
from wingman.errors import ConfigurationError, InvalidRequest

HI = [{"role": "user", "content": "hi"}]


def test_chatml() -> None:
    text = ChatTemplate(CHATML).render(HI, Rendering())
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert ChatTemplate(CHATML).render(HI, Rendering(add_generation_prompt=False)).endswith("<|im_end|>\n")


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
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{% for i in range(10000000) %}x{% endfor %}",
        "{% for i in range(90000) %}{% for j in range(90000) %}{{ 'x' * 1000 }}{% endfor %}{% endfor %}",
        "{{ undefined.attribute.of }}",
    ],
)
def test_hostile_and_broken_templates_are_refused(source: str) -> None:
    with pytest.raises(InvalidRequest):
        ChatTemplate(source).render(HI, Rendering())


def test_raise_exception_reaches_the_client() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render(HI, Rendering())


def test_a_template_that_does_not_compile_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError):
        ChatTemplate("{% if %}")


def test_families() -> None:
    assert {"chatml", "llama3", "command-r"} <= set(family_names())
    llama3 = FamilyTemplate("llama3", apply_family)
    assert llama3.render(HI, Rendering()).endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    recognised = FamilyTemplate("{{ '<|im_start|>' }}", apply_family)
    assert recognised.render(HI, Rendering()) == ChatTemplate(CHATML).render(HI, Rendering())
    with pytest.raises(ConfigurationError):
        FamilyTemplate("{{ 'nothing known' }}", apply_family)


def test_prefill_and_bos() -> None:
    messages = read_messages([*HI, {"role": "assistant", "content": "So,"}], knows_developer=False)
    template = ChatTemplate("{{ bos_token }}" + CHATML)
    text = render_prompt(template, split_prefill(messages), Rendering(bos_token="<s>"), adds_bos=True)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nSo,"
    kept = render_prompt(template, split_prefill(messages), Rendering(bos_token="<s>"), adds_bos=False)
    assert kept.startswith("<s>")


def test_developer_is_system_unless_the_template_knows_it() -> None:
    raw = [{"role": "developer", "content": "x"}]
    assert read_messages(raw, knows_developer=False)[0]["role"] == "system"
    assert read_messages(raw, knows_developer=True)[0]["role"] == "developer"
