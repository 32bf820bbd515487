"""Jobs -> Server-Sent Events: what native, text and chat streams have in common."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any, Final

import orjson

from protocol import encode_event
from wingman.api.errors import error_body
from wingman.engine.stream import JobStream
from wingman.http.messages import EventStream

DONE: Final = encode_event(b"[DONE]")


def encode(body: dict[str, Any]) -> bytes:
    """An event block with a JSON object."""
    return encode_event(orjson.dumps(body))


def encode_error(error: BaseException) -> bytes:
    """The event that tells of a failure to clients of native, text and chat streams."""
    return encode(error_body(error)[1])


def event_stream(
    events: AsyncGenerator[bytes, None],
    job: JobStream,
    ping_s: int,
    failed: Callable[[BaseException], bytes] = encode_error,
) -> EventStream:
    """The answer that streams a job; however it ends, the job does too. `ping_s` <= 0 sends no comments."""
    return EventStream(guarded(events, failed), job.close, float(ping_s) if ping_s > 0 else None)


async def guarded(
    events: AsyncGenerator[bytes, None], failed: Callable[[BaseException], bytes] = encode_error
) -> AsyncGenerator[bytes, None]:
    """The events; a failure becomes the event that `failed` makes of it, after which nothing follows."""
    try:
        async for block in events:
            yield block
    except Exception as error:  # noqa: BLE001 - the task root of a stream
        yield failed(error)
    finally:
        await events.aclose()
