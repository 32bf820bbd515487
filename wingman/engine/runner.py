"""What the scheduler plans and what a model runtime does with it.

A Batch says what to compute; it knows no policy. A Runner computes it; it knows no job. Tests
script a Runner, `wingman.engine.llama` is the real one. All on the engine thread, except
`Tokenizer`, whose methods may be called from any thread while the model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from msgspec import Struct, field

from wingman.config import SamplingParams
from wingman.engine.drafting import Draft, DraftRequest
from wingman.engine.types import Constraint, ModelInfo, TokenProb

OnProgress = Callable[[float], bool]
"""Told the share of a model that is loaded, 0.0 to 1.0; False gives the load up. On the engine thread."""

TO_END = -1
"""An end position that means "everything from the start position on" (llama_memory_seq_rm)."""

MAX_EMBED_INPUTS = 64
"""Inputs in one batch of embeddings; each is a sequence of the embedding context."""


class RunnerFailure(Exception):
    """A batch could not be computed; the runtime is usable again after `reset`."""


class KvRemove(Struct, frozen=True):
    """Drop the cached tokens at positions [start, end) of a slot."""

    slot_id: int
    start: int
    end: int = TO_END


class KvShift(Struct, frozen=True):
    """Move the cached tokens at positions [start, end) of a slot by `delta` positions."""

    slot_id: int
    start: int
    end: int
    delta: int


class KvCopy(Struct, frozen=True):
    """Replace what slot `target` holds by the first `n_tokens` tokens of slot `source`."""

    source: int
    target: int
    n_tokens: int


class KvPark(Struct, frozen=True):
    """Keep a copy of a slot in host memory under `key`."""

    slot_id: int
    key: int


class KvRestore(Struct, frozen=True):
    """Replace what a slot holds by the first `n_tokens` tokens parked under `key`, which stay parked."""

    key: int
    slot_id: int
    n_tokens: int


class KvDrop(Struct, frozen=True):
    """Free what is parked under `key`."""

    key: int


KvOp = KvRemove | KvShift | KvCopy | KvPark | KvRestore | KvDrop


class SamplerStart(Struct, frozen=True):
    """Give a slot a fresh sampler; `history` are the prompt tokens that penalties look back on."""

    slot_id: int
    params: SamplingParams
    history: Sequence[int]
    constraint: Constraint | None = None
    n_probs: int = 0
    post_sampling_probs: bool = False


class Fork(Struct, frozen=True):
    """After the step, give slot `target` a copy of slot `source`'s cache, and sample for it from the
    same logits if the source's chunk wants a sample."""

    source: int
    target: int
    job_id: int


class Chunk(Struct, frozen=True):
    """Tokens of one slot at consecutive positions; a token is sampled after the last if asked.

    The last `n_draft` tokens are guesses: a token is sampled before each, and as long as it is the one
    guessed, the next.
    """

    slot_id: int
    job_id: int
    tokens: Sequence[int]
    position: int
    wants_sample: bool
    n_draft: int = 0


class Batch(Struct, frozen=True):
    """One step: cache operations first, in order, then the chunks at once, then the forks.

    `lora` holds the scale of each loaded adapter.
    """

    kv: tuple[KvOp, ...]
    samplers: tuple[SamplerStart, ...]
    chunks: tuple[Chunk, ...]
    planned_at: float
    forks: tuple[Fork, ...] = ()
    lora: tuple[float, ...] = ()

    @property
    def n_tokens(self) -> int:
        """Tokens to compute."""
        return sum(len(chunk.tokens) for chunk in self.chunks)


class AsidePiece(Struct, frozen=True):
    """Tokens of one prompt to compute outside the slots, from `position` on; of all but the last of its `n_prompt`
    tokens. The first piece goes on from what the slot holds."""

    slot_id: int
    job_id: int
    tokens: Sequence[int]
    position: int
    n_prompt: int
    lora: tuple[float, ...] = ()
    is_first: bool = True

    @property
    def is_last(self) -> bool:
        """Whether none follows."""
        return self.position + len(self.tokens) == self.n_prompt - 1


class Samples(Struct, frozen=True):
    """What a step sampled, by slot id: a token, and more where drafts were right, in order. The grammar
    of `stuck` slots allows no further token."""

    tokens: Mapping[int, Sequence[int]]
    probs: Mapping[int, Sequence[TokenProb]] = field(default_factory=dict)
    stuck: frozenset[int] = frozenset()
    sample_s: float = 0.0
    """Time that choosing the tokens took."""


class Vocabulary(Protocol):
    """What the scheduler asks about tokens."""

    def piece(self, token: int, special: bool = False) -> bytes:
        """The token's bytes; a special token has none unless `special`."""

    def is_eog(self, token: int) -> bool:
        """Whether the token ends a generation."""


class Tokenizer(Vocabulary, Protocol):
    """Text <-> tokens; thread-safe."""

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of `text`; `add_special` adds BOS and the like when the model wants them."""

    def detokenize(self, tokens: Sequence[int], special: bool) -> str:
        """Text of `tokens`; invalid bytes become U+FFFD."""

    @property
    def max_piece_bytes(self) -> int:
        """No token stands for more. The first to ask reads the whole vocabulary: not on the event loop."""

    @property
    def eog_tokens(self) -> tuple[int, ...]:
        """Every token that ends a generation, likewise."""


class SamplerParts(Protocol):
    """Builds the slow parts of samplers ahead, so that the engine thread need not; thread-safe."""

    def prepare(self, params: SamplingParams, constraint: Constraint | None) -> None:
        """Compile the grammar and the like; raises InvalidRequest when the grammar is broken."""


class Runner(Protocol):
    """A loaded model with its contexts."""

    info: ModelInfo
    tokenizer: Tokenizer

    @property
    def parts(self) -> SamplerParts:
        """What builds samplers ahead."""

    @property
    def n_batch(self) -> int:
        """Most tokens in a batch."""

    @property
    def n_ubatch(self) -> int:
        """Most tokens computed at once."""

    @property
    def n_ctx(self) -> int:
        """Tokens the whole cache holds."""

    @property
    def can_rollback(self) -> bool:
        """Whether the cache can drop the last tokens of a slot."""

    @property
    def n_window(self) -> int:
        """A slot that holds no more tokens can drop the last ones even so."""

    def prepare(self, batch: Batch) -> None:
        """Carry out its cache operations, start its samplers. Raises RunnerFailure."""

    def run(self, batch: Batch) -> Samples:
        """Compute a batch that is prepared. Raises RunnerFailure."""

    @property
    def can_compute_aside(self) -> bool:
        """Whether prompts can be computed outside the slots, one at a time, by the three that follow. An idle
        engine's `tidy` forgets what was computed there."""

    def begin_aside(self, piece: AsidePiece) -> None:
        """Make room for a prompt and take over what its slot holds. Raises RunnerFailure."""

    def run_aside(self, piece: AsidePiece, goes_on: Callable[[], bool]) -> bool:
        """Compute a piece, which follows the one before. Now and then `goes_on` is asked, until it says no; it may run
        batches, and what it raises is raised here. False when it said no: all is lost then that was computed here.
        Raises RunnerFailure."""

    def land_aside(self, slot_id: int) -> None:
        """Replace what a slot holds by what was computed. When this raises RunnerFailure, the slot's contents are
        undefined until all of them are removed."""

    def embed(self, inputs: Sequence[Sequence[int]], n_piece: int) -> Iterator[list[bytes]]:
        """Vectors of inputs that fit one batch, as float32 bytes, computed in pieces of `n_piece` tokens where
        the model allows it: [] after each but the last. Raises RunnerFailure."""

    @property
    def draft_model(self) -> Callable[[Sequence[DraftRequest]], list[Draft]] | None:
        """What guesses with a second model, if there is one."""

    def slot_bytes(self, slot_id: int) -> int:
        """Size of the serialised cache of a slot."""

    def save_slot(self, slot_id: int) -> bytes:
        """The serialised cache of a slot."""

    def restore_slot(self, slot_id: int, state: bytes, n_tokens: int) -> bool:
        """Fill a slot from `save_slot` output for a slot of `n_tokens`; False, and the slot empty, when it does
        not fit."""

    def set_threads(self, n_threads: int) -> None:
        """Compute the next steps and embeddings with so many threads."""

    def tidy(self) -> bool:
        """Do a millisecond of what can wait until nobody waits for the engine; whether there is more of it."""

    def reset(self) -> None:
        """Rebuild the context after a failure: every slot is empty afterwards."""

    def close(self) -> None:
        """Free everything."""
