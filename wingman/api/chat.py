"""Chat: POST /chat/completions and /v1/chat/completions, /apply-template, /chat/completions/input_tokens."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Iterable, Sequence
from functools import partial
from typing import Any

import orjson

from wingman.api import shapes
from wingman.api.bodies import encode_answers
from wingman.api.naming import naming_of
from wingman.api.probabilities import prob_items, shown_probs
from wingman.api.schema import ChatRequest, parse_body
from wingman.api.streams import DONE, encode, event_stream
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
from wingman.engine.stream import JobStream
from wingman.engine.types import Finished, Progress, TextDelta, TokenProb
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
        return event_stream(_events(turn, naming, stream), stream, turn.ping_s)
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


async def _events(turn: Turn, naming: shapes.Naming, stream: JobStream) -> AsyncGenerator[bytes, None]:
    indexes = {job.id: index for index, job in enumerate(turn.jobs)}
    readers = [AnswerReader(turn.dialogue) for _ in turn.jobs]
    ended: dict[int, Finished] = {}
    for index in indexes.values():  # in order: clients take choices as they come
        yield encode(shapes.chat_chunk(naming, index, {"role": "assistant", "content": None}))
    async for event in stream:
        index = indexes[event.job_id]
        if isinstance(event, TextDelta):
            for chunk in _chunks(turn, naming, index, readers[index], readers[index].push(event)):
                yield encode(shapes.add_timings(chunk, event.timings))
        elif isinstance(event, Progress):
            chunk = shapes.chat_chunk(naming, index, {})
            yield encode(chunk | {"prompt_progress": shapes.progress_body(event)})
        elif isinstance(event, Finished):
            ended[index] = event
            reader = readers[index]
            for chunk in _chunks(turn, naming, index, reader, reader.finish()):
                yield encode(chunk)
            reason = _reason(turn, event, reader.has_called)
            last = shapes.chat_chunk(naming, index, {}, reason)
            if len(ended) < len(readers):
                yield encode(last)
    for body in _end(turn, naming, last, [ended[index] for index in sorted(ended)]):
        yield encode(body)
    yield DONE


def _chunks(
    turn: Turn, naming: shapes.Naming, index: int, reader: AnswerReader, deltas: Iterable[Delta]
) -> list[dict[str, Any]]:
    chunks = []
    for delta in deltas:
        probs = reader.take_probs(delta)
        logprobs = _prob_items(turn, probs) if probs else None
        chunks.append(shapes.chat_chunk(naming, index, _delta_body(turn, delta), None, logprobs))
    return chunks


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


def _end(
    turn: Turn, naming: shapes.Naming, last: dict[str, Any], results: Sequence[Finished]
) -> list[dict[str, Any]]:
    """The last chunk with finish_reason and, if asked for, the one with usage; timings are on the last."""
    chunks = [last]
    options = turn.fields.stream_options
    if options is not None and options.include_usage:
        base = shapes.chat_chunk(naming, 0, {})
        chunks.append(shapes.usage_chunk(base, shapes.usage_of(results)))
    turn.as_completion().add_verbose(shapes.add_timings(chunks[-1], results[0].timings), results[0])
    return chunks
