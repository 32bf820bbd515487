"""`kill -9` at random moments of downloads and loads: what is told afterwards is true, and nothing is lost."""

from __future__ import annotations

import hashlib
import random
import shutil
import sqlite3
import threading
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.daemon import Daemon, is_over, wait_until
from tests.support.hub import HubServer
from tools.tinymodel import write_llama
from wingman.services.home import Home, stored_name
from wingman.services.partial import held_bytes

REPO, PATH = "o/Tiny-GGUF", "m.Q8_0.gguf"
N_KILLS = 20
RATE = 4_000_000
LOST_BYTES = 5 * 2**18
"""A kill costs at most a block that is not written yet, and what is on its way."""


def make_model(folder: Path, n_bytes: int) -> bytes:
    """A usable model, with so many bytes after its weights."""
    return write_llama(folder / "m.gguf").read_bytes() + random.Random(0).randbytes(n_bytes)


def check_database(home: Home) -> None:
    """Sound, and never put aside as damaged."""
    with closing(sqlite3.connect(home.database)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert not list(home.data.glob("*damaged*"))


def kill_while_starting(daemon: Daemon, after_s: float) -> None:
    """Start it and kill it at a random moment of that, or right after it."""

    def kill() -> None:
        daemon.process.kill()  # the one of then

    timer = threading.Timer(after_s, kill)
    timer.start()
    with suppress(AssertionError):  # it did not start
        daemon.start()
    timer.join()
    daemon.kill()


def wait_sent(hub: HubServer, n_bytes: int) -> None:
    """Wait until the Hub has sent so much."""
    wait_until(lambda: {"sent": hub.bytes_sent(PATH)}, lambda seen: seen["sent"] >= n_bytes)


def test_a_download_survives_any_kill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, chance, home = make_model(tmp_path, 64 * 2**20), random.Random(1), Home(tmp_path / "home")
    target = home.models / stored_name(REPO, PATH)
    with HubServer() as hub, Daemon(home.root, hub=hub.url) as daemon:
        hub.add_repo(REPO, {PATH: content})
        hub.throttle = RATE
        daemon.ask("/api/downloads/enqueue", modelRepo=REPO, filePath=PATH)
        for index in range(N_KILLS):
            if index % 4 == 3:
                daemon.kill()
                kill_while_starting(daemon, chance.uniform(0.0, 1.2))
            else:
                wait_sent(hub, hub.bytes_sent(PATH) + chance.randrange(RATE // 2))
                daemon.kill()
            kept = held_bytes(target)
            daemon.start()
            item = daemon.download(REPO, PATH)
            assert item["status"] in ("queued", "downloading")
            assert item["downloadedBytes"] <= held_bytes(target) <= len(content)
            assert (item["error"], target.exists(), held_bytes(target) >= kept) == ("", False, True)
        daemon.kill()
        hub.throttle = None
        daemon.start()
        item = wait_until(lambda: daemon.download(REPO, PATH), is_over)
        assert (item["status"], item["downloadedBytes"]) == ("complete", len(content))
        assert hashlib.sha256(target.read_bytes()).digest() == hashlib.sha256(content).digest()
        assert [path.name for path in home.models.iterdir()] == [target.name]
        again = hub.bytes_sent(PATH) - len(content)
    check_database(home)
    with capsys.disabled():
        print(f" [{N_KILLS + 1} kills: {again} of {len(content)} bytes fetched again]", end="")
    assert 0 <= again <= (N_KILLS + 1) * LOST_BYTES


def test_a_download_survives_a_kill_at_its_end(tmp_path: Path) -> None:
    """The moments when bytes are hashed, synced, renamed and told to be complete."""
    content, chance = make_model(tmp_path, 2**20), random.Random(2)
    for index in range(4):
        home = Home(tmp_path / f"home{index}")
        target = home.models / stored_name(REPO, PATH)
        with HubServer() as hub, Daemon(home.root, hub=hub.url) as daemon:
            hub.add_repo(REPO, {PATH: content})
            daemon.ask("/api/downloads/enqueue", modelRepo=REPO, filePath=PATH)
            while held_bytes(target) < len(content):
                time.sleep(0.001)
            time.sleep(chance.uniform(0.0, 0.03))
            daemon.kill()
            daemon.start()
            item = wait_until(lambda daemon=daemon: daemon.download(REPO, PATH), is_over)
            assert (item["status"], item["downloadedBytes"]) == ("complete", len(content))
            assert target.read_bytes() == content
            assert [path.name for path in home.models.iterdir()] == [target.name]
            assert hub.bytes_sent(PATH) == len(content)
        check_database(home)


AFTER_CRASH = {"failed to load", "stopped unexpectedly"}


class Attempt:
    """Starts a model from a thread of its own; what was heard of it until the daemon was killed."""

    def __init__(self, daemon: Daemon) -> None:
        self.is_accepted = False
        self.status = ""
        """The last one seen."""
        self._daemon = daemon
        self._thread = threading.Thread(target=self._start)
        self._thread.start()

    def _start(self) -> None:
        query = {"alias": "smol", "modelRepo": REPO, "filePath": PATH, "contextSize": 512}
        with suppress(httpx.TransportError):
            answer = self._daemon.api("/api/inference/start", **query)
            assert answer.status_code == 202, answer.text
            self.is_accepted = True
            while True:
                self.status = self._daemon.item("smol")["status"]
                time.sleep(0.02)

    def wait_loaded(self) -> None:
        """Wait until it runs."""
        wait_until(lambda: {"status": self.status}, lambda seen: seen["status"] == "inferring")

    def join(self) -> None:
        """Wait until the connection was lost."""
        self._thread.join()


def check_item(daemon: Daemon, attempt: Attempt, before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The item says what became of the attempt; as it was `before` only if it was never accepted."""
    items: list[dict[str, Any]] = daemon.ask("/api/inference")["WingmanItems"]
    if items == before and not attempt.is_accepted:
        return items
    (item,) = items
    assert (item["status"], item["error"] in AFTER_CRASH) == ("error", True)
    if attempt.status == "inferring":
        assert item["error"] == "stopped unexpectedly"
    return items


def test_a_load_survives_any_kill(tmp_path: Path, starter_model: Path) -> None:
    chance, home, told = random.Random(3), Home(tmp_path / "home"), set()
    home.create()
    shutil.copy(starter_model, home.models / stored_name(REPO, PATH))
    items: list[dict[str, Any]] = []
    with Daemon(home.root, "--parallel", "1") as daemon:
        for index in range(N_KILLS):
            attempt = Attempt(daemon)
            if index % 4 == 3:  # however slow the machine is
                attempt.wait_loaded()
            time.sleep(chance.uniform(0.0, 1.0))
            daemon.kill()
            attempt.join()
            daemon.start()
            items = check_item(daemon, attempt, items)
            told |= {item["error"] for item in items}
            assert daemon.download(REPO, PATH)["status"] == "complete"
        assert "stopped unexpectedly" in told <= AFTER_CRASH
        item = daemon.start_model("smol", REPO, PATH, contextSize=512)
        assert (item["status"], item["error"]) == ("inferring", "")
        assert daemon.chat("smol").status_code == 200
    check_database(home)
