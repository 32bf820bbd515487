"""Fixtures shared by all tests: the real model, fetched once, and real servers around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
from hypothesis import HealthCheck, settings

from tests.support.server import ServerProcess
from tools.tinymodel import write_llama
from wingman.services.starter import fetch_starter

# The same examples on each run, however loaded the machine is; `fuzz` looks for new ones.
settings.register_profile(
    "repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test touches the home folder of who runs it, nor asks the Hub on the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WINGMAN_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        yield


@pytest.fixture(scope="session")
def starter_model() -> Path:
    """SmolLM2-135M-Instruct, got the way `wingman serve --starter` gets it."""
    return fetch_starter(Path.home() / ".cache" / "wingman-tests" / "models")


@pytest.fixture(scope="session")
def server(starter_model: Path) -> Iterator[ServerProcess]:
    """A server on the real model with eight slots, shared by tests that leave it as it was."""
    arguments = ["--model", str(starter_model), "--alias", "smol", "-c", "8192", "-np", "8", "--metrics"]
    with ServerProcess(arguments) as process:
        yield process


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    """OpenAI's package talking to the shared server; it tries once."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated model that says noise, with fill-in-the-middle tokens and a BOS."""
    return write_llama(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture
def start_server(starter_model: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Start servers of one's own; they end with the test."""
    running: list[ServerProcess] = []

    def start(
        *arguments: str, model: Path | None = None, environment: dict[str, str] | None = None
    ) -> ServerProcess:
        process = ServerProcess(["--model", str(model or starter_model), *arguments], environment)
        running.append(process)
        return process.__enter__()

    yield start
    for process in running:
        process.__exit__(None, None, None)
