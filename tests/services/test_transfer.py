"""One file through all that a network, a server and a disk can do to it."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.downloads import FullDisk, ScriptedHub, make_remote_file, names, open_full
from tests.support.hub import HubServer
from wingman.errors import InsufficientRoom, WingmanError
from wingman.services import partial
from wingman.services.pace import RateLimit, Speed, size_text, speed_text
from wingman.services.partial import partial_path, publish, read_sidecar, sidecar_path
from wingman.services.remote import Remote
from wingman.services.transfer import Patience, Progress, TransferFailed, Transfers

REPO, PATH = "o/Tiny-GGUF", "m.gguf"
CONTENT = os.urandom(3 * 2**20 + 17)


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


class Pauses:
    """A sleep that only takes notes."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.slept.append(seconds)
        await asyncio.sleep(0)


async def fetch_all(hub: HubServer, executor: ThreadPoolExecutor, target: Path, **options: Any) -> Pauses:
    """Locate and fetch the file of `hub` into the partial of `target`."""
    remote, pauses = Remote(hub.url, "t", stall_s=options.pop("stall_s", 5.0)), Pauses()
    try:
        file = await remote.locate(REPO, PATH)
        transfers = Transfers(remote, executor, sleep=pauses, jitter=lambda: 1.0, **options)
        await transfers.fetch(file, target, Progress())
    finally:
        await remote.aclose()
    return pauses


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.add_repo(REPO, {PATH: CONTENT})
        yield server


async def test_a_file_is_fetched_and_published(
    hub: HubServer, executor: ThreadPoolExecutor, tmp_path: Path
) -> None:
    target = tmp_path / "x.gguf"
    await fetch_all(hub, executor, target)
    assert names(tmp_path) == ["x.gguf.partial", "x.gguf.partial.json"]
    publish([target])
    assert names(tmp_path) == ["x.gguf"]
    assert target.read_bytes() == CONTENT


FAULTS: list[tuple[str, dict[str, Any]]] = [
    ("cut mid-body", {"cut_after": 1_000_000, "times": 2}),
    ("silence", {"stall_after": 1_000_000, "times": 1}),
    ("drip", {"drip": (500_000, 0.01)}),
    ("wrong hash once", {"wrong_hash": True, "times": 1}),
    ("changed ETag", {"cut_after": 1_000_000, "change_etag": True, "times": 1}),
    ("no ranges", {"no_range": True, "cut_after": 1_000_000, "times": 1}),
    ("too short", {"lie_length": 5, "times": 1}),
    ("too long", {"lie_length": len(CONTENT) + 5, "times": 1}),
    ("busy", {"status": 503, "where": "cdn", "times": 2}),
    ("expired link", {"status": 403, "where": "cdn", "times": 1}),
]


@pytest.mark.parametrize(("what", "fault"), FAULTS, ids=[what for what, _ in FAULTS])
async def test_what_passes_is_survived(
    hub: HubServer, executor: ThreadPoolExecutor, tmp_path: Path, what: str, fault: dict[str, Any]
) -> None:
    hub.misbehave(REPO, PATH, **fault)
    await fetch_all(hub, executor, tmp_path / "x.gguf", stall_s=0.3)
    assert partial_path(tmp_path / "x.gguf").read_bytes() == CONTENT


HOPELESS: list[tuple[str, dict[str, Any], str]] = [
    ("wrong hash", {"wrong_hash": True}, "checksum of m.gguf is wrong, twice"),
    ("too short", {"lie_length": 5}, "promised .* has 5; gave up after 5 tries"),
    ("always from the start", {"no_range": True, "cut_after": 1_000_000}, "cut; gave up after 5 tries"),
    ("always another ETag", {"change_etag": True, "cut_after": 1_000_000}, "cut; gave up after 5 tries"),
    ("busy", {"status": 500, "where": "cdn"}, "file server answered with status 500; gave up"),
    ("too small a size", {"lie_size": 1000}, "promised 1000 bytes"),
]


@pytest.mark.parametrize(("what", "fault", "words"), HOPELESS, ids=[what for what, _, _ in HOPELESS])
async def test_what_stays_is_told(
    hub: HubServer, executor: ThreadPoolExecutor, tmp_path: Path, what: str, fault: dict[str, Any], words: str
) -> None:
    hub.misbehave(REPO, PATH, **fault)
    with pytest.raises(WingmanError, match=words):
        await fetch_all(hub, executor, tmp_path / "x.gguf")
    assert "x.gguf" not in names(tmp_path)


async def test_a_wrong_hash_leaves_nothing(
    hub: HubServer, executor: ThreadPoolExecutor, tmp_path: Path
) -> None:
    hub.misbehave(REPO, PATH, wrong_hash=True)
    with pytest.raises(TransferFailed):
        await fetch_all(hub, executor, tmp_path / "x.gguf")
    assert names(tmp_path) == []
    assert hub.bytes_sent(PATH) == 2 * len(CONTENT)


async def test_a_cut_costs_no_byte(hub: HubServer, executor: ThreadPoolExecutor, tmp_path: Path) -> None:
    hub.misbehave(REPO, PATH, cut_after=1_000_000, times=3)
    pauses = await fetch_all(hub, executor, tmp_path / "x.gguf")
    assert hub.bytes_sent(PATH) == len(CONTENT)
    assert pauses.slept == [1.0, 1.0, 1.0]  # each got further, so the patience was whole again


async def test_a_refused_range_starts_over(
    hub: HubServer, executor: ThreadPoolExecutor, tmp_path: Path
) -> None:
    hub.misbehave(REPO, PATH, cut_after=1_000_000, times=1)
    hub.misbehave(REPO, PATH, status=416, where="cdn", times=1)
    await fetch_all(hub, executor, tmp_path / "x.gguf")
    assert partial_path(tmp_path / "x.gguf").read_bytes() == CONTENT
    assert [one.status for one in hub.file_requests(PATH) if one.listener == "cdn"] == [200, 416, 200]


async def test_pauses_grow_and_retry_after_is_kept(
    hub: HubServer, executor: ThreadPoolExecutor, tmp_path: Path
) -> None:
    for seconds in ("0", "0", "100", "99999"):
        hub.misbehave(REPO, PATH, status=503, headers={"Retry-After": seconds}, times=1, method="GET")
    pauses = await fetch_all(hub, executor, tmp_path / "x.gguf")
    assert pauses.slept == [1.0, 2.0, 100.0, 300.0]


def test_patience_is_bounded() -> None:
    assert Patience().pause_s(40, 0, 0.0) == 30.0
    assert Patience().pause_s(1, 0, 0.0) == 0.5


async def test_a_partial_that_is_complete_asks_for_nothing(
    hub: HubServer, executor: ThreadPoolExecutor, tmp_path: Path
) -> None:
    await fetch_all(hub, executor, tmp_path / "x.gguf")
    await fetch_all(hub, executor, tmp_path / "x.gguf")
    sidecar = read_sidecar(tmp_path / "x.gguf")
    assert sidecar is not None
    unchecked = msgspec.structs.replace(sidecar, is_checked=False)
    sidecar_path(tmp_path / "x.gguf").write_bytes(msgspec.json.encode(unchecked))
    await fetch_all(hub, executor, tmp_path / "x.gguf")
    publish([tmp_path / "x.gguf"])
    await fetch_all(hub, executor, tmp_path / "x.gguf")  # as after a crash while a set was renamed
    assert hub.bytes_sent(PATH) == len(CONTENT)


async def test_a_file_of_the_right_size_in_its_place_is_not_believed(
    hub: HubServer, executor: ThreadPoolExecutor, tmp_path: Path
) -> None:
    target = tmp_path / "x.gguf"
    target.write_bytes(bytes(len(CONTENT)))
    await fetch_all(hub, executor, target)
    publish([target])
    assert target.read_bytes() == CONTENT


SIDECARS: list[tuple[str, Any, int]] = [
    ("of this boot", {}, 2_000_000),
    ("of another boot", {"boot": "b", "verified": 1_500_000}, 1_500_000),
    ("boasting", {"boot": "b", "verified": 10**12}, 2_000_000),
    ("of another file", {"file": make_remote_file(b"other")}, 0),
]


@pytest.mark.parametrize(("what", "changes", "kept"), SIDECARS, ids=[what for what, _, _ in SIDECARS])
async def test_what_is_kept_of_a_partial(
    executor: ThreadPoolExecutor, tmp_path: Path, what: str, changes: dict[str, Any], kept: int
) -> None:
    target, file = tmp_path / "x.gguf", make_remote_file(CONTENT)
    partial_path(target).write_bytes(CONTENT[:2_000_000])
    sidecar = partial.Sidecar(file, '"e"', 1_000_000, boot=partial._boot_id())
    sidecar_path(target).write_bytes(msgspec.json.encode(msgspec.structs.replace(sidecar, **changes)))
    hub = ScriptedHub({(file.repo, file.path): CONTENT}, chunk_bytes=100_000)
    progress = Progress()
    await Transfers(hub, executor).fetch(file, target, progress)
    assert hub.opened == [(file.path, kept, '"e"' if kept else "")]
    assert (progress.position, progress.received) == (len(CONTENT), len(CONTENT) - kept)
    assert partial_path(target).read_bytes() == CONTENT


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b"x" * 10**6, None])
async def test_a_partial_without_a_readable_sidecar_is_fetched_anew(
    executor: ThreadPoolExecutor, tmp_path: Path, text: bytes | None
) -> None:
    target, file = tmp_path / "x.gguf", make_remote_file(CONTENT)
    partial_path(target).write_bytes(b"something else")
    if text is not None:
        sidecar_path(target).write_bytes(text)
    hub = ScriptedHub({(file.repo, file.path): CONTENT}, chunk_bytes=100_000)
    await Transfers(hub, executor).fetch(file, target, Progress())
    assert partial_path(target).read_bytes() == CONTENT


async def test_bytes_that_rotted_on_the_disk_are_found(executor: ThreadPoolExecutor, tmp_path: Path) -> None:
    target, file = tmp_path / "x.gguf", make_remote_file(CONTENT)
    partial_path(target).write_bytes(bytes(1000))
    sidecar = partial.Sidecar(file, '"e"', 1000, boot=partial._boot_id())
    sidecar_path(target).write_bytes(msgspec.json.encode(sidecar))
    hub = ScriptedHub({(file.repo, file.path): CONTENT}, chunk_bytes=100_000)
    await Transfers(hub, executor).fetch(file, target, Progress())
    assert [start for _, start, _ in hub.opened] == [1000, 0]
    assert partial_path(target).read_bytes() == CONTENT


async def test_git_ids_are_checked_where_there_is_no_sha256(
    executor: ThreadPoolExecutor, tmp_path: Path
) -> None:
    blob_id = hashlib.sha1(b"blob %d\0" % len(CONTENT) + CONTENT).hexdigest()
    file = msgspec.structs.replace(make_remote_file(CONTENT), sha256="", etag=blob_id)
    hub = ScriptedHub({(file.repo, file.path): CONTENT}, script=["damage"], chunk_bytes=100_000)
    await Transfers(hub, executor).fetch(file, tmp_path / "x.gguf", Progress())
    assert [start for _, start, _ in hub.opened] == [0, 0]


async def test_a_full_disk_keeps_what_came(
    hub: HubServer, executor: ThreadPoolExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "x.gguf"
    with pytest.raises(InsufficientRoom, match="disk is full: free some space"):
        await fetch_all(hub, executor, target, open_file=open_full)
    held = partial.held_bytes(target)
    assert held >= 2**20
    await fetch_all(hub, executor, target)
    assert partial_path(target).read_bytes() == CONTENT
    assert hub.file_requests(PATH)[-1].range == f"bytes={held}-"
    monkeypatch.setattr(FullDisk, "error", errno.EIO)
    partial_path(target).unlink()
    with pytest.raises(TransferFailed, match="can't be written: Input/output error"):
        await fetch_all(hub, executor, target, open_file=open_full)


async def test_a_link_in_the_place_of_a_partial_is_not_followed(
    hub: HubServer, executor: ThreadPoolExecutor, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    partial_path(tmp_path / "x.gguf").symlink_to(outside)
    with pytest.raises(TransferFailed, match="can't be written"):
        await fetch_all(hub, executor, tmp_path / "x.gguf")
    assert outside.read_bytes() == b"precious"


async def test_cancelled_keeps_what_came_and_leaves_the_disk_alone(
    executor: ThreadPoolExecutor, tmp_path: Path
) -> None:
    target, file = tmp_path / "x.gguf", make_remote_file(CONTENT)
    hub = ScriptedHub({(file.repo, file.path): CONTENT}, script=["hang"], chunk_bytes=100_000)
    progress = Progress()
    task = asyncio.create_task(Transfers(hub, executor).fetch(file, target, progress))
    while progress.position < 2**20:  # noqa: ASYNC110 - the executor says when
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    sidecar = read_sidecar(target)
    assert sidecar is not None
    assert sidecar.verified == progress.position == partial.held_bytes(target)
    assert hub.open_now == []


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(0, 5000),
    chunk_bytes=st.integers(1, 700),
    script=st.lists(st.sampled_from(["cut", "refuse", "damage", ""]), max_size=4),
)
def test_whatever_happens_the_bytes_are_right_or_it_says_so(
    tmp_path_factory: pytest.TempPathFactory, size: int, chunk_bytes: int, script: list[str]
) -> None:
    content = bytes(index * 7 % 251 for index in range(size))
    file = make_remote_file(content)
    hub = ScriptedHub({(file.repo, file.path): content}, list(script) if size else [], chunk_bytes)
    target, progress = tmp_path_factory.mktemp("models") / "x.gguf", Progress()

    async def fetch() -> bool:
        with ThreadPoolExecutor(1) as executor:
            try:
                await Transfers(hub, executor, sleep=Pauses()).fetch(file, target, progress)
            except TransferFailed:
                return False
        return True

    if asyncio.run(fetch()):
        publish([target])
        assert target.read_bytes() == content
        assert progress.position == size
    else:
        assert script.count("damage") >= 2
        assert not target.exists()


def test_a_rate_limit_is_shared() -> None:
    limit = RateLimit(100)
    assert limit.take(100, 0.0) == 1.0
    assert limit.take(50, 0.0) == 1.5
    assert limit.take(50, 10.0) == 0.5  # what was not used is not saved up
    assert RateLimit(0).take(10**9, 0.0) == 0.0


async def test_a_limited_transfer_waits_as_long_as_its_bytes_take(
    hub: HubServer, executor: ThreadPoolExecutor, tmp_path: Path
) -> None:
    now_s = 0.0
    remote = Remote(hub.url, "t")

    async def sleep(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds

    limit = RateLimit(1_000_000)
    transfers = Transfers(remote, executor, limit=limit, clock=lambda: now_s, sleep=sleep)
    await transfers.fetch(await remote.locate(REPO, PATH), tmp_path / "x.gguf", Progress())
    await remote.aclose()
    assert len(CONTENT) / 1e6 - 0.1 <= now_s <= len(CONTENT) / 1e6


def test_speed_is_that_of_the_last_seconds() -> None:
    speed = Speed()
    assert speed.update(0, 0.0) == 0.0
    assert speed.update(1000, 1.0) == 1000.0
    assert [speed.update(1000, cast(float, second)) for second in (2.0, 3.0, 4.0, 5.0)][-1] == 0.0
    assert speed_text(12_345_678) == "12.3 MB/s"
    assert (size_text(4_100_000_000), size_text(1_500_000)) == ("4.1 GB", "1.5 MB")
