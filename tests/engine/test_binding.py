"""What the library says while it is not listened to, and when it is."""

from __future__ import annotations

import logging
from importlib import metadata
from pathlib import Path

import pytest

from wingman.config import ModelConfig
from wingman.engine.llama import binding
from wingman.engine.llama.binding import lib
from wingman.engine.llama.weights import load_weights
from wingman.errors import ModelLoadFailure


def test_its_version_is_that_of_the_package() -> None:
    assert binding.version() == metadata.version("llama-cpp-python")


def load_nothing(calls: list[int]) -> object:
    """A load that fails and says why."""
    calls.append(1)
    return lib.llama_model_load_from_file(b"/nowhere.gguf", lib.llama_model_default_params())


def test_what_fails_is_tried_again_and_heard() -> None:
    binding.initialize()
    binding.take_errors()
    calls: list[int] = []
    assert not binding.quietly(lambda: load_nothing(calls))
    assert len(calls) == 2
    assert "nowhere.gguf" in binding.take_errors()


def test_what_works_is_done_once_and_not_heard() -> None:
    binding.initialize()
    binding.take_errors()
    calls: list[int] = []
    assert binding.quietly(lambda: (load_nothing(calls), "made")[1]) == "made"
    assert calls == [1]
    assert binding.take_errors() == ""
    load_nothing(calls)
    assert "nowhere.gguf" in binding.take_errors(), "it is heard again"


def test_a_load_that_is_given_up_is_not_tried_again(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    load = lib.llama_model_load_from_file
    monkeypatch.setattr(lib, "llama_model_load_from_file", lambda *given: (calls.append(1), load(*given))[1])
    with pytest.raises(ModelLoadFailure, match="cancelled"):
        load_weights(ModelConfig(model=tiny_model), lambda _: False)
    assert calls == [1]


def test_with_debug_messages_everything_is_heard(caplog: pytest.LogCaptureFixture) -> None:
    binding.initialize()
    calls: list[int] = []
    with caplog.at_level(logging.DEBUG, "wingman.llama"):
        assert binding.quietly(lambda: load_nothing(calls) or "made") == "made"
    assert "nowhere.gguf" in caplog.text
    assert calls == [1]
    binding.take_errors()
