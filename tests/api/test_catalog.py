"""GET /api/models: status codes and shape."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from protocol import Headers, Target
from tests.support.hub import HubServer
from wingman.api.catalog import list_models
from wingman.errors import InvalidRequest
from wingman.http.messages import Request
from wingman.services.catalog import Catalog, Room
from wingman.services.home import Home
from wingman.services.hub import Hub

KEYS = set(
    "isa id name maxLength tokenLimit vendor location items downloads likes created updated size iQScore eQScore "
    "isInferable totalMemory availableMemory normalizedQuantizedMemRequired".split()
)
ITEM_KEYS = set(
    "isa modelRepo modelRepoName filePath quantization quantizationName isDownloaded available hasError location "
    "isInferable normalizedQuantizedMemRequired".split()
)


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        server.add_repo("owner/One-GGUF", {"one-Q4_0.gguf": b"x"})
        server.add_repo("owner/Two-GGUF", {"two-Q4_0.gguf": b"x"})
        yield server


@pytest.fixture
def catalog(server: HubServer, tmp_path: Path) -> Catalog:
    home = Home(tmp_path)
    home.create()
    return Catalog(home, Hub(server.url, "", home.cache), downloads=tuple, room=Room, need_bytes=lambda _: 1)


async def get(catalog: Catalog, *query: tuple[str, str]) -> Any:
    request = Request("GET", Target("/api/models", query), Headers([]), "1", "peer")
    response = await list_models(catalog, request)
    assert response.status == 200
    assert response.content_type == "application/json; charset=utf-8"
    return json.loads(response.body)


async def test_all_models_with_the_original_keys(catalog: Catalog) -> None:
    body = await get(catalog)
    assert list(body) == ["models"]
    assert [model["id"] for model in body["models"]] == ["owner/One-GGUF", "owner/Two-GGUF"]
    assert set(body["models"][0]) == KEYS
    assert set(body["models"][0]["items"][0]) == ITEM_KEYS | {"sizeBytes"}


async def test_one_repository(catalog: Catalog) -> None:
    body = await get(catalog, ("modelRepo", "owner/Two-GGUF"))
    assert [model["id"] for model in body["models"]] == ["owner/Two-GGUF"]
    assert body["models"][0]["items"][0]["sizeBytes"] == 1


async def test_without_the_hub_it_says_so(catalog: Catalog, server: HubServer) -> None:
    server.close()
    assert await get(catalog) == {"models": [], "stale": True}


@pytest.mark.parametrize("repo", ["", "owner", "../x", "a/b/c", "owner/x?y"])
async def test_bad_names_are_refused(catalog: Catalog, server: HubServer, repo: str) -> None:
    with pytest.raises(InvalidRequest):
        await get(catalog, ("modelRepo", repo))
    assert server.requests == []
