"""What an answer is made of: deltas while it is written, a message in the end. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec import Struct


class ContentDelta(Struct, frozen=True):
    """More of the content."""

    text: str


class ReasoningDelta(Struct, frozen=True):
    """More of the thoughts."""

    text: str


class ToolCallStart(Struct, frozen=True):
    """Call `index`, counted from 0, of tool `name`; `id` is the model's, if it made one in time."""

    index: int
    name: str
    id: str | None = None


class ArgumentsDelta(Struct, frozen=True):
    """More of the arguments of call `index`, JSON text."""

    index: int
    text: str


Delta = ContentDelta | ReasoningDelta | ToolCallStart | ArgumentsDelta


class ParsedCall(Struct, frozen=True):
    """A whole call; `arguments` is JSON text, cut short if the answer was."""

    name: str
    arguments: str
    id: str | None = None


class ParsedMessage(Struct, frozen=True):
    """A whole answer."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ParsedCall, ...] = ()


def collect(deltas: Sequence[Delta]) -> ParsedMessage:
    """The answer that `deltas` are the parts of."""
    starts = [delta for delta in deltas if isinstance(delta, ToolCallStart)]
    arguments: dict[int, list[str]] = {start.index: [] for start in starts}
    for delta in deltas:
        if isinstance(delta, ArgumentsDelta):
            arguments[delta.index].append(delta.text)
    return ParsedMessage(
        "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta)),
        "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta)),
        tuple(ParsedCall(start.name, "".join(arguments[start.index]), start.id) for start in starts),
    )


class DeltaList:
    """Deltas since the last `take`, with neighbours of a kind joined."""

    def __init__(self) -> None:
        self._deltas: list[Delta] = []
        self._kind: Callable[[str], Delta] | None = None
        self._texts: list[str] = []

    def text(self, kind: Callable[[str], Delta], text: str) -> None:
        """Append `text`, if any, to the delta that `kind` makes."""
        if kind is not self._kind:
            self._join()
            self._kind = kind
        self._texts.append(text)

    def start(self, delta: ToolCallStart) -> None:
        """Append `delta`."""
        self._join()
        self._deltas.append(delta)

    def take(self) -> list[Delta]:
        """The deltas so far."""
        self._join()
        deltas, self._deltas = self._deltas, []
        return deltas

    def _join(self) -> None:
        text = "".join(self._texts)
        if self._kind is not None and text:
            self._deltas.append(self._kind(text))
        self._kind, self._texts = None, []
