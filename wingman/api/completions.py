"""Text completion: native (POST /completion, /completions) and OpenAI's (POST /v1/completions)."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import orjson

from wingman.api import shapes
from wingman.api.generation import JobMaker, read_prompt, refuse_unsupported, settings_of
from wingman.api.schema import CompletionRequest, parse_body
from wingman.api.streams import DONE, encode, event_stream
from wingman.engine.client import JobStream
from wingman.engine.types import Finished, Job, Progress, TextDelta
from wingman.errors import InvalidRequest, NotSupported
from wingman.http.messages import Answer, Request, Response
from wingman.services.residency import ServedModel


@dataclass(frozen=True, slots=True)
class _Completion:
    """A prepared request."""

    job: Job
    prompt: str
    fields: CompletionRequest
    served: ServedModel
    ping_s: int

    def final(self, finished: Finished) -> dict[str, Any]:
        """The native final object."""
        settings = settings_of(self.job, self.served.config, self.served.name)
        body = shapes.native_final(
            finished,
            self.job,
            self.served.name,
            self.prompt,
            settings,
            return_tokens=bool(self.fields.return_tokens),
        )
        return shapes.select_fields(body, self.fields.response_fields)


async def complete(served: ServedModel, request: Request) -> Answer:
    """POST /completion, /completions: llama-server's native completion."""
    prepared = await _prepare(served, request)
    stream = served.engine.submit(prepared.job)
    if prepared.job.stream:
        return event_stream(_native_events(prepared, stream), stream, prepared.ping_s)
    async with stream:
        finished = await stream.result()
    return Response(200, orjson.dumps(prepared.final(finished)))


async def complete_text(served: ServedModel, request: Request) -> Answer:
    """POST /v1/completions: OpenAI's object, with the native keys beside."""
    prepared = await _prepare(served, request)
    naming = naming_of(served)
    stream = served.engine.submit(prepared.job)
    if prepared.job.stream:
        return event_stream(_text_events(prepared, naming, stream), stream, prepared.ping_s)
    async with stream:
        finished = await stream.result()
    text = prepared.prompt + finished.text if prepared.fields.echo else finished.text
    body = prepared.final(finished)
    body |= shapes.text_chunk(naming, text, shapes.finish_reason(finished))
    body |= {"usage": shapes.usage(finished), "timings": finished.timings.to_dict()}
    return Response(200, orjson.dumps(body))


def naming_of(served: ServedModel) -> shapes.Naming:
    """Id and the like of a new answer."""
    return shapes.Naming(shapes.new_completion_id(), served.name, int(time.time()), served.info.build)


async def _prepare(served: ServedModel, request: Request) -> _Completion:
    fields = await parse_body(request.body, CompletionRequest)
    refuse_unsupported(fields)
    if fields.suffix:
        raise NotSupported("'suffix' is not supported yet")
    if fields.best_of is not None and fields.best_of > 1:
        raise NotSupported("'best_of' is not supported")
    if fields.prompt is None:
        raise InvalidRequest("Field 'prompt': is required", "prompt")
    return await served.engine.work(len(request.body), _tokenize, served, fields, served.engine.new_job_id())


def _tokenize(served: ServedModel, fields: CompletionRequest, job_id: int) -> _Completion:
    tokenizer = served.engine.tokenizer
    tokens = read_prompt(fields.prompt, tokenizer, served.info)
    maker = JobMaker(served.config, served.info, tokenizer)
    job = maker.build_job(job_id, tokens, fields)
    prompt = tokenizer.detokenize(tokens, special=True) if len(tokens) < served.info.n_ctx_slot else ""
    return _Completion(job, prompt, fields, served, maker.ping_interval(fields))


async def _native_events(prepared: _Completion, stream: JobStream) -> AsyncGenerator[bytes, None]:
    n_prompt = len(prepared.job.prompt)
    async for event in stream:
        if isinstance(event, TextDelta):
            yield encode(shapes.native_partial(event, stream.slot_id, n_prompt))
        elif isinstance(event, Progress):
            empty = TextDelta(event.job_id, "", (), 0)
            yield encode(shapes.native_partial(empty, stream.slot_id, n_prompt, event))
        elif isinstance(event, Finished):
            yield encode(prepared.final(event))


async def _text_events(
    prepared: _Completion, naming: shapes.Naming, stream: JobStream
) -> AsyncGenerator[bytes, None]:
    if prepared.fields.echo:
        yield encode(shapes.text_chunk(naming, prepared.prompt, None))
    async for event in stream:
        if isinstance(event, TextDelta) and event.text:
            yield encode(shapes.add_timings(shapes.text_chunk(naming, event.text, None), event.timings))
        elif isinstance(event, Progress):
            chunk = shapes.text_chunk(naming, "", None)
            yield encode(chunk | {"prompt_progress": shapes.progress_body(event)})
        elif isinstance(event, Finished):
            last = shapes.text_chunk(naming, "", shapes.finish_reason(event))
            yield encode(prepared.final(event) | last | {"usage": shapes.usage(event)})
            options = prepared.fields.stream_options
            if options is not None and options.include_usage:
                yield encode(shapes.usage_chunk(shapes.text_chunk(naming, "", None), event))
            yield DONE
