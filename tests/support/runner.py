"""A scripted Runner: no model, but a real cache that notices every inconsistency of the scheduler.

The token after a sequence depends only on the tokens in its cache and on the adapter scales they were
computed with, so what a job produces must not depend on its neighbours, on slots, on chunking, on forks or
on cache reuse.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Iterator, Sequence

from wingman.config import SamplingParams
from wingman.engine.runner import (
    AsidePiece,
    Batch,
    Chunk,
    KvCopy,
    KvDrop,
    KvOp,
    KvPark,
    KvRemove,
    KvRestore,
    KvShift,
    Runner,
    RunnerFailure,
    SamplerStart,
    Samples,
    Tokenizer,
)
from wingman.engine.types import Constraint, EmbeddingInfo, ModelInfo, PoolingType, TokenProb

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

    @property
    def max_piece_bytes(self) -> int:
        return 3

    @property
    def eog_tokens(self) -> tuple[int, ...]:
        return (EOS,)

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        return [1] * add_special + [3 + byte for byte in text.encode("utf-8", "replace")]

    def detokenize(self, tokens: Sequence[int], special: bool) -> str:
        return b"".join(self.piece(token, special) for token in tokens).decode("utf-8", "replace")


def entries(tokens: Sequence[int], lora: tuple[float, ...] = ()) -> list[int]:
    """What the cache holds of tokens computed with these adapter scales."""
    shift = sum(int(scale * (index + 1)) for index, scale in enumerate(lora)) % 97
    return [token + N_VOCAB * shift for token in tokens]


def _hash(held: Sequence[int]) -> int:
    value = 7
    for entry in held:
        value = (value * 31 + entry) % 1_000_003
    return value


def next_token(held: Sequence[int]) -> int:
    """The token that follows what a cache holds: a hash of all of it, about one in 40 being EOS."""
    value = _hash(held)
    return EOS if value % 40 == 0 else 3 + value % 256


def is_stuck(held: Sequence[int]) -> bool:
    """Whether a constraint allows nothing more there: once in about eleven tokens."""
    return _hash(held) % 11 == 0


def model_info(n_slots: int, n_ctx_slot: int, n_ctx: int | None = None) -> ModelInfo:
    """Facts of the scripted model."""
    return ModelInfo(
        path="scripted.gguf", description="scripted", n_vocab=N_VOCAB, n_ctx_train=n_ctx_slot, n_ctx_slot=n_ctx_slot,
        n_ctx_total=n_ctx or n_slots * n_ctx_slot, n_embd=1, n_params=1, size_bytes=1, ftype="F32", vocab_type=1,
        n_slots=n_slots, bos_token="<1>", eos_token="<2>", adds_bos=True, chat_template=None, build="b-scripted",
        system_info="", can_shift=True, embedding=EmbeddingInfo(PoolingType.MEAN, 1, N_EMBED),
    )  # fmt: skip


def compute(runner: Runner, batch: Batch) -> Samples:
    """Run a batch as the engine thread does."""
    runner.prepare(batch)
    return runner.run(batch)


class ScriptedRunner:
    """Computes batches over lists of tokens. `fail_at` makes that step raise RunnerFailure."""

    def __init__(
        self, n_slots: int = 2, n_ctx_slot: int = 64, n_ctx: int | None = None, n_batch: int = 16
    ) -> None:
        self.info = model_info(n_slots, n_ctx_slot, n_ctx)
        self.tokenizer: Tokenizer = ScriptedVocabulary()
        self.cache: list[list[int]] = [[] for _ in range(n_slots)]
        self.n_ctx = self.info.n_ctx_total
        self.n_batch = self.n_ubatch = n_batch
        self.can_rollback = True
        self.n_window = 0
        self.draft_model = None
        self.parked: dict[int, list[int]] = {}
        self.can_compute_aside = False
        self.aside: list[int] = []
        self.n_aside = 0
        """Tokens computed there in all."""
        self.samplers: dict[int, SamplerStart] = {}
        self.fail_at: set[int] = set()
        self.n_steps = self.n_tidied = 0
        self.n_computed = 0
        """Tokens in all batches."""
        self.is_closed = False
        self.parts = ScriptedParts()
        self.embedded: list[int] = []

    def prepare(self, batch: Batch) -> None:
        for op in batch.kv:
            self._edit(op)
            assert sum(map(len, self.cache)) <= self.n_ctx
        self.samplers |= {start.slot_id: start for start in batch.samplers}

    def run(self, batch: Batch) -> Samples:
        self.n_steps += 1
        if self.n_steps in self.fail_at:
            raise RunnerFailure("scripted")
        assert 0 <= batch.n_tokens <= self.n_batch
        self.n_computed += batch.n_tokens
        wanted: dict[int, Chunk] = {}
        for chunk in batch.chunks:
            cache = self.cache[chunk.slot_id]
            assert len(chunk.tokens) > 0
            assert chunk.position == len(cache), "positions must follow what the cache holds"
            cache.extend(entries(chunk.tokens, batch.lora))
            assert len(cache) <= self.info.n_ctx_slot
            if chunk.wants_sample:
                wanted[chunk.slot_id] = chunk
        for fork in batch.forks:
            assert not self.cache[fork.target], "a fork goes into an empty slot"
            self.cache[fork.target] = list(self.cache[fork.source])
            if fork.source in wanted:
                wanted[fork.target] = wanted[fork.source]
        assert sum(map(len, self.cache)) <= self.n_ctx
        return self._sample(wanted)

    def _edit(self, op: KvOp) -> None:
        """A cache that can't be cut is only ever emptied."""
        match op:
            case KvRemove(slot_id, start, end):
                assert self._can_cut(self.cache[slot_id], start)
                del self.cache[slot_id][start : None if end < 0 else end]
            case KvShift():
                assert op.start + op.delta >= 0
            case KvCopy(source, target, n_tokens):
                self._fill(target, self.cache[source], n_tokens)
            case KvPark(slot_id, key):
                assert key not in self.parked
                self.parked[key] = list(self.cache[slot_id])
            case KvRestore(key, slot_id, n_tokens):
                self._fill(slot_id, self.parked[key], n_tokens)
            case KvDrop(key):
                del self.parked[key]

    def _can_cut(self, held: list[int], n_kept: int) -> bool:
        return self.can_rollback or n_kept in (0, len(held)) or len(held) <= self.n_window

    def _fill(self, slot_id: int, held: list[int], n_tokens: int) -> None:
        assert n_tokens <= len(held)
        assert n_tokens == len(held) or self._can_cut(held, n_tokens)
        self.cache[slot_id] = held[:n_tokens]

    def _sample(self, wanted: dict[int, Chunk]) -> Samples:
        tokens: dict[int, list[int]] = {}
        stuck = set()
        for slot_id, chunk in wanted.items():
            is_last = False
            n_held = len(self.cache[slot_id]) - chunk.n_draft
            draft = list(chunk.tokens[len(chunk.tokens) - chunk.n_draft :]) if chunk.n_draft else []
            tokens[slot_id] = []
            while not is_last:
                held = self.cache[slot_id][: n_held + len(tokens[slot_id])]
                if self.samplers[slot_id].constraint and is_stuck(held):
                    stuck.add(slot_id)
                    break
                token = self.choose(slot_id, held)
                is_last = draft[len(tokens[slot_id]) : len(tokens[slot_id]) + 1] != [token]
                tokens[slot_id].append(token)
        probs = {
            slot_id: [TokenProb(t, -0.5, ((t, -0.5),) * self.samplers[slot_id].n_probs) for t in run]
            for slot_id, run in tokens.items()
            if self.samplers[slot_id].n_probs
        }
        return Samples(tokens, probs, frozenset(stuck))

    def choose(self, slot_id: int, held: Sequence[int]) -> int:
        """The token that follows what a slot holds; what tests replace."""
        return next_token(held)

    def begin_aside(self, piece: AsidePiece) -> None:
        assert piece.is_first
        self.aside = list(self.cache[piece.slot_id])
        assert piece.position == len(self.aside)

    def land_aside(self, slot_id: int) -> None:
        self.cache[slot_id] = list(self.aside)

    def run_aside(self, piece: AsidePiece, goes_on: Callable[[], bool]) -> bool:
        return all(goes_on() for _ in self.computing_aside(piece))

    def computing_aside(self, piece: AsidePiece) -> Iterator[None]:
        """Compute a piece, with a stop wherever `run_aside` asks whether to go on."""
        assert 0 < len(piece.tokens) <= self.n_ubatch
        assert piece.position == len(self.aside)
        for token in piece.tokens:
            yield
            self.aside += entries([token], piece.lora)
            self.n_aside += 1
        assert len(self.aside) < self.info.n_ctx_slot

    def slot_bytes(self, slot_id: int) -> int:
        return 4 * len(self.cache[slot_id])

    def embed(self, inputs: Sequence[Sequence[int]], n_piece: int) -> Iterator[list[bytes]]:
        assert sum(map(len, inputs)) <= N_EMBED
        self.embedded.append(len(inputs))
        for _ in range(sum(map(len, inputs)) // 8):
            yield []
        yield [struct.pack("<f", sum(tokens)) for tokens in inputs]

    def save_slot(self, slot_id: int) -> bytes:
        return array("i", self.cache[slot_id]).tobytes()

    def restore_slot(self, slot_id: int, state: bytes, n_tokens: int) -> bool:
        self.cache[slot_id] = []
        if len(state) != 4 * n_tokens or sum(map(len, self.cache)) + len(state) // 4 > self.n_ctx:
            return False
        self.cache[slot_id] = list(array("i", state))
        return True

    def set_threads(self, n_threads: int) -> None:
        self.n_threads = n_threads

    def tidy(self) -> bool:
        self.n_tidied += 1
        return self.n_tidied % 3 > 0

    def reset(self) -> None:
        self.cache = [[] for _ in self.cache]
        self.parked.clear()
        self.samplers.clear()

    def close(self) -> None:
        self.is_closed = True


def solo_output(
    prompt: Sequence[int],
    n_predict: int,
    n_ctx_slot: int,
    lora: tuple[float, ...] = (),
    is_bound: bool = False,
) -> list[int]:
    """What a job alone on the machine generates, without context shift; `is_bound` by a constraint."""
    held = entries(prompt, lora)
    output: list[int] = []
    while n_predict < 0 or len(output) < n_predict:
        if is_bound and is_stuck(held):
            break
        token = next_token(held)
        output.append(token)
        held += entries([token], lora)
        if token == EOS or len(held) >= n_ctx_slot:
            break
    return output
