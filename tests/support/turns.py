"""A turn without a model: what an engine would say is given as text, in any pieces."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from hypothesis import strategies as st

from tests.support.runner import ScriptedVocabulary
from wingman.api.dialects import Body, PartWriter
from wingman.api.schema import ChatRequest
from wingman.api.turns import Dialogue, Turn
from wingman.chat.formats import HERMES
from wingman.chat.reasoning import THINK, ReasoningMode
from wingman.chat.tools import Tool, ToolChoice, ToolMode
from wingman.config import SamplingParams
from wingman.engine.types import Finished, Job, JobEvent, StopType, TextDelta, Timings

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
ANSWER = f"<think>Well now.</think>Let me look.\n{CALL}\n{CALL}"
"""Everything an answer can have."""
ANSWERS = (ANSWER, "Paris.", "", CALL, CALL[:50], "<think>Hm", f"{CALL} and more", f"<think>a</think>{CALL}")
TOOLS = (Tool("weather", "", {"type": "object"}),)
PIECES = st.sampled_from(ANSWERS).flatmap(
    lambda text: st.lists(st.integers(0, len(text)), max_size=8).map(lambda cuts: cut(text, sorted(cuts)))
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["text", "message", "function", "user", "assistant", "tool_use", "{}", "auto", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["type", "role", "content", "text", "name", "id", "input", "call_id", "output", "format"]),
        inner, max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip
"""JSON that is often nearly right."""


def cut(text: str, places: list[int]) -> list[str]:
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


def make_turn(**fields: Any) -> Turn:
    """A turn of a model that writes Hermes' calls and thinks in tags; `fields` are those of the request."""
    engine = SimpleNamespace(tokenizer=ScriptedVocabulary())
    served = SimpleNamespace(name="model", engine=engine, info=SimpleNamespace(build="b1"))
    dialogue = Dialogue(HERMES, ToolChoice(ToolMode.AUTO, TOOLS), True, ReasoningMode.AUTO, THINK, False)
    job = Job(1, (1, 2, 3, 4, 5), SamplingParams())
    return Turn((job,), "", ChatRequest(**fields), cast(Any, served), dialogue, 30)


def events_of(pieces: list[str], stop: StopType = StopType.EOS, word: str = "") -> list[JobEvent]:
    """What a job posts: 5 tokens of input, 2 of them cached, and one token for each piece."""
    n_tokens = len(pieces)
    timings = Timings(cache_n=2, prompt_n=3, prompt_ms=1.0, predicted_n=n_tokens, predicted_ms=1.0)
    deltas: list[JobEvent] = [TextDelta(1, piece, (7,), n) for n, piece in enumerate(pieces, 1)]
    text = "".join(pieces)
    return [*deltas, Finished(1, 0, text, (7,) * n_tokens, 5, 5, stop, word, False, False, timings)]


def write(writer: PartWriter, events: list[JobEvent]) -> list[Body]:
    """All the events a client would get."""
    return [*writer.start(), *(body for event in events for body in writer.take(event))]
