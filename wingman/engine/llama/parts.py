"""The slow parts of samplers, built ahead and cloned for each request: grammars and DRY.

Compiling a grammar takes up to hundreds of milliseconds and DRY searches the whole vocabulary for
each breaker, so both happen on the threads that also tokenise; the engine thread only clones. A
native sampler can't be copied while another thread frees it, hence the lock around both.
"""

from __future__ import annotations

import ctypes
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Final

from wingman.config import SamplingParams
from wingman.engine.llama.binding import lib
from wingman.engine.llama.candidates import Candidates
from wingman.engine.llama.grammar import Grammar, Heads
from wingman.engine.types import Constraint
from wingman.errors import InvalidRequest

MAX_PARTS: Final = 128
"""Compiled parts that are kept, least recently used first out."""


class LlamaParts:
    """Grammars and DRY samplers of one vocabulary; `prepare` from any thread, the rest on the engine's.

    `n_ctx` bounds how far DRY looks back, in tokens.
    """

    def __init__(self, vocab: Any, n_ctx: int) -> None:
        self._vocab = vocab
        self._n_ctx = n_ctx
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        self._heads: Heads | None = None

    def prepare(self, params: SamplingParams, constraint: Constraint | None) -> None:
        """Build what these parameters need; raises InvalidRequest when the grammar is broken."""
        if constraint is not None:
            self._keep(constraint.grammar, self._compile, constraint)
            self._find_heads()
        if uses_dry(params):
            self._keep(_dry_key(params), self._build_dry, params)

    def grammar(self, constraint: Constraint, candidates: Candidates) -> Grammar:
        """A grammar of one's own, at its start."""
        native = self._clone(constraint.grammar, self._compile, constraint)
        return Grammar(native, self._find_heads(), candidates)

    def _find_heads(self) -> Heads:
        """The vocabulary's, built when first needed: two threads at once build equal ones."""
        if self._heads is None:
            self._heads = Heads(self._vocab)
        return self._heads

    def dry(self, params: SamplingParams) -> Any:
        """A DRY sampler of one's own, without history."""
        return self._clone(_dry_key(params), self._build_dry, params)

    def close(self) -> None:
        """Free everything; the vocabulary must still be there."""
        with self._lock:
            for part in self._kept.values():
                lib.llama_sampler_free(part)
            self._kept.clear()

    def _keep(self, key: Hashable, build: Callable[[Any], Any], source: Any) -> None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return
        part = build(source)
        with self._lock:
            self._insert(key, part)

    def _clone(self, key: Hashable, build: Callable[[Any], Any], source: Any) -> Any:
        with self._lock:
            if key not in self._kept:  # pushed out since it was prepared
                self._insert(key, build(source))
            return lib.llama_sampler_clone(self._kept[key])

    def _insert(self, key: Hashable, part: Any) -> None:
        previous = self._kept.pop(key, None)
        if previous is not None:
            lib.llama_sampler_free(previous)
        self._kept[key] = part
        while len(self._kept) > MAX_PARTS:
            lib.llama_sampler_free(self._kept.popitem(last=False)[1])

    def _compile(self, constraint: Constraint) -> Any:
        part = lib.llama_sampler_init_grammar(
            self._vocab, constraint.grammar.encode("utf-8", "replace"), b"root"
        )
        if not part:
            raise InvalidRequest("failed to parse grammar", "grammar")
        return part

    def _build_dry(self, params: SamplingParams) -> Any:
        last_n = self._n_ctx if params.dry_penalty_last_n < 0 else min(params.dry_penalty_last_n, self._n_ctx)
        words = [word.encode("utf-8", "replace") for word in params.dry_sequence_breakers]
        breakers = (ctypes.c_char_p * max(len(words), 1))(*words)
        return lib.llama_sampler_init_dry(
            self._vocab,
            params.dry_multiplier,
            params.dry_base,
            params.dry_allowed_length,
            last_n,
            breakers,
            len(words),
        )


def uses_dry(params: SamplingParams) -> bool:
    """Whether the chain holds a DRY sampler that does anything."""
    return params.dry_multiplier != 0 and params.dry_penalty_last_n != 0 and "dry" in params.samplers


def _dry_key(params: SamplingParams) -> Hashable:
    return (
        params.dry_multiplier,
        params.dry_base,
        params.dry_allowed_length,
        params.dry_penalty_last_n,
        params.dry_sequence_breakers,
    )
