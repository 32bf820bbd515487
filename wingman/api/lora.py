"""LoRA adapters: GET and POST /lora-adapters."""

from __future__ import annotations

import orjson

from wingman.api.generation import read_lora
from wingman.api.schema import parse_list
from wingman.http.messages import Request, Response
from wingman.services.served import ServedModel


def list_adapters(served: ServedModel, _: Request) -> Response:
    """The loaded adapters, with the scales of requests that name none."""
    adapters = zip(served.info.loras, served.engine.lora_scales, strict=True)
    body = [
        {
            "id": index,
            "path": lora.path,
            "scale": scale,
            "task_name": lora.metadata.get("adapter.lora.task_name", ""),
            "prompt_prefix": lora.metadata.get("adapter.lora.prompt_prefix", ""),
        }
        for index, (lora, scale) in enumerate(adapters)
    ]
    return Response(200, orjson.dumps(body))


async def set_adapters(served: ServedModel, request: Request) -> Response:
    """Set the scales; adapters that are not named are off. Requests that have begun keep theirs."""
    served.engine.lora_scales = read_lora(await parse_list(request.body), served.engine.lora_scales)
    return Response(200, orjson.dumps({"success": True}))
