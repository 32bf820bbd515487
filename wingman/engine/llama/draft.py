"""A small second model that guesses what the served one will say.

It has a context of its own with a sequence per slot, and keeps there what it has seen of each slot's text:
a call computes what is new since the last one, takes back what turned out otherwise, and then drafts for
all slots together, the likeliest token each time. Made, used and closed on the engine thread, never at
the same time as the served model, so both may use all threads.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from msgspec import Struct, field

from wingman.config import ContextConfig, ModelConfig
from wingman.engine.drafting import NO_DRAFT, Draft, DraftRequest
from wingman.engine.llama import binding
from wingman.engine.llama.batch import TokenBatch
from wingman.engine.llama.binding import lib
from wingman.engine.llama.context import LlamaContext
from wingman.engine.llama.model import LlamaModel
from wingman.engine.runner import RunnerFailure
from wingman.engine.slots import common_prefix
from wingman.errors import DraftMisfit

MAX_CATCH_UP_TOKENS: Final = 256
"""Tokens computed at once to catch up, all slots together, so that a long prompt does not stall a step; slots
with the least to catch up with go first."""
_MAX_SIZE_DIFFERENCE: Final = 128
"""Tokens that one vocabulary may have more than the other: padding (common_speculative_are_compatible)."""
_FIRST_COMPARED: Final = 5
"""Texts of the tokens before are special ones that fine-tunes rename (the same place)."""


class _Growing(Struct):
    """A draft that grows, and the tokens to compute before the next guess."""

    request: DraftRequest
    pending: Sequence[int]
    tokens: list[int] = field(default_factory=list)


class DraftModel:
    """A loaded draft model."""

    def __init__(self, target: LlamaModel, model: ModelConfig, context: ContextConfig) -> None:
        """Load the file that `model` names beside `target`; `context` as for the target, its `ctx_size` shared by
        as many slots. Raises ModelLoadFailure; DraftMisfit when the two don't speak the same tokens."""
        self._model = LlamaModel(dataclasses.replace(model, lora=(), lora_scaled=(), override_kv=()))
        self._context: LlamaContext | None = None
        try:
            _check_kind(self._model)
            check_vocabularies(target, self._model)
            # A window kept whole can be cut anywhere.
            self._context = LlamaContext(self._model, dataclasses.replace(context, swa_full=True))
        except BaseException:
            self.close()
            raise
        self._batch = TokenBatch(self._context.n_batch)
        self._n_vocab = self._model.tokenizer.n_tokens
        self._is_unified = context.kv_unified
        self._n_shared = min(self._n_vocab, target.tokenizer.n_tokens)
        self._held: list[list[int]] = [[] for _ in range(context.parallel)]

    def draft(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """A draft for each request, of different slots. Raises RunnerFailure; the next call starts over then."""
        growing = [self._align(request) for request in requests]
        wanted = sorted((each for each in growing if each is not None), key=lambda each: len(each.pending))
        if self._is_unified:
            self._make_room(wanted)
        while wanted:
            outputs = self._add_pending(wanted)
            self._decode()
            for each, index in outputs:
                self._guess(each, index)
            wanted = [each for each, _ in outputs if each.pending]
        return [Draft(each.tokens, 0) if each is not None and each.tokens else NO_DRAFT for each in growing]

    def set_threads(self, n_threads: int) -> None:
        """Compute the next drafts with so many threads."""
        if self._context is not None:
            self._context.set_threads(n_threads)

    def close(self) -> None:
        """Free context and weights."""
        if self._context is not None:
            self._context.close()
            self._context = None
        self._model.close()

    def _align(self, request: DraftRequest) -> _Growing | None:
        """Take back what the slot's text does not begin with; None when no draft can come of the rest: it does
        not fit, or has a token that only the served model knows."""
        tokens, held = list(request.tokens), self._held[request.slot_id]
        if not tokens or request.n_max <= 0 or len(tokens) > self._generating().n_ctx_slot:
            return None
        n_common = min(len(held), len(tokens) - 1)
        if held[:n_common] != tokens[:n_common]:
            n_common = common_prefix(held[:n_common], tokens)
        self._forget(request.slot_id, n_common)
        pending = tokens[n_common:]
        return _Growing(request, pending) if max(pending) < self._n_shared else None

    def _make_room(self, wanted: list[_Growing]) -> None:
        """Where the slots share the cache, forget the text of those that want nothing, as far as there is no
        room, then drop requests, those with the most to catch up with first."""
        n_over = sum(map(len, self._held)) + sum(map(self._n_needed, wanted)) - self._generating().n_ctx
        asked = {each.request.slot_id for each in wanted}
        idle = [slot_id for slot_id, held in enumerate(self._held) if held and slot_id not in asked]
        while n_over > 0 and idle:
            n_over -= self._forget(idle.pop())
        while n_over > 0 and wanted:
            last = wanted.pop()
            n_over -= self._n_needed(last) + self._forget(last.request.slot_id)

    def _n_needed(self, growing: _Growing) -> int:
        """Tokens that a draft adds to its slot at most; its last one is not computed."""
        n_left = self._generating().n_ctx_slot - len(growing.request.tokens)
        return len(growing.pending) + min(growing.request.n_max - 1, n_left)

    def _forget(self, slot_id: int, n_kept: int = 0) -> int:
        """Drop all but the first tokens of a slot; how many that were."""
        held = self._held[slot_id]
        n_dropped = len(held) - n_kept
        if n_dropped > 0:
            lib.llama_memory_seq_rm(self._generating().memory, slot_id, n_kept, -1)
            del held[n_kept:]
        return n_dropped

    def _add_pending(self, wanted: Sequence[_Growing]) -> list[tuple[_Growing, int]]:
        """Put into the batch what is pending, as much as fits; those it is all of, with their batch indices."""
        room = min(MAX_CATCH_UP_TOKENS, self._generating().n_batch)
        outputs = []
        for each in wanted:
            tokens, is_all = each.pending[:room], len(each.pending) <= room
            if not tokens:
                break
            held = self._held[each.request.slot_id]
            index = self._batch.add(tokens, len(held), each.request.slot_id, wants_output=is_all)
            held.extend(tokens)
            room -= len(tokens)
            outputs += [(each, index)] * is_all
        return outputs

    def _decode(self) -> None:
        code = lib.llama_decode(self._generating().handle, self._batch.native())
        self._batch.clear()
        if code:
            self._forget_all()
            raise RunnerFailure(f"llama_decode of the draft model returned {code}: {binding.take_errors()}")

    def _forget_all(self) -> None:
        lib.llama_memory_clear(self._generating().memory, True)
        for held in self._held:
            held.clear()

    def _guess(self, growing: _Growing, index: int) -> None:
        """Lengthen a draft by the likeliest token, or end it."""
        request, logits = growing.request, self._logits(index)
        token = int(logits.argmax())
        growing.pending = ()
        if request.p_min > 0 and _share(logits, token) < request.p_min:
            return
        growing.tokens.append(token)
        has_room = len(self._held[request.slot_id]) < self._generating().n_ctx_slot
        if len(growing.tokens) < request.n_max and has_room and not self._model.tokenizer.is_eog(token):
            growing.pending = (token,)

    def _logits(self, index: int) -> npt.NDArray[np.float32]:
        """Those of the tokens that both models know; overwritten by the next decode."""
        logits = lib.llama_get_logits_ith(self._generating().handle, index)
        row: Any = (ctypes.c_float * self._n_shared).from_address(ctypes.addressof(logits.contents))
        return np.frombuffer(row, np.float32)

    def _generating(self) -> LlamaContext:
        assert self._context is not None, "the draft model is closed"
        return self._context


def _share(logits: npt.NDArray[np.float32], token: int) -> float:
    """The probability of a token."""
    return float(1 / np.exp(logits - logits[token]).sum())


def _check_kind(draft: LlamaModel) -> None:
    if not draft.can_generate:
        raise DraftMisfit(f"{draft.path.name} can't draft: it does not generate text")
    if lib.llama_model_is_recurrent(draft.handle) or lib.llama_model_is_hybrid(draft.handle):
        raise DraftMisfit(f"{draft.path.name} can't draft: its state can't be taken back")


def check_vocabularies(target: LlamaModel, draft: LlamaModel) -> None:
    """Raise DraftMisfit unless token ids mean the same in both (common_speculative_are_compatible)."""
    difference = _difference(target, draft)
    if difference:
        raise DraftMisfit(f"{draft.path.name} can't draft for {target.path.name}: {difference}")


def _difference(target: LlamaModel, draft: LlamaModel) -> str:
    """What tells two vocabularies apart, "" for nothing that matters."""
    if lib.llama_vocab_type(target.vocab) != lib.llama_vocab_type(draft.vocab):
        return "their vocabularies are of different types"
    for mark in ("bos", "eos"):
        if _added(target.vocab, mark) != _added(draft.vocab, mark):
            return f"they put different {mark} tokens around a text"
    sizes = [model.tokenizer.n_tokens for model in (target, draft)]
    if abs(sizes[0] - sizes[1]) > _MAX_SIZE_DIFFERENCE:
        return f"their vocabularies have {sizes[0]} and {sizes[1]} tokens"
    text = lib.llama_vocab_get_text
    for token in range(_FIRST_COMPARED, min(sizes)):
        if text(target.vocab, token) != text(draft.vocab, token):
            return f"token {token} is another in each"
    return ""


def _added(vocab: Any, mark: str) -> int | None:
    """The token that is put before ("bos") or after ("eos") each text, None for none."""
    is_added = getattr(lib, f"llama_vocab_get_add_{mark}")(vocab)
    return int(getattr(lib, f"llama_vocab_{mark}")(vocab)) if is_added else None
