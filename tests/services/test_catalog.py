"""The catalog of the Hub, of downloads and of local files, with and without the Hub."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.hub import HubServer
from tools.tinymodel import write_llama, write_lora
from wingman.errors import NotFound, UpstreamFailure
from wingman.services import catalog as module
from wingman.services.catalog import Catalog, Room
from wingman.services.home import LOCAL, Home
from wingman.services.hub import Hub
from wingman.services.items import AIModel, DownloadItem

MB = 2**20
REPO = "owner/Tiny-7B-GGUF"
STORED = "owner[-]Tiny-7B-GGUF[=]tiny-Q4_0.gguf"


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


class World:
    """A catalog and what it reads."""

    def __init__(self, server: HubServer, home: Home) -> None:
        self.home = home
        self.rows: list[DownloadItem] = []
        self.room = Room(total=8000, available=4000)
        hub = Hub(server.url, "", home.cache)
        self.catalog = Catalog(
            home,
            hub,
            downloads=lambda: self.rows,
            room=lambda: self.room,
            need_bytes=lambda header: header.file_size + 100 * MB,
        )

    async def models(self) -> dict[str, AIModel]:
        models, _ = await self.catalog.models()
        return {model.id: model for model in models}

    async def repo(self, repo_id: str) -> Any:
        return json.loads(await self.catalog.repo_body(repo_id))


@pytest.fixture
def world(server: HubServer, tmp_path: Path) -> World:
    home = Home(tmp_path)
    home.create()
    return World(server, home)


def row(path: str = "tiny-Q4_0.gguf", status: str = "complete", repo: str = REPO) -> DownloadItem:
    return DownloadItem(model_repo=repo, file_path=path, status=status)  # type: ignore[arg-type]


async def test_a_repository_of_the_hub(server: HubServer, world: World) -> None:
    files = {"tiny-Q4_0.gguf": b"x", "b/tiny-F16.gguf": b"x", "mmproj-F16.gguf": b"x", "README.md": b"x"}
    server.add_repo(REPO, files, downloads=5, likes=3)
    model = (await world.models())[REPO]
    assert (model.name, model.size, model.downloads, model.likes) == ("owner/Tiny-7B", "7B", 5, 3)
    assert (model.vendor, model.max_length, model.token_limit) == ("meta", 4096, 65536)
    assert model.location == f"{server.url}/{REPO}"
    assert (model.total_memory, model.available_memory) == (8000, 3968)
    large, small = model.items
    assert (small.file_path, small.quantization, small.quantization_name) == (
        "tiny-Q4_0.gguf",
        "Q4_0",
        "4-bit 0",
    )
    assert small.normalized_quantized_mem_required == model.normalized_quantized_mem_required == 3756
    assert small.is_inferable
    assert model.is_inferable
    assert (large.file_path, large.normalized_quantized_mem_required) == ("b/tiny-F16.gguf", 13352)
    assert not large.is_inferable
    assert not small.is_downloaded
    assert small.available


async def test_a_set_is_one_item_and_half_a_set_is_none(server: HubServer, world: World) -> None:
    parts = [f"m-Q8_0-0000{index}-of-00003.gguf" for index in (1, 2, 3)]
    server.add_repo(REPO, dict.fromkeys([*parts, "n-00001-of-00002.gguf"], b"12345"))
    (model,) = (await world.models()).values()
    assert [item.file_path for item in model.items] == [parts[0]]
    body = await world.repo(REPO)
    assert [item["sizeBytes"] for item in body["models"][0]["items"]] == [15]
    (again,) = (await world.models())[REPO].items
    assert again.size_bytes == 15


async def test_a_downloaded_file_is_told_by_its_header(server: HubServer, world: World) -> None:
    server.add_repo(REPO, {"tiny-Q4_0.gguf": b"x", "tiny-Q8_0.gguf": b"x"})
    path = write_llama(world.home.models / STORED)
    world.rows = [row(), row("tiny-Q8_0.gguf", "error")]
    model = (await world.models())[REPO]
    here, failed = model.items
    assert (here.is_downloaded, here.location, here.size_bytes) == (True, str(path), path.stat().st_size)
    assert here.normalized_quantized_mem_required == 101
    assert model.max_length == model.token_limit == 512
    assert (failed.is_downloaded, failed.has_error, failed.available) == (False, True, True)


async def test_a_file_counts_only_once_its_download_is_complete(server: HubServer, world: World) -> None:
    server.add_repo(REPO, {"tiny-Q4_0.gguf": b"x"})
    write_llama(world.home.models / STORED)
    world.rows = [row(status="downloading")]
    assert not (await world.models())[REPO].items[0].is_downloaded
    world.rows = [row()]
    assert (await world.models())[REPO].items[0].is_downloaded
    (world.home.models / STORED).unlink()
    assert not (await world.models())[REPO].items[0].is_downloaded


async def test_what_the_hub_does_not_list_is_there_too(server: HubServer, world: World) -> None:
    write_llama(world.home.models / STORED)
    write_llama(world.home.models / "mine-Q5_0.gguf")
    write_lora(world.home.models / "adapter.gguf")
    (world.home.models / "broken.gguf").write_bytes(b"GGUF")
    world.rows = [row(), row("gone.gguf", "cancelled", "other/Repo")]
    models = await world.models()
    assert list(models) == [LOCAL, "other/Repo", REPO]
    assert models[REPO].items[0].is_downloaded
    broken, mine = models[LOCAL].items
    assert (mine.file_path, mine.quantization, mine.is_downloaded) == ("mine-Q5_0.gguf", "Q5_0", True)
    assert (broken.has_error, broken.is_downloaded, broken.available) == (True, False, False)
    assert not models["other/Repo"].items[0].available


async def test_without_the_hub_what_is_known_is_shown(server: HubServer, world: World) -> None:
    server.close()
    write_llama(world.home.models / "mine.gguf")
    models, is_stale = await world.catalog.models()
    assert [model.id for model in models] == [LOCAL]
    assert is_stale
    body = json.loads(await world.catalog.body())
    assert body["stale"] is True
    assert body["models"][0]["items"][0]["isDownloaded"] is True


async def test_the_body_is_made_anew_only_after_a_change(
    server: HubServer, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[object] = []
    build: Callable[..., object] = module._build

    def count(*given: object) -> object:
        built.append(given)
        return build(*given)

    monkeypatch.setattr(module, "_build", count)
    server.add_repo(REPO, {"tiny-Q4_0.gguf": b"x"})
    first = await world.catalog.body()
    world.rows = [row(status="downloading")]
    await world.catalog.body()
    world.rows = [
        DownloadItem(model_repo=REPO, file_path="tiny-Q4_0.gguf", status="downloading", progress=0.5)
    ]
    world.room = Room(8000, 3999)
    assert json.loads(await world.catalog.body()) == json.loads(first)
    assert len(built) == 2
    world.room = Room(8000, 1000)
    assert await world.catalog.body() != first
    assert len(built) == 3
    assert len(server.requests) == 1


async def test_one_repository_with_sizes(server: HubServer, world: World) -> None:
    server.add_repo("owner/other", {"m-Q4_K_M.gguf": b"123"})
    body = await world.repo("owner/other")
    (model,) = body["models"]
    assert "stale" not in body
    assert (model["id"], model["name"]) == ("owner/other", "owner/other")
    assert (model["items"][0]["sizeBytes"], model["items"][0]["normalizedQuantizedMemRequired"]) == (3, 1)
    await world.repo("owner/other")
    assert len(server.requests) == 1


async def test_one_repository_that_is_unknown_or_only_here(server: HubServer, world: World) -> None:
    with pytest.raises(NotFound):
        await world.repo(REPO)
    with pytest.raises(NotFound):
        await world.repo(LOCAL)
    world.rows = [row()]
    write_llama(world.home.models / STORED)
    write_llama(world.home.models / "mine.gguf")
    for repo in (REPO, LOCAL):
        (model,) = (await world.repo(repo))["models"]
        assert model["id"] == repo
        assert model["items"][0]["isDownloaded"] is True


async def test_one_repository_without_the_hub(server: HubServer, world: World) -> None:
    server.add_repo(REPO, {"tiny-Q4_0.gguf": b"x"})
    await world.catalog.models()
    server.down = 503
    body = await world.repo(REPO)
    assert body["stale"] is True
    assert body["models"][0]["items"][0]["filePath"] == "tiny-Q4_0.gguf"
    with pytest.raises(UpstreamFailure):
        await world.repo("owner/unheard-of")


async def test_many_at_once_share_the_work(server: HubServer, world: World) -> None:
    server.add_repo(REPO, {"tiny-Q4_0.gguf": b"x"})
    bodies = await asyncio.gather(*(world.catalog.body() for _ in range(20)))
    assert all(body is bodies[0] for body in bodies)
    assert len(server.requests) == 1
