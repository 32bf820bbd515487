"""From an empty home to the end of the server, by HTTP and WebSocket alone, as a client sees it."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.support.daemon import Daemon, Watcher, receive
from tests.support.hub import HubServer
from wingman.services import starter
from wingman.services.home import Home

TINY_REPO, TINY_PATH = "tests/Tiny-GGUF", "tiny.F32.gguf"
MESSAGES: Any = [{"role": "user", "content": "Tell me a story about the sea."}]


@pytest.fixture
def hub(starter_model: Path, tiny_model: Path) -> Iterator[HubServer]:
    with HubServer() as hub:
        hub.add_repo(starter.REPO, {starter.PATH: starter_model, "README.md": b"# SmolLM2"}, downloads=10)
        hub.add_repo(TINY_REPO, {TINY_PATH: tiny_model}, downloads=5)
        hub.add_repo("tests/no-models", {"weights.safetensors": b"x"})
        yield hub


def test_a_model_is_found_fetched_started_asked_and_stopped(tmp_path: Path, hub: HubServer) -> None:
    home = Home(tmp_path / "home")
    with Daemon(home.root, hub=hub.url) as daemon:
        assert_empty(daemon)
        assert_hub_is_listed(daemon)
        fetch_while_the_hub_breaks(daemon, hub, home)
        with Watcher(daemon.events()) as watcher:
            start_the_model(daemon, watcher)
            chat_while_metrics_come(daemon, watcher)
            start_a_second_one(daemon, watcher)
            ask_for_unknown_ones(daemon)
            stop_both(daemon, watcher)
            shut_down(daemon, watcher)
    assert not home.runtime_file.exists()
    with sqlite3.connect(home.database) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def assert_empty(daemon: Daemon) -> None:
    assert daemon.ask("/api/downloads") == {"DownloadItems": []}
    assert daemon.ask("/api/inference") == {"WingmanItems": []}
    assert daemon.ask("/api/inference/status") == []
    assert httpx.get(f"{daemon.url}/v1/models").json()["data"] == []
    assert httpx.get(f"{daemon.url}/ready").status_code == 200
    refused = daemon.chat(None)
    assert refused.status_code == 404
    assert "no model is loaded" in refused.json()["error"]["message"]


def assert_hub_is_listed(daemon: Daemon) -> None:
    answer = daemon.ask("/api/models")
    assert not answer.get("stale")
    models = {model["id"]: model for model in answer["models"]}
    assert list(models) == [starter.REPO, TINY_REPO]
    (item,) = models[starter.REPO]["items"]
    assert (item["filePath"], item["quantization"], item["isDownloaded"]) == (starter.PATH, "Q4_1", False)
    assert models[starter.REPO]["size"] == "135M"


def fetch_while_the_hub_breaks(daemon: Daemon, hub: HubServer, home: Home) -> None:
    """The connection breaks once in the middle; progress is true at each moment it is told."""
    hub.throttle = 40_000_000
    hub.misbehave(starter.REPO, starter.PATH, cut_after=30_000_000, times=1)
    seen: list[dict[str, Any]] = []
    with daemon.events("?events=download_status") as socket:
        answer = daemon.api("/api/downloads/enqueue", modelRepo=starter.REPO, filePath=starter.PATH)
        assert answer.status_code == 202
        while not seen or seen[-1]["status"] in ("queued", "downloading"):
            message = receive(socket)
            if message["event"] == "download_status":
                seen.append(message)
                assert message["downloadedBytes"] <= hub.bytes_sent(starter.PATH)
    hub.throttle = None
    assert [message["status"] for message in seen] == sorted(
        (message["status"] for message in seen), key=["queued", "downloading", "complete"].index
    )
    assert seen[-1]["status"] == "complete"
    assert len(seen) > 4
    counts = [message["downloadedBytes"] for message in seen]
    assert counts == sorted(counts)
    assert counts[-1] == starter.SIZE_BYTES
    assert all(message["totalBytes"] == starter.SIZE_BYTES for message in seen)
    assert all(abs(one["progress"] - one["downloadedBytes"] / one["totalBytes"]) < 1e-5 for one in seen)
    assert any("/s" in message["downloadSpeed"] for message in seen)
    file = home.model_file(starter.REPO, starter.PATH)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == starter.SHA256
    assert hub.bytes_sent(starter.PATH) == starter.SIZE_BYTES  # nothing came twice
    again = daemon.api("/api/downloads/enqueue", modelRepo=starter.REPO, filePath=starter.PATH)
    assert (again.status_code, again.json()["status"]) == (208, "complete")


def start_the_model(daemon: Daemon, watcher: Watcher) -> None:
    query = {"alias": "smol", "modelRepo": starter.REPO, "filePath": starter.PATH, "contextSize": 2048}
    answer = daemon.api("/api/inference/start", **query)
    assert (answer.status_code, answer.json()["status"]) == (202, "queued")
    watcher.wait("inference_status", alias="smol", status="inferring")
    told = watcher.of("inference_status", alias="smol")
    order = [message["status"] for message in told]
    assert list(dict.fromkeys(order)) == ["queued", "preparing", "inferring"]
    progress = [message["progress"] for message in told if message["status"] == "preparing"]
    assert progress[0] == 0
    assert progress == sorted(progress)
    assert progress[-1] <= 1
    again = daemon.api("/api/inference/start", **query)
    assert (again.status_code, again.json()["status"]) == (208, "inferring")


def chat_while_metrics_come(daemon: Daemon, watcher: Watcher) -> None:
    with openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="smol",
            messages=MESSAGES,
            max_tokens=120,
            stream=True,
            stream_options={"include_usage": True},
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        chunks = list(stream)
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens == 120
    assert "sea" in "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    last = watcher.wait("metrics", alias="smol", requests_running=0, kv_cache_tokens=usage.total_tokens - 1)
    told = watcher.of("metrics", alias="smol")
    told = told[: told.index(last) + 1]
    assert_metrics_are_whole(last)
    for message in told:
        assert all(type(value) in (int, float) for value in message["timings"].values())
    counts = [message["timings"]["predicted_count"] for message in told]
    assert counts == sorted(counts)
    assert len(set(counts)) > 3  # it was told while they came
    assert counts[-1] == 120
    assert last["timings"]["prompt_count"] == usage.prompt_tokens
    assert any(message["tokens_per_second"] > 0 for message in told)
    assert any(message["system"]["has_next_token"] for message in told)
    assert last["tokens_per_second"] == 0
    assert "sea" not in str(watcher.messages)  # what is said is nobody else's


def assert_metrics_are_whole(message: dict[str, Any]) -> None:
    timings, system = message["timings"], message["system"]
    assert timings.keys() >= set(
        """timestamp load_time sample_time sample_count sample_per_token_ms sample_per_second total_time
        prompt_count prompt_ms prompt_per_token_ms prompt_per_second predicted_count predicted_ms
        predicted_per_token_ms predicted_per_second""".split()
    )
    assert 0 < timings["load_time"] < timings["total_time"]
    rate = 1000 * (timings["predicted_count"] - 1) / timings["predicted_ms"]
    assert timings["predicted_per_second"] == pytest.approx(rate, rel=0.01)
    assert (system["model_alias"], system["quantization"]) == ("smol", "Q4_1")
    assert system["ctx_size"] == 4 * 2048  # contextSize is what one request gets
    assert message["meta"]["arch"] == "llama"
    assert message["meta"]["n_layer"] == "30"
    assert sum(message["tensors"].values()) == 272
    assert len(message["slots"]) == 4


def start_a_second_one(daemon: Daemon, watcher: Watcher) -> None:
    assert daemon.fetch(TINY_REPO, TINY_PATH)["status"] == "complete"
    assert daemon.start_model("tiny", TINY_REPO, TINY_PATH)["status"] == "inferring"
    watcher.wait("inference_status", alias="tiny", status="inferring")
    with openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="none", max_retries=0) as client:
        for alias in ("smol", "tiny"):
            answer = client.chat.completions.create(model=alias, messages=MESSAGES, max_tokens=4)
            assert answer.model == alias
            assert answer.usage is not None
            assert answer.usage.completion_tokens > 0
        assert {model.id for model in client.models.list()} == {"smol", "tiny"}
    watcher.wait("metrics", alias="tiny", requests_running=0)
    assert daemon.chat(None).json()["model"] in ("smol", "tiny")


def ask_for_unknown_ones(daemon: Daemon) -> None:
    refused = daemon.chat("gpt-4")
    assert refused.status_code == 404
    message = refused.json()["error"]["message"]
    assert message == "no model is called 'gpt-4'; loaded: smol, tiny"
    for path, query in (
        ("/api/inference/start", {"alias": "x", "modelRepo": "no/such-GGUF", "filePath": "x.gguf"}),
        ("/api/inference/stop", {"alias": "x"}),
        ("/api/inference/reset", {"alias": "x"}),
        ("/api/downloads/cancel", {"modelRepo": "no/such-GGUF", "filePath": "x.gguf"}),
        ("/api/downloads/enqueue", {"modelRepo": "no/such-GGUF", "filePath": "x.gguf"}),
        ("/api/nothing", {}),
    ):
        assert daemon.api(path, **query).status_code == 404, path
    assert daemon.api("/api/inference/start", alias="x").status_code == 422
    loaded = daemon.api("/api/downloads/reset", modelRepo=starter.REPO, filePath=starter.PATH)
    assert loaded.status_code == 409


def stop_both(daemon: Daemon, watcher: Watcher) -> None:
    for alias in ("smol", "tiny"):
        stopped = daemon.ask("/api/inference/stop", alias=alias)
        assert (stopped["alias"], stopped["status"], stopped["error"]) == (alias, "complete", "")
        watcher.wait("inference_status", alias=alias, status="complete")
        assert watcher.of("inference_status", alias=alias, status="cancelling")
    assert {item["status"] for item in daemon.ask("/api/inference")["WingmanItems"]} == {"complete"}
    deleted = daemon.ask("/api/downloads/reset", modelRepo=TINY_REPO, filePath=TINY_PATH)
    assert deleted["filePath"] == TINY_PATH
    assert [item["filePath"] for item in daemon.ask("/api/downloads")["DownloadItems"]] == [starter.PATH]


def shut_down(daemon: Daemon, watcher: Watcher) -> None:
    assert daemon.ask("/api/shutdown") == {"status": "shutting down"}
    assert daemon.wait() == 0
    code, _ = watcher.join()
    assert code == 1001  # going away
    status = watcher.of("status")[-1]
    assert (status["WingmanService"]["status"], status["DownloadService"]["status"]) == ("stopping",) * 2
    seqs = [message["seq"] for message in watcher.messages]
    assert seqs == sorted(seqs)
    assert "Traceback" not in daemon.log
