"""Anthropic's messages: POST /v1/messages and /v1/messages/count_tokens.

Errors are Anthropic's too, with llama-server's keys beside: {"type": "error", "error": {"type", "message",
"code"}}. Streams are those of Anthropic's API: blocks one after the other, each with its index.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import orjson

from wingman.api.anthropic_input import CHAT_WORDS, to_chat
from wingman.api.dialects import Body, Part, PartKind, PartWriter, encode, reply, require, respelled
from wingman.api.dialects_schema import MessageRequest
from wingman.api.errors import error_body, error_response
from wingman.api.schema import parse_body
from wingman.api.turns import Turn, check_turn, count_tokens, prepare_turn
from wingman.engine.types import Finished, StopType, TokenProb
from wingman.http.messages import Answer, Request, Response
from wingman.services.served import ServedModel

Endpoint = Callable[[ServedModel, Request], Awaitable[Answer]]

# -- errors -----------------------------------------------------------------------------------------

_ERRORS: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
"""Status -> Anthropic's type; any other is an api_error."""


def _respelled_error(status: int, body: Body) -> Body:
    kind = _ERRORS.get(status, "api_error")
    return body | {"type": "error", "error": body["error"] | {"type": kind}}


def _refusing(endpoint: Endpoint) -> Endpoint:
    """The endpoint with errors in Anthropic's shape; status and headers stay."""

    @functools.wraps(endpoint)
    async def guarded(served: ServedModel, request: Request) -> Answer:
        try:
            return await endpoint(served, request)
        except Exception as error:  # noqa: BLE001 - the error table knows all
            response = error_response(error)
            body = _respelled_error(response.status, orjson.loads(response.body))
            return replace(response, body=orjson.dumps(body))

    return guarded


# -- endpoints --------------------------------------------------------------------------------------


@_refusing
async def create_message(served: ServedModel, request: Request) -> Answer:
    """Answer a conversation as Anthropic's Messages API, streamed or not."""
    fields = await parse_body(request.body, MessageRequest)
    turn = await served.engine.work(len(request.body), _prepare, served, fields)
    return await reply(MessageWriter(turn))


@_refusing
async def count_message_tokens(served: ServedModel, request: Request) -> Answer:
    """How many tokens a conversation has."""
    fields = await parse_body(request.body, MessageRequest)
    n_tokens = await served.engine.work(len(request.body), _count, served, fields)
    return Response(200, orjson.dumps({"input_tokens": n_tokens}))


def _prepare(served: ServedModel, fields: MessageRequest) -> Turn:
    require(fields, "", ("max_tokens",))
    chat = to_chat(fields)
    with respelled(CHAT_WORDS):
        check_turn(chat)
        return prepare_turn(served, chat)


def _count(served: ServedModel, fields: MessageRequest) -> int:
    chat = to_chat(fields)
    with respelled(CHAT_WORDS):
        return count_tokens(served, chat)


# -- answers ----------------------------------------------------------------------------------------

_REASONS: Final = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_DELTAS: Final = {
    PartKind.THOUGHT: ("thinking_delta", "thinking"),
    PartKind.TEXT: ("text_delta", "text"),
    PartKind.CALL: ("input_json_delta", "partial_json"),
}


class MessageWriter(PartWriter):
    """Follows an answer as Anthropic's message."""

    def __init__(self, turn: Turn) -> None:
        super().__init__(turn)
        self._id = "msg_" + secrets.token_hex(16)
        self._end: Body = {"stop_reason": None, "stop_sequence": None}
        self._usage = _usage(len(turn.jobs[0].prompt))

    def start(self) -> list[Body]:
        """The message, still empty."""
        return [{"type": "message_start", "message": self.body()}]

    def opened(self, part: Part) -> list[Body]:
        """A block begins."""
        return [{"type": "content_block_start", "index": part.index, "content_block": _block(part)}]

    def grown(self, part: Part, text: str, probs: Sequence[TokenProb]) -> list[Body]:
        """More of a block."""
        kind, field = _DELTAS[part.kind]
        return [_delta(part, {"type": kind, field: text})]

    def closed(self, part: Part) -> list[Body]:
        """A block ends; thoughts with a signature, which is empty as nobody checks it."""
        stop = {"type": "content_block_stop", "index": part.index}
        if part.kind is not PartKind.THOUGHT:
            return [stop]
        return [_delta(part, {"type": "signature_delta", "signature": ""}), stop]

    def ended(self, finished: Finished, reason: str) -> list[Body]:
        """Why the message ends, and what it took."""
        self._end = _end(self.turn, finished, reason)
        self._usage = _usage(finished.n_prompt, finished.timings.cache_n, finished.timings.predicted_n)
        return [{"type": "message_delta", "delta": self._end, "usage": self._usage}, {"type": "message_stop"}]

    def fail(self, error: BaseException) -> bytes:
        """The error, after which nothing follows."""
        return encode(_respelled_error(*error_body(error)))

    def body(self) -> Body:
        """The message so far."""
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self.turn.served.name,
            "content": [_block(part) for part in self.parts],
            "usage": self._usage,
            **self._end,
        }


def _end(turn: Turn, finished: Finished, reason: str) -> Body:
    word = finished.stopping_word
    if reason == "stop" and finished.stop_type is StopType.WORD and word in (turn.fields.stop or ()):
        return {"stop_reason": "stop_sequence", "stop_sequence": word}
    return {"stop_reason": _REASONS[reason], "stop_sequence": None}


def _usage(n_prompt: int, n_cached: int = 0, n_output: int = 0) -> dict[str, int]:
    return {
        "input_tokens": n_prompt - n_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": n_cached,
        "output_tokens": n_output,
    }


def _delta(part: Part, delta: Body) -> Body:
    return {"type": "content_block_delta", "index": part.index, "delta": delta}


def _block(part: Part) -> Body:
    match part.kind:
        case PartKind.THOUGHT:
            return {"type": "thinking", "thinking": part.text, "signature": ""}
        case PartKind.TEXT:
            return {"type": "text", "text": part.text}
        case PartKind.CALL:
            return {"type": "tool_use", "id": part.call_id, "name": part.name, "input": _arguments(part.text)}


def _arguments(text: str) -> dict[str, Any]:
    """A call's arguments; {} when they were cut short: half of them might do what nobody meant."""
    try:
        arguments = orjson.loads(text)
    except ValueError:
        return {}
    return arguments if isinstance(arguments, dict) else {}
