"""`wingman pull`: which file, how far, and what ctrl-C means."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from tests.commands.fakes import REPO, FakeApi, Terminal, download, error, model, offer
from wingman.commands.api import CommandFailed
from wingman.commands.pull import Target, parse_target


@pytest.fixture
def hub(api: FakeApi) -> FakeApi:
    """Offers one repository, and downloads what is asked for in two steps."""
    api.models[REPO] = model(offer("Q4_K_M"), offer("Q8_0", 3000), offer("F16", 9000))

    def enqueue(query: dict[str, str]) -> tuple[int, Any]:
        item = download(query["filePath"], status="queued", downloadedBytes=0, progress=0.0)
        done = item | {"status": "complete", "downloadedBytes": 2_000_000, "progress": 1.0}
        half = item | {"status": "downloading", "downloadedBytes": 1_000_000, "downloadSpeed": "1.0 MB/s"}
        other = download("other.gguf", status="error", error="not ours")
        api.downloads = [item]
        api.messages = [{"event": "download_status", **message} for message in (other, half, done)]
        return 202, item

    api.replies["/api/downloads/enqueue"] = enqueue
    return api


def enqueued(api: FakeApi) -> dict[str, str]:
    return next(query for path, query in api.posted() if path == "/api/downloads/enqueue")


@pytest.mark.parametrize(
    ("repo", "file", "target"),
    [
        ("o/r", None, Target("o/r", "", "")),
        ("o/r", "Q4_K_M", Target("o/r", "", "Q4_K_M")),
        ("o/r:Q4_K_M", None, Target("o/r", "", "Q4_K_M")),
        ("o/r/sub/x.gguf", None, Target("o/r", "", "sub/x.gguf")),
        ("hf://o/r@v1.0/x.gguf", None, Target("o/r", "v1.0", "x.gguf")),
        ("hf://o/r@abc", "x.gguf", Target("o/r", "abc", "x.gguf")),
    ],
)
def test_repositories_are_named_in_several_ways(repo: str, file: str | None, target: Target) -> None:
    assert parse_target(repo, file) == target


@pytest.mark.parametrize(
    ("repo", "file"),
    [("", None), ("name", None), ("o/r/x.gguf", "y.gguf"), ("o//x", None), ("https://h/o/r", None)],
)
def test_what_is_no_repository_is_refused(repo: str, file: str | None) -> None:
    with pytest.raises(CommandFailed):
        parse_target(repo, file)


def test_the_fitting_file_is_chosen_and_the_reason_told(terminal: Terminal, hub: FakeApi) -> None:
    status, out, err = terminal.run("pull", REPO)
    assert status == 0
    assert enqueued(hub) == {"modelRepo": REPO, "filePath": "tiny.Q4_K_M.gguf"}
    assert "tiny.Q4_K_M.gguf: " in err
    assert "memory" in err
    assert out == "tiny.Q4_K_M is here, 2.0 MB: wingman run tiny.Q4_K_M\n"


def test_json_is_one_document_with_the_reason(terminal: Terminal, hub: FakeApi) -> None:
    status, out, _ = terminal.run("pull", REPO, "--json")
    item = orjson.loads(out)
    assert status == 0
    assert (item["isa"], item["status"], "event" in item) == ("DownloadItem", "complete", False)
    assert "memory" in item["reason"]


@pytest.mark.parametrize(
    ("words", "file_path"),
    [
        (("--json", REPO, "q8_0"), "tiny.Q8_0.gguf"),
        ((REPO, "--json", "tiny.F16.gguf"), "tiny.F16.gguf"),
        ((f"{REPO}:F16", "--json"), "tiny.F16.gguf"),
    ],
)
def test_a_named_file_is_taken_whatever_its_size(
    terminal: Terminal, hub: FakeApi, words: tuple[str, ...], file_path: str
) -> None:
    assert terminal.run("pull", *words)[0] == 0
    assert enqueued(hub)["filePath"] == file_path


def test_a_revision_is_pinned(terminal: Terminal, hub: FakeApi) -> None:
    assert terminal.run("pull", f"hf://{REPO}@main/tiny.Q8_0.gguf")[0] == 0
    assert enqueued(hub) == {"modelRepo": f"hf://{REPO}@main", "filePath": "tiny.Q8_0.gguf"}


def test_what_is_not_there_names_what_is(terminal: Terminal, hub: FakeApi) -> None:
    status, out, err = terminal.run("pull", REPO, "Q2_K")
    assert (status, out) == (1, "")
    assert err == f"wingman: {REPO}: Q2_K is not in it; it has: Q4_K_M, Q8_0, F16\n"


def test_of_two_files_with_a_quantization_none_is_guessed(terminal: Terminal, hub: FakeApi) -> None:
    hub.models[REPO]["items"].append(offer("Q8_0", filePath="other.Q8_0.gguf"))
    _, _, err = terminal.run("pull", REPO, "Q8_0")
    assert "could be any of: tiny.Q8_0.gguf, other.Q8_0.gguf" in err


def test_nothing_that_fits_is_not_downloaded_unasked(terminal: Terminal, hub: FakeApi) -> None:
    hub.models[REPO] = model(offer("Q8_0", 90_000))
    status, _, err = terminal.run("pull", REPO)
    assert status == 1
    assert "name a file to get it nevertheless" in err
    assert hub.posted() == []


def test_an_error_of_the_download_is_told(terminal: Terminal, hub: FakeApi) -> None:
    failed = download("tiny.Q8_0.gguf", status="error", error="the file's hash is wrong\x1b[2J")
    hub.replies["/api/downloads/enqueue"] = lambda _: (202, failed)
    hub.downloads = [failed]
    status, out, err = terminal.run("pull", REPO, "Q8_0")
    assert (status, out) == (1, "")
    assert err == "wingman: tiny.Q8_0.gguf: the file's hash is wrong\\x1b[2J\n"


def test_a_refusal_of_the_server_is_told(terminal: Terminal, hub: FakeApi) -> None:
    hub.replies["/api/downloads/enqueue"] = lambda _: error(507, "the disk is full")
    assert terminal.run("pull", REPO, "Q8_0") == (1, "", "wingman: the disk is full\n")


def test_without_a_socket_it_asks(terminal: Terminal, hub: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    states = [download(status="downloading", downloadedBytes=n, progress=0.1) for n in (1, 2)] + [download()]
    hub.replies["/api/downloads/enqueue"] = lambda _: (202, states[0])
    hub.replies["/api/downloads"] = lambda _: (
        200,
        {"DownloadItems": [states.pop(0) if states else download()]},
    )
    hub.messages = None
    monkeypatch.setattr("wingman.commands.follow.POLL_S", 0.0)
    assert terminal.run("pull", REPO, "Q4_K_M")[0] == 0


def test_a_file_that_is_here_needs_no_hub(terminal: Terminal, api: FakeApi) -> None:
    api.replies["/api/models"] = lambda _: error(502, "the Hub can't be reached")
    api.replies["/api/downloads/enqueue"] = lambda _: (208, download())
    api.downloads = [download()]
    assert terminal.run("pull", REPO, "tiny.Q4_K_M.gguf")[0] == 0


def test_a_terminal_sees_a_bar(terminal: Terminal, hub: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    _, out, err = terminal.run("pull", REPO, "Q8_0")
    assert out.count("\n") == 1
    assert "tiny.Q8_0.gguf:  50%" in err
    assert "1.0 MB/s" in err
    assert "100%" in err


@pytest.mark.parametrize(("is_daemon", "words"), [(True, "goes on in the server"), (False, "resumes it")])
def test_ctrl_c_leaves_the_download_resumable(
    terminal: Terminal, hub: FakeApi, monkeypatch: pytest.MonkeyPatch, is_daemon: bool, words: str
) -> None:
    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    hub.is_daemon = is_daemon
    monkeypatch.setattr("wingman.commands.pull.wait", interrupt)
    status, out, err = terminal.run("pull", REPO, "Q8_0")
    assert (status, out) == (130, "")
    assert words in err
    assert hub.is_closed
