"""Chat: POST /chat/completions and /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import orjson

from wingman.api import shapes
from wingman.api.completions import naming_of
from wingman.api.generation import JobMaker, refuse_endless, refuse_unsupported, settings_of
from wingman.api.schema import ChatRequest, parse_body
from wingman.api.streams import DONE, encode, event_stream
from wingman.chat.conversation import read_messages, render_prompt, split_prefill
from wingman.chat.template import Rendering
from wingman.engine.client import JobStream
from wingman.engine.types import Finished, Job, Progress, TextDelta
from wingman.errors import InvalidRequest, NotSupported
from wingman.http.messages import Answer, Request, Response
from wingman.services.residency import ServedModel


@dataclass(frozen=True, slots=True)
class _Chat:
    """A prepared request."""

    job: Job
    prompt: str
    fields: ChatRequest
    served: ServedModel
    ping_s: int

    def add_verbose(self, body: dict[str, Any], finished: Finished) -> dict[str, Any]:
        """The body with `__verbose`, the native final object, when asked for."""
        default = self.served.config.server.verbose
        if default if self.fields.verbose is None else self.fields.verbose:
            settings = settings_of(self.job, self.served.config, self.served.name)
            body["__verbose"] = shapes.native_final(
                finished, self.job, self.served.name, self.prompt, settings, return_tokens=True
            )
        return body


async def chat(served: ServedModel, request: Request) -> Answer:
    """Answer a conversation, streamed or not."""
    fields = await parse_body(request.body, ChatRequest)
    _check(fields)
    prepared = await served.engine.work(
        len(request.body), _render, served, fields, served.engine.new_job_id()
    )
    naming = naming_of(served)
    stream = served.engine.submit(prepared.job)
    if prepared.job.stream:
        return event_stream(_events(prepared, naming, stream), stream, prepared.ping_s)
    async with stream:
        finished = await stream.result()
    return Response(
        200, orjson.dumps(prepared.add_verbose(shapes.chat_completion(naming, finished), finished))
    )


def _check(fields: ChatRequest) -> None:
    refuse_unsupported(fields)
    if fields.messages is None:
        raise InvalidRequest("Field 'messages': is required", "messages")
    if fields.top_logprobs is not None and not fields.logprobs:
        raise InvalidRequest("Field 'top_logprobs': needs logprobs to be true", "top_logprobs")
    for name in ("tools", "functions"):
        if getattr(fields, name):
            raise NotSupported(f"'{name}' is not supported yet")
    if isinstance(fields.tool_choice, str) and fields.tool_choice not in ("auto", "none", "required"):
        raise InvalidRequest("Field 'tool_choice': must be auto, none or required", "tool_choice")
    if fields.add_generation_prompt and fields.continue_final_message:
        message = "Field 'continue_final_message': excludes add_generation_prompt"
        raise InvalidRequest(message, "continue_final_message")


def _render(served: ServedModel, fields: ChatRequest, job_id: int) -> _Chat:
    """Template and tokenise; in the engine's executor."""
    info, tokenizer = served.info, served.engine.tokenizer
    messages = read_messages(fields.messages or (), knows_developer=served.template.knows_developer)
    adds_prompt = fields.add_generation_prompt is not False
    rendering = Rendering(adds_prompt, info.bos_token, info.eos_token, fields.chat_template_kwargs)
    prompt = render_prompt(served.template, split_prefill(messages), rendering, adds_bos=info.adds_bos)
    refuse_endless(prompt, info)
    tokens = tokenizer.tokenize(prompt, add_special=True, parse_special=True)
    maker = JobMaker(served.config, info, tokenizer)
    job = maker.build_job(job_id, tokens, fields)
    return _Chat(job, prompt, fields, served, maker.ping_interval(fields))


async def _events(prepared: _Chat, naming: shapes.Naming, stream: JobStream) -> AsyncGenerator[bytes, None]:
    yield encode(shapes.chat_chunk(naming, {"role": "assistant", "content": None}))
    async for event in stream:
        if isinstance(event, TextDelta) and event.text:
            chunk = shapes.chat_chunk(naming, {"content": event.text})
            yield encode(shapes.add_timings(chunk, event.timings))
        elif isinstance(event, Progress):
            chunk = shapes.chat_chunk(naming, {})
            yield encode(chunk | {"prompt_progress": shapes.progress_body(event)})
        elif isinstance(event, Finished):
            for body in _last_chunks(prepared, naming, event):
                yield encode(body)
            yield DONE


def _last_chunks(prepared: _Chat, naming: shapes.Naming, finished: Finished) -> list[dict[str, Any]]:
    """The chunk with finish_reason and, if asked for, the one with usage; timings are on the last."""
    chunks = [shapes.chat_chunk(naming, {}, shapes.finish_reason(finished))]
    options = prepared.fields.stream_options
    if options is not None and options.include_usage:
        chunks.append(shapes.usage_chunk(shapes.chat_chunk(naming, {}), finished))
    prepared.add_verbose(shapes.add_timings(chunks[-1], finished.timings), finished)
    return chunks
