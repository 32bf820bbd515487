"""llama-cpp-python's own server, for reference: the same runtime as Wingman's, one request at a time.

It speaks the OpenAI API only and tells no counts in a stream, so that its tokens are counted by
events, and an answer may end before its length. Needs `llama-cpp-python[server]`.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from typing import Final

from tools.bench_load import LOOPBACK, Dialect, Exchange, LoadFailure, Stamped, read_event
from tools.bench_servers import Contender, Settings

REFERENCE: Final = "llama-cpp-python"
_NEEDED: Final = (
    "llama_cpp",
    "fastapi",
    "uvicorn",
    "pydantic_settings",
    "sse_starlette",
    "starlette_context",
)


def find_reference(n_cores: int) -> Contender | None:
    """The server, with a thread for each core unless the settings say else; None when it can't be imported."""
    if any(importlib.util.find_spec(name) is None for name in _NEEDED):
        return None

    def share(settings: Settings, port: int) -> list[str]:
        return [
            *("--model", str(settings.model)),
            *("--host", LOOPBACK),
            *("--port", str(port)),
            *("--n_ctx", str(settings.n_ctx)),
            *("--n_threads", str(settings.n_threads or n_cores)),
            *("--interrupt_requests", "false"),  # else a request ends the stream of the one before
        ]

    dialect = Dialect("/v1/models", "/v1/completions", request_body, read_exchange)
    return Contender(REFERENCE, (sys.executable, "-m", "llama_cpp.server"), dialect=dialect, share=share)


def request_body(prompt: str, n_predict: int, _: bool) -> bytes:
    """JSON for POST /v1/completions: greedy, streamed, at most `n_predict` tokens long."""
    return json.dumps({"prompt": prompt, "max_tokens": n_predict, "temperature": 0, "stream": True}).encode()


def read_exchange(started: float, events: Stamped) -> Exchange:
    """The measurements of one answer. Raises LoadFailure when it reports an error or has no end or no text."""
    if not events or events[-1][1] != b"[DONE]":
        raise LoadFailure("the stream ended early")
    try:
        texts = [(came, read_event(data)["choices"][0]["text"]) for came, data in events[:-1]]
    except (LookupError, TypeError) as error:
        raise LoadFailure(f"the stream has no completion: {error!r}") from error
    stamps = [came for came, text in texts if text]
    if not stamps:
        raise LoadFailure("the stream has no text")
    return Exchange(
        n_prompt=0,
        n_tokens=len(stamps),
        first_token_ms=(stamps[0] - started) * 1e3,
        gaps_ms=tuple((after - before) * 1e3 for before, after in itertools.pairwise(stamps)),
        text="".join(text for _, text in texts),
    )
