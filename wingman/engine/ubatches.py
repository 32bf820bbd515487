"""How llama.cpp cuts a batch into what is computed at once. Pure; engine thread only.

Where each sequence has a stream of its own, a piece (ubatch) takes as many tokens of each of some sequences
whose numbers follow each other (llama_batch_allocr::split_equal). So eight tokens of eight sequences are one
piece, and a guess for one of them is another, which costs a pass over the weights. A cache that all share is cut
only where a piece is full.
"""

from __future__ import annotations

from collections.abc import Iterable


def even_pieces(lengths: Iterable[tuple[int, int]], n_most: int) -> tuple[int, ...]:
    """Tokens of each piece of a batch with so many tokens of these sequences, as (sequence, tokens) in order of
    sequences, at most `n_most` tokens a piece."""
    left = dict(lengths)
    pieces = []
    while left:
        first = next(iter(left))
        run: list[int] = []
        while first + len(run) in left:
            run.append(first + len(run))
        n_each = min(max(1, n_most // len(run)), *(left[sequence] for sequence in run))
        pieces.append(n_each * len(run))
        left = {
            sequence: n - n_each if sequence in run else n
            for sequence, n in left.items()
            if sequence not in run or n > n_each
        }
    return tuple(pieces)


def full_pieces(n_tokens: int, n_most: int) -> tuple[int, ...]:
    """The same for a cache that all sequences share."""
    n_full, n_rest = divmod(n_tokens, n_most)
    return (n_most,) * n_full + ((n_rest,) if n_rest else ())
