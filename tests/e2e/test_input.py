"""Bad input of every kind gets a JSON error that names the field; the server lives on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.server import ServerProcess
from wingman.app import MODEL_ROUTES

ROUTES: list[list[str]] = [
    [path.replace("{id}", "0?action=save") for path in paths]
    for method, paths, _, body, _ in MODEL_ROUTES
    if method == "POST" and isinstance(body, type) and issubclass(body, msgspec.Struct)
]
"""The paths of each route whose body is an object."""
TYPES: dict[str, type[msgspec.Struct]] = {
    path.replace("{id}", "0?action=save"): body for _, paths, _, body, _ in MODEL_ROUTES for path in paths
}
PATHS = tuple(paths[0] for paths in ROUTES if "?" not in paths[0])
TALK = [{"role": "user", "content": "Hi"}]
GOOD: dict[str, Any] = {
    "prompt": "Hi", "messages": TALK, "input": "Hi", "content": "Hi", "tokens": [5], "query": "a", "documents": ["b"],
    "input_prefix": "a", "input_suffix": "b", "filename": "x", "n_predict": 1, "max_tokens": 1,
    "max_output_tokens": 1,
}  # fmt: skip
"""Enough for every route; each skips what it doesn't know."""
WRONG: dict[str, Any] = {"object": {"a": 1}, "string": "x", "array": [["x"]], "number": 1.5, "bool": True}


@pytest.fixture(scope="module")
def tiny_server(tiny_model: Path) -> Iterator[ServerProcess]:
    """A server that answers in no time, for thousands of requests."""
    with ServerProcess(["--model", str(tiny_model), "-np", "2"]) as process:
        yield process


def check_error(status: int, body: dict[str, Any]) -> None:
    error = body["error"]
    assert status in (400, 501), body
    assert error["code"] == status
    assert error["message"]
    assert error["type"] in ("invalid_request_error", "exceed_context_size_error", "not_supported_error")


def good_body(schema: type[msgspec.Struct]) -> dict[str, Any]:
    names = schema.__struct_fields__
    left_out = {"prompt"} if "input" in names else set()  # responses take a prompt by its id only
    return {name: value for name, value in GOOD.items() if name in names and name not in left_out}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"null", b"5", b'"x"', b"[]", b"\xff\xfe", b'{"a":1}}', b"\x00" * 100, b'{"prompt":"\\ud800"}',
     b"[" * 5000, b'{"a":' * 5000, b"x" * 10_000_000],
    ids=["empty", "open", "null", "number", "string", "array", "utf16", "extra", "nul", "surrogate", "deep",
         "deepobj", "10MB"],
)  # fmt: skip
def test_garbage(server: ServerProcess, path: str, body: bytes) -> None:
    response = server.client.post(path, content=body)
    check_error(response.status_code, response.json())


def test_ten_megabytes_of_valid_json(server: ServerProcess) -> None:
    huge = server.client.post("/completion", content=json.dumps({"prompt": "word " * 2_000_000}))
    assert huge.status_code == 400
    assert huge.json()["error"]["type"] == "exceed_context_size_error"
    padded = {"prompt": "Hello", "n_predict": 1, "padding": "x" * 10_000_000}
    assert server.post("/completion", padded).status_code == 200


def test_a_body_over_the_limit_is_a_413(server: ServerProcess) -> None:
    response = server.client.post("/completion", content=b"x" * (33 * 1024 * 1024))
    assert response.status_code == 413
    assert response.json()["error"]["code"] == 413


@pytest.mark.parametrize("kind", sorted(WRONG))
@pytest.mark.parametrize("path", [paths[0] for paths in ROUTES])
def test_every_field_with_a_wrong_type(tiny_server: ServerProcess, path: str, kind: str) -> None:
    schema = TYPES[path]
    for field in schema.__struct_fields__:
        response = tiny_server.post(path, good_body(schema) | {field: WRONG[kind]})
        if response.status_code != 200:
            body = response.json()
            check_error(response.status_code, body)
            assert response.status_code == 501 or field in json.dumps(body["error"]), body
    assert tiny_server.complete("Still there", n_predict=1)["tokens_predicted"] == 1


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"n_predict": -2}, "n_predict"), ({"n_discard": -1}, "n_discard"), ({"n_keep": -2}, "n_keep"),
        ({"repeat_last_n": -2}, "repeat_last_n"), ({"repeat_penalty": 0}, "repeat_penalty"),
        ({"adaptive_decay": 1}, "adaptive_decay"), ({"min_keep": -1}, "min_keep"), ({"n_cmpl": 0}, "n_cmpl"),
        ({"dry_sequence_breakers": []}, "dry_sequence_breakers"), ({"id_slot": 8}, "id_slot"),
        ({"stop": [1]}, "stop"), ({"sse_ping_interval": -2, "stream": True}, "sse_ping_interval"),
        ({"samplers": ["infill"]}, "samplers"), ({"t_max_predict_ms": -5}, "t_max_predict_ms"),
        ({"stop": ["x" * 600]}, "stop"), ({"stop": ["ab"] * 300}, "stop"), ({"stop": ["y" * 500] * 20}, "stop"),
        ({"logit_bias": [["a b " * 40000, 1]]}, "logit_bias"), ({"samplers": ["top_k"] * 40}, "samplers"),
        ({"dry_sequence_breakers": ["x"] * 17}, "dry_sequence_breakers"), ({"n_keep": 2**80}, "n_keep"),
        ({"prompt": []}, "prompt"), ({"prompt": None}, "prompt"), ({"prompt": 7}, "prompt"),
        ({"prompt": [10**9]}, "prompt"), ({"prompt": [-1]}, "prompt"), ({"prompt": ""}, "prompt"),
        ({"prompt": [True, "x"]}, "prompt"), ({"response_format": {"type": "yaml"}}, "response_format"),
    ],
)  # fmt: skip
def test_values_out_of_range(server: ServerProcess, fields: dict[str, Any], field: str) -> None:
    response = server.post("/completion", {"prompt": "Hi", "n_predict": 1000, "ignore_eos": True} | fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith(field)
    assert server.get("/health").json()["slots_processing"] == 0, "a refused request holds a slot"


@pytest.mark.parametrize(
    "fields",
    [{"top_k": -1}, {"top_p": 7}, {"temperature": -3}, {"mirostat": 9}, {"temperature": True}, {"seed": 2**40},
     {"seed": -1}, {"stop": 5}, {"logit_bias": "x"}, {"logit_bias": [["x"], [1], [10**9, 2], [1, "a"]]},
     {"id_slot": "1"}, {"lora": []}, {"repeat_last_n": -1}, {"dry_multiplier": 1, "dry_penalty_last_n": -1},
     {"response_fields": [[[1]]]},
     {"samplers": ["nonsense"]}, {"typical_p": 0}, {"n_probs": 0}, {"top_n_sigma": 1e30}, {"dynatemp_range": 3}],
)  # fmt: skip
def test_odd_values_that_are_served(server: ServerProcess, fields: dict[str, Any]) -> None:
    response = server.post("/completion", {"prompt": "Hi", "n_predict": 2} | fields)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("path", "fields", "status"),
    [("/v1/completions", {"best_of": 2}, 400), ("/v1/rerank", {}, 501), ("/slots/0?action=save", {}, 501),
     ("/completion", {"prompt": {"prompt_string": "a", "multimodal_data": ["x"]}}, 400),
     ("/v1/responses", {"previous_response_id": "r"}, 400), ("/v1/responses", {"background": True}, 400)],
)  # fmt: skip
def test_what_is_not_there_says_so(
    server: ServerProcess, path: str, fields: dict[str, Any], status: int
) -> None:
    response = server.post(path, good_body(TYPES[path]) | fields)
    assert response.status_code == status, response.text
    check_error(status, response.json())
    assert (response.headers.get("x-should-retry") == "false") == (status == 501)


WORDS = st.sampled_from(
    ["", "a", "root", 'root ::= "a"', "root ::= root", "object", "type", "function", "name", "text", "auto", "required",
     "json_schema", "schema", "user", "role", "content", "string", "pattern", "^a+$", "$ref", "#", "\x00", "\U0001f600"]
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)
FREE_FIELDS = (
    (
        "/completion",
        "logit_bias stop prompt grammar json_schema response_format samplers lora grammar_triggers",
    ),
    (
        "/v1/chat/completions",
        "messages tools tool_choice functions response_format json_schema logit_bias stop",
    ),
    ("/v1/embeddings", "input content"),
    ("/v1/responses", "input tools tool_choice text"),
    ("/v1/messages", "messages system tools tool_choice thinking"),
)


@settings(max_examples=200, deadline=None)
@given(
    case=st.sampled_from([(path, name) for path, names in FREE_FIELDS for name in names.split()]), value=JSON
)
def test_any_value_of_a_free_field_is_served_or_refused(
    server: ServerProcess, case: tuple[str, str], value: Any
) -> None:
    path, name = case
    content = json.dumps(good_body(TYPES[path]) | {name: value})  # NaN and Infinity too
    response = _post(server, path, content)
    if response.status_code != 200:
        assert response.status_code == 400, response.text
        check_error(400, response.json())


def _post(server: ServerProcess, path: str, content: str) -> httpx.Response:
    return server.client.post(path, content=content.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize(
    ("messages", "field"),
    [(None, "messages"), (5, "messages"), (["x"], "messages"), ([{"role": "user"}], "messages[0].content"),
     ([{"content": "x"}], "messages[0].role"), ([{"role": 5, "content": "x"}], "messages[0].role"),
     ([{"role": "user", "content": 5}], "messages[0].content"),
     ([{"role": "user", "content": [5]}], "messages[0].content[0]"),
     ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
     ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
     ([{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}], "messages")],
)  # fmt: skip
def test_broken_messages(server: ServerProcess, messages: Any, field: str) -> None:
    response = server.post("/v1/chat/completions", {"messages": messages})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == field


def test_unknown_paths_and_methods(server: ServerProcess) -> None:
    for method, path in (
        ("GET", "/nope"),
        ("GET", "/completion"),
        ("POST", "/health"),
        ("GET", "/v1/models/"),
    ):
        response = server.client.request(method, path)
        assert response.status_code == 404
        assert response.json()["error"] == {
            "code": 404,
            "message": "File Not Found",
            "type": "not_found_error",
        }
    assert server.client.head("/health").status_code == 200
