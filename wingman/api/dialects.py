"""What OpenAI's responses and Anthropic's messages have in common: both are dialects over a chat turn.

A request becomes a ChatRequest whose messages a `History` collects. An answer is a row of parts (thoughts,
text, calls), which a `PartWriter` follows; streamed or not, it takes the same way, so both say the same.
Translation runs in the engine's executor, writers on the loop; nothing here waits but `reply`.
"""

from __future__ import annotations

import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum, auto
from functools import partial
from typing import Any, Final

import msgspec
import orjson
from msgspec import Struct, field

from protocol import encode_event
from wingman.api.bodies import encode_answers
from wingman.api.chat import new_call_id
from wingman.api.probabilities import shown_probs
from wingman.api.ranges import COUNT, read_number
from wingman.api.schema import ChatRequest, GenerationFields, Number
from wingman.api.streams import EventWriter, event_stream
from wingman.api.turns import AnswerReader, Turn, finish_reason
from wingman.chat.output import ArgumentsDelta, ContentDelta, Delta, ReasoningDelta, ToolCallStart
from wingman.engine.types import Finished, JobEvent, Progress, StopType, TextDelta, TokenProb
from wingman.errors import InvalidRequest
from wingman.http.messages import Answer, Response

Body = dict[str, Any]

# -- requests ---------------------------------------------------------------------------------------

_OWN: Final[dict[str, None]] = dict.fromkeys(
    (
        "n_predict", "max_completion_tokens", "n", "n_cmpl",
        "logprobs", "top_logprobs", "n_probs", "post_sampling_probs",
    )
)  # fmt: skip
"""Generation fields that the dialects replace by words of their own, or have no place for."""
_MAX_SHOWN: Final = 64
"""Characters of a client's word that an error repeats."""


def invalid(where: str, what: str) -> InvalidRequest:
    """The refusal of a field."""
    return InvalidRequest(f"Field '{where}': {what}", where)


def shown(word: str) -> str:
    """A client's word as an error repeats it."""
    return f"'{word[:_MAX_SHOWN]}'"


def require(item: msgspec.Struct, where: str, names: Sequence[str]) -> None:
    """Refuse an object that lacks one of these; `where` is its path, "" for the body."""
    for name in names:
        if getattr(item, name) is None:
            raise invalid(f"{where}.{name}" if where else name, "is required")


def derive_chat(
    request: GenerationFields, max_tokens: Number | None, limit: str, **fields: Any
) -> ChatRequest:
    """A chat request with the generation fields of `request`, at most `max_tokens`, which the dialect calls
    `limit`, and these fields."""
    shared = {name: getattr(request, name) for name in GenerationFields.__struct_fields__}
    if max_tokens is not None:
        max_tokens = read_number(max_tokens, limit, COUNT)
    return ChatRequest(**(shared | _OWN | {"max_tokens": max_tokens} | fields))


@contextmanager
def respelled(words: Sequence[tuple[str, str]]) -> Iterator[None]:
    """Refusals from within name fields of a chat request; put the dialect's words, as pairs of a pattern and
    what it becomes, in their place."""
    try:
        yield
    except InvalidRequest as error:
        if error.field is None:
            raise
        name = error.field
        for pattern, word in words:
            name = re.sub(pattern, word, name)
        raise InvalidRequest(error.message.replace(error.field, name), name) from None


def text_parts(texts: Sequence[str]) -> list[Body]:
    """Content of a chat message."""
    return [{"type": "text", "text": text} for text in texts]


class History:
    """The messages of a chat request in the making. What the assistant thinks, says and calls in a row is one
    message, as templates have it."""

    def __init__(self) -> None:
        self._messages: list[Body] = []

    def add(self, role: str, texts: Sequence[str]) -> None:
        """A message."""
        self._messages.append({"role": role, "content": text_parts(texts)})

    def say(self, role: str, texts: Sequence[str]) -> None:
        """More of what `role` says: a part of its last message if that is the last of all."""
        self._last(role)["content"] += text_parts(texts)

    def think(self, texts: Sequence[str]) -> None:
        """Thoughts of the assistant."""
        self._last("assistant").setdefault("reasoning_content", []).extend(texts)

    def call(self, call_id: str, name: str, arguments: Body | str) -> None:
        """A call by the assistant."""
        function = {"name": name, "arguments": arguments}
        call = {"id": call_id, "type": "function", "function": function}
        self._last("assistant").setdefault("tool_calls", []).append(call)

    def result(self, call_id: str, texts: Sequence[str]) -> None:
        """The result of a call."""
        self._messages.append({"role": "tool", "tool_call_id": call_id, "content": text_parts(texts)})

    def messages(self, field: str) -> list[Body]:
        """All of them; raises InvalidRequest naming `field` when the last is a call: who would go on?"""
        if self._messages and self._messages[-1].get("tool_calls"):
            raise invalid(field, "ends with a call that has no result")
        for message in self._messages:
            if "reasoning_content" in message:
                message["reasoning_content"] = "\n".join(message["reasoning_content"])
        return self._messages

    def _last(self, role: str) -> Body:
        if not self._messages or self._messages[-1]["role"] != role:
            self.add(role, ())
        return self._messages[-1]


# -- answers ----------------------------------------------------------------------------------------


class PartKind(Enum):
    """What a part of an answer is."""

    THOUGHT = auto()
    TEXT = auto()
    CALL = auto()


_KINDS: Final[dict[type[Delta], PartKind]] = {
    ReasoningDelta: PartKind.THOUGHT,
    ContentDelta: PartKind.TEXT,
    ToolCallStart: PartKind.CALL,
    ArgumentsDelta: PartKind.CALL,
}


class Part(Struct):
    """A part of an answer; of a call, the text is its arguments."""

    kind: PartKind
    index: int
    name: str = ""
    call_id: str = ""
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    pieces: list[str] = field(default_factory=list)
    probs: list[TokenProb] = field(default_factory=list)
    status: str = "in_progress"

    @property
    def text(self) -> str:
        """What it says so far."""
        return "".join(self.pieces)


class PartWriter(ABC):
    """Follows one answer: `take` its events as they come and send the events of the dialect it returns; in
    the end `body` is the whole answer."""

    def __init__(self, turn: Turn) -> None:
        self.turn = turn
        self.parts: list[Part] = []
        self._reader = AnswerReader(turn.dialogue)

    @abstractmethod
    def start(self) -> list[Body]:
        """Events before anything is known."""

    @abstractmethod
    def opened(self, part: Part) -> list[Body]:
        """Events of a part that begins."""

    @abstractmethod
    def grown(self, part: Part, text: str, probs: Sequence[TokenProb]) -> list[Body]:
        """Events of a part that goes on."""

    @abstractmethod
    def closed(self, part: Part) -> list[Body]:
        """Events of a part that ends."""

    @abstractmethod
    def ended(self, finished: Finished, reason: str) -> list[Body]:
        """Events of the end; `reason` is the finish reason of a chat."""

    @abstractmethod
    def fail(self, error: BaseException) -> bytes:
        """Encoded events that tell of a failure."""

    @abstractmethod
    def body(self) -> Body:
        """The answer so far."""

    def progress(self, progress: Progress) -> list[Body]:
        """Events of prompt evaluation, for requests that ask for them."""
        return []

    def take(self, event: JobEvent) -> list[Body]:
        """The events that follow from one of the job."""
        if isinstance(event, TextDelta):
            return self._write(self._reader.push(event))
        if isinstance(event, Progress):
            return self.progress(event)
        return self._finish(event) if isinstance(event, Finished) else []

    def close_part(self, status: str) -> list[Body]:
        """End the part that is being written, if any."""
        if not self.parts or self.parts[-1].status != "in_progress":
            return []
        self.parts[-1].status = status
        return self.closed(self.parts[-1])

    def _write(self, deltas: Sequence[Delta]) -> list[Body]:
        bodies: list[Body] = []
        for delta in deltas:
            kind = _KINDS[type(delta)]
            if isinstance(delta, ToolCallStart) or not self.parts or self.parts[-1].kind is not kind:
                bodies += self.close_part("completed") + self._open(kind, delta)
            if not isinstance(delta, ToolCallStart):
                part = self.parts[-1]
                probs = self._reader.take_probs(delta) if kind is PartKind.TEXT else ()
                part.pieces.append(delta.text)
                part.probs += probs
                bodies += self.grown(part, delta.text, probs)
        return bodies

    def _open(self, kind: PartKind, delta: Delta) -> list[Body]:
        part = Part(kind, len(self.parts))
        if isinstance(delta, ToolCallStart):
            part.name = delta.name
            is_taken = any(other.call_id == delta.id for other in self.parts)
            part.call_id = new_call_id(self.turn) if is_taken or not delta.id else delta.id
        self.parts.append(part)
        return self.opened(part)

    def _finish(self, finished: Finished) -> list[Body]:
        bodies = self._write(self._reader.finish())
        reason = finish_reason(finished, has_called=self._reader.has_called)
        bodies += self.close_part("incomplete" if reason == "length" else "completed")
        return bodies + self.ended(finished, reason)


async def reply(writer: PartWriter) -> Answer:
    """Answer with the events of the turn's job, or with its end."""
    turn = writer.turn
    stream = turn.served.engine.submit(*turn.jobs)
    if turn.jobs[0].stream:
        return event_stream(_NamedEvents(writer), stream, turn.ping_s)
    async with stream:
        results = await stream.results()
    return Response(200, await encode_answers(turn.served, results, partial(_whole, writer, results[0])))


def _whole(writer: PartWriter, finished: Finished) -> Body:
    """The body of an answer that is not streamed."""
    turn = writer.turn
    probs = shown_probs(finished, turn.jobs[0], turn.served.engine.tokenizer)
    if finished.stop_type is StopType.EOS:
        probs = probs[:-1]  # of the end itself, which no delta of a stream shows
    writer.take(TextDelta(finished.job_id, finished.text, finished.tokens, len(finished.tokens), probs=probs))
    writer.take(finished)
    return writer.body()


class _NamedEvents(EventWriter):
    """What a PartWriter says, encoded."""

    def __init__(self, writer: PartWriter) -> None:
        self._writer = writer

    def start(self) -> Iterable[bytes]:
        return map(encode, self._writer.start())

    def take(self, event: JobEvent) -> Iterable[bytes]:
        return map(encode, self._writer.take(event))

    def fail(self, error: BaseException) -> bytes:
        return self._writer.fail(error)


def encode(body: Body) -> bytes:
    """An event block, named by the type of its object."""
    return encode_event(orjson.dumps(body), body["type"])
