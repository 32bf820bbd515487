"""JSON answers: what is around them is taken off, however the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wingman.chat.fence import FencedParser, answer_grammar
from wingman.chat.output import OutputParser, collect
from wingman.chat.reasoning import THINK

SPACE = st.sampled_from(["", " ", "\n", "\n\n  "])
JSON = st.sampled_from(['{"a": "``` x"}', "[1, 2]", '"``"', "17", '{\n "a": {}\n}'])


def content(pieces: list[str]) -> str:
    parser = FencedParser(OutputParser(None))
    deltas = [delta for piece in pieces for delta in parser.push(piece)] + parser.finish()
    assert all(getattr(delta, "text", "x") for delta in deltas)
    return collect(deltas).content


@given(SPACE, JSON, SPACE, st.booleans(), st.data())
def test_only_the_json_is_left(before: str, text: str, after: str, fenced: bool, data: st.DataObject) -> None:
    whole = f"{before}```json{before}{text}{after}```" if fenced else f"{before}{text}{after}"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert content(pieces) == text


@given(st.text("`json {}\n1", max_size=30), st.data())
def test_any_text_reads_the_same_however_it_is_cut(whole: str, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(whole)))
    assert content([whole[:cut], whole[cut:]]) == content([whole]) == content(list(whole))


def test_an_answer_cut_short_keeps_what_there_is() -> None:
    assert content(['```json\n{"a": 1']) == '{"a": 1'
    assert content(['```json\n{"a": 1}\n``']) == '{"a": 1}'
    assert content(["``"]) == ""


@pytest.mark.parametrize("inside", [False, True])
def test_thoughts_may_come_first(inside: bool) -> None:
    text = answer_grammar({"type": "integer"}, THINK, starts_in_reasoning=inside)
    assert "thoughts-0 ::=" in text
    assert ("(space" in text.splitlines()[0]) is not inside
