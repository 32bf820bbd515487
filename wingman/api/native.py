"""Completions of prompts, and llama-server's native answers to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from msgspec import Struct

from wingman.api import shapes
from wingman.api.bodies import encode_answers
from wingman.api.constraints import read_constraint
from wingman.api.generation import JobMaker
from wingman.api.probabilities import native_items, native_probs, text_logprobs
from wingman.api.schema import GenerationFields
from wingman.api.settings import settings_of
from wingman.api.streams import EventWriter, encode, event_stream
from wingman.engine.types import Finished, Job, JobEvent, Progress, TextDelta, TokenProb
from wingman.http.messages import Answer, Response
from wingman.services.served import ServedModel


class Completion(Struct, frozen=True):
    """A prepared request: its jobs in the order of their answers, and the text of each one's prompt."""

    jobs: tuple[Job, ...]
    prompts: tuple[str, ...]
    fields: GenerationFields
    served: ServedModel
    ping_s: int

    @property
    def indexes(self) -> dict[int, int]:
        """Job id -> index of its answer."""
        return {job.id: index for index, job in enumerate(self.jobs)}

    def final(self, finished: Finished, index: int) -> dict[str, Any]:
        """The native final object of an answer."""
        job, served = self.jobs[index], self.served
        body = shapes.native_final(
            finished,
            index,
            job,
            served.name,
            self.prompts[index],
            settings_of(job, served.config, served.name),
            return_tokens=bool(self.fields.return_tokens),
        )
        if job.n_probs and not job.stream:
            probs = native_probs(finished, job, served.engine.tokenizer)
            if probs:
                body["completion_probabilities"] = self.native_probs(probs)
        return shapes.select_fields(body, self.fields.response_fields)

    def add_verbose(self, body: dict[str, Any], finished: Finished) -> dict[str, Any]:
        """The body with `__verbose`, the native object of the first answer, when asked for."""
        default = self.served.config.server.verbose
        if default if self.fields.verbose is None else self.fields.verbose:
            body["__verbose"] = self.final(finished, 0)
        return body

    def native_probs(self, probs: Sequence[TokenProb]) -> list[dict[str, Any]]:
        """`completion_probabilities`."""
        is_post = self.jobs[0].post_sampling_probs
        return native_items(probs, self.served.engine.tokenizer, is_post=is_post)

    def logprobs(self, probs: Sequence[TokenProb], offset: int) -> dict[str, Any] | None:
        """`logprobs` of a text choice."""
        if not self.jobs[0].n_probs:
            return None
        is_post = self.jobs[0].post_sampling_probs
        return text_logprobs(probs, self.served.engine.tokenizer, offset, is_post=is_post)


async def answer_natively(prepared: Completion) -> Answer:
    """Submit, and answer with native objects: one, or an array for several answers."""
    stream = prepared.served.engine.submit(*prepared.jobs)
    if prepared.jobs[0].stream:
        return event_stream(NativeWriter(prepared, stream.slot_ids), stream, prepared.ping_s)
    async with stream:
        results = await stream.results()
    return Response(200, await encode_answers(prepared.served, results, lambda: _bodies(prepared, results)))


def _bodies(prepared: Completion, results: Sequence[Finished]) -> Any:
    bodies = [prepared.final(finished, index) for index, finished in enumerate(results)]
    return bodies[0] if len(bodies) == 1 else bodies


def build_completion(
    served: ServedModel, fields: GenerationFields, prompts: Sequence[Sequence[int]]
) -> Completion:
    """Jobs for tokenised prompts; in the engine's executor."""
    maker = JobMaker.of(served)
    constraint = read_constraint(fields, served.constraint)
    groups = [maker.build_jobs(prompt, fields, constraint) for prompt in prompts]
    texts = [_shown_prompt(served, group[0].prompt) for group in groups for _ in group]
    jobs = tuple(job for group in groups for job in group)
    return Completion(jobs, tuple(texts), fields, served, maker.ping_interval(fields))


def _shown_prompt(served: ServedModel, prompt: Sequence[int]) -> str:
    """The text of a prompt; one that will be refused for its length need not be read."""
    if len(prompt) >= served.info.n_ctx_slot:
        return ""
    return served.engine.tokenizer.detokenize(prompt, special=True)


class NativeWriter(EventWriter):
    """Follows the answers as llama-server's partial objects; `slot_ids` is kept up by who reads the jobs."""

    def __init__(self, prepared: Completion, slot_ids: Mapping[int, int]) -> None:
        self._prepared = prepared
        self._indexes = prepared.indexes
        self._slot_ids = slot_ids

    def take(self, event: JobEvent) -> Iterator[bytes]:
        """An object for each event."""
        prepared, index = self._prepared, self._indexes[event.job_id]
        if isinstance(event, TextDelta):
            yield encode(self._partial(event, index))
        elif isinstance(event, Progress):
            yield encode(self._partial(TextDelta(event.job_id, "", (), 0), index, event))
        elif isinstance(event, Finished):
            yield encode(prepared.final(event, index))

    def _partial(self, delta: TextDelta, index: int, progress: Progress | None = None) -> dict[str, Any]:
        prepared = self._prepared
        slot_id = self._slot_ids.get(delta.job_id, -1)
        body = shapes.native_partial(delta, index, slot_id, len(prepared.jobs[index].prompt), progress)
        if delta.probs:
            body["completion_probabilities"] = prepared.native_probs(delta.probs)
        return body
