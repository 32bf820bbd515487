"""Text completion: native (POST /completion, /completions) and OpenAI's (POST /v1/completions)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from wingman.api.streams import DONE, EventWriter, TextFrame, encode, event_stream
from wingman.engine.types import Finished, JobEvent, Progress, TextDelta, TokenProb
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
        return event_stream(_TextWriter(prepared, naming), stream, prepared.ping_s)
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


class _TextWriter(EventWriter):
    """Follows the answers as OpenAI's chunks."""

    def __init__(self, prepared: Completion, naming: shapes.Naming) -> None:
        self._prepared = prepared
        self._naming = naming
        self._indexes = prepared.indexes
        self._offsets = [0] * len(prepared.jobs)
        """Characters sent of each answer."""
        self._unsent: list[tuple[TokenProb, ...]] = [()] * len(prepared.jobs)
        """Probabilities of tokens whose text is held back; they are reported with the text."""
        self._ended: dict[int, Finished] = {}
        job = prepared.jobs[0]
        self._has_only_text = not job.n_probs and not job.timings_per_token
        self._frames = [TextFrame(partial(self._chunk, index)) for index in range(len(prepared.jobs))]

    def start(self) -> Iterator[bytes]:
        """The prompts, if they are wanted."""
        if _echoes(self._prepared):
            for index, prompt in enumerate(self._prepared.prompts):
                self._offsets[index] = len(prompt)
                yield encode(self._chunk(index, prompt))

    def take(self, event: JobEvent) -> Iterator[bytes]:
        """A chunk for what can be seen."""
        index = self._indexes[event.job_id]
        if isinstance(event, TextDelta):
            if self._has_only_text and event.text:
                yield self._frames[index].block(event.text)
                return
            self._unsent[index] += event.probs
            if event.text:
                yield encode(shapes.add_timings(self._text_chunk(index, event.text), event.timings))
        elif isinstance(event, Progress):
            yield encode(self._chunk(index, "") | {"prompt_progress": shapes.progress_body(event)})
        elif isinstance(event, Finished):
            self._ended[index] = event
            yield encode(self._last_chunk(index))
            if len(self._ended) == len(self._prepared.jobs):
                yield from self._end()

    def _chunk(self, index: int, text: str, logprobs: Any = None) -> dict[str, Any]:
        return shapes.text_chunk(self._naming, shapes.text_choice(index, text, None, logprobs))

    def _text_chunk(self, index: int, text: str) -> dict[str, Any]:
        logprobs = self._prepared.logprobs(self._unsent[index], self._offsets[index])
        self._unsent[index] = ()
        self._offsets[index] += len(text)
        return self._chunk(index, text, logprobs)

    def _last_chunk(self, index: int) -> dict[str, Any]:
        """The chunk with finish_reason; that of the last answer has the usage of all."""
        finished = self._ended[index]
        chunk = self._prepared.final(finished, index)
        choice = shapes.text_choice(index, "", shapes.finish_reason(finished))
        chunk |= shapes.text_chunk(self._naming, choice)
        if len(self._ended) == len(self._prepared.jobs):
            chunk["usage"] = shapes.usage_of(self._results)
            self._prepared.add_verbose(chunk, self._ended[0])
        return chunk

    def _end(self) -> Iterator[bytes]:
        options = self._prepared.fields.stream_options
        if options is not None and options.include_usage:
            usage = shapes.usage_of(self._results)
            yield encode(shapes.usage_chunk(shapes.text_chunk(self._naming), usage))
        yield DONE

    @property
    def _results(self) -> list[Finished]:
        return [self._ended[index] for index in sorted(self._ended)]
