"""One GGUF model: its vocabulary, its adapters and what its header says.

Loaded and freed on the engine thread. The vocabulary functions read immutable data, so
`LlamaTokenizer` may be used from any thread until the model is freed; its owner sees to that.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from itertools import chain, compress, repeat
from pathlib import Path
from typing import Any, Final

from wingman.config import ModelConfig
from wingman.engine.llama import binding
from wingman.engine.llama.binding import lib
from wingman.engine.llama.weights import Weights, load_weights
from wingman.engine.runner import OnProgress
from wingman.engine.types import FimTokens, LoraInfo
from wingman.errors import ModelLoadFailure


def _short(name: str, result: Any) -> Any:
    """A function of vocabulary and token that keeps the interpreter's lock: whoever reads a whole vocabulary would
    give it away, and wait for it, a hundred thousand times."""
    prototype = ctypes.PYFUNCTYPE(result, ctypes.c_void_p, ctypes.c_int32)
    return prototype((name, lib._lib))


_is_eog: Final = _short("llama_vocab_is_eog", ctypes.c_bool)
_text_of: Final = _short("llama_vocab_get_text", ctypes.c_char_p)
_GULP_TOKENS: Final = 1024


class LlamaModel:
    """A loaded model."""

    def __init__(
        self, config: ModelConfig, on_progress: OnProgress | None = None, weights: Weights | None = None
    ) -> None:
        """Load the weights, unless they are loaded already, and the adapters. Raises ModelLoadFailure with what
        the library said, or when `on_progress` said to give up."""
        weights = weights or load_weights(config, on_progress)
        self.path = weights.path
        self.handle: Any = weights.handle
        self.vocab: Any = lib.llama_model_get_vocab(self.handle)
        self.tokenizer = LlamaTokenizer(self.vocab)
        self.adapters: list[Any] = []
        """Handles of the LoRA adapters; they live as long as the model."""
        self.loras = tuple(self._load_adapter(*pair) for pair in _scaled(config))

    def _load_adapter(self, path: Path, scale: float) -> LoraInfo:
        handle = lib.llama_adapter_lora_init(self.handle, str(path.expanduser()).encode())
        if not handle:
            reason = binding.take_errors() or "the library gave no reason"
            self.close()
            raise ModelLoadFailure(f"can't load the LoRA adapter {path}: {reason}")
        self.adapters.append(handle)
        return LoraInfo(str(path), scale, _adapter_metadata(handle))

    def close(self) -> None:
        """Free the weights; the tokenizer must not be used any more."""
        if self.handle:
            lib.llama_model_free(self.handle)
            self.handle = None

    def describe(self) -> str:
        """The library's one-line description."""
        buffer = ctypes.create_string_buffer(256)
        lib.llama_model_desc(self.handle, buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace")

    def ftype(self) -> str:
        """Quantisation of the file in words."""
        name = lib.llama_ftype_name(lib.llama_model_ftype(self.handle))
        return name.decode() if name else ""

    def chat_template(self, name: str | None = None) -> str | None:
        """The jinja2 template in the GGUF, the default one or that of a name, or None."""
        raw = lib.llama_model_chat_template(self.handle, name.encode() if name else None)
        return raw.decode("utf-8", "replace") if raw else None

    def metadata(self) -> dict[str, str]:
        """Key-value pairs of the GGUF header, arrays and long texts shortened by the library."""
        pairs = {}
        buffer = ctypes.create_string_buffer(512)
        for index in range(lib.llama_model_meta_count(self.handle)):
            lib.llama_model_meta_key_by_index(self.handle, index, buffer, len(buffer))
            key = buffer.value.decode("utf-8", "replace")
            lib.llama_model_meta_val_str_by_index(self.handle, index, buffer, len(buffer))
            pairs[key] = buffer.value.decode("utf-8", "replace")
        return pairs

    @property
    def can_generate(self) -> bool:
        """Whether it predicts the next token; encoders such as BERT don't. Raises ModelLoadFailure for an
        encoder-decoder model, which needs more than one pass."""
        has_encoder = bool(lib.llama_model_has_encoder(self.handle))
        has_decoder = bool(lib.llama_model_has_decoder(self.handle))
        if has_encoder and has_decoder:
            raise ModelLoadFailure(f"{self.path.name} is an encoder-decoder model; those are not supported")
        return has_decoder and not self._is_bidirectional()

    def _is_bidirectional(self) -> bool:
        metadata = self.metadata()
        return metadata.get(metadata.get("general.architecture", "") + ".attention.causal") == "false"

    @property
    def can_rollback(self) -> bool:
        """Whether its cache can drop the last tokens of a sequence."""
        return not self.is_recurrent and not lib.llama_model_n_swa(self.handle)

    @property
    def head_width(self) -> int:
        """Numbers in a key."""
        metadata = self.metadata()
        given = metadata.get(metadata.get("general.architecture", "") + ".attention.key_length", "")
        if given.isdigit():
            return int(given)
        n_heads = max(1, int(lib.llama_model_n_head(self.handle)))
        return int(lib.llama_model_n_embd(self.handle)) // n_heads

    @property
    def is_recurrent(self) -> bool:
        """Whether it has a state that can't be taken back, alone or beside a cache."""
        return bool(lib.llama_model_is_recurrent(self.handle) or lib.llama_model_is_hybrid(self.handle))


def _scaled(config: ModelConfig) -> list[tuple[Path, float]]:
    pairs = [*config.lora, *config.lora_scaled]
    return [(path, 0.0 if config.lora_init_without_apply else scale) for path, scale in pairs]


def _adapter_metadata(handle: Any) -> dict[str, str]:
    pairs = {}
    buffer = ctypes.create_string_buffer(512)
    for index in range(lib.llama_adapter_meta_count(handle)):
        lib.llama_adapter_meta_key_by_index(handle, index, buffer, len(buffer))
        key = buffer.value.decode("utf-8", "replace")
        lib.llama_adapter_meta_val_str_by_index(handle, index, buffer, len(buffer))
        pairs[key] = buffer.value.decode("utf-8", "replace")
    return pairs


class LlamaTokenizer:
    """Tokenizer over a llama_vocab; thread-safe while the model lives."""

    def __init__(self, vocab: Any) -> None:
        self._vocab = vocab
        self.n_tokens = int(lib.llama_vocab_n_tokens(vocab))
        self._pieces: list[bytes | None] = [None] * self.n_tokens

    @functools.cached_property
    def max_piece_bytes(self) -> int:  # noqa: D102
        # a token's text in the vocabulary has each of its bytes in one character at least
        texts = (map(_text_of, repeat(self._vocab), tokens) for tokens in self._gulps())
        return max((max(map(len, filter(None, each)), default=1) for each in texts), default=1)

    @functools.cached_property
    def eog_tokens(self) -> tuple[int, ...]:  # noqa: D102
        found = (compress(tokens, map(_is_eog, repeat(self._vocab), tokens)) for tokens in self._gulps())
        return tuple(chain.from_iterable(found))

    def _gulps(self) -> Iterator[range]:
        """All tokens, as many at a time as take less than a millisecond while no other thread has a turn."""
        starts = range(0, self.n_tokens, _GULP_TOKENS)
        return (range(start, min(start + _GULP_TOKENS, self.n_tokens)) for start in starts)

    def fim_tokens(self) -> FimTokens | None:
        """The fill-in-the-middle tokens, or None when one of the three needed is missing."""
        find = (lib.llama_vocab_fim_pre, lib.llama_vocab_fim_suf, lib.llama_vocab_fim_mid)
        needed = [int(function(self._vocab)) for function in find]
        if min(needed) < 0:
            return None
        prefix, suffix, middle = needed
        return FimTokens(
            prefix,
            suffix,
            middle,
            int(lib.llama_vocab_fim_rep(self._vocab)),
            int(lib.llama_vocab_fim_sep(self._vocab)),
        )

    def is_eog(self, token: int) -> bool:  # noqa: D102
        return bool(_is_eog(self._vocab, token))

    def piece(self, token: int, special: bool = False) -> bytes:  # noqa: D102
        if special:
            return self._read_piece(token, special=True)
        piece = self._pieces[token]
        if piece is None:
            piece = self._pieces[token] = self._read_piece(token, special=False)
        return piece

    def spell(self, data: bytes) -> list[int] | None:
        """Tokens of one byte each that are `data` together, or None when a byte has none. Tokenising does not
        do: SentencePiece puts a space in front."""
        if not self._byte_tokens.keys() >= set(data):
            return None
        return [self._byte_tokens[byte] for byte in data]

    @functools.cached_property
    def _byte_tokens(self) -> dict[int, int]:
        pieces = ((token, self.piece(token)) for token in range(self.n_tokens))
        return {piece[0]: token for token, piece in pieces if len(piece) == 1}

    def _read_piece(self, token: int, *, special: bool) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n_bytes = lib.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if n_bytes >= 0:
                return buffer.raw[:n_bytes]
            size = -n_bytes

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:  # noqa: D102
        data = text.encode("utf-8", "replace")
        capacity = len(data) + 8
        while True:
            buffer = (lib.llama_token * capacity)()
            count = lib.llama_tokenize(
                self._vocab, data, len(data), buffer, capacity, add_special, parse_special
            )
            if count >= 0:
                return list(buffer[:count])
            capacity = -count

    def detokenize(self, tokens: Sequence[int], special: bool) -> str:  # noqa: D102
        array = (lib.llama_token * max(len(tokens), 1))(*tokens)
        size = 16 * len(tokens) + 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = lib.llama_detokenize(self._vocab, array, len(tokens), buffer, size, False, special)
            if count >= 0:
                return buffer.raw[:count].decode("utf-8", "replace")
            size = -count

    def special_text(self, token: int) -> str:
        """Text of a special token such as BOS; "" when the model has none."""
        return "" if token < 0 else self.piece(token, special=True).decode("utf-8", "replace")
