"""Grammars, JSON schemas and response formats on the real model."""

from __future__ import annotations

import json
import threading
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.support.events import chat_text, read_events
from tests.support.server import ServerProcess

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "likes": {"type": "array", "items": {"enum": ["tea", "cake"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
MESSAGES = [{"role": "user", "content": "Describe a person."}]
PATHS = ("/completion", "/v1/completions", "/v1/chat/completions")


def request(path: str, **fields: Any) -> dict[str, Any]:
    subject = {"messages": MESSAGES} if "chat" in path else {"prompt": "A person:"}
    return subject | {"temperature": 0, "n_predict": 120} | fields


def answer(server: ServerProcess, path: str, **fields: Any) -> str:
    """The text of an answer, which is the same when it is streamed."""
    body = request(path, **fields)
    response = server.post(path, body)
    assert response.status_code == 200, response.text
    events = read_events(server, path, body)
    if "chat" in path:
        text, streamed = response.json()["choices"][0]["message"]["content"], chat_text(events)
    else:
        text = response.json()["content"]
        streamed = "".join(
            event["choices"][0]["text"] if path == "/v1/completions" else event["content"] for event in events
        )
    assert streamed == text
    return str(text)


def refusal(server: ServerProcess, path: str, **fields: Any) -> str:
    """The message of a refusal, which is an ordinary 400 for a stream too."""
    responses = [server.post(path, request(path, stream=stream, **fields)) for stream in (False, True)]
    for response in responses:
        assert response.status_code == 400, response.text
        assert response.json()["error"]["type"] == "invalid_request_error"
    return str(responses[0].json()["error"]["message"])


def check_person(text: str) -> None:
    person = json.loads(text)
    assert list(person) == ["name", "age", "likes"]
    assert len(person["name"]) <= 12
    assert person["age"] in range(121)
    assert len(person["likes"]) in (1, 2)
    assert set(person["likes"]) <= {"tea", "cake"}


@pytest.mark.parametrize("path", PATHS)
def test_json_schema(server: ServerProcess, path: str) -> None:
    check_person(answer(server, path, json_schema=PERSON))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json_object", "schema": PERSON},
        {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}},
        {"type": "json_schema", "json_schema": {"schema": PERSON, "strict": False}},
    ],
)
def test_response_format(server: ServerProcess, path: str, response_format: dict[str, Any]) -> None:
    check_person(answer(server, path, response_format=response_format))


@pytest.mark.parametrize("path", PATHS)
def test_plain_text_is_not_constrained(server: ServerProcess, path: str) -> None:
    plain = answer(server, path, n_predict=12)
    assert answer(server, path, n_predict=12, response_format={"type": "text"}) == plain
    assert not plain.startswith("{")


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_object", "schema": {}}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        {"json_schema": {"type": "object"}},
    ],
)
@pytest.mark.parametrize("path", PATHS)
def test_any_object(server: ServerProcess, path: str, fields: dict[str, Any]) -> None:
    text = answer(server, path, n_predict=24, **fields)
    assert text.startswith("{")


@pytest.mark.parametrize("path", PATHS)
def test_constants(server: ServerProcess, path: str) -> None:
    assert answer(server, path, json_schema={"const": "42"}) == '"42"'
    assert answer(server, path, json_schema={"enum": [None]}) == "null"
    assert answer(server, path, response_format={"type": "json_object", "schema": {"const": "42"}}) == '"42"'


@pytest.mark.parametrize("path", PATHS)
def test_grammar(server: ServerProcess, path: str) -> None:
    text = answer(server, path, grammar='root ::= "yes" | "no" " " [0-9]{3}')
    assert text == "yes" or (text[:3] == "no " and len(text) == 6 and text[3:].isdigit())
    assert answer(server, path, grammar='root ::= "\\u00fc" "漢字" "\\U0001F642"') == "ü漢字🙂"


def test_a_grammar_holds_at_any_temperature(server: ServerProcess) -> None:
    for seed in range(4):
        body = {"temperature": 3, "top_k": 0, "top_p": 1, "min_p": 0, "seed": seed, "json_schema": PERSON}
        check_person(answer(server, "/completion", **body))


def test_an_answer_may_be_cut_off_within_a_grammar(server: ServerProcess) -> None:
    body = server.complete("Names:", n_predict=3, json_schema=PERSON, return_tokens=True)
    assert (body["stop_type"], body["tokens_predicted"]) == ("limit", 3)
    assert body["content"].startswith("{")
    stopped = server.complete("Names:", n_predict=50, json_schema=PERSON, stop=['"name"'])
    assert stopped["stopping_word"] == '"name"'
    assert stopped["content"].strip() == "{"


@pytest.mark.parametrize(
    "schema", [123, "text", [], {"type": 123}, {"type": "hiccup"}, {"$ref": "#/nowhere"}]
)
@pytest.mark.parametrize("path", PATHS)
def test_bad_schemas(server: ServerProcess, path: str, schema: Any) -> None:
    assert "json_schema" in refusal(server, path, json_schema=schema)
    if schema != []:  # an empty schema stands for any object
        wrapped = {"type": "json_schema", "json_schema": {"schema": schema}}
        assert "response_format" in refusal(server, path, response_format=wrapped)


@pytest.mark.parametrize("path", PATHS)
def test_bad_response_formats(server: ServerProcess, path: str) -> None:
    assert "response_format" in refusal(server, path, response_format={"type": "xml"})
    assert "response_format" in refusal(server, path, response_format={"type": 5})


@pytest.mark.parametrize(
    "grammar",
    [
        "root ::= (",
        "no root here",
        'other ::= "a"',
        "root ::= missing",
        "root ::= root",
        'root ::= "a" root2',
        "root ::= [z-a",
        'root ::= "x"{1000000000}',
        'root ::= "a"{5,2}',
        "root ::= " + "(" * 50_000 + '"a"' + ")" * 50_000,
        "root ::= " + "(" * 24 + '"a"' + "*)*" * 24,
        "\x00",
    ],
)
def test_bad_grammars(server: ServerProcess, grammar: str) -> None:
    assert "grammar" in refusal(server, "/completion", grammar=grammar)


def test_schemas_too_large_or_too_deep(server: ServerProcess) -> None:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(400):
        deep = {"type": "array", "items": deep}
    refusal(server, "/completion", json_schema=deep)
    wide = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(20_000)}}
    refusal(server, "/completion", json_schema=wide)


def test_nested_repetitions_cost_what_is_written_of_them(server: ServerProcess) -> None:
    grammar = "root ::= " + "(" * 24 + '"a"' + "{9})" * 24
    assert set(answer(server, "/completion", n_predict=20, grammar=grammar)) == {"a"}
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(12):
        schema = {"type": "array", "items": schema, "minItems": 10, "maxItems": 10}
    text = answer(server, "/completion", n_predict=20, json_schema=schema)
    assert text.split()[:3] == ["["] * 3


def test_a_refused_grammar_leaves_other_streams_alone(server: ServerProcess) -> None:
    body = {"prompt": "Tell me a story:", "temperature": 0, "n_predict": 150, "ignore_eos": True}
    expected = server.complete(**body)["content"]
    texts: list[str] = []

    def listen() -> None:
        events = read_events(server, "/completion", body)
        texts.append("".join(event["content"] for event in events))

    listener = threading.Thread(target=listen)
    listener.start()
    for _ in range(10):
        refusal(server, "/completion", grammar='root ::= ("a"{9}){9} (')
    listener.join()
    assert texts == [expected]


class TestLazy:
    PROMPT = "Count: one, two, three,"

    def test_word(self, server: ServerProcess) -> None:
        free = server.complete(self.PROMPT, n_predict=12)["content"]
        assert " four, five" in free
        trigger = {"type": 1, "value": "five"}
        text = answer(
            server, "/completion", prompt=self.PROMPT, n_predict=30, grammar='root ::= "five" " apples!"',
            grammar_lazy=True, grammar_triggers=[trigger],
        )  # fmt: skip
        assert text == " four, five apples!"

    def test_word_within_a_token(self, server: ServerProcess) -> None:
        trigger = {"type": 1, "value": "iv"}
        text = answer(
            server, "/completion", prompt=self.PROMPT, n_predict=30, grammar='root ::= "ive" " apples!"',
            grammar_lazy=True, grammar_triggers=[trigger],
        )  # fmt: skip
        assert text == " four, five apples!"

    def test_token(self, server: ServerProcess) -> None:
        (token,) = server.post("/tokenize", {"content": " five"}).json()["tokens"]
        text = answer(
            server, "/completion", prompt=self.PROMPT, n_predict=30, grammar='root ::= " five" "ty" "."',
            grammar_lazy=True, grammar_triggers=[{"type": 0, "value": " five", "token": token}],
        )  # fmt: skip
        assert text == " four, fivety."

    def test_without_its_trigger_nothing_is_constrained(self, server: ServerProcess) -> None:
        free = server.complete(self.PROMPT, n_predict=12)["content"]
        trigger = {"type": 1, "value": "<tool>"}
        fields = {"grammar": 'root ::= "<tool>"', "grammar_lazy": True, "grammar_triggers": [trigger]}
        assert server.complete(self.PROMPT, n_predict=12, **fields)["content"] == free

    def test_a_trigger_that_the_grammar_forbids(self, server: ServerProcess) -> None:
        trigger = {"type": 1, "value": "five"}
        fields = {"grammar": 'root ::= "six"', "grammar_lazy": True, "grammar_triggers": [trigger]}
        body = server.complete(self.PROMPT, n_predict=12, **fields)
        assert body["content"].startswith(" four, five")
        assert server.complete(self.PROMPT, n_predict=2)["content"] == " four,"

    @pytest.mark.parametrize(
        "triggers", [None, [], [5], [{}], [{"type": 1}], [{"type": 0}], [{"type": 7, "value": "a"}]]
    )
    def test_bad_triggers(self, server: ServerProcess, triggers: Any) -> None:
        message = refusal(
            server, "/completion", grammar='root ::= "a"', grammar_lazy=True, grammar_triggers=triggers
        )
        assert "grammar_triggers" in message

    def test_a_token_beyond_the_vocabulary_never_comes(self, server: ServerProcess) -> None:
        free = server.complete(self.PROMPT, n_predict=8)["content"]
        fields = {"grammar": 'root ::= "a"', "grammar_lazy": True}
        triggers = [{"type": 0, "token": 10**6}]
        assert (
            server.complete(self.PROMPT, n_predict=8, grammar_triggers=triggers, **fields)["content"] == free
        )
        for token in (-1, 2**40, True):
            body = {"prompt": "x", "grammar_triggers": [{"type": 0, "token": token}], **fields}
            assert server.post("/completion", body).status_code == 400


class TestPrecedence:
    def test_native_grammar_beats_schema(self, server: ServerProcess) -> None:
        text = answer(server, "/completion", grammar='root ::= "g"', json_schema={"const": "s"})
        assert text == "g"

    def test_chat_refuses_both(self, server: ServerProcess) -> None:
        path = "/v1/chat/completions"
        refusal(server, path, grammar='root ::= "g"', json_schema={"const": "s"})

    def test_chat_response_format_beats_grammar(self, server: ServerProcess) -> None:
        wanted = {"type": "json_schema", "json_schema": {"schema": {"const": "r"}}}
        path = "/v1/chat/completions"
        assert answer(server, path, grammar='root ::= "g"', response_format=wanted) == '"r"'
        assert answer(server, path, grammar='root ::= "g"', response_format={"type": "text"}) == "g"


class Answer(BaseModel):
    city: str
    inhabitants: int


def test_structured_outputs_of_the_package(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Which city is the capital of France?"}]
    parsed = client.chat.completions.parse(
        model="smol", messages=messages, response_format=Answer, temperature=0, max_tokens=80
    )
    found = parsed.choices[0].message.parsed
    assert isinstance(found, Answer)
    assert "Paris" in found.city
    with client.chat.completions.stream(
        model="smol", messages=messages, response_format=Answer, temperature=0, max_tokens=80
    ) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == found
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="smol", messages=messages, response_format=Answer, max_tokens=2)


def test_settings_show_the_grammar(server: ServerProcess) -> None:
    settings = server.complete("a", n_predict=1, grammar='root ::= "b"')["generation_settings"]
    assert settings["grammar"] == 'root ::= "b"'
    assert settings["grammar_lazy"] is False
    triggers = [{"type": 1, "value": "q"}]
    lazy = {"grammar": 'root ::= "q"', "grammar_lazy": True, "grammar_triggers": triggers}
    settings = server.complete("a", n_predict=1, **lazy)["generation_settings"]
    assert (settings["grammar_lazy"], settings["grammar_triggers"]) == (True, triggers)
