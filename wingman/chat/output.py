"""What a model writes -> content, thoughts and tool calls, while it is being written.

`OutputParser` follows one answer with the elements of an `OutputFormat`. Two rules decide all doubts:
the deltas depend on the text alone, never on how it was cut; and what turns out to be no call is
content, exactly as it was written. A call is announced once its tool is known and its arguments have
begun; from then on its arguments are streamed as the JSON text they are, and what does not fit any
more is content. Nothing here raises on any text. Pure; one parser an answer.

Where llama-server differs: it fails the request when text follows a call or a call is malformed, and
it allows white space around calls only where the template has it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from msgspec import Struct

from wingman.chat.cursor import Cursor, Markers, Steps
from wingman.chat.deltas import (
    ArgumentsDelta,
    ContentDelta,
    Delta,
    DeltaList,
    ParsedCall,
    ParsedMessage,
    ReasoningDelta,
    ToolCallStart,
    collect,
)
from wingman.chat.formats import (
    Arguments,
    CallId,
    CallObject,
    Element,
    Literal,
    Name,
    OutputFormat,
    Parameters,
    Space,
)
from wingman.chat.jsonscan import ObjectScanner
from wingman.chat.reasoning import ReasoningMode, ReasoningTags
from wingman.chat.tools import MAX_NAME_CHARS, Tool

__all__ = [
    "ArgumentsDelta", "ContentDelta", "Delta", "OutputParser", "ParsedCall", "ParsedMessage", "ReasoningDelta",
    "ToolCallStart", "collect",
]  # fmt: skip

_NAME: Final = re.compile(r"[a-zA-Z0-9_.:/-]+")
_KEY: Final = re.compile(r"[^<>\n]+")
_ID: Final = re.compile(r"[a-zA-Z0-9_-]+")
_STRING_TEXT: Final = re.compile(r'[^"\\\x00-\x1f]+')
_ANY: Final = re.compile(r"(?s:.)+")
_NOTHING: Final = Markers(())
_CALL_TYPES: Final = frozenset({"type", "id"})
"""Keys that a call object may have beside its own; their values are strings."""


class _Malformed(Exception):
    """What was taken for a call is none, or not any more."""


class _Call(Struct):
    """What is known of the call being read."""

    name: str = ""
    id: str | None = None
    announced: bool = False


class OutputParser:
    """Follows one answer. `push` its text as it comes, then `finish`; each returns what became certain."""

    def __init__(
        self,
        format: OutputFormat | None,
        *,
        tools: Sequence[Tool] = (),
        parallel: bool = True,
        reasoning: ReasoningMode = ReasoningMode.AUTO,
        tags: ReasoningTags | None = None,
        starts_in_reasoning: bool = False,
    ) -> None:
        """`tools` are those that may be called; with not `parallel`, what follows the first is ignored.

        Thoughts are looked for if the template has `tags`; `starts_in_reasoning` says that the prompt
        opened them. Pass the template's format without tools too: it knows marks around the content.
        """
        self._format = format or OutputFormat("plain", ())
        self._tools = {tool.name: tool for tool in tools}
        self._parallel = parallel
        self._reasoning = reasoning
        self._tags = tags
        self._n_calls = 0
        self._call = _Call()
        self._arguments_delta = partial(ArgumentsDelta, 0)
        self._pending: list[str] = []  # white space at the end of the thoughts so far
        self._has_reasoning = False
        self._cursor = Cursor()
        self._out = DeltaList()
        self._steps = self._answer(starts_in_reasoning)

    @property
    def called(self) -> bool:
        """Whether a call was announced: the finish reason of a whole answer is then tool_calls."""
        return self._n_calls > 0

    def push(self, text: str) -> list[Delta]:
        """More of the answer."""
        self._cursor.push(text)
        return self._advance()

    def finish(self) -> list[Delta]:
        """The end of the answer, complete or cut short."""
        self._cursor.close()
        return self._advance()

    def _advance(self) -> list[Delta]:
        next(self._steps, None)
        return self._out.take()

    # The answer as a whole

    def _answer(self, in_reasoning: bool) -> Steps[None]:
        cursor, tags = self._cursor, self._tags
        yield from cursor.space()
        if tags and ((yield from cursor.maybe(tags.open)) or in_reasoning):
            yield from self._thoughts(tags)
        if self._format.call and self._format.is_bare:
            yield from self._calls()
        markers = self._markers()
        while (marker := (yield from cursor.run(markers))) is not None:
            if not marker:
                self._content(cursor.release())
            elif tags and marker == tags.open:
                cursor.release()
                yield from cursor.maybe(marker)
                yield from self._thoughts(tags)
            elif marker in self._format.dropped:
                yield from cursor.maybe(marker)
                cursor.release()
                yield from cursor.space()
            else:
                cursor.release()
                yield from self._calls()
        self._content(cursor.release())

    def _markers(self) -> Markers:
        opens = {self._tags.open} if self._tags and self._tags.anywhere else set()
        return Markers({*self._format.beginnings, *self._format.dropped, *opens})

    def _content(self, text: str) -> None:
        self._out.text(ContentDelta, text)

    # Thoughts

    def _thoughts(self, tags: ReasoningTags) -> Steps[None]:
        """Read up to and with the closing tag, or to the end: thoughts that never end are all thoughts."""
        cursor = self._cursor
        self._keep_in_content(cursor.release())
        calls = self._format.triggers if self._format.call_ends_reasoning else ()
        ends = Markers({tags.close, *calls})
        while (marker := (yield from cursor.run(ends))) == "":
            text = cursor.release()
            self._keep_in_content(text)
            self._think(text)
        if marker == tags.close:
            yield from cursor.maybe(tags.close)
            self._keep_in_content(cursor.release())
        yield from cursor.space()
        if not self._reasoning.in_content:
            cursor.release()

    def _keep_in_content(self, text: str) -> None:
        if self._reasoning.in_content:
            self._content(text)

    def _think(self, text: str) -> None:
        """Report thoughts without the white space around them."""
        if not self._reasoning.apart:
            return
        body = text.rstrip()
        if body:
            before = "".join(self._pending) if self._has_reasoning else ""
            self._out.text(ReasoningDelta, before + (body if self._has_reasoning else body.lstrip()))
            self._has_reasoning = True
            self._pending.clear()
        if len(body) < len(text):
            self._pending.append(text[len(body) :])

    # Calls

    def _calls(self) -> Steps[None]:
        """Read calls; give back what is none."""
        before = self._n_calls
        try:
            yield from self._read_calls()
        except _Malformed:
            self._give_back(announced=self._n_calls > before)
        else:
            yield from self._cursor.space()
            self._cursor.release()

    def _read_calls(self) -> Steps[None]:
        format, cursor = self._format, self._cursor
        yield from self._match(format.opening)
        more = True
        while more:
            self._call = _Call()
            yield from self._match(format.call)
            cursor.release()
            if not self._parallel:
                yield from self._ignore()
            yield from cursor.space()
            if format.separator:
                more = yield from cursor.maybe(format.separator)
            else:
                more = bool(format.continuations) and (yield from cursor.sees(format.continuations))
        yield from self._match(format.closing)

    def _ignore(self) -> Steps[None]:
        """Read the rest of the answer for nothing."""
        while (yield from self._cursor.run(_NOTHING)) is not None:
            self._cursor.release()

    def _give_back(self, *, announced: bool) -> None:
        text = self._cursor.release()
        cut_short = announced and self._cursor.ended
        if not cut_short and text.lstrip() not in self._format.content_openings:
            self._content(text)

    def _match(self, elements: Sequence[Element]) -> Steps[None]:
        """Read `elements`, one after the other; raises _Malformed where the text has something else."""
        cursor = self._cursor
        for element in elements:
            match element:
                case Literal(texts, optional):
                    yield from self._one_of(texts, optional=optional)
                case Space():
                    yield from cursor.space()
                case Name():
                    self._call.name = yield from cursor.word(_NAME, MAX_NAME_CHARS)
                case CallId(open):
                    if (yield from cursor.maybe(open)):
                        self._call.id = (yield from cursor.word(_ID, MAX_NAME_CHARS)) or None
                case Arguments():
                    yield from self._arguments()
                case CallObject():
                    yield from self._call_object(element)
                case Parameters():
                    yield from self._parameters(element)

    def _one_of(self, texts: Sequence[str], *, optional: bool = False) -> Steps[None]:
        for text in texts:
            if (yield from self._cursor.maybe(text)):
                return
        if not optional:
            raise _Malformed

    def _announce(self) -> None:
        """Report the call; what was read of it so far is dealt with."""
        call = self._call
        if call.announced or call.name not in self._tools or (self._n_calls and not self._parallel):
            raise _Malformed
        self._out.start(ToolCallStart(self._n_calls, call.name, call.id))
        self._arguments_delta = partial(ArgumentsDelta, self._n_calls)
        self._n_calls += 1
        call.announced = True
        self._cursor.release()

    def _arguments(self) -> Steps[None]:
        """Stream a JSON object."""
        if (yield from self._cursor.peek()) != "{":
            raise _Malformed
        self._announce()
        scanner = ObjectScanner()
        while not scanner.complete:
            ended = not (yield from self._cursor.peek())
            self._cursor.scan(scanner)
            self._out.text(self._arguments_delta, self._cursor.release())
            if scanner.failed or ended:
                raise _Malformed

    def _call_object(self, shape: CallObject) -> Steps[None]:
        """`{"name": ..., "arguments": {...}}`: the name first, so that the arguments can be streamed."""
        yield from self._one_of("{")
        more = True
        while more:
            yield from self._cursor.space()
            key = yield from self._string()
            yield from self._cursor.space()
            yield from self._one_of(":")
            yield from self._cursor.space()
            if key in shape.arguments:
                yield from self._arguments()
            else:
                self._note(shape, key, (yield from self._string()))
            yield from self._cursor.space()
            more = yield from self._cursor.maybe(",")
        yield from self._one_of("}")
        if not self._call.announced:
            raise _Malformed

    def _note(self, shape: CallObject, key: str, value: str) -> None:
        if key == shape.name and value in self._tools:
            self._call.name = value
        elif key == shape.id:
            self._call.id = value if _ID.fullmatch(value) else None
        elif key not in _CALL_TYPES:
            raise _Malformed

    def _string(self) -> Steps[str]:
        """A short JSON string."""
        cursor = self._cursor
        yield from self._one_of('"')
        raw: list[str] = []
        while not (yield from cursor.maybe('"')):
            text = yield from cursor.word(_STRING_TEXT, MAX_NAME_CHARS)
            if not text and (yield from cursor.peek()) == "\\":
                text = yield from cursor.word(_ANY, 2)
            raw.append(text)
            if not text or sum(map(len, raw)) > MAX_NAME_CHARS:
                raise _Malformed
        try:
            return str(json.loads(f'"{"".join(raw)}"'))
        except ValueError:
            raise _Malformed from None

    # Arguments one by one

    def _parameters(self, shape: Parameters) -> Steps[None]:
        """Make a JSON object of parameters written as text."""
        cursor = self._cursor
        self._announce()
        self._out.text(self._arguments_delta, "{")
        n_read = 0
        while (yield from cursor.maybe(shape.before)):
            key = yield from cursor.word(_KEY, MAX_NAME_CHARS)
            for text in shape.between:
                yield from self._one_of((text,))
                yield from cursor.space() if text != shape.between[-1] else cursor.maybe("\n" * shape.padded)
            self._out.text(self._arguments_delta, f"{', ' if n_read else ''}{_quoted(key)}: ")
            cursor.release()
            yield from self._value(shape, self._tools[self._call.name].is_text(key))
            n_read += 1
            yield from cursor.space()
        self._out.text(self._arguments_delta, "}")

    def _value(self, shape: Parameters, is_text: bool) -> Steps[None]:
        """Stream a string as it comes; anything else must be seen whole to tell what it is."""
        cursor = self._cursor
        ends = Markers((f"\n{shape.after}", shape.after) if shape.padded else (shape.after,))
        whole: list[str] = []
        if is_text:
            self._out.text(self._arguments_delta, '"')
        while (marker := (yield from cursor.run(ends))) == "":
            text = cursor.release()
            if is_text:
                self._out.text(self._arguments_delta, _quoted(text)[1:-1])
            else:
                whole.append(text)
        if marker is None:
            raise _Malformed
        self._out.text(self._arguments_delta, '"' if is_text else _as_json("".join(whole)))
        yield from cursor.maybe(marker)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _as_json(text: str) -> str:
    """`text` if it is JSON, else a string of it."""
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _quoted(text)
    return text.strip()


def _refuse(constant: str) -> Any:
    raise ValueError(constant)
