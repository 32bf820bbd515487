"""/api/downloads: status codes and bodies."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from protocol import Headers
from protocol.target import parse_target
from tests.support.downloads import PATH, REPO, House, ended
from tools.tinymodel import write_llama
from wingman.api.downloads import cancel_download, enqueue_download, list_downloads, reset_download
from wingman.api.errors import error_response
from wingman.errors import WingmanError
from wingman.http.messages import Request, Response
from wingman.services.downloads import Downloads

KEYS = {
    "isa",
    "modelRepo",
    "filePath",
    "status",
    "totalBytes",
    "downloadedBytes",
    "downloadSpeed",
    "progress",
}
KEYS |= {"metadata", "error", "created", "updated"}
BOTH = f"modelRepo={REPO}&filePath={PATH}"

Endpoint = Callable[[Downloads, Request], Awaitable[Response]]


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    house = House(tmp_path / "home")
    house.hub.files[REPO, PATH] = write_llama(tmp_path / "m.gguf").read_bytes()
    yield house
    for downloads in house.opened:
        await downloads.close()


async def call(endpoint: Endpoint, downloads: Downloads, query: str) -> tuple[int, Any]:
    target = parse_target(f"/api/downloads?{query}".encode())
    request = Request("GET", target, Headers([]), "1", "127.0.0.1")
    try:
        response = await endpoint(downloads, request)
    except WingmanError as error:
        response = error_response(error)
    return response.status, json.loads(response.body)


async def test_the_life_of_a_download(house: House) -> None:
    downloads = await house.open()
    status, body = await call(enqueue_download, downloads, BOTH)
    assert (status, body["status"], set(body)) == (202, "queued", KEYS)
    await ended(downloads)
    status, body = await call(enqueue_download, downloads, BOTH)
    assert (status, body["status"], body["progress"]) == (208, "complete", 1.0)
    assert (await call(cancel_download, downloads, BOTH))[0] == 409
    assert await call(list_downloads, downloads, "") == (200, {"DownloadItems": [body]})
    assert await call(reset_download, downloads, BOTH) == (200, body)
    assert await call(list_downloads, downloads, "") == (200, {"DownloadItems": []})


async def test_cancelled(house: House) -> None:
    house.hub.script = ["hang"]
    downloads = await house.open()
    await call(enqueue_download, downloads, BOTH)
    for _ in range(2):
        status, body = await call(cancel_download, downloads, BOTH)
        assert (status, body["status"]) == (200, "cancelled")


async def test_the_list_is_filtered_by_both(house: House) -> None:
    house.hub.files["o/Other-GGUF", PATH] = house.hub.files[REPO, PATH]
    downloads = await house.open()
    await call(enqueue_download, downloads, BOTH)
    await call(enqueue_download, downloads, f"modelRepo=o/Other-GGUF&filePath={PATH}")

    async def repos(query: str) -> list[str]:
        _, body = await call(list_downloads, downloads, query)
        return [item["modelRepo"] for item in body["DownloadItems"]]

    assert await repos(f"filePath={PATH}") == [REPO, "o/Other-GGUF"]
    assert await repos("modelRepo=o/Other-GGUF") == ["o/Other-GGUF"]
    assert await repos("modelRepo=o/Other-GGUF&filePath=x.gguf") == []


@pytest.mark.parametrize("endpoint", [enqueue_download, cancel_download, reset_download])
async def test_parameters_are_required(house: House, endpoint: Endpoint) -> None:
    downloads = await house.open()
    for query, missing in [
        (f"modelRepo={REPO}", "filePath"),
        (f"filePath={PATH}", "modelRepo"),
        ("modelRepo=&filePath=x", "modelRepo"),
    ]:
        status, body = await call(endpoint, downloads, query)
        assert (status, body["error"]["param"]) == (422, missing)


@pytest.mark.parametrize("endpoint", [enqueue_download, cancel_download, reset_download])
async def test_unknown_and_odd_names(house: House, endpoint: Endpoint) -> None:
    downloads = await house.open()
    assert (await call(endpoint, downloads, f"modelRepo={REPO}&filePath=none.gguf"))[0] == 404
    status, body = await call(endpoint, downloads, f"modelRepo={REPO}&filePath=../../etc/x.gguf")
    assert (status, body["error"]["param"]) == (400, "filePath")


async def test_no_room_and_in_use(house: House) -> None:
    downloads = await house.open()
    house.free_bytes = 10
    assert (await call(enqueue_download, downloads, BOTH))[0] == 507
    house.free_bytes = 10**12
    status, body = await call(enqueue_download, downloads, f"{BOTH}&revision=v1")
    assert (status, json.loads(body["metadata"])["revision"]) == (202, "v1")
    await ended(downloads)
    house.used.add((REPO, PATH))
    assert (await call(reset_download, downloads, BOTH))[0] == 409
