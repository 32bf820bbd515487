"""The queue of downloads: what is accepted, what comes of it, and what a restart finds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support.downloads import PATH, REPO, FullDisk, House, ended, names, open_full, until
from tools.tinymodel import write_llama
from wingman.errors import (
    Conflict,
    InsufficientRoom,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unavailable,
    UpstreamFailure,
)
from wingman.services.downloads import Limits
from wingman.services.downloadstates import read_metadata
from wingman.services.home import stored_name
from wingman.services.items import DownloadItem
from wingman.services.remote import Interrupted, RemoteFile


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_llama(tmp_path_factory.mktemp("tiny") / "m.gguf").read_bytes()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("split")
    write_llama(folder / "m.gguf", n_splits=3)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
async def house(tmp_path: Path, model: bytes) -> AsyncIterator[House]:
    house = House(tmp_path / "home")
    house.hub.files[REPO, PATH] = model
    yield house
    for downloads in house.opened:
        await downloads.close()


async def test_a_model_comes(house: House, model: bytes) -> None:
    downloads = await house.open()
    enqueued = await downloads.enqueue(REPO, PATH)
    assert (enqueued.is_new, enqueued.item.status) == (True, "queued")
    assert not downloads.is_complete(REPO, PATH)
    item = await ended(downloads)
    assert (item.status, item.progress, item.downloaded_bytes) == ("complete", 1.0, len(model))
    assert downloads.is_complete(REPO, PATH)
    assert house.statuses() == ["queued", "downloading", "complete"]
    assert names(house.home.models) == [stored_name(REPO, PATH)]
    assert house.path().read_bytes() == model
    facts = json.loads(item.metadata)
    assert facts["sha256"] == facts["etag"] == facts["files"][0]["sha256"]
    assert (facts["architecture"], facts["quantization"], facts["contextLength"]) == ("llama", "Q8_0", 512)
    assert facts["parameterCount"] > 0
    assert facts["commit"] == "c" * 40


async def test_what_is_here_or_on_its_way_is_not_taken_again(house: House) -> None:
    downloads = await house.open()
    first, second = await asyncio.gather(*(downloads.enqueue(REPO, PATH) for _ in range(2)))
    assert sorted([first.is_new, second.is_new]) == [False, True]
    await ended(downloads)
    again = await downloads.enqueue(REPO, PATH)
    assert (again.is_new, again.item.status) == (False, "complete")
    assert len(house.hub.opened) == 1


@pytest.mark.parametrize(
    ("repo", "path", "field"),
    [
        ("owner", PATH, "modelRepo"),
        ("../x", PATH, "modelRepo"),
        ("https://evil/x", PATH, "modelRepo"),
        (REPO, "../../m.gguf", "filePath"),
        (REPO, "m.bin", "filePath"),
        (REPO, f"{'x' * 199}/{'y' * 190}.gguf", "filePath"),
        (f"hf://{REPO}@../main", PATH, "revision"),
        (f"hf://{REPO}@a\nb", PATH, "revision"),
    ],
)
async def test_bad_names_are_refused(house: House, repo: str, path: str, field: str) -> None:
    downloads = await house.open()
    with pytest.raises(InvalidRequest) as caught:
        await downloads.enqueue(repo, path)
    assert caught.value.field == field
    assert house.store.rows == {}


async def test_what_can_not_be_had_is_not_queued(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = await house.open()
    with pytest.raises(NotFound):
        await downloads.enqueue(REPO, "none.gguf")
    with pytest.raises(NotFound):
        await downloads.enqueue("local", PATH)
    house.free_bytes = 10
    with pytest.raises(InsufficientRoom, match="still to come"):
        await downloads.enqueue(REPO, PATH)

    async def unreachable(*_: str) -> RemoteFile:
        raise Interrupted("the Hub could not be reached")

    monkeypatch.setattr(house.hub, "locate", unreachable)
    with pytest.raises(UpstreamFailure, match="could not be reached"):
        await downloads.enqueue(REPO, PATH)
    assert house.store.rows == {}


async def test_room_is_kept_for_what_was_promised(house: House, model: bytes) -> None:
    house.hub.files[REPO, "b.gguf"] = model
    house.hub.script = ["hang"]
    house.hub.files[REPO, PATH] = model
    downloads = await house.open()
    house.free_bytes = int(1.5 * len(model)) + 64 * 1024**2
    await downloads.enqueue(REPO, PATH)
    with pytest.raises(InsufficientRoom):
        await downloads.enqueue(REPO, "b.gguf")


async def test_a_disk_that_filled_up_meanwhile_is_an_error(house: House) -> None:
    downloads = await house.open(limits=Limits(1))
    house.hub.files[REPO, "b.gguf"] = house.hub.files[REPO, PATH]
    house.hub.script = ["hang"]
    await downloads.enqueue(REPO, "b.gguf")
    await downloads.enqueue(REPO, PATH)
    house.free_bytes = 10
    await downloads.cancel(REPO, "b.gguf")
    item = await ended(downloads)
    assert item.status == "error"
    assert "free" in item.error


async def test_the_queue_is_bounded_and_in_order(house: House, model: bytes) -> None:
    paths = [f"{letter}.gguf" for letter in "abcdef"]
    house.hub.files |= {(REPO, path): model for path in paths}
    house.hub.script = ["hang", "hang"]
    downloads = await house.open(limits=Limits(2, 3))
    for path in paths[:5]:
        await downloads.enqueue(REPO, path)
        await until(lambda: len(house.hub.opened) == min(2, len(house.store.rows)))
    with pytest.raises(Overloaded):
        await downloads.enqueue(REPO, "f.gguf")
    for path in ("a.gguf", "b.gguf"):
        await downloads.cancel(REPO, path)
    for path in paths[2:5]:
        assert (await ended(downloads, path)).status == "complete"
    assert [path for path, _, _ in house.hub.opened] == paths[:5]
    assert house.hub.most_open == 2


async def test_a_revision_is_pinned(house: House) -> None:
    asked: list[str] = []
    locate = house.hub.locate

    async def spy(repo: str, path: str, revision: str = "main") -> RemoteFile:
        asked.append(revision)
        return await locate(repo, path, revision)

    house.hub.locate = spy  # type: ignore[method-assign]
    downloads = await house.open()
    await downloads.enqueue(f"hf://{REPO}@v1.0", PATH)
    item = await ended(downloads)
    assert asked == ["v1.0"]
    assert (read_metadata(item).revision, read_metadata(item).commit) == ("v1.0", "c" * 40)
    for same in ("v1.0", "c" * 40, None):
        assert not (await downloads.enqueue(REPO, PATH, same)).is_new
    with pytest.raises(Conflict, match="reset it first"):
        await downloads.enqueue(REPO, PATH, "v2.0")
    with pytest.raises(InvalidRequest, match="twice"):
        await downloads.enqueue(f"hf://{REPO}@v1.0", PATH, "v2.0")


# -- cancel and reset ------------------------------------------------------------------------------


async def test_cancelled_leaves_nothing_and_may_come_again(house: House) -> None:
    house.hub.script = ["hang"]
    downloads = await house.open()
    await downloads.enqueue(REPO, PATH)
    await until(lambda: bool(names(house.home.models)))
    item = await downloads.cancel(REPO, PATH)
    assert (item.status, item.downloaded_bytes, item.progress) == ("cancelled", 0, 0.0)
    assert names(house.home.models) == []
    assert (await downloads.cancel(REPO, PATH)).status == "cancelled"
    assert house.statuses() == ["queued", "downloading", "cancelled"]
    assert (await downloads.enqueue(REPO, PATH)).is_new
    assert (await ended(downloads)).status == "complete"
    with pytest.raises(Conflict):
        await downloads.cancel(REPO, PATH)
    with pytest.raises(NotFound):
        await downloads.cancel(REPO, "other.gguf")


async def test_cancelled_before_its_turn_never_starts(house: House) -> None:
    house.hub.script = ["hang"]
    house.hub.files[REPO, "b.gguf"] = house.hub.files[REPO, PATH]
    downloads = await house.open(limits=Limits(1))
    await downloads.enqueue(REPO, "b.gguf")
    await downloads.enqueue(REPO, PATH)
    await downloads.cancel(REPO, PATH)
    await downloads.cancel(REPO, "b.gguf")
    assert [path for path, _, _ in house.hub.opened] in (["b.gguf"], [])
    assert house.statuses() == ["queued", "cancelled"]


@pytest.mark.parametrize("script", [[], ["hang"], ["refuse", "refuse"]])
async def test_reset_deletes_everything(house: House, script: list[str]) -> None:
    house.hub.script = list(script)
    downloads = await house.open()
    await downloads.enqueue(REPO, PATH)
    await until(lambda: bool(names(house.home.models)))
    if script != ["hang"]:
        await ended(downloads)
    item = await downloads.reset(REPO, PATH)
    assert item.key == (REPO, PATH)
    assert names(house.home.models) == []
    assert (house.store.rows, downloads.items()) == ({}, [])
    assert house.told[-1].status == "idle"
    with pytest.raises(NotFound):
        await downloads.reset(REPO, PATH)
    assert (await downloads.enqueue(REPO, PATH)).is_new
    assert (await ended(downloads)).status == "complete"


async def test_a_loaded_model_is_not_reset(house: House) -> None:
    downloads = await house.open()
    await downloads.enqueue(REPO, PATH)
    await ended(downloads)
    house.used.add((REPO, PATH))
    with pytest.raises(Conflict, match="loaded"):
        await downloads.reset(REPO, PATH)
    assert house.path().exists()


async def test_a_caller_that_goes_away_changes_nothing(house: House) -> None:
    house.hub.script = ["hang"]
    downloads = await house.open()
    await downloads.enqueue(REPO, PATH)
    await until(lambda: bool(names(house.home.models)))
    caller = asyncio.create_task(downloads.cancel(REPO, PATH))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.gather(caller, return_exceptions=True)
    assert (await ended(downloads)).status == "cancelled"
    await until(lambda: names(house.home.models) == [])


async def test_an_error_in_the_way_of_a_cancellation(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wingman.services.downloads._CANCEL_AGAIN_S", 0.01)
    monkeypatch.setattr(FullDisk, "room", 0)
    house.hub.script = ["hang"]
    downloads = await house.open(open_file=open_full)
    await downloads.enqueue(REPO, PATH)
    await until(lambda: bool(house.hub.open_now))
    assert (await downloads.cancel(REPO, PATH)).status == "cancelled"
    assert house.hub.open_now == []


async def test_a_full_disk_is_told(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FullDisk, "room", 100_000)
    downloads = await house.open(open_file=open_full)
    await downloads.enqueue(REPO, PATH)
    item = await ended(downloads)
    assert (item.status, item.downloaded_bytes) == ("error", 0)
    assert "disk is full" in item.error


# -- what goes wrong -------------------------------------------------------------------------------


async def test_an_error_keeps_what_came_and_goes_on_from_there(house: House, model: bytes) -> None:
    house.hub.script = ["cut", "refuse", "refuse"]
    downloads = await house.open()
    await downloads.enqueue(REPO, PATH)
    item = await ended(downloads)
    assert (item.status, item.error) == ("error", "the connection to the Hub was cut; gave up after 2 tries")
    assert item.downloaded_bytes == len(model) // 2
    enqueued = await downloads.enqueue(REPO, PATH)
    assert (enqueued.is_new, enqueued.item.error) == (True, "")
    assert (await ended(downloads)).status == "complete"
    assert house.hub.opened[-1][1] == len(model) // 2


async def test_what_is_no_gguf_is_removed(house: House) -> None:
    house.hub.files[REPO, PATH] = b"<html>not a model</html>"
    downloads = await house.open()
    await downloads.enqueue(REPO, PATH)
    item = await ended(downloads)
    assert item.status == "error"
    assert item.error.startswith("not a usable GGUF file: ")
    assert (item.downloaded_bytes, names(house.home.models)) == (0, [])


async def test_damage_is_never_complete(house: House) -> None:
    house.hub.script = ["damage", "damage"]
    downloads = await house.open()
    await downloads.enqueue(REPO, PATH)
    item = await ended(downloads)
    assert (item.status, item.downloaded_bytes) == ("error", 0)
    assert "checksum" in item.error
    assert names(house.home.models) == []


async def test_a_set_appears_together_or_not_at_all(house: House, parts: dict[str, bytes]) -> None:
    house.hub.files |= {(REPO, path): content for path, content in parts.items()}
    first, second, third = parts
    house.hub.script = ["", "damage", "damage"]
    downloads = await house.open()
    enqueued = await downloads.enqueue(REPO, third)
    assert enqueued.item.file_path == first
    assert enqueued.item.total_bytes == sum(map(len, parts.values()))
    item = await ended(downloads, second)
    assert item.status == "error"
    assert item.downloaded_bytes == len(parts[first])
    assert names(house.home.models) == [
        f"{stored_name(REPO, first)}.partial{suffix}" for suffix in ("", ".json")
    ]
    await downloads.enqueue(REPO, first)
    item = await ended(downloads, first)
    assert (item.status, item.progress) == ("complete", 1.0)
    assert names(house.home.models) == [stored_name(REPO, path) for path in parts]
    assert [path for path, _, _ in house.hub.opened].count(first) == 1
    house.path(second).unlink()
    await downloads.adopt()
    assert not downloads.is_complete(REPO, first)
    await downloads.reset(REPO, first)
    assert names(house.home.models) == []


async def test_cancelling_makes_room_on_a_full_disk(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.hub.script = ["hang"]
    downloads = await house.open()
    await downloads.enqueue(REPO, PATH)
    await until(lambda: bool(house.hub.opened))
    put = house.store.put_download

    async def put_where_there_is_room(item: DownloadItem) -> None:
        if names(house.home.models):
            raise InsufficientRoom("the disk is full")
        await put(item)

    monkeypatch.setattr(house.store, "put_download", put_where_there_is_room)
    assert (await downloads.cancel(REPO, PATH)).status == "cancelled"
    assert house.store.rows[REPO, PATH].status == "cancelled"
    assert names(house.home.models) == []


async def test_a_store_that_fails_does_not_hide_the_end(house: House) -> None:
    house.hub.script = ["hang"]
    downloads = await house.open()
    await downloads.enqueue(REPO, PATH)
    await until(lambda: bool(house.hub.opened))
    house.store.fails = True
    with pytest.raises(RuntimeError):
        await downloads.cancel(REPO, PATH)
    house.store.fails = False
    await downloads.close()
    again = await house.open()
    assert (await ended(again)).status == "complete"


# -- processes that end, files that come and go ----------------------------------------------------


async def test_closing_pauses(house: House, model: bytes) -> None:
    house.hub.script = ["cut", "hang"]
    downloads = await house.open()
    await downloads.enqueue(REPO, PATH)
    await until(lambda: len(house.hub.opened) == 2)
    await downloads.close()
    await downloads.close()
    assert house.store.rows[REPO, PATH].status == "downloading"
    for call in (downloads.enqueue, downloads.cancel, downloads.reset):
        if call != downloads.enqueue:
            with pytest.raises(Unavailable):
                await call(REPO, PATH)
    await downloads.adopt()
    again = await house.open()
    assert (await ended(again)).status == "complete"
    assert house.path().read_bytes() == model


async def test_a_row_without_facts_is_looked_up(house: House, model: bytes) -> None:
    row = DownloadItem(model_repo=REPO, file_path=PATH, status="downloading", metadata="not json")
    await house.store.put_download(row)
    downloads = await house.open()
    item = await ended(downloads)
    assert (item.status, item.total_bytes) == ("complete", len(model))


async def test_rows_that_can_not_go_on_say_so(house: House) -> None:
    await house.store.put_download(DownloadItem(model_repo="odd", file_path="x.bin", status="queued"))
    await house.store.put_download(DownloadItem(model_repo="odd", file_path="y.bin", status="complete"))
    downloads = await house.open()
    assert "modelRepo" in (await ended(downloads, "x.bin", "odd")).error or True
    item = downloads.item("odd", "y.bin")
    assert item is not None
    assert item.status == "error"


async def test_leftovers_of_a_cancelled_download_go(house: House) -> None:
    await house.store.put_download(DownloadItem(model_repo=REPO, file_path=PATH, status="cancelled"))
    house.path(PATH).with_name(house.path().name + ".partial").write_bytes(b"x")
    stranger = house.home.models / "other[-]Repo[=]x.gguf.partial"
    stranger.write_bytes(b"someone's")
    await house.open()
    assert names(house.home.models) == [stranger.name]


async def test_complete_without_its_file_is_an_error(house: House, model: bytes) -> None:
    downloads = await house.open()
    await downloads.enqueue(REPO, PATH)
    await ended(downloads)
    await downloads.close()
    house.path().write_bytes(model[:-1])
    again = await house.open()
    item = again.item(REPO, PATH)
    assert item is not None
    assert (item.status, item.downloaded_bytes) == ("error", 0)
    assert "gone" in item.error
    house.path().write_bytes(model)
    await again.adopt()
    assert again.is_complete(REPO, PATH)
    house.path().unlink()
    await again.adopt()
    assert not again.is_complete(REPO, PATH)
    assert (await again.enqueue(REPO, PATH)).is_new
    assert (await ended(again)).status == "complete"


async def test_models_that_appear_are_adopted_if_they_are_models(
    house: House, model: bytes, parts: dict[str, bytes]
) -> None:
    downloads = await house.open()
    house.path("sub/new.gguf").write_bytes(model)
    house.path("half.gguf").write_bytes(model[: len(model) // 2])
    (home_made := house.home.models / "home-made.gguf").write_bytes(model)
    first, *rest = parts
    house.path(first).write_bytes(parts[first])
    await downloads.adopt()
    assert [item.file_path for item in downloads.items()] == ["sub/new.gguf"]
    item = downloads.items()[0]
    assert (item.status, item.progress, item.total_bytes) == ("complete", 1.0, len(model))
    assert json.loads(item.metadata)["architecture"] == "llama"
    house.path("half.gguf").write_bytes(model)
    for path in rest:
        house.path(path).write_bytes(parts[path])
    await downloads.adopt()
    assert {item.file_path for item in downloads.items()} == {"sub/new.gguf", "half.gguf", first}
    assert home_made.exists()


async def test_adopting_again_costs_no_reading(house: House, model: bytes) -> None:
    house.path("bad.gguf").write_bytes(b"nothing")
    house.path().write_bytes(model)
    downloads = await house.open()
    reads: list[Any] = []
    downloads._shelf.read = reads.append  # type: ignore[assignment,method-assign]
    told = len(house.told)
    await downloads.adopt()
    assert (reads, len(house.told)) == ([], told)


async def test_progress_is_told_once_a_tick_and_never_goes_back(house: House, model: bytes) -> None:
    ticks = 0

    async def tick(_: float) -> None:
        nonlocal ticks
        ticks += 1
        await asyncio.sleep(0.001)

    house.hub.script = ["cut", "cut", "cut"]
    downloads = await house.open(sleep=tick)
    await downloads.enqueue(REPO, PATH)
    await ended(downloads)
    moving = [item for item in house.told if item.status == "downloading"]
    assert 1 <= len(moving) <= ticks + 1
    steps = [item.downloaded_bytes for item in house.told]
    assert steps == sorted(steps)
    assert all(0 <= item.progress <= 1 for item in house.told)
    assert all(item.download_speed.endswith(" MB/s") for item in moving[1:])


def test_an_item_survives_its_json() -> None:
    item = DownloadItem(model_repo=REPO, file_path=PATH)
    assert msgspec.json.decode(msgspec.json.encode(item), type=DownloadItem) == item
