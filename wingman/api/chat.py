"""Chat: POST /chat/completions and /v1/chat/completions, /apply-template, /chat/completions/input_tokens."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import orjson

from wingman.api import shapes
from wingman.api.bodies import encode_answers
from wingman.api.naming import naming_of
from wingman.api.probabilities import prob_items, shown_probs
from wingman.api.schema import ChatRequest, parse_body
from wingman.api.streams import DONE, EventWriter, TextFrame, encode, event_stream
from wingman.api.turns import (
    AnswerReader,
    Turn,
    check_turn,
    count_tokens,
    finish_reason,
    prepare_turn,
    render_turn,
)
from wingman.chat.output import ArgumentsDelta, ContentDelta, Delta, ParsedCall, ReasoningDelta
from wingman.engine.types import Finished, JobEvent, Progress, TextDelta, TokenProb
from wingman.http.messages import Answer, Request, Response
from wingman.services.served import ServedModel


async def chat(served: ServedModel, request: Request) -> Answer:
    """Answer a conversation, streamed or not."""
    fields = await parse_body(request.body, ChatRequest)
    check_turn(fields)
    turn = await served.engine.work(len(request.body), prepare_turn, served, fields)
    naming = naming_of(served)
    stream = served.engine.submit(*turn.jobs)
    if turn.jobs[0].stream:
        return event_stream(_ChatWriter(turn, naming), stream, turn.ping_s)
    async with stream:
        results = await stream.results()
    return Response(200, await encode_answers(served, results, partial(_body, turn, naming, results)))


async def apply_template(served: ServedModel, request: Request) -> Response:
    """The prompt a conversation becomes."""
    fields = await parse_body(request.body, ChatRequest)
    check_turn(fields)
    return Response(200, await served.engine.work(len(request.body), _rendered, served, fields))


def _rendered(served: ServedModel, fields: ChatRequest) -> bytes:
    return orjson.dumps({"prompt": render_turn(served, fields)[0]})


async def input_tokens(served: ServedModel, request: Request) -> Response:
    """How many tokens a conversation has."""
    fields = await parse_body(request.body, ChatRequest)
    check_turn(fields)
    n_tokens = await served.engine.work(len(request.body), count_tokens, served, fields)
    return Response(200, orjson.dumps({"object": "response.input_tokens", "input_tokens": n_tokens}))


# -- not streamed -----------------------------------------------------------------------------------


def _body(turn: Turn, naming: shapes.Naming, results: Sequence[Finished]) -> dict[str, Any]:
    choices = [_choice(turn, index, finished) for index, finished in enumerate(results)]
    body = shapes.chat_completion(naming, choices, results)
    return turn.as_completion().add_verbose(body, results[0])


def _choice(turn: Turn, index: int, finished: Finished) -> dict[str, Any]:
    parsed = turn.parse(finished)
    message: dict[str, Any] = {"role": "assistant", "content": parsed.content}
    if parsed.reasoning:
        message["reasoning_content"] = parsed.reasoning
    calls = parsed.tool_calls
    if calls and turn.fields.functions:
        message["function_call"] = {"name": calls[0].name, "arguments": calls[0].arguments}
    elif calls:
        message["tool_calls"] = [_call_body(turn, call) for call in calls]
    choice = {"finish_reason": _reason(turn, finished, bool(calls)), "index": index, "message": message}
    probs = shown_probs(finished, turn.jobs[index], turn.served.engine.tokenizer)
    if probs:
        choice["logprobs"] = {"content": _prob_items(turn, probs)}
    return choice


def _call_body(turn: Turn, call: ParsedCall) -> dict[str, Any]:
    return {
        "id": call.id or new_call_id(turn),
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def new_call_id(turn: Turn) -> str:
    """An id for a call whose model made none; some templates refuse any other length."""
    return secrets.token_hex(16)[: turn.dialogue.format.id_length]


def _reason(turn: Turn, finished: Finished, has_called: bool) -> str:
    reason = finish_reason(finished, has_called=has_called)
    return "function_call" if reason == "tool_calls" and turn.fields.functions else reason


def _prob_items(turn: Turn, probs: Sequence[TokenProb]) -> list[dict[str, Any]]:
    is_post = turn.jobs[0].post_sampling_probs
    return prob_items(probs, turn.served.engine.tokenizer, is_post=is_post)


# -- streamed ---------------------------------------------------------------------------------------


class _ChatWriter(EventWriter):
    """Follows the answers as OpenAI's chunks."""

    def __init__(self, turn: Turn, naming: shapes.Naming) -> None:
        self._turn = turn
        self._naming = naming
        self._indexes = {job.id: index for index, job in enumerate(turn.jobs)}
        self._readers = [AnswerReader(turn.dialogue) for _ in turn.jobs]
        self._ended: dict[int, Finished] = {}
        job = turn.jobs[0]
        self._has_only_text = not job.n_probs and not job.timings_per_token
        self._frames = [TextFrame(partial(self._content_chunk, index)) for index in range(len(turn.jobs))]

    def start(self) -> Iterator[bytes]:
        """The roles, in order: clients take choices as they come."""
        for index in range(len(self._readers)):
            yield encode(shapes.chat_chunk(self._naming, index, {"role": "assistant", "content": None}))

    def take(self, event: JobEvent) -> Iterator[bytes]:
        """A chunk for each thing that became certain."""
        index = self._indexes[event.job_id]
        reader = self._readers[index]
        if isinstance(event, TextDelta):
            yield from self._text(index, event, reader.push(event))
        elif isinstance(event, Progress):
            chunk = shapes.chat_chunk(self._naming, index, {})
            yield encode(chunk | {"prompt_progress": shapes.progress_body(event)})
        elif isinstance(event, Finished):
            yield from map(encode, self._chunks(index, reader.finish()))
            self._ended[index] = event
            reason = _reason(self._turn, event, reader.has_called)
            yield from self._end(shapes.chat_chunk(self._naming, index, {}, reason))

    def _content_chunk(self, index: int, text: str) -> dict[str, Any]:
        return shapes.chat_chunk(self._naming, index, _delta_body(self._turn, ContentDelta(text)))

    def _text(self, index: int, event: TextDelta, deltas: Sequence[Delta]) -> Iterator[bytes]:
        if self._has_only_text and len(deltas) == 1 and isinstance(deltas[0], ContentDelta):
            yield self._frames[index].block(deltas[0].text)
            return
        for chunk in self._chunks(index, deltas):
            yield encode(shapes.add_timings(chunk, event.timings))

    def _chunks(self, index: int, deltas: Iterable[Delta]) -> Iterator[dict[str, Any]]:
        for delta in deltas:
            probs = self._readers[index].take_probs(delta)
            logprobs = _prob_items(self._turn, probs) if probs else None
            yield shapes.chat_chunk(self._naming, index, _delta_body(self._turn, delta), None, logprobs)

    def _end(self, last: dict[str, Any]) -> Iterator[bytes]:
        """The end of an answer; that of all has timings, on the chunk with usage when that is asked for."""
        if len(self._ended) < len(self._readers):
            yield encode(last)
            return
        results = [self._ended[index] for index in sorted(self._ended)]
        options = self._turn.fields.stream_options
        if options is not None and options.include_usage:
            yield encode(last)
            last = shapes.usage_chunk(shapes.chat_chunk(self._naming, 0, {}), shapes.usage_of(results))
        shapes.add_timings(last, results[0].timings)
        yield encode(self._turn.as_completion().add_verbose(last, results[0]))
        yield DONE


def _delta_body(turn: Turn, delta: Delta) -> dict[str, Any]:
    if isinstance(delta, ContentDelta):
        return {"content": delta.text}
    if isinstance(delta, ReasoningDelta):
        return {"reasoning_content": delta.text}
    if isinstance(delta, ArgumentsDelta):
        function = {"arguments": delta.text}
        if turn.fields.functions:
            return {"function_call": function}
        return {"tool_calls": [{"index": delta.index, "function": function}]}
    function = {"name": delta.name, "arguments": ""}
    if turn.fields.functions:
        return {"function_call": function}
    call = {
        "index": delta.index,
        "id": delta.id or new_call_id(turn),
        "type": "function",
        "function": function,
    }
    return {"tool_calls": [call]}
