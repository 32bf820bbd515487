"""The page for people: how it is served, and that what it asks for is there. No browser is needed."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.daemon import Daemon, receive
from wingman.app import PUBLIC

PAGE = Path(__file__).parents[2] / "wingman" / "web" / "index.html"
TEXT = PAGE.read_text("utf-8")
STYLE = TEXT[TEXT.index("<style>") : TEXT.index("</style>")]
SCRIPT = TEXT[TEXT.index("<script>") + len("<script>") : TEXT.index("</script>")]
CODE = re.sub(r"(^|\s)//.*", "", SCRIPT)
HTML = TEXT.replace(SCRIPT, "").replace(STYLE, "")
HEADERS = {
    "content-type": "text/html; charset=utf-8",
    "content-security-policy": "default-src 'self' 'unsafe-inline'; connect-src *; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Daemon]:
    """A model and the control API, each with a listener."""
    home = tmp_path_factory.mktemp("page") / "home"
    with Daemon(home, "--model", str(tiny_model), "--alias", "tiny", "--control", "-c", "512") as running:
        yield running


def called_paths() -> set[str]:
    """All paths that the script asks for."""
    paths = set(re.findall(r"[\"`}](/[a-z][a-z0-9_/]*)", CODE))
    assert "/api/downloads/" in paths
    verbs = re.findall(r"change\(\"(\w+)\"\)", CODE)
    return paths - {"/api/downloads/", "/ws"} | {f"/api/downloads/{verb}" for verb in verbs}


def test_it_is_served_by_both_listeners(daemon: Daemon) -> None:
    for base in (daemon.url, daemon.control):
        for origin in ({}, {"origin": "https://elsewhere.example", "sec-fetch-site": "cross-site"}):
            answer = httpx.get(base + "/", headers=origin)  # following a link from elsewhere is fine
            assert answer.status_code == 200
            assert answer.content == PAGE.read_bytes()
            assert HEADERS.items() <= dict(answer.headers).items()
        head = httpx.head(base + "/")
        assert (head.status_code, head.content) == (200, b"")


def test_it_needs_no_key_but_what_it_asks_for_does(tmp_path: Path) -> None:
    with Daemon(tmp_path / "home", "--single-port", "--api-key", "k") as daemon:
        assert httpx.get(daemon.url + "/").content == PAGE.read_bytes()
        for path in called_paths() - PUBLIC:
            assert httpx.get(daemon.url + path).status_code == 401, path


def test_every_path_it_calls_exists(daemon: Daemon) -> None:
    served = {
        path
        for base in (daemon.url, daemon.control)
        for path in httpx.get(base + "/openapi.json").json()["paths"]
    }
    called = called_paths()
    assert called <= served, called - served
    assert called >= {
        "/api/hardware",
        "/api/models",
        "/api/inference/start",
        "/v1/chat/completions",
        "/v1/models",
    }
    assert {f"/api/downloads/{verb}" for verb in ("enqueue", "cancel", "reset")} <= called


def test_it_tells_the_listeners_apart(daemon: Daemon) -> None:
    statuses = {
        path: [httpx.get(base + path).status_code for base in (daemon.url, daemon.control)]
        for path in ("/live", "/health", "/api/hardware")
    }
    assert statuses == {"/live": [200, 200], "/health": [200, 404], "/api/hardware": [404, 200]}


def test_a_browser_lets_it_call_the_other_listener(daemon: Daemon) -> None:
    wanted = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    for own, other, path in (
        (daemon.control, daemon.url, "/v1/chat/completions"),
        (daemon.url, daemon.control, "/api/inference/stop"),
    ):
        headers = {"origin": own, "sec-fetch-site": "same-site"}
        preflight = httpx.options(other + path, headers=headers | wanted)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == own
        assert "POST" in preflight.headers["access-control-allow-methods"]
        assert preflight.headers["access-control-allow-headers"] == "authorization,content-type"
        answer = httpx.post(other + path, headers=headers, json={})
        assert answer.status_code in (400, 422)
        assert answer.headers["access-control-allow-origin"] == own
        assert httpx.get(other + "/live", headers=headers).headers["access-control-allow-origin"] == own


def test_further_origins_do_not_shut_it_out(tmp_path: Path) -> None:
    with Daemon(tmp_path / "home", "--cors-origins", "https://a.example") as daemon:
        for origin in (daemon.url, "https://a.example"):
            answer = httpx.get(daemon.control + "/api/inference", headers={"origin": origin})
            assert answer.headers["access-control-allow-origin"] == origin


def test_what_it_reads_is_sent(daemon: Daemon) -> None:
    seen = {}
    with daemon.events("ws", origin=daemon.url) as socket:
        while not {"status", "metrics"} <= seen.keys():
            message = receive(socket)
            seen[message["event"]] = message
    status, metrics = seen["status"], seen["metrics"]
    names = set(re.findall(r"\bmessage\.(\w+)", CODE)) - {"content", "event", "alias"}
    assert names == {"WingmanItems", "DownloadItems", "hardware"}
    assert names <= status.keys()
    read = set(re.findall(r"\bmetrics\.([a-z_]+)\b(?!\()", CODE))
    assert {"slots", "tokens_per_second", "kv_cache_usage_ratio"} <= read <= metrics.keys()
    assert set(re.findall(r"\bslot\.(\w+)", CODE)) <= metrics["slots"][0].keys()
    for part, name in re.findall(r"\b(cpu|gpu|disk|os|llama)\.(?!cpp\b)(\w+)", CODE):
        assert name in status["hardware"][part]
    assert {"alias", "status", "error", "modelRepo", "filePath", "port", "address"} <= status["WingmanItems"][
        0
    ].keys()


def test_it_asks_nobody_else_and_inserts_only_text() -> None:
    assert not re.search(r"https?://", TEXT)
    assert not re.search(r"\b(src|href|srcset|action)\s*=", HTML)
    assert not re.search(r"\bon\w+\s*=", HTML), "the script binds handlers"
    assert not re.search(r"@import|url\(|expression", STYLE)
    dangerous = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|\beval\b|\bFunction\("
    assert not re.search(dangerous, SCRIPT)
    assert not re.search(
        r"import\s*\(|import\s+\w|setAttribute|localStorage|document\.cookie|\.src\b|\.href\b", CODE
    )
    assert TEXT.count("<script") == 1
    assert "?key" not in CODE, "a key is never in an address"
    assert len(TEXT.splitlines()) <= 450


def test_its_parts_are_there() -> None:
    ids = re.findall(r"\bid=\"([\w-]+)\"", HTML)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"find\(\"([\w-]+)\"\)", CODE)) == set(ids)
    for control in re.findall(r"<(?:input|select|textarea)[^>]*>", HTML):
        assert "aria-label" in control or 'for="key"' in HTML
    assert "color-scheme: light dark" in STYLE


def test_its_script_parses() -> None:
    code = re.sub(r"\"[^\"\n]*\"", "", CODE)
    for opening, closing in ("()", "[]", "{}"):
        assert code.count(opening) == code.count(closing)
    assert SCRIPT.count("`") % 2 == 0
    node = shutil.which("node")
    if node is not None:  # the checks above are all there is elsewhere
        subprocess.run(
            [node, "--check", "-"], input=SCRIPT, text=True, check=True, capture_output=True, timeout=60
        )
