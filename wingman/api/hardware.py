"""The machine: GET /api/hardware and /api/hardwareinfo."""

from __future__ import annotations

from typing import Final

import msgspec

from wingman.http.messages import Request, Response
from wingman.services.hardware import Hardware

_MAX_AGE_S: Final = 1.0
"""Many who ask at once don't make us look more often."""


async def get_hardware(hardware: Hardware, _: Request) -> Response:
    """GPUs, processor, memory, disk, system and runtime; no GPU is zeros."""
    return Response(200, msgspec.json.encode(await hardware.refresh(_MAX_AGE_S)))
