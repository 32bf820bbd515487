"""`wingman ps`, `start` and `stop`."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from tests.commands.fakes import REPO, FakeApi, Terminal, download, error, running

FILE = "tiny.Q4_K_M.gguf"


@pytest.fixture
def ready(api: FakeApi) -> FakeApi:
    """One model, which loads when it is started."""
    api.downloads = [download()]

    def start(query: dict[str, str]) -> tuple[int, Any]:
        item = running(query["alias"], status="queued", filePath=query["filePath"])
        api.items = [item]
        api.messages = [
            {"event": "inference_status", **running("other", status="error", error="not ours")},
            {"event": "inference_status", **item, "status": "preparing", "progress": 0.5},
            {"event": "inference_status", **item, "status": "inferring"},
        ]
        return 202, item

    api.replies["/api/inference/start"] = start
    return api


def test_ps_shows_what_runs(terminal: Terminal, api: FakeApi) -> None:
    api.items = [running("a", port=7000, contextSize=4096), running("b", status="error", error="no memory")]
    status, out, err = terminal.run("ps")
    assert (status, err) == (0, "")
    assert out.splitlines()[1].split() == ["a", "inferring", f"{REPO}/{FILE}", "7000", "4096"]
    assert len(out.splitlines()) == 2
    assert "b: no memory" in terminal.run("ps", "--all")[2]


def test_ps_adds_the_numbers_of_the_socket(terminal: Terminal, api: FakeApi) -> None:
    api.items = [running("a")]
    api.messages = [{"event": "metrics", "alias": "a", "slots": [{"n_ctx": 2048}], "tokens_per_second": 9.87}]
    assert terminal.run("ps")[1].splitlines()[1].split()[-2:] == ["2048", "9.9"]
    document = orjson.loads(terminal.run("ps", "--json")[1])
    assert document[0]["alias"] == "a"
    assert document[0]["metrics"]["slots"] == [{"n_ctx": 2048}]


def test_ps_does_without_a_socket(terminal: Terminal, api: FakeApi) -> None:
    api.items, api.messages = [running("a")], None
    assert terminal.run("ps")[0] == 0


def test_start_waits_until_it_is_loaded(terminal: Terminal, ready: FakeApi) -> None:
    status, out, _ = terminal.run("start", REPO, "--ctx-size", "4096", "-ngl", "0", "--force")
    assert (status, out) == (0, "tiny.Q4_K_M is ready: wingman run tiny.Q4_K_M\n")
    assert ready.posted() == [
        (
            "/api/inference/start",
            {
                "alias": "tiny.Q4_K_M",
                "modelRepo": REPO,
                "filePath": FILE,
                "contextSize": "4096",
                "gpuLayers": "0",
                "force": "true",
            },
        )
    ]


def test_start_under_an_alias_as_json(terminal: Terminal, ready: FakeApi) -> None:
    status, out, _ = terminal.run("start", REPO, "--alias", "smol", "--port", "7000", "--json")
    assert status == 0
    assert orjson.loads(out)["alias"] == "smol"
    assert ready.posted()[0][1]["port"] == "7000"


@pytest.mark.parametrize("name", ["smol", REPO])
def test_start_again_as_before(terminal: Terminal, ready: FakeApi, name: str) -> None:
    ready.items = [running("smol", status="complete", contextSize=512, chatTemplate="chatml")]
    assert terminal.run("start", name, "--gpu-layers", "3")[0] == 0
    query = ready.posted()[0][1]
    assert (query["alias"], query["contextSize"], query["chatTemplate"]) == ("smol", "512", "chatml")
    assert query["gpuLayers"] == "3"


def test_a_name_that_is_another_models_alias_is_not_taken(terminal: Terminal, ready: FakeApi) -> None:
    ready.items = [running("tiny.Q4_K_M", status="complete", filePath="other.gguf")]
    assert terminal.run("start", REPO)[0] == 0
    assert ready.posted()[0][1]["alias"] == f"{REPO}/{FILE}"


def test_start_tells_why_it_did_not_load(terminal: Terminal, ready: FakeApi) -> None:
    failed = running(status="error", error="not enough memory")
    ready.replies["/api/inference/start"] = lambda _: (202, failed)
    ready.items = [failed]
    status, out, err = terminal.run("start", FILE)
    assert (status, out) == (1, "")
    assert "tiny.Q4_K_M did not load: not enough memory" in err


@pytest.mark.parametrize("status", [400, 409, 507])
def test_start_tells_the_servers_refusal(terminal: Terminal, ready: FakeApi, status: int) -> None:
    ready.replies["/api/inference/start"] = lambda _: error(status, "it can't be")
    assert terminal.run("start", FILE) == (1, "", "wingman: it can't be\n")


def test_start_of_a_taken_alias_says_so(terminal: Terminal, ready: FakeApi) -> None:
    ready.replies["/api/inference/start"] = lambda _: (208, running("smol", filePath="other.gguf"))
    _, _, err = terminal.run("start", FILE, "--alias", "smol")
    assert "smol is other.gguf already: choose another with --alias" in err


def test_the_model_of_the_server_itself_is_not_started(terminal: Terminal, ready: FakeApi) -> None:
    ready.items = [running("own", status="error", modelRepo="", filePath="/own.gguf")]
    status, _, err = terminal.run("start", "own")
    assert (status, ready.posted()) == (1, [])
    assert "wingman serve --model" in err


def test_start_of_half_a_model_says_how_to_get_the_rest(terminal: Terminal, ready: FakeApi) -> None:
    ready.downloads = [download(status="error", progress=0.25, error="the Hub is away")]
    status, _, err = terminal.run("start", FILE)
    assert (status, ready.posted()) == (1, [])
    assert f"(error, 25%: the Hub is away); wingman pull {REPO} {FILE} gets the rest" in err


def test_without_a_server_start_becomes_one(terminal: Terminal, ready: FakeApi) -> None:
    ready.is_daemon = False
    status, out, err = terminal.run("start", REPO, "--alias", "smol")
    assert (status, out) == (0, "")
    assert "becomes one" in err
    assert terminal.served[0][1] == {"alias": "smol", "modelRepo": REPO, "filePath": FILE}


@pytest.mark.parametrize("name", ["smol", FILE, REPO])
def test_stop_by_alias_or_model(terminal: Terminal, ready: FakeApi, name: str) -> None:
    ready.items = [running("smol")]
    ready.replies["/api/inference/stop"] = lambda _: (200, running("smol", status="complete"))
    assert terminal.run("stop", name) == (0, "smol is stopped\n", "")
    assert ready.posted() == [("/api/inference/stop", {"alias": "smol"})]
    assert orjson.loads(terminal.run("stop", name, "--json")[1])["status"] == "complete"


def test_stop_of_what_does_not_run_names_what_does(terminal: Terminal, ready: FakeApi) -> None:
    assert terminal.run("stop", "x") == (1, "", "wingman: x does not run; nothing does\n")
    ready.items = [running("a"), running("b")]
    assert "these do: a, b" in terminal.run("stop", "x")[2]
    assert "runs as a, b: say which" in terminal.run("stop", FILE)[2]


def test_stop_needs_a_server(terminal: Terminal, api: FakeApi) -> None:
    api.is_daemon = False
    status, _, err = terminal.run("stop", "x")
    assert status == 1
    assert "no server is running" in err
