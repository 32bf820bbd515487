"""Blocks that are rendered around a text are those of the whole object."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from wingman.api import shapes
from wingman.api.streams import TextFrame, encode

NAMES = st.text(st.characters(codec="utf-8"))


@given(NAMES, NAMES, st.integers(0, 7), st.lists(NAMES))
def test_a_frame_renders_as_the_whole_object_does(
    name: str, model: str, index: int, texts: list[str]
) -> None:
    naming = shapes.Naming(name, model, 1_700_000_000, "b1")

    def chat(text: str) -> dict[str, Any]:
        return shapes.chat_chunk(naming, index, {"content": text})

    def plain(text: str) -> dict[str, Any]:
        return shapes.text_chunk(naming, shapes.text_choice(index, text, None))

    for make in (chat, plain):
        frame = TextFrame(make)
        assert [frame.block(text) for text in texts] == [encode(make(text)) for text in texts]
