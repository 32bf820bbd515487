"""A real daemon against a Hub or a disk that misbehaves: the right end, nothing corrupt to be seen, words for
people.

All faults go on at once, each with a repository of its own, so that the pauses between tries pass only once.
"""

from __future__ import annotations

import hashlib
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import Daemon, is_over, wait_until
from tests.support.downloads import make_remote_file
from tests.support.hub import HubServer
from tools.tinymodel import write_llama
from wingman.services.home import stored_name
from wingman.services.partial import Partial, partial_path

TOKEN = "hf_secret"
CUT = 150_000
N_FILLER = 1_200_000
"""Bytes after the weights, so that a file comes in several blocks."""


@dataclass(frozen=True)
class Case:
    """What happens to the file of one repository."""

    name: str
    faults: tuple[dict[str, Any], ...]
    words: str = ""
    """Of the error it ends with; "" when it ends well."""

    @property
    def repo(self) -> str:
        return f"o/{self.name.replace(' ', '-')}-GGUF"

    @property
    def path(self) -> str:
        return f"{self.name.replace(' ', '-')}.Q8_0.gguf"


PASSING = [
    Case("good", ()),
    Case("cut once", ({"cut_after": CUT, "times": 1},)),
    Case("cut always", ({"cut_after": CUT * 4},)),
    Case("silence", ({"stall_after": CUT, "times": 1},)),
    Case("drip", ({"drip": (100_000, 0.05)},)),
    Case("wrong hash once", ({"wrong_hash": True, "times": 1},)),
    Case("other etag", ({"cut_after": CUT, "change_etag": True, "times": 1},)),
    Case("range beyond end", ({"cut_after": CUT, "times": 1}, {"status": 416, "where": "cdn", "times": 1})),
    Case("no ranges", ({"cut_after": CUT, "times": 1}, {"no_range": True})),
    Case("too short once", ({"lie_length": 5, "times": 1},)),
    Case("too long once", ({"lie_length": 10**9, "times": 1},)),
    Case("expired link", ({"status": 403, "where": "cdn", "times": 1},)),
    Case("busy", ({"status": 503, "where": "cdn", "times": 2},)),
    Case("asked to wait", ({"status": 429, "method": "GET", "headers": {"Retry-After": "3"}, "times": 1},)),
]

STAYING = [
    Case("wrong hash", ({"wrong_hash": True},), "checksum of .* is wrong, twice: the Hub's copy is damaged"),
    Case("always too short", ({"lie_length": 5},), r"promised \d+ bytes .* has 5; gave up after 5 tries"),
    Case("always too long", ({"lie_length": 10**9},), r"promised \d+ bytes .* has 1000000000; gave up"),
    Case("size is lower", ({"lie_size": 1000},), "promised 1000 bytes .* gave up after 5 tries"),
    Case("no progress", ({"no_range": True, "cut_after": CUT},), "connection .* was cut; gave up"),
    Case("other etags", ({"change_etag": True, "cut_after": CUT},), "connection .* was cut; gave up"),
    Case("always silent", ({"stall_after": 0},), "stopped sending; gave up after 5 tries"),
    Case(
        "server fault",
        ({"cut_after": CUT, "times": 1}, {"status": 500, "where": "cdn"}),
        "answered with status 500; gave up",
    ),
    Case(
        "terms changed",
        ({"status": 403, "method": "GET", "headers": {"X-Error-Code": "GatedRepo"}},),
        "gated: accept its terms at http.*/o/terms-changed-GGUF, then give a token with HF_TOKEN",
    ),
    Case("token expired", ({"status": 401, "method": "GET"},), "refuses the token; check HF_TOKEN"),
    Case(
        "deleted",
        ({"status": 404, "method": "GET", "headers": {"X-Error-Code": "EntryNotFound"}},),
        "has no file deleted.Q8_0.gguf",
    ),
    Case("nowhere", ({"redirect": "gopher://x/y", "method": "GET"},), "redirects to an address .* not safe"),
]

BROKEN = [
    Case("no gguf", (), "not a usable GGUF file: "),
    Case("cut gguf", (), "not a usable GGUF file: it is incomplete: it has .* bytes of "),
]

CASES = PASSING + STAYING + BROKEN


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A usable model of about a megabyte and a half."""
    weights = write_llama(tmp_path_factory.mktemp("source") / "m.gguf").read_bytes()
    return weights + random.Random(0).randbytes(N_FILLER)


@pytest.fixture(scope="module")
def hub(model: bytes) -> Iterator[HubServer]:
    with HubServer() as hub:
        contents = {"no gguf": b"<html>Sorry!</html>" * 5000, "cut gguf": model[:200_000]}
        for case in CASES:
            hub.add_repo(case.repo, {case.path: contents.get(case.name, model)})
            for fault in case.faults:
                hub.misbehave(case.repo, case.path, **fault)
        yield hub


@pytest.fixture(scope="module")
def daemon(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    flags = ("--download-stall", "1", "--parallel-downloads", "64")
    with Daemon(
        tmp_path_factory.mktemp("home"), *flags, hub=hub.url, environment={"HF_TOKEN": TOKEN}
    ) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def ended(daemon: Daemon, hub: HubServer) -> dict[str, dict[str, Any]]:
    """All cases to their end: the items by repository. What is to be seen meanwhile is whole."""
    for case in CASES:
        assert (
            daemon.api("/api/downloads/enqueue", modelRepo=case.repo, filePath=case.path).status_code == 202
        )

    whole: set[Path] = set()

    def look() -> dict[str, Any]:
        items = {item["modelRepo"]: item for item in daemon.ask("/api/downloads")["DownloadItems"]}
        for case in CASES:
            check_truth(items[case.repo], final_file(daemon, case.repo, case.path), hub, whole)
        return items

    return wait_until(look, lambda items: all(map(is_over, items.values())))


def final_file(daemon: Daemon, repo: str, path: str) -> Path:
    return daemon.home / "models" / stored_name(repo, path)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_truth(item: dict[str, Any], final: Path, hub: HubServer, whole: set[Path]) -> None:
    """Complete means that the file is there, and what has its name is whole; those are added to `whole`."""
    if final not in whole and final.exists():
        (files,) = hub.repos[item["modelRepo"]].commits.values()
        assert digest(final) == files[item["filePath"]].sha256
        whole.add(final)
    assert final in whole or item["status"] != "complete"
    assert 0 <= item["progress"] <= 1
    assert item["downloadedBytes"] <= item["totalBytes"]


@pytest.mark.parametrize("case", PASSING, ids=lambda case: case.name)
def test_what_passes_is_survived(
    ended: dict[str, dict[str, Any]], daemon: Daemon, model: bytes, case: Case
) -> None:
    item = ended[case.repo]
    assert (item["status"], item["error"], item["progress"]) == ("complete", "", 1.0)
    assert item["downloadedBytes"] == item["totalBytes"] == len(model)
    assert final_file(daemon, case.repo, case.path).read_bytes() == model


@pytest.mark.parametrize("case", STAYING + BROKEN, ids=lambda case: case.name)
def test_what_stays_is_told(ended: dict[str, dict[str, Any]], daemon: Daemon, case: Case) -> None:
    item = ended[case.repo]
    assert item["status"] == "error"
    assert re.search(case.words, item["error"])
    assert not final_file(daemon, case.repo, case.path).exists()


def sent(hub: HubServer, name: str) -> int:
    """Bytes that the Hub sent of the file of a case."""
    path = next(case for case in CASES if case.name == name).path
    return sum(one.bytes_sent for one in hub.file_requests(path) if one.status in (200, 206))


def test_a_byte_that_came_is_not_fetched_again(
    ended: dict[str, dict[str, Any]], hub: HubServer, model: bytes
) -> None:
    assert {sent(hub, name) for name in ("good", "cut once", "cut always", "silence", "drip")} == {len(model)}
    for name in ("other etag", "range beyond end", "no ranges"):  # these have to begin again
        assert sent(hub, name) == len(model) + CUT
    assert sent(hub, "wrong hash") == sent(hub, "wrong hash once") == 2 * len(model)


def test_the_token_stays_at_the_hub(ended: dict[str, dict[str, Any]], daemon: Daemon, hub: HubServer) -> None:
    assert hub.tokens_seen("hub") == {TOKEN}
    assert hub.tokens_seen("cdn") == set()
    assert TOKEN not in daemon.log


def test_signed_addresses_are_not_logged(ended: dict[str, dict[str, Any]], daemon: Daemon) -> None:
    assert "/api/downloads/enqueue" in daemon.log
    assert "X-Amz-Signature" not in daemon.log


@pytest.mark.parametrize("case", [*BROKEN, STAYING[0]], ids=lambda case: case.name)
def test_what_can_not_be_used_is_not_kept(
    ended: dict[str, dict[str, Any]], daemon: Daemon, case: Case
) -> None:
    final = final_file(daemon, case.repo, case.path)
    assert [path.name for path in final.parent.iterdir() if path.name.startswith(final.name)] == []
    assert ended[case.repo]["downloadedBytes"] == 0


def test_what_came_is_kept_for_another_try(
    ended: dict[str, dict[str, Any]], daemon: Daemon, hub: HubServer, model: bytes
) -> None:
    case = next(case for case in STAYING if case.name == "server fault")
    assert ended[case.repo]["downloadedBytes"] == CUT
    hub.behave()
    assert daemon.fetch(case.repo, case.path)["status"] == "complete"
    assert final_file(daemon, case.repo, case.path).read_bytes() == model
    assert sent(hub, case.name) == len(model)


REFUSALS = [
    ("no repository", "o/unknown-GGUF", {}, 404, "no repository o/unknown-GGUF"),
    (
        "gated",
        "o/gated-GGUF",
        {},
        403,
        "is gated: accept its terms at http.*/o/gated-GGUF, then give a token",
    ),
    ("busy", "o/plain-GGUF", {"status": 503}, 502, "the Hub answered with status 503"),
    ("asked to wait", "o/plain-GGUF", {"status": 429}, 502, "the Hub answered with status 429"),
    (
        "no file",
        "o/plain-GGUF",
        {"status": 404, "headers": {"X-Error-Code": "EntryNotFound"}},
        404,
        "no file",
    ),
    ("bad token", "o/plain-GGUF", {"status": 401}, 403, "refuses the token; check HF_TOKEN"),
    ("too big", "o/plain-GGUF", {"lie_size": 2**49}, 507, "are still to come and the disk .* has .* free"),
]


@pytest.mark.parametrize(
    ("what", "repo", "fault", "status", "words"), REFUSALS, ids=[row[0] for row in REFUSALS]
)
def test_what_can_not_be_had_is_not_queued(
    daemon: Daemon, hub: HubServer, model: bytes, what: str, repo: str, fault: dict[str, Any], status: int,
    words: str,
) -> None:  # fmt: skip
    hub.add_repo("o/plain-GGUF", {"m.gguf": model})
    hub.add_repo("o/gated-GGUF", {"m.gguf": model}, gated=True, token="hf_another")
    if fault:
        hub.misbehave(repo, "m.gguf", times=1, **fault)
    answer = daemon.api("/api/downloads/enqueue", modelRepo=repo, filePath="m.gguf")
    assert (answer.status_code, daemon.ask("/api/downloads", modelRepo=repo)["DownloadItems"]) == (status, [])
    assert re.search(words, answer.json()["error"]["message"])


def test_a_gated_model_comes_with_the_right_token(daemon: Daemon, hub: HubServer, model: bytes) -> None:
    hub.add_repo("o/mine-GGUF", {"m.gguf": model}, gated=True, token=TOKEN)
    assert daemon.fetch("o/mine-GGUF", "m.gguf")["status"] == "complete"


def test_a_new_version_does_not_mix_with_the_old_one(daemon: Daemon, hub: HubServer, model: bytes) -> None:
    hub.add_repo("o/moving-GGUF", {"m.gguf": model})
    hub.misbehave("o/moving-GGUF", "m.gguf", cut_after=CUT, times=1)
    daemon.ask("/api/downloads/enqueue", modelRepo="o/moving-GGUF", filePath="m.gguf")
    hub.add_repo("o/moving-GGUF", {"m.gguf": model[::-1]})
    item = wait_until(lambda: daemon.download("o/moving-GGUF", "m.gguf"), is_over)
    assert item["status"] == "complete"
    assert final_file(daemon, "o/moving-GGUF", "m.gguf").read_bytes() == model


def test_a_set_with_a_damaged_part_does_not_appear(daemon: Daemon, hub: HubServer, tmp_path: Path) -> None:
    write_llama(tmp_path / "m.gguf", n_splits=2)
    parts = {path.name: path.read_bytes() for path in sorted(tmp_path.iterdir())}
    first, second = parts
    hub.add_repo("o/set-GGUF", parts)
    hub.misbehave("o/set-GGUF", second, wrong_hash=True, times=2)
    item = daemon.fetch("o/set-GGUF", first)
    assert (item["status"], second in item["error"]) == ("error", True)
    assert not any(final_file(daemon, "o/set-GGUF", part).exists() for part in parts)
    assert daemon.fetch("o/set-GGUF", first)["status"] == "complete"
    assert {part: final_file(daemon, "o/set-GGUF", part).read_bytes() for part in parts} == parts
    assert hub.bytes_sent(first) == len(parts[first])  # the part that was right is not fetched again


def test_a_partial_that_is_complete_asks_for_no_byte(tmp_path: Path, hub: HubServer, model: bytes) -> None:
    hub.add_repo("o/whole-GGUF", {"whole.gguf": model})
    home, name = tmp_path, stored_name("o/whole-GGUF", "whole.gguf")
    (home / "models").mkdir()
    partial = Partial(home / "models" / name, make_remote_file(model, "whole.gguf", "o/whole-GGUF"))
    partial.open()
    partial.append([model])
    partial.close()
    with Daemon(home, hub=hub.url) as daemon:
        assert daemon.fetch("o/whole-GGUF", "whole.gguf")["status"] == "complete"
        assert final_file(daemon, "o/whole-GGUF", "whole.gguf").read_bytes() == model
    assert hub.bytes_sent("whole.gguf") == 0


def test_a_hub_that_is_down(tmp_path: Path, model: bytes) -> None:
    repo, path = "o/Tiny-GGUF", "m.gguf"
    with HubServer() as hub, Daemon(tmp_path, hub=hub.url) as daemon:
        hub.add_repo(repo, {path: model})
        hub.misbehave(repo, path, drip=(20_000, 0.05))
        daemon.ask("/api/downloads/enqueue", modelRepo=repo, filePath=path)
        seen = wait_until(lambda: daemon.download(repo, path), lambda item: item["downloadedBytes"] > 0)
        hub.close()
        item = wait_until(lambda: daemon.download(repo, path), is_over)
        held = item["downloadedBytes"]
        assert item["status"] == "error"
        assert seen["downloadedBytes"] <= held == hub.bytes_sent(path)
        assert item["error"] == "the Hub could not be reached; gave up after 5 tries"
        answer = daemon.api("/api/downloads/enqueue", modelRepo=repo, filePath=path)
        assert answer.status_code == 502
        assert answer.json()["error"]["message"] == "the Hub could not be reached"
        assert daemon.download(repo, path) == item
        with HubServer() as other:
            other.add_repo(repo, {path: model})
            daemon.environment["HF_ENDPOINT"] = other.url
            daemon.restart()
            assert daemon.download(repo, path)["error"] == item["error"]
            assert daemon.fetch(repo, path)["status"] == "complete"
            assert other.bytes_sent(path) == len(model) - held
            assert final_file(daemon, repo, path).read_bytes() == model


def with_files_up_to(n_bytes: int) -> tuple[str, ...]:
    """A command's prefix: no file may grow beyond so many bytes, as on a disk that is full."""
    code = (
        "import os, resource, sys; "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({n_bytes}, {n_bytes})); "
        "os.execvp(sys.argv[1], sys.argv[1:])"
    )
    return sys.executable, "-c", code


def test_a_disk_that_takes_no_more(tmp_path: Path, model: bytes) -> None:
    repo, path, room = "o/Tiny-GGUF", "m.gguf", 1_000_000
    with HubServer() as hub, Daemon(tmp_path, hub=hub.url, prefix=with_files_up_to(room)) as daemon:
        hub.add_repo(repo, {path: model})
        item = daemon.fetch(repo, path)
        final = final_file(daemon, repo, path)
        assert item["status"] == "error"
        assert item["error"] == "the models folder can't be written: File too large"
        assert (final.exists(), partial_path(final).stat().st_size <= room) == (False, True)
        daemon.prefix = ()
        daemon.restart()
        assert daemon.fetch(repo, path)["status"] == "complete"
        assert final.read_bytes() == model


def test_a_database_that_takes_no_more_stops_no_model(tmp_path: Path, model: bytes) -> None:
    repo, path = "o/Tiny-GGUF", "m.gguf"
    with HubServer() as hub, Daemon(tmp_path, hub=hub.url) as daemon:
        hub.add_repo(repo, {path: model})
        daemon.fetch(repo, path)
        daemon.prefix = with_files_up_to(33_000)  # SQLite can open, and store a few changes
        daemon.restart()
        for _ in range(4):
            assert daemon.start_model("tiny", repo, path)["status"] == "inferring"
            assert daemon.chat("tiny").status_code == 200
            assert daemon.ask("/api/inference/stop", alias="tiny")["status"] == "complete"
        assert daemon.stop() == 0
        assert "the database failed" in daemon.log
        assert "Traceback" not in daemon.log
        daemon.prefix = ()
        daemon.start()
        assert daemon.start_model("tiny", repo, path)["status"] == "inferring"
