"""The same story through the `wingman` command alone: with a server, and without one."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.support.daemon import TIMEOUT_S, Daemon, environment_of
from tests.support.hub import HubServer
from wingman.services import starter

TINY_REPO, TINY = "tests/Tiny-GGUF", "tiny.Q8_0"
SMOL = "SmolLM2-135M-Instruct.Q4_1"


class Shell:
    """Runs commands in a home folder; every one ends with the expected status and without a traceback."""

    def __init__(self, home: Path, hub: HubServer) -> None:
        self.home = home
        self.hub = hub
        self.environment = environment_of(home, hub.url) | {"WINGMAN_PORT": "0", "WINGMAN_CONTROL_PORT": "0"}

    def run(self, *words: str, status: int = 0, given: str = "") -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*words),
            env=self.environment,
            input=given,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    def say(self, *words: str, given: str = "") -> str:
        """What a command prints when it has nothing to remark."""
        done = self.run(*words, given=given)
        assert done.stderr == ""
        return done.stdout

    def json(self, *words: str) -> Any:
        """The document that a command prints with --json."""
        return orjson.loads(self.run(*words, "--json").stdout)

    def fail(self, *words: str) -> str:
        """The one line that a command says why it can't do it, nothing being printed."""
        done = self.run(*words, status=1)
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert line.startswith("wingman: ")
        return line.removeprefix("wingman: ")

    @contextmanager
    def begin(self, *words: str, **streams: Any) -> Iterator[subprocess.Popen[str]]:
        """A command that goes on; it has ended in the end. It hears ctrl-C also where the tests run in
        the background: shells have it ignored there, and a child would inherit that."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        command = self.command(*words)
        with subprocess.Popen(command, env=self.environment, text=True, **streams) as process:
            try:
                yield process
            except BaseException:
                process.kill()
                raise

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "wingman", *words]


@pytest.fixture
def shell(tmp_path: Path, tiny_model: Path) -> Iterator[Shell]:
    with HubServer() as hub:
        hub.add_repo(TINY_REPO, {f"{TINY}.gguf": tiny_model}, downloads=5)
        yield Shell(tmp_path / "home", hub)


def rows(table: str) -> list[list[str]]:
    """The cells of a table, its titles first."""
    return [re.split(r"  +", line) for line in table.splitlines()]


def test_the_story_with_a_server(shell: Shell, starter_model: Path) -> None:
    shell.hub.add_repo(starter.REPO, {starter.PATH: starter_model}, downloads=10)
    with Daemon(shell.home, hub=shell.hub.url) as daemon:
        assert shell.run("list").stderr == "no models are here yet; wingman pull owner/repo gets one\n"
        offers = rows(shell.say("list", "--all"))
        assert [row[0] for row in offers] == ["MODEL", starter.REPO, TINY_REPO]
        with shell.begin("logs", "-f", "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as follower:
            pull_both(shell)
            start_and_ask(shell)
            stop_and_remove(shell)
            assert shell.json("hardware")["cpu"]["logicalCores"] == os.cpu_count()
            assert shell.say("hardware").startswith("gpu ")
            assert '"POST /api/inference/stop" 200' in shell.say("logs", "-n", "30")
            assert shell.say("shutdown") == "the server is shutting down\n"
            assert daemon.wait() == 0
            events, farewell = follower.communicate(timeout=TIMEOUT_S)
        assert farewell == "the server is gone\n"
        told = [orjson.loads(line) for line in events.splitlines()]
        assert {one["event"] for one in told} == {"download_status", "inference_status"}
        assert [one["status"] for one in told if one.get("alias") == "smol"][-1] == "complete"


def pull_both(shell: Shell) -> None:
    """The Hub breaks in the middle; nobody needs to notice."""
    shell.hub.misbehave(starter.REPO, starter.PATH, cut_after=50_000_000, times=1)
    pulled = shell.run("pull", starter.REPO)
    assert pulled.stdout == f"{SMOL} is here, 98.4 MB: wingman run {SMOL}\n"
    assert re.fullmatch(rf"{SMOL}.gguf: Q4_1 needs \d+ MB of the \d+ MB free in memory\n", pulled.stderr)
    again = shell.json("pull", starter.REPO, "Q4_1")
    assert (again["status"], again["progress"], again["totalBytes"]) == ("complete", 1.0, starter.SIZE_BYTES)
    assert shell.say("pull", f"hf://{TINY_REPO}/{TINY}.gguf").startswith(f"{TINY} is here, ")


def start_and_ask(shell: Shell) -> None:
    assert shell.say("start", SMOL, "--alias", "smol", "-c", "2048") == "smol is ready: wingman run smol\n"
    assert shell.json("start", TINY)["status"] == "inferring"
    titles, *running = rows(shell.say("ps"))
    assert titles[:3] == ["ALIAS", "STATUS", "MODEL"]
    assert {row[0]: row[1:3] for row in running} == {
        "smol": ["inferring", f"{starter.REPO}/{starter.PATH}"],
        TINY: ["inferring", f"{TINY_REPO}/{TINY}.gguf"],
    }
    metrics = {item["alias"]: item["metrics"] for item in shell.json("ps")}
    assert metrics["smol"]["meta"]["arch"] == "llama"
    question = "What is the capital of France? Answer in one word."
    assert shell.say("run", "smol", question).strip()
    assert shell.say("run", "smol", "--system", "Be brief.", given=question).strip()
    answer = shell.json("run", TINY, "hello", "there")
    assert answer["model"] == TINY
    assert answer["finish_reason"] in ("stop", "length")
    assert answer["usage"]["prompt_tokens"] > 0


def stop_and_remove(shell: Shell) -> None:
    assert shell.fail("rm", SMOL, "--yes") == f"{starter.PATH} is loaded: wingman stop smol first"
    assert shell.say("stop", SMOL) == "smol is stopped\n"
    assert shell.fail("stop", "smol") == f"smol does not run; these do: {TINY}"
    assert [row[1] for row in rows(shell.say("ps", "--all"))] == ["STATUS", "complete", "inferring"]
    assert shell.fail("rm", SMOL) == "nobody can be asked here: give --yes to delete it"
    assert shell.say("rm", SMOL, "-y") == f"{starter.PATH} is deleted\n"
    assert [model["name"] for model in shell.json("list")] == [TINY]


def test_the_story_without_a_server(shell: Shell) -> None:
    assert "no models are here yet" in shell.run("list").stderr
    assert shell.fail("run", TINY, "hello") == f"no model is called {TINY}; there are none here yet"
    pulled = shell.run("pull", TINY_REPO)
    assert pulled.stdout == f"{TINY} is here, 596 kB: wingman run {TINY}\n"
    titles, row = rows(shell.say("list"))
    assert titles == ["NAME", "REPO", "FILE", "SIZE", "QUANT", "STATUS"]
    assert row == [TINY, TINY_REPO, f"{TINY}.gguf", "596 kB", "Q8_0", "complete"]
    answer = shell.json("run", TINY, "hello")
    assert (answer["model"], answer["usage"]["prompt_tokens"] > 0) == (TINY, True)
    assert rows(shell.say("ps", "-a"))[1][:2] == [TINY, "complete"]
    assert shell.run("ps").stderr.startswith("nothing runs; wingman run MODEL")
    for command in (("stop", TINY), ("shutdown",), ("logs", "-f")):
        assert shell.fail(*command).startswith("no server is running: start one with wingman serve")
    assert shell.say("rm", TINY, "--yes") == f"{TINY}.gguf is deleted\n"
    assert shell.json("list") == []
    assert not [path for path in (shell.home / "models").rglob("*") if path.is_file()]


def test_start_without_a_server_becomes_one(shell: Shell) -> None:
    shell.run("pull", TINY_REPO)
    with shell.begin("start", TINY, "--alias", "tiny", stderr=subprocess.PIPE) as server:
        assert server.stderr is not None
        first = server.stderr.readline()
        assert first == "no server is running, so this becomes one, with tiny; ctrl-C ends it\n"
        for line in server.stderr:
            if line.startswith("Try it"):
                break
        assert shell.say("start", TINY, "--alias", "tiny") == "tiny is ready: wingman run tiny\n"
        assert shell.json("run", "tiny", "hello")["model"] == "tiny"
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=TIMEOUT_S)
        assert server.returncode == 0


def test_ctrl_c_pauses_a_pull_and_the_same_command_resumes_it(shell: Shell, starter_model: Path) -> None:
    shell.hub.add_repo(starter.REPO, {starter.PATH: starter_model})
    shell.hub.throttle = 20_000_000
    with shell.begin("pull", starter.REPO, stderr=subprocess.PIPE) as pull:
        while shell.hub.bytes_sent(starter.PATH) < 10_000_000:
            assert pull.poll() is None
            time.sleep(0.02)
        pull.send_signal(signal.SIGINT)
        _, remarks = pull.communicate(timeout=TIMEOUT_S)
    assert pull.returncode == 130
    assert remarks.splitlines()[-1] == "the download is paused; the same command resumes it"
    (item,) = shell.json("list")
    assert item["status"] in ("queued", "downloading")  # whoever looks takes it up again for that time
    assert 0 < item["progress"] < 1
    shell.hub.throttle = None
    assert shell.run("pull", starter.REPO).stdout.startswith(f"{SMOL} is here, 98.4 MB")
    assert shell.hub.bytes_sent(starter.PATH) < starter.SIZE_BYTES + 5_000_000  # only what was on its way


def test_a_terminal_shows_a_bar(shell: Shell, starter_model: Path) -> None:
    shell.hub.add_repo(starter.REPO, {starter.PATH: starter_model})
    shell.hub.throttle = 60_000_000
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (25, 120))
    with shell.begin("pull", starter.REPO, stdout=subprocess.PIPE, stderr=theirs) as pull:
        os.close(theirs)
        shown = read_terminal(ours)
        assert pull.stdout is not None
        assert "is here, 98.4 MB" in pull.stdout.read()
    assert re.search(r"SmolLM2-135M-Instruct.Q4_1.gguf: +\d+%\|.*98\.4M \[.*MB/s\]", shown), shown
    assert "100%" in shown


def read_terminal(number: int) -> str:
    """Everything that is printed to a terminal until nobody holds it any more."""
    pieces: list[bytes] = []
    try:
        while piece := os.read(number, 65536):
            pieces.append(piece)
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(number)
    return b"".join(pieces).decode()


def test_mistakes_are_told_in_one_line(shell: Shell) -> None:
    shell.run("pull", TINY_REPO)
    with Daemon(shell.home, hub=shell.hub.url):
        for words, message in (
            (("pull", "garbage"), "garbage is no repository: give owner/repo"),
            (("pull", "no/such-GGUF"), "the Hub knows no no/such-GGUF"),
            (("pull", TINY_REPO, "Q5_0"), f"{TINY_REPO}: Q5_0 is not in it; it has: Q8_0"),
            (("start", "nothing"), f"no model is called nothing; here are: {TINY}"),
            (("run", "a/b", "hi"), "wingman pull a/b gets it"),
            (("run", TINY, " "), "the prompt is empty"),
            (("stop", TINY), f"{TINY} does not run; nothing does"),
            (("rm", "nothing", "-y"), "no model is called nothing"),
            (("start", TINY, "--port", "99999"), "port must be a whole number from 0 to 65535"),
            (("ps", "--url", "http://127.0.0.1:9"), "no Wingman answers at http://127.0.0.1:9"),
        ):
            assert message in shell.fail(*words)
        assert shell.run("fly", status=2).stderr
        mistyped = shell.run("ps", "--hoem", "x", status=2)
        assert mistyped.stderr == "wingman: --hoem is unknown; did you mean --home?\n"


def test_keys_are_asked_for_and_taken(shell: Shell) -> None:
    shell.run("pull", TINY_REPO)
    with Daemon(shell.home, "--api-key", "user", "--admin-key", "root", hub=shell.hub.url):
        assert "give its key with --admin-key and --api-key" in shell.fail("ps")
        assert "Invalid API Key" in shell.fail("ps", "--admin-key", "user")
        assert shell.json("start", TINY, "--admin-key", "root")["status"] == "inferring"
        assert "Invalid API Key" in shell.fail("run", TINY, "hi", "--admin-key", "root")
        shell.environment |= {"WINGMAN_ADMIN_KEY": "root", "WINGMAN_API_KEY": "user"}
        assert shell.json("run", TINY, "hi")["model"] == TINY
        assert shell.json("ps")[0]["metrics"]["alias"] == TINY  # the WebSocket takes the key, too
        assert shell.say("shutdown") == "the server is shutting down\n"
