"""Which model a request names: `model` of its query or of its JSON body."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import msgspec

from wingman.http.messages import Request

_INLINE_BYTES: Final = 64 * 1024
"""Bodies up to this are looked through in well under a millisecond."""


class _Named(msgspec.Struct):
    model: Any = None


async def requested_model(request: Request) -> str | None:
    """The name, or None for a request without one; a body that is no JSON object is left to its endpoint."""
    named = request.target.first("model")
    if named is not None or not request.body:
        return named
    if len(request.body) > _INLINE_BYTES:
        return await asyncio.to_thread(_read, request.body)
    return _read(request.body)


def _read(body: bytes) -> str | None:
    try:
        model = msgspec.json.decode(body, type=_Named).model
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return model if isinstance(model, str) and model else None
