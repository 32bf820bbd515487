"""How a batch is cut, against llama.cpp's rules written as a loop over tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wingman.engine.ubatches import even_pieces, full_pieces


def cut_by_token(lengths: dict[int, int], n_most: int) -> list[int]:
    """split_equal with `sequential`: one token of each sequence in turn while all have one and the piece has
    room for a round."""
    tokens = [sequence for sequence, n in sorted(lengths.items()) for _ in range(n)]
    pieces = []
    while tokens:
        run: list[int] = []
        for sequence in tokens:
            if not run or sequence == run[-1] + 1:
                run.append(sequence)
        piece = 0
        while all(sequence in tokens for sequence in run):
            for sequence in run:
                tokens.remove(sequence)
                piece += 1
            if (piece // len(run) + 1) * len(run) > n_most:
                break
        pieces.append(piece)
    return pieces


@given(st.dictionaries(st.integers(0, 9), st.integers(1, 30), max_size=8), st.integers(8, 40))
def test_as_the_library_cuts(lengths: dict[int, int], n_most: int) -> None:
    pieces = even_pieces(sorted(lengths.items()), n_most)
    assert list(pieces) == cut_by_token(lengths, n_most)


@pytest.mark.parametrize(
    ("lengths", "pieces"),
    [
        ({0: 1, 1: 1, 2: 1, 3: 1}, (4,)),
        ({0: 1, 2: 1, 4: 1, 6: 1}, (1, 1, 1, 1)),
        ({0: 1, 1: 5, 2: 5, 3: 1}, (4, 8)),
        ({0: 5, 1: 1, 2: 5}, (3, 4, 4)),
        ({0: 600, 1: 1}, (2, 512, 87)),
        ({}, ()),
    ],
)
def test_examples(lengths: dict[int, int], pieces: tuple[int, ...]) -> None:
    assert even_pieces(sorted(lengths.items()), 512) == pieces


def test_a_shared_cache_is_cut_where_a_piece_is_full() -> None:
    assert full_pieces(1100, 512) == (512, 512, 76)
    assert full_pieces(512, 512) == (512,)
    assert full_pieces(0, 512) == ()
