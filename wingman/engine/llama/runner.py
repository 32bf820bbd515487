"""LlamaRunner: the Runner that computes with llama.cpp. Made, used and closed on the engine thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from wingman.config import ContextConfig, ModelConfig
from wingman.engine.drafting import Draft, DraftRequest
from wingman.engine.llama import binding
from wingman.engine.llama.aside import AsideContext, has_one_part
from wingman.engine.llama.binding import lib
from wingman.engine.llama.candidates import Candidates
from wingman.engine.llama.context import LlamaContext, context_params
from wingman.engine.llama.draft import DraftModel
from wingman.engine.llama.embedder import Embedder, describe_embedding
from wingman.engine.llama.model import LlamaModel
from wingman.engine.llama.parts import LlamaParts
from wingman.engine.llama.sampler import Draw, Sampler
from wingman.engine.llama.weights import Weights
from wingman.engine.runner import (
    AsidePiece,
    Batch,
    OnProgress,
    RunnerFailure,
    SamplerStart,
    Samples,
    Tokenizer,
)
from wingman.engine.types import ModelInfo


class LlamaRunner:
    """A loaded model, its contexts and a sampler per slot. A model that only embeds has no context for
    generation."""

    def __init__(
        self,
        model: ModelConfig,
        context: ContextConfig,
        on_progress: OnProgress | None = None,
        weights: Weights | None = None,
        *,
        is_alone: bool = False,
    ) -> None:
        """Load the model, or take over its weights. `is_alone`: nothing else in this process computes or serves
        yet. Raises ModelLoadFailure."""
        self._context_config = context
        self._model = LlamaModel(model, on_progress, weights)
        self._context: LlamaContext | None = None
        self._embedder: Embedder | None = None
        self._draft: DraftModel | None = None
        self._aside: AsideContext | None = None
        self._has_one_part = False
        """Whether the cache is of the form that prompts computed outside it can land in."""
        self._is_on_gpu = binding.can_offload() and model.n_gpu_layers != 0
        self._samplers: dict[int, Sampler] = {}
        try:
            self._open(context, is_alone=is_alone)
        except BaseException:
            self._close_contexts()
            self._model.close()
            raise

    def _open(self, context: ContextConfig, *, is_alone: bool) -> None:
        if self._model.can_generate:
            self._context = LlamaContext(self._model, context, is_alone=is_alone)
            self._has_one_part = has_one_part(self._context, context.parallel)
            self._context.warm_up(self._model, is_alone=is_alone)
            if context.model_draft is not None:
                self._draft = DraftModel(self._model, _draft_config(context), context)
        self.tokenizer: Tokenizer = self._model.tokenizer
        self.info = self._describe()
        self._candidates = Candidates(self.info.n_vocab)
        self.parts = LlamaParts(self._model.vocab, self.info.n_ctx_slot)
        if context.embeddings or not self.info.can_generate:
            self._open_embedder()

    @property
    def n_batch(self) -> int:
        """Most tokens in a batch."""
        return self._context.n_batch if self._context else 1

    @property
    def n_ubatch(self) -> int:
        """Most tokens computed at once."""
        return self._context.n_ubatch if self._context else 1

    @property
    def n_ctx(self) -> int:
        """Tokens the whole cache holds."""
        return self._context.n_ctx if self._context else 0

    @property
    def can_rollback(self) -> bool:
        """Whether the cache can drop the last tokens of a slot. A full-size sliding window can't either: what
        was parked or copied lacks the tokens that its end no longer sees."""
        return self._model.can_rollback

    @property
    def n_window(self) -> int:
        """A slot that holds no more tokens can drop the last ones even so."""
        return 0 if self._model.is_recurrent else int(lib.llama_model_n_swa(self._model.handle))

    def prepare(self, batch: Batch) -> None:
        """Bring cache and samplers into the state that a batch begins with. Raises RunnerFailure."""
        context = self._generating()
        for op in batch.kv:
            context.edit_cache(op)
        for start in batch.samplers:
            self._start_sampler(start)
        context.set_lora(self._model.adapters, batch.lora)

    def run(self, batch: Batch) -> Samples:
        """Compute a batch that is prepared, and sample. Raises RunnerFailure."""
        context = self._generating()
        last = context.decode(batch)
        wanted = {
            chunk.slot_id: (index, chunk.tokens[len(chunk.tokens) - chunk.n_draft :])
            for chunk, index in zip(batch.chunks, last, strict=True)
            if chunk.wants_sample
        }
        for fork in batch.forks:
            context.fork(fork)
            if fork.source in wanted:
                wanted[fork.target] = wanted[fork.source]
        started = time.perf_counter()
        runs = {slot: self._samplers[slot].draw_run(context.handle, *where) for slot, where in wanted.items()}
        return _samples(runs, time.perf_counter() - started)

    def _generating(self) -> LlamaContext:
        if self._context is None:
            raise RunnerFailure("this model does not generate text")
        return self._context

    def _start_sampler(self, start: SamplerStart) -> None:
        previous = self._samplers.pop(start.slot_id, None)
        if previous is not None:
            previous.close()
        self._samplers[start.slot_id] = Sampler(
            start,
            self.parts,
            self._candidates,
            self._model.vocab,
            self._model.tokenizer,
            self.info.n_ctx_slot,
        )

    @property
    def can_compute_aside(self) -> bool:
        """Whether prompts can be computed outside the slots: not where a GPU is kept busy by what is enqueued
        ahead; not in a cache that all slots share, whose room is counted by the step; nor in one of several
        parts."""
        is_split = self._context is not None and not self._context_config.kv_unified
        return is_split and not self._is_on_gpu and self._model.can_rollback and self._has_one_part

    def begin_aside(self, piece: AsidePiece) -> None:
        """Make room for a prompt and take over what its slot holds. Raises RunnerFailure."""
        slots = self._generating()
        if self._aside is None or self._aside.n_ctx < piece.n_prompt:
            self._close_aside()
            self._aside = AsideContext(self._model, self._context_config, slots, piece.n_prompt)
        self._aside.begin(piece, slots)

    def run_aside(self, piece: AsidePiece, goes_on: Callable[[], bool]) -> bool:
        """Compute a piece, asking now and then whether to go on. Raises RunnerFailure."""
        return self._begun_aside().run(piece, goes_on)

    def land_aside(self, slot_id: int) -> None:
        """Replace what a slot holds by what was computed. Raises RunnerFailure."""
        self._generating().write(self._begun_aside().result(), slot_id)

    def _begun_aside(self) -> AsideContext:
        if self._aside is None:
            raise RunnerFailure("nothing was begun outside the slots")
        return self._aside

    def embed(self, inputs: Sequence[Sequence[int]], n_piece: int) -> Iterator[list[bytes]]:
        """Vectors of inputs that fit one batch, as float32 bytes, computed in pieces of `n_piece` tokens by
        models that generate: [] after each but the last. Raises RunnerFailure."""
        return self._open_embedder().embed(inputs, n_piece)

    def _open_embedder(self) -> Embedder:
        if self._embedder is None:
            params = context_params(self._model, self._context_config)
            self._embedder = Embedder(self._model, params, self.info.embedding)
        return self._embedder

    @property
    def draft_model(self) -> Callable[[Sequence[DraftRequest]], list[Draft]] | None:
        """What guesses with a second model, if there is one."""
        return None if self._draft is None else self._draft.draft

    def slot_bytes(self, slot_id: int) -> int:
        """Size of the serialised cache of a slot."""
        return self._generating().slot_bytes(slot_id)

    def save_slot(self, slot_id: int) -> bytes:
        """The serialised cache of a slot."""
        return self._generating().read_slot(slot_id)

    def restore_slot(self, slot_id: int, state: bytes, n_tokens: int) -> bool:
        """Fill a slot from `save_slot` output; False, and the slot empty, when it does not fit."""
        return self._generating().write_slot(slot_id, state, n_tokens)

    def set_threads(self, n_threads: int) -> None:
        """Compute the next steps and embeddings with so many threads."""
        for context in (self._draft, self._context, self._embedder, self._aside):
            if context is not None:
                context.set_threads(n_threads)

    def tidy(self) -> bool:
        """Free the context for long prompts, then give back some of the pages that the cache does not use yet;
        whether there may be more to do."""
        if self._aside is not None:
            self._close_aside()
            return True
        return self._context is not None and self._context.tidy()

    def reset(self) -> None:
        """Make a fresh context; the weights stay, and so does what is computed aside."""
        self._close_samplers()
        self._generating().close()
        self._context = LlamaContext(self._model, self._context_config)

    def close(self) -> None:
        """Free samplers, contexts and weights, in this order."""
        self._close_samplers()
        self.parts.close()
        self._close_contexts()
        self._model.close()

    def _close_aside(self) -> None:
        if self._aside is not None:
            self._aside.close()
            self._aside = None

    def _close_contexts(self) -> None:
        self._close_aside()
        for context in (self._draft, self._context, self._embedder):
            if context is not None:
                context.close()

    def _close_samplers(self) -> None:
        for sampler in self._samplers.values():
            sampler.close()
        self._samplers.clear()

    def _can_shift(self, context: LlamaContext) -> bool:
        """Whether positions can be moved. Keys in bf16, or quantised with heads that are no multiple of 64 wide,
        end the process when they are (seen with 0.3.36)."""
        type_k = self._context_config.cache_type_k
        is_safe = type_k in ("f16", "f32") or (type_k != "bf16" and self._model.head_width % 64 == 0)
        return is_safe and bool(lib.llama_memory_can_shift(context.memory))

    def _describe(self) -> ModelInfo:
        model, tokenizer, vocab = self._model, self._model.tokenizer, self._model.vocab
        embedding = describe_embedding(model, self._context_config)
        context = self._context
        return ModelInfo(
            path=str(model.path),
            description=model.describe(),
            n_vocab=tokenizer.n_tokens,
            n_ctx_train=int(lib.llama_model_n_ctx_train(model.handle)),
            n_ctx_slot=context.n_ctx_slot if context else embedding.n_max,
            n_ctx_total=context.n_ctx if context else embedding.n_max,
            n_embd=int(lib.llama_model_n_embd(model.handle)),
            n_params=int(lib.llama_model_n_params(model.handle)),
            size_bytes=int(lib.llama_model_size(model.handle)),
            ftype=model.ftype(),
            vocab_type=int(lib.llama_vocab_type(vocab)),
            n_slots=self._context_config.parallel,
            bos_token=tokenizer.special_text(int(lib.llama_vocab_bos(vocab))),
            eos_token=tokenizer.special_text(int(lib.llama_vocab_eos(vocab))),
            adds_bos=bool(lib.llama_vocab_get_add_bos(vocab)),
            adds_eos=bool(lib.llama_vocab_get_add_eos(vocab)),
            adds_sep=bool(lib.llama_vocab_get_add_sep(vocab)),
            bos_id=int(lib.llama_vocab_bos(vocab)),
            eos_id=int(lib.llama_vocab_eos(vocab)),
            sep_token=int(lib.llama_vocab_sep(vocab)),
            chat_template=model.chat_template(),
            rerank_template=model.chat_template("rerank"),
            build=binding.build_info(),
            system_info=binding.system_info(),
            can_shift=context is not None and self._can_shift(context),
            can_generate=context is not None,
            embedding=embedding,
            fim=tokenizer.fim_tokens(),
            loras=model.loras,
            metadata=model.metadata(),
        )


def _draft_config(context: ContextConfig) -> ModelConfig:
    return ModelConfig(model=context.model_draft, n_gpu_layers=context.n_gpu_layers_draft)


def _samples(runs: dict[int, tuple[Draw, ...]], sample_s: float) -> Samples:
    return Samples(
        tokens={slot: [draw.token for draw in run if draw.token >= 0] for slot, run in runs.items()},
        probs={
            slot: [draw.prob for draw in run if draw.prob is not None]
            for slot, run in runs.items()
            if run[0].prob is not None
        },
        stuck=frozenset(slot for slot, run in runs.items() if run[-1].token < 0),
        sample_s=sample_s,
    )
