"""Text completion: native (POST /completion, /completions) and OpenAI's (POST /v1/completions)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from functools import partial
from typing import Any

from wingman.api import shapes
from wingman.api.bodies import encode_answers
from wingman.api.infill import complete_between, side_tokens
from wingman.api.naming import naming_of
from wingman.api.native import Completion, answer_natively, build_completion
from wingman.api.probabilities import native_probs
from wingman.api.prompts import read_prompts, split_prompts
from wingman.api.schema import CompletionRequest, parse_body
from wingman.api.streams import DONE, encode, event_stream
from wingman.engine.stream import JobStream
from wingman.engine.types import Finished, Progress, TextDelta, TokenProb
from wingman.errors import InvalidRequest
from wingman.http.messages import Answer, Request, Response
from wingman.services.served import ServedModel


async def complete(served: ServedModel, request: Request) -> Answer:
    """POST /completion, /completions: llama-server's native completion."""
    return await answer_natively(await _prepare(served, request))


async def complete_text(served: ServedModel, request: Request) -> Answer:
    """POST /v1/completions: OpenAI's object, with the native keys beside."""
    prepared = await _prepare(served, request)
    naming = naming_of(served)
    stream = served.engine.submit(*prepared.jobs)
    if prepared.jobs[0].stream:
        return event_stream(_text_events(prepared, naming, stream), stream, prepared.ping_s)
    async with stream:
        results = await stream.results()
    make = partial(_text_body, prepared, naming, results)
    return Response(200, await encode_answers(served, results, make))


def _text_body(prepared: Completion, naming: shapes.Naming, results: Sequence[Finished]) -> dict[str, Any]:
    body = prepared.final(results[0], 0)
    body |= shapes.text_chunk(naming, *_choices(prepared, results))
    body |= {"usage": shapes.usage_of(results), "timings": results[0].timings.to_dict()}
    return prepared.add_verbose(body, results[0])


def _choices(prepared: Completion, results: Sequence[Finished]) -> list[dict[str, Any]]:
    tokenizer = prepared.served.engine.tokenizer
    choices = []
    for index, (job, finished) in enumerate(zip(prepared.jobs, results, strict=True)):
        echo = prepared.prompts[index] if _echoes(prepared) else ""
        logprobs = prepared.logprobs(native_probs(finished, job, tokenizer), len(echo))
        reason = shapes.finish_reason(finished)
        choices.append(shapes.text_choice(index, echo + finished.text, reason, logprobs))
    return choices


def _echoes(prepared: Completion) -> bool:
    return isinstance(prepared.fields, CompletionRequest) and bool(prepared.fields.echo)


async def _prepare(served: ServedModel, request: Request) -> Completion:
    fields = await parse_body(request.body, CompletionRequest)
    if fields.best_of is not None and fields.best_of > (fields.n or 1):
        raise InvalidRequest("Field 'best_of': answers beyond 'n' are not drawn", "best_of")
    if fields.prompt is None:
        raise InvalidRequest("Field 'prompt': is required", "prompt")
    return await served.engine.work(len(request.body), _tokenize, served, fields)


def _tokenize(served: ServedModel, fields: CompletionRequest) -> Completion:
    if fields.suffix:
        return _between(served, fields)
    served.engine.check_count(len(split_prompts(fields.prompt, "prompt")))
    prompts = read_prompts(fields.prompt, served.engine.tokenizer, served.info)
    return build_completion(served, fields, prompts)


def _between(served: ServedModel, fields: CompletionRequest) -> Completion:
    """OpenAI's `suffix`: what goes between prompt and suffix."""
    if served.info.fim is None:
        raise InvalidRequest("Field 'suffix': this model has no fill-in-the-middle tokens", "suffix")
    for field in ("prompt", "suffix"):
        if not isinstance(getattr(fields, field), str):
            raise InvalidRequest(f"Field '{field}': must be a string when suffix is given", field)
    prefix, suffix = (side_tokens(getattr(fields, field), field, served) for field in ("prompt", "suffix"))
    return complete_between(served, fields, prefix, suffix)


async def _text_events(
    prepared: Completion, naming: shapes.Naming, stream: JobStream
) -> AsyncGenerator[bytes, None]:
    indexes = prepared.indexes
    offsets = [0] * len(prepared.jobs)
    if _echoes(prepared):
        for index, prompt in enumerate(prepared.prompts):
            offsets[index] = len(prompt)
            yield encode(shapes.text_chunk(naming, shapes.text_choice(index, prompt, None)))
    unsent: list[tuple[TokenProb, ...]] = [()] * len(prepared.jobs)
    ended: dict[int, Finished] = {}
    async for event in stream:
        index = indexes[event.job_id]
        if isinstance(event, TextDelta):
            unsent[index] += event.probs
            if event.text:  # tokens whose text is held back report with the text
                logprobs = prepared.logprobs(unsent[index], offsets[index])
                unsent[index] = ()
                offsets[index] += len(event.text)
                choice = shapes.text_choice(index, event.text, None, logprobs)
                yield encode(shapes.add_timings(shapes.text_chunk(naming, choice), event.timings))
        elif isinstance(event, Progress):
            chunk = shapes.text_chunk(naming, shapes.text_choice(index, "", None))
            yield encode(chunk | {"prompt_progress": shapes.progress_body(event)})
        elif isinstance(event, Finished):
            ended[index] = event
            yield encode(_last_text_chunk(prepared, naming, index, ended))
    options = prepared.fields.stream_options
    if options is not None and options.include_usage:
        results = [ended[index] for index in sorted(ended)]
        yield encode(shapes.usage_chunk(shapes.text_chunk(naming), shapes.usage_of(results)))
    yield DONE


def _last_text_chunk(
    prepared: Completion, naming: shapes.Naming, index: int, ended: dict[int, Finished]
) -> dict[str, Any]:
    """The chunk with finish_reason; that of the last answer has the usage of all."""
    finished = ended[index]
    chunk = prepared.final(finished, index)
    chunk |= shapes.text_chunk(naming, shapes.text_choice(index, "", shapes.finish_reason(finished)))
    if len(ended) == len(prepared.jobs):
        chunk["usage"] = shapes.usage_of([ended[one] for one in sorted(ended)])
        prepared.add_verbose(chunk, ended[0])
    return chunk
