"""A grammar that binds one sequence, and a quick way to ask it about a whole vocabulary.

Engine thread only, but `Heads` are built on any. llama.cpp tries each token by itself, 4 ms for 49k and 23 ms
for 262k tokens. But a token is forbidden whenever one is that it begins with: heads are asked first, the
others only if their head is allowed. And where a chain keeps few tokens, few are asked about at all.

That holds for grammars of characters; rules that name tokens never get here (`wingman.chat.grammar`).
A token the grammar has not been asked about must never be accepted by it: that aborts the process.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from wingman.engine.llama.binding import lib
from wingman.engine.llama.candidates import Candidates

_MAX_PIECE_BYTES: Final = 256
"""Tokens spelt longer are their own heads."""


class Heads:
    """For each token of a vocabulary another one that it begins with, of one or two bytes, or itself."""

    def __init__(self, vocab: Any) -> None:
        """Read the vocabulary; takes some 0.2 s for 100k tokens."""
        pieces = _pieces(vocab)
        short = {piece: token for token, piece in enumerate(pieces) if 0 < len(piece) <= 2}
        heads = [
            short.get(piece[:2], short.get(piece[:1], token)) if piece else token
            for token, piece in enumerate(pieces)
        ]
        self.tokens, self._places = np.unique(np.array(heads), return_inverse=True)
        """Every head, ascending."""

    def reach(self, allowed: npt.NDArray[Any]) -> npt.NDArray[np.intp]:
        """Ids, ascending, of the tokens whose head is one of `allowed`."""
        return np.flatnonzero(np.isin(self.tokens, allowed)[self._places])


def _pieces(vocab: Any) -> list[bytes]:
    """The first three bytes of each token as the grammar reads it, none of those that end an output."""
    buffer = ctypes.create_string_buffer(_MAX_PIECE_BYTES)
    pieces: list[bytes] = []
    for token in range(int(lib.llama_vocab_n_tokens(vocab))):
        n_bytes = lib.llama_token_to_piece(vocab, token, buffer, _MAX_PIECE_BYTES, 0, True)
        is_text = n_bytes > 0 and not lib.llama_vocab_is_eog(vocab, token)
        pieces.append(buffer.raw[: min(n_bytes, 3)] if is_text else b"")
    return pieces


class Grammar:
    """Owns a native grammar sampler; `heads` are those of its vocabulary."""

    def __init__(self, native: Any, heads: Heads, candidates: Candidates) -> None:
        self._native = native
        self._heads = heads
        self._candidates = candidates

    def allows(self, token: int) -> bool:
        """Whether a token may come next."""
        one = lib.llama_token_data(id=token, logit=1.0, p=0.0)
        array = lib.llama_token_data_array(data=ctypes.pointer(one), size=1, selected=-1, sorted=False)
        lib.llama_sampler_apply(self._native, ctypes.byref(array))
        return bool(one.logit != -math.inf)

    def accept(self, token: int) -> None:
        """Go on behind a token that it allows."""
        lib.llama_sampler_accept(self._native, token)

    def among(self, ids: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
        """Those of the tokens that may come next."""
        self._candidates.start(ids, 0.0)
        self._candidates.apply(self._native)
        left = self._candidates.left
        return np.asarray(left["id"][left["logit"] != -math.inf])

    def among_all(self) -> npt.NDArray[np.int32]:
        """All tokens that may come next."""
        return self.among(self._heads.reach(self.among(self._heads.tokens)))

    def close(self) -> None:
        """Free it."""
        lib.llama_sampler_free(self._native)
