"""A scripted Runner: no model, but a real cache that notices every inconsistency of the scheduler.

The token after a sequence depends only on the tokens in its cache, so what a job produces must not
depend on its neighbours, on slots, on chunking or on cache reuse.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence

from wingman.config import SamplingParams
from wingman.engine.runner import Batch, KvRemove, KvShift, RunnerFailure, Samples
from wingman.engine.types import Constraint, EmbeddingInfo, ModelInfo, PoolingType

N_VOCAB = 300
EOS = 2
N_EMBED = 32


class ScriptedParts:
    """Has nothing to build."""

    def prepare(self, params: SamplingParams, constraint: Constraint | None) -> None:
        pass


class ScriptedVocabulary:
    """Byte tokens: token 3 + b is byte b; 0..2 are special; strings map to their UTF-8 bytes."""

    def piece(self, token: int, special: bool = False) -> bytes:
        if token < 3:
            return b"<%d>" % token if special else b""
        return bytes([(token - 3) % 256])

    def is_eog(self, token: int) -> bool:
        return token == EOS

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        return [1] * add_special + [3 + byte for byte in text.encode("utf-8", "replace")]

    def detokenize(self, tokens: Sequence[int], special: bool) -> str:
        return b"".join(self.piece(token, special) for token in tokens).decode("utf-8", "replace")


def next_token(tokens: Sequence[int]) -> int:
    """The token that follows `tokens`: a hash of all of them, about one in 40 being EOS."""
    value = 7
    for token in tokens:
        value = (value * 31 + token) % 1_000_003
    return EOS if value % 40 == 0 else 3 + value % 256


def model_info(n_slots: int, n_ctx_slot: int) -> ModelInfo:
    """Facts of the scripted model."""
    return ModelInfo(
        path="scripted.gguf", description="scripted", n_vocab=N_VOCAB, n_ctx_train=n_ctx_slot, n_ctx_slot=n_ctx_slot,
        n_embd=1, n_params=1, size_bytes=1, ftype="F32", vocab_type=1, n_slots=n_slots, bos_token="<1>",
        eos_token="<2>", adds_bos=True, chat_template=None, build="b-scripted", system_info="", can_shift=True,
        max_piece_bytes=3,
        eog_tokens=(EOS,), embedding=EmbeddingInfo(PoolingType.MEAN, 1, N_EMBED),
    )  # fmt: skip


class ScriptedRunner:
    """Computes batches over lists of tokens. `fail_at` makes that step raise RunnerFailure."""

    def __init__(
        self, n_slots: int = 2, n_ctx_slot: int = 64, n_ctx: int | None = None, n_batch: int = 16
    ) -> None:
        self.info = model_info(n_slots, n_ctx_slot)
        self.tokenizer = ScriptedVocabulary()
        self.cache: list[list[int]] = [[] for _ in range(n_slots)]
        self.n_ctx = n_ctx or n_slots * n_ctx_slot
        self.n_batch = self.n_ubatch = n_batch
        self.can_rollback = True
        self.has_sampler: set[int] = set()
        self.fail_at: set[int] = set()
        self.n_steps = 0
        self.is_closed = False
        self.parts = ScriptedParts()
        self.embedded: list[int] = []

    def run(self, batch: Batch) -> Samples:
        self.n_steps += 1
        if self.n_steps in self.fail_at:
            raise RunnerFailure("scripted")
        for op in batch.kv:
            cache = self.cache[op.slot_id]
            if isinstance(op, KvRemove):
                del cache[op.start : None if op.end < 0 else op.end]
            else:
                assert isinstance(op, KvShift)
                assert op.start + op.delta >= 0
        self.has_sampler |= {start.slot_id for start in batch.samplers}
        assert 0 <= batch.n_tokens <= self.n_batch
        samples = {}
        for chunk in batch.chunks:
            cache = self.cache[chunk.slot_id]
            assert len(chunk.tokens) > 0
            assert chunk.position == len(cache), "positions must follow what the cache holds"
            cache.extend(chunk.tokens)
            assert len(cache) <= self.info.n_ctx_slot
            if chunk.wants_sample:
                assert chunk.slot_id in self.has_sampler
                samples[chunk.slot_id] = next_token(cache)
        for fork in batch.forks:
            assert not self.cache[fork.target], "a fork goes into an empty slot"
            self.cache[fork.target] = list(self.cache[fork.source])
            if fork.source in samples:
                assert fork.target in self.has_sampler
                samples[fork.target] = samples[fork.source]
        assert sum(map(len, self.cache)) <= self.n_ctx
        return Samples(samples)

    def embed(self, inputs: Sequence[Sequence[int]]) -> list[bytes]:
        assert sum(map(len, inputs)) <= N_EMBED
        self.embedded.append(len(inputs))
        return [struct.pack("<f", sum(tokens)) for tokens in inputs]

    def save_slot(self, slot_id: int) -> bytes:
        return array("i", self.cache[slot_id]).tobytes()

    def restore_slot(self, slot_id: int, state: bytes) -> bool:
        self.cache[slot_id] = []
        if len(state) % 4:
            return False
        self.cache[slot_id] = list(array("i", state))
        return True

    def reset(self) -> None:
        self.cache = [[] for _ in self.cache]
        self.has_sampler.clear()

    def close(self) -> None:
        self.is_closed = True


def solo_output(prompt: Sequence[int], n_predict: int, n_ctx_slot: int) -> list[int]:
    """What a job alone on the machine generates, without context shift."""
    tokens = list(prompt)
    output: list[int] = []
    while n_predict < 0 or len(output) < n_predict:
        token = next_token(tokens)
        output.append(token)
        tokens.append(token)
        if token == EOS or len(tokens) >= n_ctx_slot:
            break
    return output
