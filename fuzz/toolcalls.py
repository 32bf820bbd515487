"""What a model writes, in any output format.

Invariant: whatever the text, reading it raises nothing; what comes out does not depend on how the text
is cut; and calls are counted from 0 and of known tools.
The first byte picks the format, the second the options.
"""

from __future__ import annotations

import random
from itertools import pairwise

from wingman.chat.formats import FORMATS
from wingman.chat.output import (
    ArgumentsDelta,
    Delta,
    OutputParser,
    ReasoningDelta,
    ToolCallStart,
    collect,
)
from wingman.chat.reasoning import HARMONY, THINK, ReasoningMode
from wingman.chat.tools import Tool

_TOOLS = (Tool("f", "", {"properties": {"s": {"type": "string"}}}), Tool("g", "", {}))
_TAGS = (None, THINK, HARMONY)
_MODES = tuple(ReasoningMode)
_LITERALS = {text for format in FORMATS for text in (*format.preserved, *format.beginnings, *format.dropped)}
TOKENS = (
    *sorted(text.encode() for text in _LITERALS), *(text.encode() for text in THINK.texts),
    b'{"name": "f", "arguments": {', b'{"s": "a"}', b'"parameters": {}', b"}}", b"}", b"[", b"]", b",", b";", b'"',
    b"f", b"g\n", b">", b"\n", b" ", b"\\u00e9", b"<parameter=s>\n", b"\n</parameter>", b"</arg_key><arg_value>",
    b"</arg_value>", b"<|message|>", b"</function>", b"```json\n", b"```", b">>>all\n", "\u00e9".encode(),
)  # fmt: skip


def one(data: bytes) -> None:
    """Check the invariant for `data`."""
    text = data[2:].decode("utf-8", "replace")
    whole = _parse(data, [text])
    _check(whole)
    rng = random.Random(data)
    places = [0, *sorted(rng.randrange(len(text) + 1) for _ in range(4)), len(text)]
    for cut in ([text[start:end] for start, end in pairwise(places)], list(text)):
        assert collect(_parse(data, cut)) == collect(whole)


def _parse(data: bytes, texts: list[str]) -> list[Delta]:
    choice, options = (*data[:2], 0, 0)[:2]
    parser = OutputParser(
        FORMATS[choice % len(FORMATS)],
        tools=_TOOLS,
        parallel=bool(options & 1),
        reasoning=_MODES[(options >> 1) % len(_MODES)],
        tags=_TAGS[(options >> 3) % len(_TAGS)],
        starts_in_reasoning=bool(options & 128),
    )
    deltas = [delta for text in texts for delta in parser.push(text)] + parser.finish()
    assert parser.called == any(isinstance(delta, ToolCallStart) for delta in deltas)
    return deltas


def _check(deltas: list[Delta]) -> None:
    n_calls = 0
    for delta in deltas:
        if isinstance(delta, ToolCallStart):
            assert delta.index == n_calls
            assert delta.name in ("f", "g")
            n_calls += 1
            continue
        assert delta.text
        if isinstance(delta, ArgumentsDelta):
            assert delta.index == n_calls - 1
        elif isinstance(delta, ReasoningDelta):
            assert delta.text.strip()
