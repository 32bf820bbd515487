"""LlamaRunner: the Runner that computes with llama.cpp. Made, used and closed on the engine thread."""

from __future__ import annotations

from wingman.config import ContextConfig, ModelConfig
from wingman.engine.llama import binding
from wingman.engine.llama.binding import lib
from wingman.engine.llama.context import LlamaContext
from wingman.engine.llama.model import LlamaModel
from wingman.engine.llama.sampler import Sampler
from wingman.engine.runner import Batch, Samples, Tokenizer
from wingman.engine.types import ModelInfo


class LlamaRunner:
    """A loaded model, its context and a sampler per slot."""

    def __init__(self, model: ModelConfig, context: ContextConfig) -> None:
        """Load the model. Raises ModelLoadFailure."""
        self._context_config = context
        self._model = LlamaModel(model)
        try:
            self._context = LlamaContext(self._model, context)
        except BaseException:
            self._model.close()
            raise
        self._samplers: dict[int, Sampler] = {}
        self._context.warm_up(self._model)
        self.tokenizer: Tokenizer = self._model.tokenizer
        self.info = self._describe()

    @property
    def n_batch(self) -> int:
        """Most tokens in a batch."""
        return self._context.n_batch

    @property
    def n_ubatch(self) -> int:
        """Most tokens computed at once."""
        return self._context.n_ubatch

    @property
    def n_ctx(self) -> int:
        """Tokens the whole cache holds."""
        return self._context.n_ctx

    @property
    def can_rollback(self) -> bool:
        """Whether the cache can drop the last tokens of a slot."""
        return self._model.can_rollback or self._context_config.swa_full

    def run(self, batch: Batch) -> Samples:
        """Compute a batch and sample. Raises RunnerFailure."""
        context = self._context
        for op in batch.kv:
            context.edit_cache(op)
        for start in batch.samplers:
            previous = self._samplers.pop(start.slot_id, None)
            if previous is not None:
                previous.close()
            self._samplers[start.slot_id] = Sampler(
                start.params, start.history, self._model.vocab, self.info.n_vocab, context.n_ctx_slot
            )
        last = context.decode(batch)
        return {
            chunk.slot_id: self._samplers[chunk.slot_id].sample(context.handle, index)
            for chunk, index in zip(batch.chunks, last, strict=True)
            if chunk.wants_sample
        }

    def reset(self) -> None:
        """Make a fresh context; the weights stay."""
        self._close_samplers()
        self._context.close()
        self._context = LlamaContext(self._model, self._context_config)

    def close(self) -> None:
        """Free samplers, context and weights, in this order."""
        self._close_samplers()
        self._context.close()
        self._model.close()

    def _close_samplers(self) -> None:
        for sampler in self._samplers.values():
            sampler.close()
        self._samplers.clear()

    def _describe(self) -> ModelInfo:
        model, tokenizer = self._model, self._model.tokenizer
        return ModelInfo(
            path=str(model.path),
            description=model.describe(),
            n_vocab=tokenizer.n_tokens,
            n_ctx_train=int(lib.llama_model_n_ctx_train(model.handle)),
            n_ctx_slot=self._context.n_ctx_slot,
            n_embd=int(lib.llama_model_n_embd(model.handle)),
            n_params=int(lib.llama_model_n_params(model.handle)),
            size_bytes=int(lib.llama_model_size(model.handle)),
            ftype=model.ftype(),
            vocab_type=int(lib.llama_vocab_type(model.vocab)),
            n_slots=self._context_config.parallel,
            bos_token=tokenizer.special_text(int(lib.llama_vocab_bos(model.vocab))),
            eos_token=tokenizer.special_text(int(lib.llama_vocab_eos(model.vocab))),
            adds_bos=bool(lib.llama_vocab_get_add_bos(model.vocab)),
            chat_template=model.chat_template(),
            build=binding.build_info(),
            system_info=lib.llama_print_system_info().decode("utf-8", "replace"),
            max_piece_bytes=tokenizer.max_piece_bytes,
            can_shift=bool(lib.llama_memory_can_shift(self._context.memory)),
            eog_tokens=tokenizer.eog_tokens,
            metadata=model.metadata(),
        )
