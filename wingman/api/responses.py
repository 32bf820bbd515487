"""OpenAI's responses: POST /responses and /v1/responses, and .../input_tokens. Nothing is stored.

Streams are the events of OpenAI's API: an `event:` line each, counted by `sequence_number`, and no [DONE].
With `return_progress` and `timings_per_token` they carry `prompt_progress` and `timings`, as llama-server's.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import orjson

from wingman.api.dialects import Body, Part, PartKind, PartWriter, encode, reply, respelled
from wingman.api.dialects_schema import ResponseRequest
from wingman.api.errors import error_body
from wingman.api.naming import naming_of
from wingman.api.probabilities import prob_items
from wingman.api.responses_input import CHAT_WORDS, to_chat
from wingman.api.schema import parse_body
from wingman.api.shapes import progress_body
from wingman.api.turns import Turn, check_turn, count_tokens, prepare_turn
from wingman.engine.types import Finished, JobEvent, Progress, TextDelta, TokenProb
from wingman.http.messages import Answer, Request, Response
from wingman.services.served import ServedModel


async def respond(served: ServedModel, request: Request) -> Answer:
    """Answer an input as OpenAI's Responses API, streamed or not; nothing is stored."""
    fields = await parse_body(request.body, ResponseRequest)
    turn = await served.engine.work(len(request.body), _prepare, served, fields)
    return await reply(ResponseWriter(turn, fields))


async def input_tokens(served: ServedModel, request: Request) -> Response:
    """How many tokens the input of a response has."""
    fields = await parse_body(request.body, ResponseRequest)
    n_tokens = await served.engine.work(len(request.body), _count, served, fields)
    return Response(200, orjson.dumps({"object": "response.input_tokens", "input_tokens": n_tokens}))


def _prepare(served: ServedModel, fields: ResponseRequest) -> Turn:
    chat = to_chat(fields)
    with respelled(CHAT_WORDS):
        check_turn(chat)
        return prepare_turn(served, chat)


def _count(served: ServedModel, fields: ResponseRequest) -> int:
    chat = to_chat(fields)
    with respelled(CHAT_WORDS):
        return count_tokens(served, chat)


_ITEMS: Final = {
    PartKind.THOUGHT: ("reasoning", "rs", "response.reasoning_text"),
    PartKind.TEXT: ("message", "msg", "response.output_text"),
    PartKind.CALL: ("function_call", "fc", "response.function_call_arguments"),
}
"""Type of an item, prefix of its id, name of its events."""
_ENDS: Final = {"length": "incomplete"}
"""Finish reasons of a chat that are no completion."""


class ResponseWriter(PartWriter):
    """Follows an answer as OpenAI's response."""

    def __init__(self, turn: Turn, request: ResponseRequest) -> None:
        super().__init__(turn)
        self._naming = naming_of(turn.served)
        self._id = "resp_" + secrets.token_hex(16)
        self._n_events = 0
        self._status = "in_progress"
        self._error: dict[str, str] | None = None
        self._usage: Body | None = None
        self._echo = _echo(turn, request)

    def start(self) -> list[Body]:
        """The response, still empty."""
        return [self._lifecycle("response.created"), self._lifecycle("response.in_progress")]

    def take(self, event: JobEvent) -> list[Body]:
        """The events that follow from one of the job; timings go on the last."""
        bodies = super().take(event)
        if isinstance(event, TextDelta | Finished) and event.timings is not None and bodies:
            bodies[-1]["timings"] = event.timings.to_dict()
        return bodies

    def progress(self, progress: Progress) -> list[Body]:
        """How far the prompt is."""
        return [self._lifecycle("response.in_progress") | {"prompt_progress": progress_body(progress)}]

    def opened(self, part: Part) -> list[Body]:
        """A new item, and its only part."""
        item = self._item(part)
        if part.kind is PartKind.CALL:
            return [self._event("response.output_item.added", output_index=part.index, item=item)]
        item["content"] = []
        return [
            self._event("response.output_item.added", output_index=part.index, item=item),
            self._event("response.content_part.added", **_place(part), part=self._content(part)),
        ]

    def grown(self, part: Part, text: str, probs: Sequence[TokenProb]) -> list[Body]:
        """More of an item."""
        event = self._event(f"{_ITEMS[part.kind][2]}.delta", **_place(part), delta=text)
        if part.kind is PartKind.TEXT:
            event["logprobs"] = self._logprobs(probs)
        return [event]

    def closed(self, part: Part) -> list[Body]:
        """The whole item."""
        field = "arguments" if part.kind is PartKind.CALL else "text"
        done: Body = {field: part.text}
        if part.kind is PartKind.TEXT:
            done["logprobs"] = self._logprobs(part.probs)
        events = [self._event(f"{_ITEMS[part.kind][2]}.done", **_place(part), **done)]
        if part.kind is not PartKind.CALL:
            events.append(self._event("response.content_part.done", **_place(part), part=self._content(part)))
        item = self._item(part)
        return [*events, self._event("response.output_item.done", output_index=part.index, item=item)]

    def ended(self, finished: Finished, reason: str) -> list[Body]:
        """The whole response."""
        self._status = _ENDS.get(reason, "completed")
        self._usage = self._usage_of(finished)
        return [self._lifecycle(f"response.{self._status}")]

    def fail(self, error: BaseException) -> bytes:
        """The end of what was written, and the response with the reason."""
        self._status = "failed"
        self._error = {"code": "server_error", "message": error_body(error)[1]["error"]["message"]}
        return b"".join(map(encode, [*self.close_part("incomplete"), self._lifecycle("response.failed")]))

    def body(self) -> Body:
        """The response so far."""
        is_cut = self._status == "incomplete"
        return self._echo | {
            "id": self._id,
            "object": "response",
            "created_at": self._naming.created,
            "status": self._status,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "model": self._naming.model,
            "output": [self._item(part) for part in self.parts],
            "usage": self._usage,
        }

    def _event(self, kind: str, **fields: Any) -> Body:
        number = self._n_events
        self._n_events += 1
        return {"type": kind, "sequence_number": number, **fields}

    def _lifecycle(self, kind: str) -> Body:
        return self._event(kind, response=self.body())

    def _item(self, part: Part) -> Body:
        kind, _, _ = _ITEMS[part.kind]
        item: Body = {"id": _item_id(part), "type": kind, "status": part.status}
        if part.kind is PartKind.CALL:
            return item | {"call_id": part.call_id, "name": part.name, "arguments": part.text}
        item["content"] = [self._content(part)]
        if part.kind is PartKind.TEXT:
            return item | {"role": "assistant"}
        return item | {"summary": [], "encrypted_content": None}

    def _content(self, part: Part) -> Body:
        if part.kind is PartKind.THOUGHT:
            return {"type": "reasoning_text", "text": part.text}
        logprobs = self._logprobs(part.probs)
        return {"type": "output_text", "text": part.text, "annotations": [], "logprobs": logprobs}

    def _logprobs(self, probs: Sequence[TokenProb]) -> list[Body]:
        return prob_items(probs, self.turn.served.engine.tokenizer, is_post=False)

    def _usage_of(self, finished: Finished) -> Body:
        """Thoughts are counted by their share of the text."""
        n_output = finished.timings.predicted_n
        n_thought = sum(len(part.text) for part in self.parts if part.kind is PartKind.THOUGHT)
        return {
            "input_tokens": finished.n_prompt,
            "input_tokens_details": {"cached_tokens": finished.timings.cache_n},
            "output_tokens": n_output,
            "output_tokens_details": {
                "reasoning_tokens": min(n_output, round(n_output * n_thought / max(len(finished.text), 1)))
            },
            "total_tokens": finished.n_prompt + n_output,
        }


def _item_id(part: Part) -> str:
    return f"{_ITEMS[part.kind][1]}_{part.id}"


def _place(part: Part) -> Body:
    """Where a delta belongs; calls have no parts."""
    place: Body = {"item_id": _item_id(part), "output_index": part.index}
    return place if part.kind is PartKind.CALL else place | {"content_index": 0}


def _echo(turn: Turn, request: ResponseRequest) -> Body:
    """What a response repeats of its request, with what was made of it."""
    sampling = turn.jobs[0].sampling
    reasoning = request.reasoning
    text = msgspec.to_builtins(request.text) if request.text else {}
    return {
        "background": False,
        "instructions": request.instructions,
        "max_output_tokens": turn.fields.max_tokens,
        "metadata": request.metadata or {},
        "parallel_tool_calls": turn.dialogue.is_parallel,
        "previous_response_id": None,
        "reasoning": {"effort": reasoning.effort if reasoning else None, "summary": None},
        "store": False,
        "temperature": sampling.temperature,
        "text": {"format": {"type": "text"}} | text,
        "tool_choice": msgspec.to_builtins(request.tool_choice) or "auto",
        "tools": msgspec.to_builtins(request.tools or []),
        "top_p": sampling.top_p,
        "truncation": "disabled",
    }
