"""Answers as Server-Sent Events, read as a plain client reads them."""

from __future__ import annotations

import json
from typing import Any

from tests.support.server import ServerProcess

DONE = "data: [DONE]"


def read_events(server: ServerProcess, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The objects of a stream that ends as its route's streams do: OpenAI's with [DONE], native ones
    without."""
    with server.client.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200, response.read()
        lines = [line for line in response.iter_lines() if line]
    if path.startswith(("/v1/", "/chat/")):
        assert lines.pop() == DONE
    assert DONE not in lines
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def chat_text(events: list[dict[str, Any]], key: str = "content", index: int = 0) -> str:
    """What the deltas of one choice add up to."""
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get(key) or "" for choice in choices)
