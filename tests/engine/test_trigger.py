"""Where a lazy grammar begins: found at the right place however tokens cut the text."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tests.support.runner import ScriptedVocabulary
from wingman.engine.llama.trigger import Trigger
from wingman.engine.types import Constraint


class Cuts(ScriptedVocabulary):
    """Tokens 1000 and up are the given pieces; text is spelt in bytes."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces

    def piece(self, token: int, special: bool = False) -> bytes:
        return self.pieces[token - 1000] if token >= 1000 else super().piece(token, special)

    def spell(self, data: bytes) -> list[int] | None:
        return None if b"\x00" in data else [3 + byte for byte in data]


def first_start(text: bytes, words: list[str]) -> int | None:
    starts = [at for word in words if (at := text.find(word.encode())) >= 0]
    return min(starts, default=None)


@given(
    pieces=st.lists(st.text("ab<\u00e9", max_size=6), max_size=12),
    words=st.lists(st.text("ab<\u00e9", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_the_text_from_the_trigger_on(pieces: list[str], words: list[str]) -> None:
    vocabulary = Cuts([piece.encode() for piece in pieces])
    trigger = Trigger(Constraint("", True, tuple(words)), vocabulary)
    text = b""
    for token, piece in enumerate(vocabulary.pieces, start=1000):
        text += piece
        start = first_start(text, words)
        seen = trigger.push(token)
        assert (seen is None) == (start is None)
        if seen is not None:
            assert b"".join(vocabulary.piece(one) for one in seen) == text[start:]
            return


@given(
    text=st.text("ab<", max_size=40),
    word=st.text("ab<", min_size=1, max_size=6),
    cuts=st.sets(st.integers(1, 39), max_size=10),
)
def test_one_trigger_is_found_at_one_place_whatever_the_cuts(text: str, word: str, cuts: set[int]) -> None:
    data = text.encode()
    edges = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    vocabulary = Cuts([data[start:end] for start, end in pairwise(edges)])
    trigger = Trigger(Constraint("", True, (word,)), vocabulary)
    place = None
    for index, end in enumerate(edges[1:]):
        seen = trigger.push(1000 + index)
        if seen is not None:
            place = end - len(b"".join(map(vocabulary.piece, seen)))
            break
    assert place == first_start(data, [word])


def test_a_trigger_token_stands_for_itself() -> None:
    trigger = Trigger(Constraint("", True, ("zz",), (7,)), Cuts([]))
    assert trigger.push(3 + ord("z")) is None
    assert trigger.push(7) == [7]


def test_a_text_that_can_not_be_spelt_binds_nothing() -> None:
    trigger = Trigger(Constraint("", True, ("a",)), Cuts([b"a\x00"]))
    assert trigger.push(1000) == []


def test_a_special_token_may_be_the_trigger_text() -> None:
    trigger = Trigger(Constraint("", True, ("<1>",)), Cuts([]))
    seen = trigger.push(1)
    assert seen is not None
    assert b"".join(ScriptedVocabulary().piece(one, special=True) for one in seen) == b"<1>"
