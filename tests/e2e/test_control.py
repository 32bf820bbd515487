"""The daemon from outside: who may call it, where it listens, how it ends, which models it keeps."""

from __future__ import annotations

import base64
import concurrent.futures
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import InvalidStatus

from tests.support.daemon import TIMEOUT_S, Daemon, Watcher, environment_of, receive, wait_until
from wingman.services import starter
from wingman.services.home import Home

REPO = "tests/Tiny-GGUF"
ONE, TWO = "one.F32", "two.F16"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A home with two models in it, to be copied."""
    home = Home(tmp_path_factory.mktemp("template"))
    home.create()
    for name in (ONE, TWO):
        shutil.copy(tiny_model, home.model_file(REPO, f"{name}.gguf"))
    return home.root


@pytest.fixture
def home(tmp_path: Path, template: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "home"))


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, template: Path) -> Iterator[Daemon]:
    """One that tests leave as it was, with a model loaded."""
    home = shutil.copytree(template, tmp_path_factory.mktemp("shared") / "home")
    with Daemon(Path(home), "--allow-host", "wingman.example", "--offline") as daemon:
        daemon.start_model("tiny", REPO, f"{ONE}.gguf")
        yield daemon


def start(daemon: Daemon, name: str, **query: Any) -> dict[str, Any]:
    """Start a model under its own name."""
    return daemon.start_model(name, REPO, f"{name}.gguf", **query)


def refusal(answer: httpx.Response) -> str:
    """What is said with a 403."""
    assert answer.status_code == 403, answer.text
    error = answer.json()["error"]
    assert error["code"] == 403
    return str(error["message"])


# -- Host, Origin, Sec-Fetch-Site -------------------------------------------------------------------


def get(url: str, **headers: str) -> httpx.Response:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.get(url, headers=names, timeout=TIMEOUT_S)


@pytest.mark.parametrize("path", ["/api/inference", "/api/shutdown", "/api/nothing", "/openapi.json"])
def test_a_rebound_name_does_not_reach_the_control_api(daemon: Daemon, path: str) -> None:
    for host in ("evil.example", "evil.example:6568", "127.0.0.1.evil.example", "localhost.evil.example"):
        assert "--allow-host" in refusal(get(daemon.control + path, host=host))
    assert daemon.process.poll() is None


def test_a_rebound_name_does_not_reach_models(daemon: Daemon) -> None:
    assert "--allow-host" in refusal(get(f"{daemon.url}/v1/models", host="evil.example"))
    assert "--allow-host" in refusal(get(f"{daemon.url}/slots", host="evil.example"))


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "127.0.0.2:80", "[::1]:6568",
                                  "wingman.example", "Wingman.Example:443", "app.localhost"])  # fmt: skip
def test_names_of_this_machine_and_those_allowed_reach_it(daemon: Daemon, host: str) -> None:
    assert get(f"{daemon.control}/api/inference", host=host).status_code == 200
    assert get(f"{daemon.url}/v1/models", host=host).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost.evil.example"])
def test_pages_of_others_may_not_control(daemon: Daemon, origin: str) -> None:
    answer = get(f"{daemon.control}/api/shutdown", origin=origin)
    assert "--cors-origins" in refusal(answer)
    assert "access-control-allow-origin" not in answer.headers
    assert get(f"{daemon.url}/v1/models", origin=origin).headers["access-control-allow-origin"] == origin
    with pytest.raises(InvalidStatus) as refused, daemon.events(origin=origin):
        pass
    assert refused.value.response.status_code == 403
    assert daemon.process.poll() is None


def test_links_and_images_of_others_may_not_control(daemon: Daemon) -> None:
    url = f"{daemon.control}/api/shutdown"
    assert "--cors-origins" in refusal(get(url, sec_fetch_site="cross-site"))
    for site in ("same-origin", "same-site", "none"):
        assert get(f"{daemon.control}/api/inference", sec_fetch_site=site).status_code == 200


def test_local_pages_may(daemon: Daemon) -> None:
    for origin in ("http://localhost:3000", "http://127.0.0.1:8080", daemon.url):
        answer = get(f"{daemon.control}/api/inference", origin=origin)
        assert answer.headers["access-control-allow-origin"] == origin
        with daemon.events(origin=origin) as socket_:
            assert receive(socket_)["event"] == "welcome"


# -- paths and methods ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/api/inference", "/API/Inference", "/api/inference/", "/Api/INFERENCE//"])
def test_paths_in_any_case_and_with_slashes(daemon: Daemon, path: str) -> None:
    for method in ("GET", "POST"):
        (item,) = daemon.ask(path, method)["WingmanItems"]
        assert item["alias"] == "tiny"


def test_what_takes_a_query_takes_a_posted_object(daemon: Daemon) -> None:
    query = {"modelRepo": REPO, "filePath": f"{ONE}.gguf"}
    (item,) = daemon.ask("/api/downloads", "POST", **query)["DownloadItems"]
    assert item["status"] == "complete"
    assert daemon.api("/api/downloads/enqueue", "POST", **query).status_code == 208
    again = daemon.api("/api/inference/start", "POST", alias="tiny", contextSize=64, force=True, **query)
    assert (again.status_code, again.json()["status"]) == (208, "inferring")
    assert daemon.api("/api/inference/stop", "POST").status_code == 422
    malformed = httpx.post(f"{daemon.control}/api/inference/stop", content=b"{")
    assert malformed.status_code == 400
    assert daemon.api("/api/inference", "DELETE").status_code == 404


def test_a_line_for_the_log_lands_in_the_file(daemon: Daemon) -> None:
    log = Home(daemon.home).logs / "wingman.log"
    for level, shown in (("info", "INFO"), ("warn", "WARNING"), ("error", "ERROR"), ("shout", "INFO")):
        message = f"a client's {level}\r\nforged\x1b[2J line"
        daemon.ask("/api/utils/log", "POST", isa="WingmanLogItem", level=level, message=message, timestamp=1)
        wait_until(
            lambda: {"text": log.read_text()}, lambda seen, level=level: f"a client's {level}" in seen["text"]
        )
        (line,) = [line for line in log.read_text().splitlines() if f"a client's {level}" in line]
        assert f"{shown:<7} wingman.client: a client's {level}\\r\\nforged\\x1b[2J line" in line
    assert httpx.post(f"{daemon.control}/api/utils/log", content=b"{").status_code == 400
    daemon.ask("/api/utils/log", "POST", message="long " * 10_000)
    wait_until(lambda: {"text": log.read_text()}, lambda seen: "long long" in seen["text"])
    assert max(map(len, log.read_text().splitlines())) < 9000


# -- keys -------------------------------------------------------------------------------------------


def test_two_kinds_of_keys_open_two_doors(home: Path) -> None:
    with Daemon(home, "--api-key", "user", "--admin-key", "root") as daemon:
        assert [daemon.api("/api/inference").status_code, daemon.chat(ONE).status_code] == [401, 401]
        daemon.key = "user"
        assert [daemon.api("/api/inference").status_code, daemon.chat(ONE).status_code] == [401, 200]
        assert daemon.api("/api/shutdown").status_code == 401
        assert status_of_socket(daemon) == 401
        daemon.key = "root"
        assert [daemon.api("/api/inference").status_code, daemon.chat(ONE).status_code] == [200, 401]
        assert status_of_socket(daemon) == 101
        daemon.key = None
        assert status_of_socket(daemon, "?key=root&api_key=root") == 401  # addresses end up in logs
        for path in ("/", "/live", "/health"):
            assert httpx.get(daemon.url + path).status_code == 200
        assert httpx.get(f"{daemon.control}/").status_code == 200  # the page asks for the key
        offered = f"wingman.key.{base64.urlsafe_b64encode(b'root').decode().rstrip('=')}"
        with daemon.events(subprotocols=["wingman", offered]) as socket_:
            assert socket_.subprotocol == "wingman"
            assert receive(socket_)["event"] == "welcome"
        assert status_of_socket(daemon, subprotocols=["wingman.key.cm9vdA=="[:-3]]) == 401


def status_of_socket(daemon: Daemon, query: str = "", **options: Any) -> int:
    """The status of the answer to a handshake."""
    try:
        with daemon.events(query, **options):
            return 101
    except InvalidStatus as refused:
        return refused.response.status_code


@pytest.mark.parametrize("flag", ["--api-key", "--admin-key"])
def test_one_kind_of_key_opens_both(home: Path, flag: str) -> None:
    with Daemon(home, flag, "secret") as daemon:
        assert [daemon.api("/api/inference").status_code, daemon.chat(ONE).status_code] == [401, 401]
        assert status_of_socket(daemon) == 401
        daemon.key = "secret"
        assert [daemon.api("/api/inference").status_code, daemon.chat(ONE).status_code] == [200, 200]
        assert status_of_socket(daemon) == 101


# -- where it listens -------------------------------------------------------------------------------


def serve(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A server that is expected not to start."""
    command = [sys.executable, "-m", "wingman", "serve", "--home", str(home), "--port", "0", *arguments]
    environment = environment_of(home)
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def test_an_address_that_others_reach_needs_a_key(home: Path) -> None:
    refused = serve(home, "--host", "0.0.0.0")
    assert refused.returncode == 1
    (line,) = refused.stderr.splitlines()
    assert "0.0.0.0 can be reached by others" in line
    assert "--api-key" in line
    assert "--insecure" in line
    with Daemon(home, "--host", "0.0.0.0", "--api-key", "k") as daemon:
        daemon.key = "k"
        daemon.url, daemon.control = (
            url.replace("0.0.0.0", "127.0.0.1") for url in (daemon.url, daemon.control)
        )
        assert daemon.chat(ONE).status_code == 200
        assert "--allow-host" in refusal(get(f"{daemon.control}/api/inference", host="evil.example"))
        assert get(f"{daemon.control}/api/inference", host="192.168.1.9").status_code == 401


def test_a_home_in_use_is_said_so(daemon: Daemon) -> None:
    refused = serve(daemon.home, "--control-port", "0")
    assert refused.returncode == 1
    assert "another Wingman uses" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_without_control_there_is_only_the_model(tmp_path: Path, tiny_model: Path) -> None:
    with Daemon(tmp_path / "none", "--no-control", "--model", str(tiny_model)) as daemon:
        assert daemon.control == daemon.url
        assert daemon.chat(None).status_code == 200
        assert daemon.api("/api/inference").status_code == 404
        assert daemon.api("/api/shutdown").status_code == 404
        assert status_of_socket(daemon) == 200  # the page: nothing is upgraded
        assert not daemon.home.exists()


def test_one_port_for_everything(home: Path) -> None:
    page = "https://app.example"
    with Daemon(home, "--single-port", "--cors-origins", page) as daemon:
        assert daemon.control == daemon.url
        assert start(daemon, ONE)["status"] == "inferring"
        assert daemon.chat(ONE).status_code == 200
        with daemon.events() as socket_:
            assert receive(socket_)["event"] == "welcome"
        evil = "https://evil.example"
        assert "--cors-origins" in refusal(get(f"{daemon.url}/api/shutdown", origin=evil))
        assert "access-control-allow-origin" not in get(f"{daemon.url}/v1/models", origin=evil).headers
        for path in ("/api/inference", "/v1/models"):
            assert get(daemon.url + path, origin=page).headers["access-control-allow-origin"] == page


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_model_with_a_port_of_its_own(home: Path) -> None:
    with Daemon(home) as daemon:
        start(daemon, ONE)
        port = free_port()
        item = start(daemon, TWO, port=port)
        assert (item["address"], item["port"]) == ("127.0.0.1", port)
        shared, daemon.url = daemon.url, f"http://127.0.0.1:{port}"
        assert [daemon.chat(model).json()["model"] for model in (None, TWO, ONE)] == [TWO, TWO, ONE]
        assert httpx.get(f"{daemon.url}/api/inference").status_code == 404
        assert "--allow-host" in refusal(get(f"{daemon.url}/v1/models", host="evil.example"))
        taken = {"alias": "third", "modelRepo": REPO, "filePath": f"{ONE}.gguf", "port": port}
        answer = daemon.api("/api/inference/start", **taken)
        assert answer.status_code == 409
        assert str(port) in answer.json()["error"]["message"]
        public = daemon.api("/api/inference/start", **taken | {"port": free_port(), "address": "0.0.0.0"})
        assert "--insecure" in refusal(public)
        daemon.ask("/api/inference/stop", alias=TWO)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{daemon.url}/health")
        daemon.url = shared
        assert daemon.chat(ONE).status_code == 200


def test_the_starter_is_served_from_the_home(tmp_path: Path, starter_model: Path) -> None:
    home = Home(tmp_path / "home")
    home.create()
    with suppress(OSError):
        os.link(starter_model, home.models / starter.FILE_NAME)
    if not (home.models / starter.FILE_NAME).exists():
        shutil.copy(starter_model, home.models / starter.FILE_NAME)
    with Daemon(home.root, "--starter", "-c", "1024", "-np", "1") as daemon:
        assert daemon.item("starter")["status"] == "inferring"
        assert daemon.download(starter.REPO, starter.PATH)["status"] == "complete"
        answer = daemon.chat(None, "What is the capital of France?", max_tokens=12).json()
        assert answer["model"] == "starter"
        assert len(answer["choices"][0]["message"]["content"]) > 10
        daemon.ask("/api/inference/reset", alias="starter")
        daemon.stop()
        daemon.start("--no-autostart")
        assert daemon.ask("/api/inference")["WingmanItems"] == []
        assert daemon.download(starter.REPO, starter.PATH)["status"] == "complete"
        assert daemon.chat(None).json()["model"] == "SmolLM2-135M-Instruct.Q4_1"  # the only one there is


# -- how it ends ------------------------------------------------------------------------------------


def end_by_post(daemon: Daemon) -> None:
    assert daemon.ask("/API/Shutdown/", "POST") == {"status": "shutting down"}


def end_by_text(daemon: Daemon) -> None:
    with daemon.events() as socket_:
        receive(socket_)
        socket_.send("shutdown")
        assert "Shutting down" in [str(text) for text in socket_]
        assert socket_.close_code == 1000


def end_by_message(daemon: Daemon) -> None:
    with daemon.events() as socket_:
        socket_.send('{"event": "shutdown"}')
        assert "Shutting down" in [str(text) for text in socket_]


def end_by_signal(daemon: Daemon) -> None:
    daemon.process.send_signal(signal.SIGINT)


def end_by_file(daemon: Daemon) -> None:
    Home(daemon.home).exit_file.touch()


@pytest.mark.parametrize("end", [end_by_post, end_by_text, end_by_message, end_by_signal, end_by_file])
def test_every_way_to_end_is_graceful(home: Path, end: Any) -> None:
    old = Home(home)
    old.exit_file.touch()  # of an earlier run
    old.kill_file.touch()
    with Daemon(home) as daemon, Watcher(daemon.events()) as watcher:
        start(daemon, ONE)
        end(daemon)
        assert daemon.wait() == 0, daemon.log
        assert watcher.join()[0] == 1001
        assert watcher.of("inference_status", alias=ONE, status="complete")
        last = watcher.of("status")[-1]
        assert (last["WingmanService"]["status"], last["DownloadService"]["status"]) == ("stopping",) * 2
        assert not old.exit_file.exists()
        assert not old.runtime_file.exists()


def test_the_file_that_kills(home: Path) -> None:
    with Daemon(home) as daemon:
        start(daemon, ONE)
        Home(home).kill_file.touch()
        assert daemon.wait() == 130
        daemon.start()
        assert not Home(home).kill_file.exists()
        assert daemon.item(ONE)["error"] == "stopped unexpectedly"
        assert start(daemon, ONE)["status"] == "inferring"


def test_what_ran_is_started_again_when_that_is_wanted(home: Path) -> None:
    with Daemon(home) as daemon:
        start(daemon, ONE, contextSize=512)
        start(daemon, TWO)
        daemon.ask("/api/inference/stop", alias=TWO)
        daemon.restart()
        assert {daemon.item(name)["status"] for name in (ONE, TWO)} == {"complete"}
        start(daemon, ONE, contextSize=512)
        daemon.restart("--restore")
        assert_runs_again(daemon)
        daemon.kill()
        daemon.start("--restore")
        assert_runs_again(daemon)


def assert_runs_again(daemon: Daemon) -> None:
    """Only the one that ran, as it was started."""
    wait_until(lambda: daemon.item(ONE), lambda item: item["status"] == "inferring")
    assert httpx.get(f"{daemon.url}/slots?model={ONE}").json()[0]["n_ctx"] == 512
    assert daemon.item(TWO)["status"] == "complete"


# -- which models it keeps --------------------------------------------------------------------------


def test_a_downloaded_model_is_loaded_for_the_request_that_names_it(home: Path) -> None:
    with Daemon(home) as daemon:
        listed = httpx.get(f"{daemon.url}/v1/models").json()["data"]
        assert {model["id"] for model in listed} == {ONE, TWO}
        names = [ONE, f"{ONE}.gguf", f"{REPO}/{ONE}.gguf", f"{REPO}:F32"] * 3
        with concurrent.futures.ThreadPoolExecutor(len(names)) as pool:
            answers = list(pool.map(daemon.chat, names))
        assert [answer.status_code for answer in answers] == [200] * len(names)
        assert {answer.json()["model"] for answer in answers} == {ONE}
        assert [item["alias"] for item in daemon.ask("/api/inference")["WingmanItems"]] == [ONE]
        assert daemon.chat(REPO).status_code == 404  # it could be either
        daemon.restart("--no-models-autoload")
        assert daemon.chat(ONE).status_code == 404
        start(daemon, ONE)
        assert daemon.chat(ONE).status_code == 200


def test_slots_are_saved_in_the_home(home: Path) -> None:
    with Daemon(home) as daemon:
        assert daemon.chat(ONE, max_tokens=4).status_code == 200
        for action in ("save", "restore"):
            answer = httpx.post(
                f"{daemon.url}/slots/0?action={action}&model={ONE}", json={"filename": "talk"}, timeout=60
            )
            assert answer.status_code == 200, answer.text
    assert (home / "data" / "slots" / "talk").is_file()


def test_an_idle_model_goes_and_comes_back(home: Path) -> None:
    with Daemon(home, "--idle-unload", "0.5") as daemon:
        start(daemon, ONE)
        for _ in range(2):
            wait_until(lambda: daemon.item(ONE), lambda item: item["status"] == "complete")
            assert daemon.item(ONE)["error"] == ""
            assert httpx.get(f"{daemon.url}/ready").status_code == 200
            assert daemon.chat(ONE).json()["model"] == ONE


def test_models_take_turns_and_no_request_is_lost(home: Path) -> None:
    with Daemon(home, "--models-max", "1") as daemon, Watcher(daemon.events()) as watcher:
        names = [ONE, TWO, TWO, ONE, ONE, TWO] * 4
        with concurrent.futures.ThreadPoolExecutor(len(names)) as pool:
            answers = list(pool.map(daemon.chat, names))
        assert [answer.status_code for answer in answers] == [200] * len(names), daemon.log
        assert [answer.json()["model"] for answer in answers] == names
        daemon.ask("/api/shutdown")
        assert daemon.wait() == 0
        watcher.join()
    loaded: set[str] = set()
    for message in watcher.of("inference_status"):
        is_in_memory = message["status"] in ("preparing", "inferring", "cancelling")
        loaded = (loaded - {message["alias"]}) | ({message["alias"]} if is_in_memory else set())
        assert len(loaded) <= 1, message
