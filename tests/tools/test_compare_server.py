"""What counts as equal, as a tie and as accepted, without servers."""

from __future__ import annotations

from collections import Counter
from fnmatch import fnmatchcase
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools import compare_server
from tools.compare_answers import (
    Answer,
    differences,
    first_difference,
    first_split,
    key_set,
    parts,
    pick,
    refusal,
    streamed,
    without,
)
from tools.compare_cases import Case
from tools.compare_server import ACCEPTED, KINDS, SETUPS, Verdict, cases_of, format_totals, judge, read_answer

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(-1e6, 1e6) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


def item(token: int, *logprobs: float) -> dict[str, Any]:
    return {"id": token, "top_logprobs": [{"logprob": value} for value in logprobs]}


def probs(*items: dict[str, Any]) -> Answer:
    return Answer(200, {"completion_probabilities": list(items)})


class TestEquality:
    @given(JSON_VALUES)
    def test_a_value_equals_itself(self, value: Any) -> None:
        assert first_difference(value, value, "") is None

    @pytest.mark.parametrize(
        ("ours", "theirs", "path"),
        [
            ({"a": 1, "more": 2}, {"a": 1}, None),
            ({"a": 1}, {"a": 1, "b": 2}, "/b"),
            ([1, 2], [1, 3], "/1"),
            ([1, 2], [1], ""),
            ([0.5, 1.0], [0.5004, 1], None),
            ([0.5, 1.0], [0.51, 1.0], ""),
            ([3000.0, 1.0], [3000.0, 2.0], None),
            (-1.0, -1.0005, None),
            (1.0, 1, None),
            (1, True, ""),
            (2, 1, ""),
            ({"a": [{"b": "x"}]}, {"a": [{"b": "y"}]}, "/a/0/b"),
        ],
    )
    def test_where_values_differ(self, ours: Any, theirs: Any, path: str | None) -> None:
        found = first_difference(ours, theirs, "")
        assert (found and found[0]) == path

    def test_only_the_topmost_missing_keys_are_named(self) -> None:
        ours, theirs = Answer(200, {"a": [{"x": 1}]}), Answer(200, {"a": [{"y": 1}], "b": {"c": {"d": 1}}})
        found = differences(key_set(ours), key_set(theirs))
        assert [path for path, _ in found] == ["keys/a/*/y", "keys/b"]


class TestViews:
    def test_picking(self) -> None:
        body = {"choices": [{"text": "a"}, {"text": "b"}]}
        assert pick(body, "choices/1/text") == "b"
        assert pick(body, "choices/*/text") == ["a", "b"]
        assert pick(body, "choices/2/text") is None
        assert pick(body, "") is body

    def test_streams_are_joined_by_choice(self) -> None:
        events = (
            {"index": 1, "content": "x", "stop": False},
            {"index": 0, "content": "a", "stop": False},
            None,
            {"index": 1, "content": "", "stop": True, "stop_type": "limit"},
            {"index": 0, "content": "b", "stop": True, "stop_type": "eos"},
        )
        view = streamed("content", ("stop_type",))(Answer(200, None, events))
        assert view["text"] == {0: "ab", 1: "x"}
        assert view["stop_type"] == ["eos", "limit"]

    def test_a_repeated_prefix_is_left_out(self) -> None:
        view = without("One,", parts("message"))
        assert view(Answer(200, {"message": {"content": "One, two"}}))["message"] == {"content": " two"}

    def test_refusals(self) -> None:
        answer = read_answer(400, "application/json", b'{"error": {"type": "t", "message": "m"}}')
        assert refusal(answer) == {"status": 400, "type": "t"}
        assert refusal(read_answer(502, "text/html", b"<html>")) == {"status": 502, "type": None}

    def test_event_streams(self) -> None:
        answer = read_answer(200, "text/event-stream", b':\n\ndata: {"a": 1}\n\ndata: [DONE]\n\n')
        assert answer == Answer(200, None, ({"a": 1},))


class TestTies:
    def test_a_small_gap_is_a_tie(self) -> None:
        split = first_split(
            probs(item(1, -0.1, -2), item(2, -1, -1.5)), probs(item(1, -0.1, -2), item(3, -1, -1.0002))
        )
        assert split is not None
        assert split.token == 1
        assert split.is_tie

    def test_a_large_gap_is_not(self) -> None:
        split = first_split(probs(item(1, -0.1, -2)), probs(item(2, -0.1, -2)))
        assert split is not None
        assert not split.is_tie

    def test_equal_tokens_do_not_part(self) -> None:
        assert first_split(probs(item(1, -0.1, -2)), probs(item(1, -0.1, -2))) is None
        assert first_split(Answer(400, {"error": {}}), probs(item(1, -0.1, -2))) is None


class TestJudging:
    CASE = Case("s", "n", "/tokenize", {}, parts("a"))

    def verdict(self, monkeypatch: pytest.MonkeyPatch, ours: Any, theirs: Any) -> Verdict:
        answers = {"ours": Answer(200, ours), "theirs": Answer(200, theirs)}
        monkeypatch.setattr(compare_server, "ask", lambda server, case: answers[server])
        return judge(self.CASE, "ours", "theirs")  # type: ignore[arg-type]

    def test_kinds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.verdict(monkeypatch, {"a": 1}, {"a": 1}) == Verdict("equal")
        assert self.verdict(monkeypatch, {"a": 1}, {"a": 2}).kind == "differ"
        monkeypatch.setitem(ACCEPTED, "s/n/*", "because")
        accepted = self.verdict(monkeypatch, {"a": 1}, {"a": 2})
        assert accepted.kind == "accepted"
        assert "because" in accepted.lines[0]

    def test_totals(self) -> None:
        table = format_totals(Counter({("plain", "equal"): 2, ("plain", "ties"): 1, ("chat", "differ"): 3}))
        assert "| plain | 3 | 2 | 1 | 0 | 0 |" in table
        assert table.splitlines()[-1] == "| all | 6 | 2 | 1 | 0 | 3 |"


class TestTables:
    def test_no_two_cases_of_a_setup_have_one_name(self) -> None:
        for setup in SETUPS:
            names = Counter((case.section, case.name) for case in cases_of(setup, ()))
            assert [name for name, count in names.items() if count > 1] == []

    def test_every_accepted_difference_names_a_case(self) -> None:
        places = [f"{case.section}/{case.name}/" for setup in SETUPS for case in cases_of(setup, ())]
        for pattern in ACCEPTED:
            heads = [pattern, pattern.rpartition("/")[0] + "/"]
            assert any(fnmatchcase(place, head) for place in places for head in heads), pattern

    def test_kinds_of_the_table(self) -> None:
        assert KINDS == ("equal", "ties", "accepted", "differ")
