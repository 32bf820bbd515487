"""`wingman list` and `wingman rm`, and how models are named."""

from __future__ import annotations

import io
from pathlib import Path

import orjson
import pytest

from tests.commands.fakes import REPO, FakeApi, Terminal, download, error, model, offer, running
from wingman.services.home import Home

EVIL = "ev\x1b[31mil\u202e.Q8_0.gguf"


@pytest.fixture
def stocked(api: FakeApi) -> FakeApi:
    """Two models of one repository, and a file of the user's own."""
    half = download("tiny.Q8_0.gguf", status="downloading", progress=0.5, totalBytes=3_000_000)
    api.downloads = [download(), half]
    api.models["local"] = model(
        offer("F16", repo="local", filePath="mine/own.F16.gguf", sizeBytes=500), repo="local"
    )
    return api


def test_list_shows_what_is_here(terminal: Terminal, stocked: FakeApi) -> None:
    stocked.items = [running()]
    status, out, _ = terminal.run("list")
    lines = out.splitlines()
    assert status == 0
    assert lines[0].split() == ["NAME", "REPO", "FILE", "SIZE", "QUANT", "STATUS"]
    assert lines[1].split() == ["own.F16", "local", "mine/own.F16.gguf", "500", "B", "F16", "complete"]
    assert lines[2].split()[-1] == "inferring"
    assert lines[3].split()[-2:] == ["downloading", "50%"]
    assert (
        len({line.index(word) for line, word in zip(lines, ("REPO", "local", REPO, REPO), strict=True)}) == 1
    )


def test_list_as_json(terminal: Terminal, stocked: FakeApi) -> None:
    _, out, err = terminal.run("list", "--json")
    facts = orjson.loads(out)
    assert err == ""
    assert [fact["status"] for fact in facts] == ["complete", "complete", "downloading"]
    assert facts[1] | {"name": "tiny.Q4_K_M", "quantization": "Q4_K_M", "sizeBytes": 2_000_000} == facts[1]


def test_hostile_names_move_no_cursor(terminal: Terminal, api: FakeApi) -> None:
    api.downloads = [download(EVIL)]
    _, out, _ = terminal.run("list")
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "ev\\x1b[31mil\\u202e" in out
    api.models[REPO] = model(offer("Q8_0"), repo=EVIL)
    assert "\x1b" not in terminal.run("list", "--all")[1]


def test_an_empty_list_says_what_to_do(terminal: Terminal, api: FakeApi) -> None:
    assert terminal.run("list") == (0, "", "no models are here yet; wingman pull owner/repo gets one\n")
    assert terminal.run("list", "--json")[1] == "[]\n"


def test_list_all_shows_the_hub(terminal: Terminal, api: FakeApi) -> None:
    api.models[REPO] = model(offer("Q4_K_M", isDownloaded=True), offer("F16", isInferable=False))
    api.replies["/api/models"] = lambda _: (200, {"models": list(api.models.values()), "stale": True})
    status, out, err = terminal.run("list", "--all")
    assert status == 0
    assert out.splitlines()[1].split() == [REPO, "1B", "7", "3", "Q4_K_M*", "F16!"]
    assert "could not be reached" in err
    assert orjson.loads(terminal.run("list", "--all", "--json")[1])[0]["id"] == REPO


@pytest.mark.parametrize(
    "name", ["tiny.Q4_K_M", "TINY.q4_k_m.gguf", f"{REPO}:q4_k_m", f"{REPO}/tiny.Q4_K_M.gguf"]
)
def test_a_model_has_several_names(terminal: Terminal, stocked: FakeApi, name: str) -> None:
    stocked.replies["/api/downloads/reset"] = lambda _: (200, download())
    assert terminal.run("rm", name, "--yes") == (0, "tiny.Q4_K_M.gguf is deleted\n", "")
    assert stocked.posted() == [("/api/downloads/reset", {"modelRepo": REPO, "filePath": "tiny.Q4_K_M.gguf"})]


def test_a_path_names_a_model(terminal: Terminal, stocked: FakeApi, tmp_path: Path) -> None:
    stocked.replies["/api/downloads/reset"] = lambda _: (200, download())
    path = Home(tmp_path).model_file(REPO, "tiny.Q4_K_M.gguf")
    assert terminal.run("rm", str(path), "-y")[0] == 0


def test_an_ambiguous_name_lists_the_candidates(terminal: Terminal, stocked: FakeApi) -> None:
    status, out, err = terminal.run("rm", REPO, "--yes")
    assert (status, out) == (1, "")
    assert err == f"wingman: {REPO} could be any of: tiny.Q4_K_M, tiny.Q8_0\n"


def test_an_unknown_name_lists_what_is_here(terminal: Terminal, stocked: FakeApi) -> None:
    _, _, err = terminal.run("rm", "big/model", "--yes")
    assert "no model is called big/model; here are: own.F16, tiny.Q4_K_M, tiny.Q8_0" in err
    assert "wingman pull big/model gets it" in err


def test_rm_asks_first(terminal: Terminal, stocked: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    stocked.replies["/api/downloads/reset"] = lambda _: (200, download())
    answer = io.StringIO("n\n")
    monkeypatch.setattr(answer, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdin", answer)
    status, _, err = terminal.run("rm", "tiny.Q4_K_M")
    assert status == 1
    assert "[y/N]" in err
    assert stocked.posted() == []


def test_rm_deletes_nothing_when_nobody_can_be_asked(
    terminal: Terminal, stocked: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    status, _, err = terminal.run("rm", "tiny.Q4_K_M")
    assert (status, stocked.posted()) == (1, [])
    assert "--yes" in err


def test_rm_refuses_what_is_loaded(terminal: Terminal, stocked: FakeApi) -> None:
    stocked.items = [running("smol")]
    status, _, err = terminal.run("rm", "tiny.Q4_K_M", "--yes")
    assert (status, stocked.posted()) == (1, [])
    assert "wingman stop smol first" in err


def test_rm_leaves_files_of_the_users_own(terminal: Terminal, stocked: FakeApi) -> None:
    status, _, err = terminal.run("rm", "own.F16", "--yes")
    assert (status, stocked.posted()) == (1, [])
    assert "delete it yourself" in err


def test_rm_tells_the_servers_refusal(terminal: Terminal, stocked: FakeApi) -> None:
    stocked.replies["/api/downloads/reset"] = lambda _: error(409, "it is loaded")
    assert terminal.run("rm", "tiny.Q4_K_M", "--yes", "--json") == (1, "", "wingman: it is loaded\n")
