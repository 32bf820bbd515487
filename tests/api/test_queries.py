"""Parameters: out of the query or of what was posted, and the model that a body names."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import Headers, Target
from wingman.api.queries import MAX_POSTED_BYTES, flag, integer, parameters, required, with_posted
from wingman.api.requested import requested_model
from wingman.errors import InvalidRequest, MissingParameter, WingmanError
from wingman.http.messages import Request


def request(body: bytes = b"", *query: tuple[str, str]) -> Request:
    return Request("POST", Target("/", query), Headers(()), "1", "peer", body=body)


def posted(fields: dict[str, Any], *query: tuple[str, str]) -> dict[str, str]:
    return dict(parameters(with_posted(request(json.dumps(fields).encode(), *query))))


def test_what_is_posted_counts_like_the_query() -> None:
    fields = {
        "alias": "a b&c=é",
        "port": 7001,
        "force": True,
        "quiet": False,
        "none": None,
        "share": 0.5,
        "": "",
    }
    assert posted(fields) == {
        "alias": "a b&c=é", "port": "7001", "force": "true", "quiet": "false", "share": "0.5", "": "",
    }  # fmt: skip


def test_the_first_of_a_name_counts_and_the_query_before_what_is_posted() -> None:
    assert posted({"a": "posted", "b": "posted"}, ("a", "1"), ("a", "2")) == {"a": "1", "b": "posted"}


@pytest.mark.parametrize("body", [b"", b" \r\n\t"])
def test_nothing_posted_is_no_error(body: bytes) -> None:
    assert parameters(with_posted(request(body, ("a", "1")))) == {"a": "1"}


@pytest.mark.parametrize(
    "body",
    [
        b"{", b"[]", b'"a"', b"null", b"\xff", b"a=1", b'{"a": [1]}', b'{"a": {"b": 1}}', b"[" * 100_000,
        b'{"a": 1' + b" " * MAX_POSTED_BYTES + b"}",
    ],
)  # fmt: skip
def test_what_is_no_flat_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        with_posted(request(body))


@given(st.binary(max_size=40) | st.text(max_size=40).map(lambda text: json.dumps({text: text}).encode()))
def test_any_body_is_parameters_or_refused(body: bytes) -> None:
    try:
        query = parameters(with_posted(request(body)))
    except WingmanError:
        return
    assert all(isinstance(part, str) for pair in query.items() for part in pair)


def test_a_parameter_that_is_required_is_not_empty() -> None:
    assert required({"a": "0"}, "a") == "0"
    for query in ({}, {"a": ""}):
        with pytest.raises(MissingParameter, match="missing parameter: a") as error:
            required(query, "a")
        assert error.value.field == "a"


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("7", 7), ("-1", -1), ("007", 7), ("-0", 0), ("", 5), (None, 5), ("99", 99)],
)
def test_a_whole_number(text: str | None, value: int) -> None:
    assert integer({} if text is None else {"n": text}, "n", 5, -1, 99) == value


@pytest.mark.parametrize(
    "text",
    ["-2", "100", "1.0", "1e1", "0x1", "+1", " 1", "1 ", "1_0", "--1", "-", "٣", "²", "nan", "9" * 5000],
)
def test_what_is_no_number_in_range_is_named(text: str) -> None:
    with pytest.raises(InvalidRequest, match="n must be a whole number from -1 to 99") as error:
        integer({"n": text}, "n", 5, -1, 99)
    assert error.value.field == "n"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", True), ("true", True), ("TRUE", True), ("on", True), ("yes", True), ("", True),
        ("0", False), ("false", False), ("off", False), ("No", False), (None, False),
    ],
)  # fmt: skip
def test_a_switch(text: str | None, value: bool) -> None:
    assert flag({} if text is None else {"force": text}, "force") is value


@pytest.mark.parametrize("text", ["2", "maybe", "tru", " true"])
def test_what_is_no_switch_is_named(text: str) -> None:
    with pytest.raises(InvalidRequest, match="force must be true or false") as error:
        flag({"force": text}, "force")
    assert error.value.field == "force"


LARGE = b'{"prompt": "' + b"x" * 100_000 + b'", "model": "late"}'


@pytest.mark.parametrize(
    ("body", "query", "name"),
    [
        (b'{"model": "a"}', (), "a"),
        (b'{"model": "a"}', (("model", "b"),), "b"),
        (b"", (("model", "b"),), "b"),
        (b"", (("model", ""),), ""),
        (b"", (), None),
        (b"{}", (), None),
        (b'{"model": null}', (), None),
        (b'{"model": ""}', (), None),
        (b'{"model": 7}', (), None),
        (b'{"model": ["a"]}', (), None),
        (b'{"model": 1' + b"0" * 10_000 + b"}", (), None),
        (b'{"model": {"model": "a"}}', (), None),
        (b'{"x": {"model": "a"}}', (), None),
        (b'[{"model": "a"}]', (), None),
        (b'{"model": "a"', (), None),
        (b"\xff\xfe", (), None),
        (b'{"model": "\xff"}', (), None),
        (b'{"model": ' + b"[" * 50_000, (), None),
        (b'{"x": ' + b"[" * 50_000, (), None),
        (LARGE, (), "late"),
        (LARGE[:-1], (), None),
    ],
)
async def test_the_model_that_a_request_names(
    body: bytes, query: tuple[tuple[str, str], ...], name: str | None
) -> None:
    assert await requested_model(request(body, *query)) == name


@given(st.binary(max_size=60))
async def test_any_body_names_a_model_or_none(body: bytes) -> None:
    assert isinstance(await requested_model(request(b'{"model":' + body)), str | None)
