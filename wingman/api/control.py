"""The control API as a table: paths under /api, their endpoints, parameters and answers.

Each path takes GET, as the original Wingman's, and POST with the same parameters in a JSON object.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final

import msgspec
import orjson
from msgspec import Struct

from wingman.api import catalog, downloads, hardware, inference, replies
from wingman.api.events import EventsEndpoint
from wingman.api.queries import check_posted, with_posted
from wingman.api.schema import parse_json
from wingman.http.messages import Answer, Request, Response
from wingman.services.catalog import Catalog
from wingman.services.downloads import Downloads
from wingman.services.hardware import Hardware, HardwareInfo
from wingman.services.inference import Inference
from wingman.services.items import AIModel, DownloadItem, WingmanItem

client_log = logging.getLogger("wingman.client")

MAX_LOG_CHARS: Final = 8192
"""Longer messages of clients are cut."""
_LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
}


class ControlPlane(Struct, frozen=True):
    """What the control API works on."""

    inference: Inference
    downloads: Downloads
    catalog: Catalog
    hardware: Hardware
    sockets: EventsEndpoint
    shutdown: Callable[[], None]

    @property
    def read_only(self) -> frozenset[str]:
        """Paths that change nothing."""
        return READ_ONLY

    def routes(self) -> Iterator[tuple[str, str, Callable[[Request], Answer | Awaitable[Answer]]]]:
        """Method, path and endpoint of each route."""
        for paths, endpoint, _, _, _ in CONTROL_ROUTES:
            for path in paths:
                for method in ("GET", "POST"):
                    yield method, path, lambda request, call=endpoint: call(self, with_posted(request))  # type: ignore[misc]
        yield "POST", LOG_PATH, lambda request: write_log(self, request)

    def described_routes(self) -> Iterator[tuple[str, str, str, Any, Any, tuple[str, ...]]]:
        """Method, path, summary, reply, body and parameters of each for /openapi.json."""
        for paths, _, parameters, reply, summary in CONTROL_ROUTES:
            for path in paths:
                yield "GET", path, summary, reply, None, parameters
        yield "POST", LOG_PATH, write_log.__doc__ or "", replies.Status, WingmanLogItem, ()


class Models(msgspec.Struct):
    """GET /api/models."""

    models: list[AIModel]
    stale: bool = False


class DownloadItems(msgspec.Struct):
    """GET /api/downloads."""

    DownloadItems: list[DownloadItem]


class WingmanItems(msgspec.Struct):
    """GET /api/inference."""

    WingmanItems: list[WingmanItem]


class WingmanLogItem(msgspec.Struct):
    """A line for the server's log."""

    message: str
    isa: str = "WingmanLogItem"
    level: Any = "info"
    timestamp: Any = 0


ControlEndpoint = Callable[[ControlPlane, Request], Answer | Awaitable[Answer]]


def shut_down(plane: ControlPlane, _: Request) -> Response:
    """End the server gracefully."""
    plane.shutdown()
    return Response(200, orjson.dumps({"status": "shutting down"}))


def write_log(_: ControlPlane, request: Request) -> Response:
    """Write a line of a client's into the server's log; an unknown level counts as info."""
    check_posted(request)
    item = parse_json(request.body, WingmanLogItem)
    level = _LEVELS.get(item.level.lower(), logging.INFO) if isinstance(item.level, str) else logging.INFO
    client_log.log(level, "%s", item.message[:MAX_LOG_CHARS])
    return Response(200, orjson.dumps({"status": "ok"}))


_FILE: Final = ("modelRepo", "filePath")
_ENQUEUE: Final = (*_FILE, "revision")
_START: Final = (
    "alias",
    *_FILE,
    "address",
    "port",
    "contextSize",
    "gpuLayers",
    "chatTemplate",
    "force",
)

CONTROL_ROUTES: Final[tuple[tuple[tuple[str, ...], ControlEndpoint, tuple[str, ...], Any, str], ...]] = (
    # paths, endpoint, parameters, reply, summary
    (("/api/models",), lambda p, r: catalog.list_models(p.catalog, r), ("modelRepo",), Models,
     "Models of the Hub and of this machine."),
    (("/api/downloads",), lambda p, r: downloads.list_downloads(p.downloads, r), _FILE, DownloadItems,
     "Downloads, filtered by what is given."),
    (("/api/downloads/enqueue",), lambda p, r: downloads.enqueue_download(p.downloads, r), _ENQUEUE, DownloadItem,
     "Download a model: 202, or 208 when it is queued or here already."),
    (("/api/downloads/cancel",), lambda p, r: downloads.cancel_download(p.downloads, r), _FILE, DownloadItem,
     "Cancel a download and drop what came of it."),
    (("/api/downloads/reset",), lambda p, r: downloads.reset_download(p.downloads, r), _FILE, DownloadItem,
     "Delete a download with its file."),
    (("/api/inference",), lambda p, r: inference.list_items(p.inference, r), ("alias",), WingmanItems,
     "Models that run or ran."),
    (("/api/inference/status",), lambda p, r: inference.get_status(p.inference, r), ("alias",), list[WingmanItem],
     "The same as a bare array."),
    (("/api/inference/start",), lambda p, r: inference.start(p.inference, r), _START, WingmanItem,
     "Load a model under an alias: 202, or 208 when that alias is active."),
    (("/api/inference/stop",), lambda p, r: inference.stop(p.inference, r), ("alias",), WingmanItem,
     "Stop a model; answers once it is gone."),
    (("/api/inference/reset",), lambda p, r: inference.reset(p.inference, r), ("alias",), WingmanItem,
     "Stop a model and forget its alias."),
    (("/api/hardware", "/api/hardwareinfo"), lambda p, r: hardware.get_hardware(p.hardware, r), (), HardwareInfo,
     "The machine."),
    (("/api/shutdown",), shut_down, (), replies.Status, "End the server gracefully."),
)  # fmt: skip
"""Every route that takes GET and POST alike; POST /api/utils/log is the one besides."""
LOG_PATH: Final = "/api/utils/log"
READ_ONLY: Final = frozenset(
    {
        "/api/models",
        "/api/downloads",
        "/api/inference",
        "/api/inference/status",
        "/api/hardware",
        "/api/hardwareinfo",
    }
)
"""Paths that change nothing."""
