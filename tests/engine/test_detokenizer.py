"""Streaming text equals non-streamed text, whatever the tokens, the stops and the splits."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wingman.engine.detokenizer import Detokenizer


def run(pieces: list[bytes], stop: tuple[str, ...]) -> tuple[list[str], str | None]:
    detokenizer = Detokenizer(stop)
    texts = []
    for data in pieces:
        piece = detokenizer.push(data)
        texts.append(piece.text)
        if piece.stopping_word is not None:
            return texts, piece.stopping_word
    texts.append(detokenizer.finish())
    return texts, None


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize(
    ("pieces", "stop", "texts", "word"),
    [
        ([b"a", b"b"], (), ["a", "b", ""], None),
        ([b"\xe2", b"\x82", b"\xac!"], (), ["", "", "€!", ""], None),
        ([b"\xe2\x82"], (), ["", "\ufffd"], None),
        ([b"one E", b"ND two"], ("END",), ["one ", ""], "END"),
        ([b"one E", b"xit"], ("END",), ["one ", "Exit", ""], None),
        ([b"EN"], ("END",), ["", "EN"], None),
        ([b"xab"], ("b", "ab"), ["x"], "ab"),
        ([b"xaaab"], ("aab",), ["xa"], "aab"),
        ([b"aa", b"ab"], ("aab",), ["", "a"], "aab"),
        ([b"abc"], ("", "c"), ["ab"], "c"),
    ],
)
def test_pieces(pieces: list[bytes], stop: tuple[str, ...], texts: list[str], word: str | None) -> None:
    assert run(pieces, stop) == (texts, word)


@given(
    st.one_of(st.binary(max_size=40), st.text(alphabet="ab€\n", max_size=40).map(str.encode)),
    st.lists(st.integers(0, 40), max_size=12),
    st.lists(st.text(alphabet="ab€\n", max_size=4), max_size=3).map(tuple),
)
def test_any_split_gives_the_same_text(data: bytes, cuts: list[int], stop: tuple[str, ...]) -> None:
    texts, word = run(split(data, cuts), stop)
    sent, whole = "".join(texts), data.decode("utf-8", "replace")
    words = [candidate for candidate in stop if candidate]
    assert not any(candidate in sent for candidate in words)
    if word is None:
        assert sent == whole
    else:
        assert whole.startswith(sent + word)


@given(
    st.lists(st.text(alphabet="abcd", max_size=6), max_size=12),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=12), min_size=1, max_size=6),
)
def test_no_more_is_held_back_than_could_begin_a_stop_string(pieces: list[str], stop: list[str]) -> None:
    detokenizer, held = Detokenizer(tuple(stop)), ""
    for data in pieces:
        piece, text = detokenizer.push(data.encode()), held + data
        if piece.stopping_word is not None:
            assert text.startswith(piece.text + piece.stopping_word)
            return
        ends = (text[at:] for at in range(len(text)))
        held = next((end for end in ends if any(word.startswith(end) for word in stop)), "")
        assert piece.text + held == text
    assert detokenizer.finish() == held


@given(
    st.text(alphabet="abc", max_size=60),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1),
)
def test_no_part_of_a_stop_string_leaks(text: str, stop: list[str]) -> None:
    texts, word = run([char.encode() for char in text], tuple(stop))
    sent = "".join(texts)
    assert not any(candidate in sent for candidate in stop)
    assert (word is None) == (sent == text)
