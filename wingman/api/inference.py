"""/api/inference: start, stop, reset, status and list of models under aliases."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Final

import msgspec

from wingman.api.queries import flag, integer, parameters, required
from wingman.errors import InvalidRequest
from wingman.http.messages import Request, Response
from wingman.services.deployments import Start
from wingman.services.inference import Inference
from wingman.services.items import WingmanItem

_HOST: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,252}[A-Za-z0-9])?", re.ASCII)
MAX_CONTEXT: Final = 2**24
MAX_LAYERS: Final = 2**15
MAX_TEMPLATE_CHARS: Final = 65_536


def list_items(inference: Inference, request: Request) -> Response:
    """All items, or those of one alias."""
    return Response(200, msgspec.json.encode({"WingmanItems": _matching(inference, request)}))


def get_status(inference: Inference, request: Request) -> Response:
    """The same as a bare array."""
    return Response(200, msgspec.json.encode(_matching(inference, request)))


def _matching(inference: Inference, request: Request) -> list[WingmanItem]:
    alias = request.target.first("alias")
    return [item for item in inference.items() if not alias or item.alias == alias]


async def start(inference: Inference, request: Request) -> Response:
    """Load a model under an alias: 202 with its item, 208 when that alias is active already."""
    item, is_new = await inference.start(read_start(parameters(request)))
    return Response(202 if is_new else 208, msgspec.json.encode(item))


async def stop(inference: Inference, request: Request) -> Response:
    """Stop a model; answers once it is gone."""
    alias = required(parameters(request), "alias")
    return Response(200, msgspec.json.encode(await inference.stop(alias)))


async def reset(inference: Inference, request: Request) -> Response:
    """Stop a model and remove its item."""
    alias = required(parameters(request), "alias")
    return Response(200, msgspec.json.encode(await inference.reset(alias)))


def read_start(query: Mapping[str, str]) -> Start:
    """The parameters of a start. Raises MissingParameter or InvalidRequest."""
    template = query.get("chatTemplate", "")
    if len(template) > MAX_TEMPLATE_CHARS:
        raise InvalidRequest(f"chatTemplate has more than {MAX_TEMPLATE_CHARS} characters", "chatTemplate")
    return Start(
        alias=required(query, "alias"),
        model_repo=required(query, "modelRepo"),
        file_path=required(query, "filePath"),
        address=_address(query.get("address", "")),
        port=integer(query, "port", 0, 0, 65535),
        context_size=integer(query, "contextSize", 0, 0, MAX_CONTEXT),
        gpu_layers=integer(query, "gpuLayers", -1, -1, MAX_LAYERS),
        chat_template=template,
        force=flag(query, "force"),
    )


def _address(text: str) -> str:
    try:
        if text:
            ipaddress.ip_address(text)
    except ValueError:
        if not _HOST.fullmatch(text) or text.endswith(".sock"):  # that would be a Unix socket
            raise InvalidRequest("address must be an IP address or a host name", "address") from None
    return text
