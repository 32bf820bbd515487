"""From start to exit: what a server says while it loads, how it stops, and how it refuses to start."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.runner import ScriptedRunner
from tests.support.server import ServerProcess
from wingman.config import Config, ContextConfig, ModelConfig, ServerConfig
from wingman.errors import ModelLoadFailure
from wingman.lifecycle import Wingman

LONG = {"prompt": "Once upon a time", "n_predict": 1900, "ignore_eos": True, "temperature": 0}


def read_stream(server: ServerProcess, path: str, body: dict[str, Any], lines: list[str]) -> threading.Thread:
    def run() -> None:
        with httpx.stream("POST", server.url + path, json=body | {"stream": True}, timeout=60) as response:
            lines.extend(line for line in response.iter_lines() if line)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_sigterm_lets_running_generations_finish(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("-np", "2", "-c", "4096", "--drain-timeout", "60")
    lines: list[str] = []
    reader = read_stream(server, "/completion", LONG | {"n_predict": 200}, lines)
    while not server.get("/health").json()["slots_processing"]:
        time.sleep(0.01)
    idle = httpx.Client(base_url=server.url)
    idle.get("/live")
    server.process.send_signal(signal.SIGTERM)
    refused = ready = None
    for _ in range(200):
        ready = idle.get("/ready")
        if ready.status_code == 503:
            refused = idle.post("/completion", json={"prompt": "late", "n_predict": 1})
            break
    reader.join(60)
    assert server.process.wait(30) == 0
    final = json.loads(lines[-1][6:])
    assert final["tokens_predicted"] == 200
    assert ready is not None
    assert ready.json()["error"]["type"] == "unavailable_error"
    assert refused is not None
    assert refused.status_code == 503
    assert refused.headers["retry-after"]


def test_generations_are_ended_properly_at_the_drain_timeout(
    start_server: Callable[..., ServerProcess],
) -> None:
    server = start_server("-np", "2", "-c", "4096", "--drain-timeout", "0.5")
    native: list[str] = []
    chat: list[str] = []
    messages = [{"role": "user", "content": "Tell me a very long story."}]
    readers = [
        read_stream(server, "/completion", LONG, native),
        read_stream(server, "/v1/chat/completions", {"messages": messages, "ignore_eos": True}, chat),
    ]
    while server.get("/health").json()["slots_processing"] < 2:
        time.sleep(0.01)
    assert server.stop() == 0
    for reader in readers:
        reader.join(30)
    assert json.loads(native[-1][6:])["stop_type"] == "limit"
    assert chat[-1] == "data: [DONE]"
    assert json.loads(chat[-2][6:])["choices"][0]["finish_reason"] == "length"


def test_a_second_signal_ends_at_once(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("-np", "1", "-c", "2048", "--drain-timeout", "600")
    lines: list[str] = []

    def read() -> None:
        with pytest.raises(httpx.HTTPError):
            with httpx.stream(
                "POST", server.url + "/completion", json=LONG | {"stream": True}, timeout=60
            ) as response:
                lines.extend(response.iter_lines())

    reader = threading.Thread(target=read)
    reader.start()
    while not server.get("/health").json()["slots_processing"]:
        time.sleep(0.01)
    server.process.send_signal(signal.SIGINT)
    while server.get("/ready").status_code == 200:
        time.sleep(0.01)
    assert server.stop(signal.SIGINT) == 130
    reader.join(30)


def run_serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "wingman", "serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_what_can_not_be_started_says_why(tmp_path: Path, starter_model: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(200))
    for arguments, message in (
        (("--starter", "--no-control"), "leave out --no-control"),
        (("--model", str(tmp_path / "none.gguf")), "is not a file"),
        (("--model", str(broken), "--port", "0"), "can't load"),
        (("--model", str(starter_model), "--host", "0.0.0.0"), "--insecure"),
        (
            ("--model", str(starter_model), "--chat-template", "nonsense", "--port", "0"),
            "no chat template is called",
        ),
        (("--parallel", "0"), "must be from 1"),
        (("-b", "2", "-np", "4"), "--batch-size must be at least --parallel"),
        (("--ctx-sise", "5"), "did you mean --ctx-size?"),
        (("--threads", "many"), "not a valid value"),
    ):
        result = run_serve(*arguments)
        assert result.returncode in (1, 2)
        assert message in result.stderr, result.stderr
        assert "Traceback" not in result.stderr


def test_a_port_in_use_says_so(server: ServerProcess, starter_model: Path) -> None:
    result = run_serve("--model", str(starter_model), "--port", server.url.rsplit(":", 1)[1])
    assert result.returncode == 1
    assert "can't listen on 127.0.0.1" in result.stderr
    assert "Traceback" not in result.stderr


def test_flags_of_llama_server_are_taken_and_named(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server(
        "--ctx_size", "1024", "-np", "2", "--no-warmup", "--cache-ram", "100", "-fa", "on", "--numa=x"
    )
    assert "--numa is a llama-server flag that has no effect here" in server.log
    assert server.get("/props").json()["default_generation_settings"]["n_ctx"] == 512


def test_environment_names(start_server: Callable[..., ServerProcess]) -> None:
    environment = {"LLAMA_ARG_N_PARALLEL": "3", "WINGMAN_CTX_SIZE": "768", "LLAMA_API_KEY": "k1,k2"}
    server = start_server(environment=environment)
    assert server.get("/health").json()["slots_idle"] == 3
    assert server.get("/props").status_code == 401
    assert server.get("/props", headers={"Authorization": "Bearer k2"}).status_code == 200


def test_unix_socket_and_several_hosts(start_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    path = tmp_path / "wingman.sock"
    server = start_server("--host", f"127.0.0.1,::1,{path}", "-c", "512", "-np", "1")
    assert "listens  http://[::1]:" in server.log
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://local") as client:
        body = client.post("/completion", json={"prompt": "Hi", "n_predict": 2}).json()
    assert body["tokens_predicted"] == 2
    assert server.stop() == 0
    assert not path.exists()


@pytest.mark.parametrize(
    "arguments", [("-ctk", "q8_0", "-ctv", "q8_0", "-fa", "on"), ("--kv-unified",), ("--no-mmap",)]
)
def test_engine_flags_still_answer(
    start_server: Callable[..., ServerProcess], arguments: tuple[str, ...]
) -> None:
    server = start_server("-c", "1024", "-np", "2", *arguments)
    answer = server.complete("The capital of France is", n_predict=4)
    assert answer["content"].strip().startswith("Paris")


def test_logs_as_json_carry_the_request_id(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("-c", "512", "-np", "1", "--log-format", "json")
    response = server.get("/props", headers={"X-Request-Id": "abc-1"})
    assert response.headers["x-request-id"] == "abc-1"
    forged = server.get("/props", headers={"X-Request-Id": "no spaces allowed"})
    assert forged.headers["x-request-id"] != "no spaces allowed"
    server.stop()
    entries = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
    (entry,) = (entry for entry in entries if entry.get("request_id") == "abc-1")
    assert (entry["status"], entry["path"], entry["level"]) == (200, "/props", "info")


# -- in this process, with a scripted model -------------------------------------------------------


def in_process(make_runner: Callable[..., ScriptedRunner], model: Path) -> Wingman:
    config = Config(
        model=ModelConfig(model=model),
        context=ContextConfig(parallel=2),
        server=ServerConfig(port=0),
    )
    return Wingman(config, make_runner)


async def test_while_the_model_loads_everything_answers_503_but_live(tiny_model: Path) -> None:
    may_load = threading.Event()

    def slow(*_: object) -> ScriptedRunner:
        may_load.wait(30)
        return ScriptedRunner()

    wingman = in_process(slow, tiny_model)
    starting = asyncio.create_task(wingman.start())
    while not wingman.addresses:  # noqa: ASYNC110 - it has no event for this
        await asyncio.sleep(0.01)
    async with httpx.AsyncClient(base_url=f"http://{wingman.addresses[0]}") as client:
        for path in ("/health", "/ready", "/slots", "/nope", "/v1/models"):
            response = await client.get(path)
            assert response.status_code == 503
            assert response.json()["error"]["message"] == "Loading model"
            assert response.json()["status"] == "loading model"
        assert (await client.options("/health")).status_code == 200
        assert (await client.get("/live")).status_code == 200
        may_load.set()
        await starting
        assert (await client.get("/ready")).status_code == 200
    await wingman.close()


async def test_a_failed_load_is_reported(tiny_model: Path) -> None:
    def broken(*_: object) -> ScriptedRunner:
        raise ModelLoadFailure("no such weights")

    wingman = in_process(broken, tiny_model)
    with pytest.raises(ModelLoadFailure, match="no such weights"):
        await wingman.start()
    await wingman.close()


async def test_a_failed_step_is_a_500_for_its_jobs_and_the_server_goes_on(tiny_model: Path) -> None:
    runner = ScriptedRunner()
    wingman = in_process(lambda *_: runner, tiny_model)
    await wingman.start()
    async with httpx.AsyncClient(base_url=f"http://{wingman.addresses[0]}") as client:
        runner.fail_at = {runner.n_steps + 2}
        failed = await client.post("/completion", json={"prompt": "abc", "n_predict": 5})
        assert failed.status_code == 500
        assert failed.json()["error"] == {
            "code": 500, "message": "the model runtime failed on this request", "type": "server_error",
        }  # fmt: skip
        runner.fail_at = {runner.n_steps + 3}
        streamed = await client.post("/completion", json={"prompt": "abc", "n_predict": 5, "stream": True})
        assert '"type":"server_error"' in streamed.text
        fine = await client.post("/completion", json={"prompt": "abc", "n_predict": 5})
        assert fine.status_code == 200
    await wingman.close()
    assert runner.is_closed


async def test_a_step_that_hangs_shows_in_ready(tiny_model: Path) -> None:
    may_go_on = threading.Event()

    class Stuck(ScriptedRunner):
        def run(self, batch: Any) -> Any:
            may_go_on.wait(30)
            return super().run(batch)

    config = Config(
        model=ModelConfig(model=tiny_model),
        context=ContextConfig(parallel=2, step_timeout=0.05),
        server=ServerConfig(port=0),
    )
    wingman = Wingman(config, lambda *_: Stuck())
    await wingman.start()
    async with httpx.AsyncClient(base_url=f"http://{wingman.addresses[0]}") as client:
        job = asyncio.create_task(client.post("/completion", json={"prompt": "abc", "n_predict": 2}))
        await asyncio.sleep(0.2)
        response = await client.get("/ready")
        assert response.status_code == 503
        assert "a step has been running" in response.json()["error"]["message"]
        assert (await client.get("/slots")).status_code == 200
        may_go_on.set()
        assert (await job).status_code == 200
        assert (await client.get("/ready")).status_code == 200
    await wingman.close()
