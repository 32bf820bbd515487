"""`wingman run`: one answer, a talk, and ctrl-C."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import orjson
import pytest

from tests.commands.fakes import FakeApi, Terminal, download, running, said
from wingman.commands.api import CommandFailed


@pytest.fixture
def loaded(api: FakeApi) -> FakeApi:
    """One model, loaded."""
    api.downloads, api.items = [download()], [running("smol")]
    return api


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a person types, line by line; then ctrl-D."""
    lines: list[Any] = []
    keyboard: Iterator[Any] = iter(lines)

    def read(_prompt: str = "") -> str:
        line = next(keyboard, EOFError())
        if isinstance(line, BaseException):
            raise line
        return str(line)

    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdin", terminal)
    monkeypatch.setattr("builtins.input", read)
    return lines


def test_one_answer(terminal: Terminal, loaded: FakeApi) -> None:
    loaded.chunks = [said("Hel", "lo")]
    assert terminal.run("run", "smol", "say", "hello") == (0, "Hello\n", "")
    body = loaded.inferred[0]
    assert (body["model"], body["stream"]) == ("smol", True)
    assert body["messages"] == [{"role": "user", "content": "say hello"}]


def test_one_answer_as_json(terminal: Terminal, loaded: FakeApi) -> None:
    loaded.chunks = [said("Hi", reason="length")]
    _, out, _ = terminal.run("run", "smol", "--json", "hello", "--system", "be short")
    assert orjson.loads(out) == {
        "model": "smol",
        "content": "Hi",
        "reasoning_content": "",
        "finish_reason": "length",
        "usage": {"completion_tokens": 1},
    }
    assert loaded.inferred[0]["messages"][0] == {"role": "system", "content": "be short"}


def test_a_pipe_is_the_prompt(terminal: Terminal, loaded: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe\n"))
    loaded.chunks = [said("ok")]
    assert terminal.run("run", "tiny.Q4_K_M")[:2] == (0, "ok\n")
    assert loaded.inferred[0]["messages"][0]["content"] == "from a pipe\n"
    assert loaded.inferred[0]["model"] == "smol"  # the alias that runs it


def test_an_empty_prompt_is_refused(
    terminal: Terminal, loaded: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert terminal.run("run", "smol") == (1, "", "wingman: the prompt is empty\n")


def test_a_talk_remembers_until_cleared(terminal: Terminal, loaded: FakeApi, typed: list[Any]) -> None:
    typed += ["first", "second", "", "/clear", "third", "/bye", "never"]
    loaded.chunks = [said("1"), said("2"), said("3")]
    status, out, _ = terminal.run("run", "smol", "--system", "S")
    assert (status, out) == (0, "1\n2\n3\n")
    contents = [[message["content"] for message in body["messages"]] for body in loaded.inferred]
    assert contents == [["S", "first"], ["S", "first", "1", "second"], ["S", "third"]]


def test_ctrl_c_stops_the_answer_only(terminal: Terminal, loaded: FakeApi, typed: list[Any]) -> None:
    typed += ["first", KeyboardInterrupt(), "second"]
    loaded.chunks = [[*said("Once", " upon")[:2], KeyboardInterrupt()], said("ok")]
    status, out, err = terminal.run("run", "smol")
    assert (status, out) == (0, "Once upon\nok\n")
    assert "/bye ends" in err
    assert loaded.n_cancelled == 1
    assert loaded.inferred[1]["messages"][1] == {"role": "assistant", "content": "Once upon"}


def test_ctrl_c_ends_a_single_answer(terminal: Terminal, loaded: FakeApi) -> None:
    loaded.chunks = [[*said("Once")[:1], KeyboardInterrupt()]]
    assert terminal.run("run", "smol", "tell") == (130, "Once\n", "")


def test_a_talk_survives_an_error(terminal: Terminal, loaded: FakeApi, typed: list[Any]) -> None:
    typed += ["too long", "short", "/what", "/help"]
    loaded.chunks = [[CommandFailed("it exceeds the context", 400)], said("ok")]
    status, out, err = terminal.run("run", "smol")
    assert (status, out) == (0, "ok\n")
    assert "it exceeds the context; /clear starts anew" in err
    assert "/what is unknown" in err
    assert [message["content"] for message in loaded.inferred[1]["messages"]] == ["short"]


def test_an_error_ends_a_single_answer(terminal: Terminal, loaded: FakeApi) -> None:
    loaded.chunks = [[CommandFailed("the model is gone")]]
    assert terminal.run("run", "smol", "hi") == (1, "", "wingman: the model is gone\n")


def test_a_talk_as_json_prints_a_document_an_answer(
    terminal: Terminal, loaded: FakeApi, typed: list[Any]
) -> None:
    typed += ["a", "b"]
    loaded.chunks = [said("1"), said("2")]
    _, out, _ = terminal.run("run", "smol", "--json")
    assert [orjson.loads(line)["content"] for line in out.splitlines()] == ["1", "2"]


def test_a_model_is_loaded_on_demand(terminal: Terminal, api: FakeApi) -> None:
    api.downloads = [download()]
    api.chunks = [said("ok")]

    def start(query: dict[str, str]) -> tuple[int, Any]:
        api.items = [running(query["alias"])]
        return 202, api.items[0]

    api.replies["/api/inference/start"] = start
    assert terminal.run("run", "tiny.Q4_K_M", "hi") == (0, "ok\n", "")
    assert api.inferred[0]["model"] == "tiny.Q4_K_M"


def test_a_terminal_gets_no_control_characters_of_a_model(
    terminal: Terminal, loaded: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    thought = {"choices": [{"delta": {"reasoning_content": "hm"}, "finish_reason": None}]}
    loaded.chunks = [[thought, *said("a\x1b]0;title\x07b\n", "c\x9b2J")]]
    _, out, _ = terminal.run("run", "smol", "hi")
    assert out == "\x1b[2mhm\x1b[0m\na]0;titleb\nc2J\n"


def test_a_file_gets_the_words_only(terminal: Terminal, loaded: FakeApi) -> None:
    thought = {"choices": [{"delta": {"reasoning_content": "hm"}, "finish_reason": None}]}
    loaded.chunks = [[thought, *said("a\x1bb")]]
    assert terminal.run("run", "smol", "hi")[1] == "a\x1bb\n"
