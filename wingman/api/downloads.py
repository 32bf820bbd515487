"""/api/downloads: enqueue, cancel, reset and list. GET changes state too, as in the original Wingman."""

from __future__ import annotations

import msgspec

from wingman.api.queries import parameters, required
from wingman.http.messages import Request, Response
from wingman.services.downloads import Downloads
from wingman.services.items import DownloadItem


async def list_downloads(downloads: Downloads, request: Request) -> Response:
    """All items, or those of ?modelRepo and ?filePath."""
    repo, path = request.target.first("modelRepo"), request.target.first("filePath")
    items = [
        item
        for item in downloads.items()
        if (not repo or item.model_repo == repo) and (not path or item.file_path == path)
    ]
    return Response(200, msgspec.json.encode({"DownloadItems": items}))


async def enqueue_download(downloads: Downloads, request: Request) -> Response:
    """202 when that put it into the queue, 208 when it was there already."""
    repo, path = _key(request)
    enqueued = await downloads.enqueue(repo, path, request.target.first("revision"))
    return _answer(202 if enqueued.is_new else 208, enqueued.item)


async def cancel_download(downloads: Downloads, request: Request) -> Response:
    """The item, now cancelled."""
    return _answer(200, await downloads.cancel(*_key(request)))


async def reset_download(downloads: Downloads, request: Request) -> Response:
    """The item as it was before it was deleted."""
    return _answer(200, await downloads.reset(*_key(request)))


def _key(request: Request) -> tuple[str, str]:
    """Raises MissingParameter."""
    given = parameters(request)
    return required(given, "modelRepo"), required(given, "filePath")


def _answer(status: int, item: DownloadItem) -> Response:
    return Response(status, msgspec.json.encode(item))
