"""JSON request bodies from a hostile client.

Invariant: whatever the bytes, parsing a body, checking its fields, reading its prompt or messages
and building its job raise nothing but WingmanError; a job that is built holds only numbers within
their documented ranges, and the answers made from it can be written as JSON.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import TypeVar

import orjson

from wingman.api.generation import JobMaker, read_prompt, refuse_unsupported, settings_of
from wingman.api.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationFields,
    TokenizeRequest,
    parse_json,
)
from wingman.api.shapes import select_fields
from wingman.chat.conversation import read_messages, render_prompt, split_prefill
from wingman.chat.template import CHATML, ChatTemplate, Rendering
from wingman.config import Config
from wingman.engine.types import Job, ModelInfo
from wingman.errors import WingmanError

_SCALARS = tuple(
    name.encode()
    for name in dict.fromkeys(CompletionRequest.__struct_fields__ + ChatRequest.__struct_fields__)
)
_STRUCTURED = tuple(b"messages prompt logit_bias stop samplers content tokens response_format".split())
_OBJECTS = (
    b"role content",
    b"role content tool_calls",
    b"type text",
    b"type",
    b"prompt_string multimodal_data",
    b"1 a",
)
_ROLES = (b'"user"', b'"assistant"', b'"developer"', b'""', b"1", b"null")
_VALUES = (
    tuple(
        b"null true false 0 -1 1 2 1.5 0.1 1e308 -1e308 1e-320 2147483648 18446744073709551615 -9223372036854775808 "
        b"123456789012345678901234567890 [] {} [[]] [{}]".split()
    )
    + tuple(b'"' + text + b'"' for text in b"a \\u0000 \xf0\x9f\x98\x80 text image_url top_k 257".split())
    + (b'""', b'{"type":"text","text":"a"}', b'{"role":"assistant","content":"a"}')
)
TOKENS = (
    *(b'"' + field + b'":' for field in _SCALARS + _STRUCTURED), *_VALUES,
    b",", b":", b"{", b"}", b"[", b"]", b"[" * 200, b'{"prompt_string":', b"\\u0000", b"\xff",
)  # fmt: skip

_N_BYTES = 256
_BOS = _N_BYTES
_EOS = _N_BYTES + 1
_N_VOCAB = _N_BYTES + 2
T = TypeVar("T")


class ByteTokenizer:
    """Each byte is a token, then come BOS and EOS."""

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """Bytes of `text`, after BOS if `add_special`."""
        assert isinstance(parse_special, bool)
        return [*([_BOS] if add_special else []), *text.encode()]

    def detokenize(self, tokens: Sequence[int], special: bool) -> str:
        """Text of `tokens`."""
        return b"".join(self.piece(token, special) for token in tokens).decode("utf-8", "replace")

    def piece(self, token: int, special: bool = False) -> bytes:
        """The byte, or a name for a special token."""
        if token < _N_BYTES:
            return bytes((token,))
        return b"<s>" if special else b""

    def is_eog(self, token: int) -> bool:
        """Whether it is EOS."""
        return token == _EOS


_TOKENIZER = ByteTokenizer()
_CONFIG = Config()
_INFO = ModelInfo(
    path="", description="", n_vocab=_N_VOCAB, n_ctx_train=512, n_ctx_slot=512, n_embd=8, n_params=1, size_bytes=1,
    ftype="", vocab_type=1, n_slots=1, bos_token="<s>", eos_token="</s>", adds_bos=True, chat_template=None, build="",
    system_info="", can_shift=True, max_piece_bytes=3, eog_tokens=(_EOS,),
)  # fmt: skip
_MAKER = JobMaker(_CONFIG, _INFO, _TOKENIZER)
_TEMPLATE = ChatTemplate(CHATML)


def one(data: bytes) -> None:
    """Check the invariant for `data`, and for a well-formed body made of it."""
    _check(data)
    _check(_Builder(data).body())


class _Builder:
    """Bytes -> well-formed JSON, chosen at random but by them alone: mutated text seldom passes the JSON parser."""

    def __init__(self, data: bytes) -> None:
        self._rng = random.Random(data)

    def body(self) -> bytes:
        """Known fields with any values, at least one of them structured."""
        items = [b'"%s":%s' % (self._pick(_STRUCTURED), self._list(0) if self._count() else self._value(0))]
        items += [b'"%s":%s' % (self._pick(_SCALARS), self._value(3)) for _ in range(self._count())]
        return b"{%s}" % b",".join(items)

    def _list(self, depth: int) -> bytes:
        return b"[%s]" % b",".join(self._value(depth + 1) for _ in range(1 + self._count()))

    def _value(self, depth: int) -> bytes:
        kind = self._rng.randrange(4)
        if depth > 4 or kind == 0:
            return self._pick(_VALUES)
        if kind == 1:
            return self._list(depth)
        names = self._pick(_OBJECTS).split()
        return b"{%s}" % b",".join(
            b'"%s":%s' % (name, self._pick(_ROLES) if name == b"role" else self._value(depth + 2))
            for name in names
        )

    def _count(self) -> int:
        return self._rng.randrange(4)

    def _pick(self, options: Sequence[bytes]) -> bytes:
        return self._rng.choice(options)


def _check(data: bytes) -> None:
    completion = _refusable(lambda: parse_json(data, CompletionRequest))
    if completion is not None:
        prompt = _refusable(lambda: read_prompt(completion.prompt, _TOKENIZER, _INFO))
        _check_fields(completion, prompt or [_BOS])
    chat = _refusable(lambda: parse_json(data, ChatRequest))
    if chat is not None:
        text = _refusable(lambda: _render(chat))
        _check_fields(chat, _TOKENIZER.tokenize(text or "", add_special=True, parse_special=True))
    tokenize = _refusable(lambda: parse_json(data, TokenizeRequest))
    if tokenize is not None and isinstance(tokenize.content, list):
        assert all(type(part) in (int, str) for part in tokenize.content)
    detokenize = _refusable(lambda: parse_json(data, DetokenizeRequest))
    if detokenize is not None:
        assert all(type(token) is int for token in detokenize.tokens or ())


def _refusable(step: Callable[[], T]) -> T | None:
    """What `step` returns, or None when it refuses the request."""
    try:
        return step()
    except WingmanError as error:
        refusal = error
    assert refusal.message
    refusal.message.encode()  # goes into an answer
    return None


def _render(chat: ChatRequest) -> str:
    conversation = split_prefill(read_messages(chat.messages or (), knows_developer=False))
    rendering = Rendering(
        chat.add_generation_prompt is not False, _INFO.bos_token, _INFO.eos_token, chat.chat_template_kwargs
    )
    return render_prompt(_TEMPLATE, conversation, rendering, adds_bos=_INFO.adds_bos)


def _check_fields(fields: GenerationFields, prompt: Sequence[int]) -> None:
    _refusable(lambda: refuse_unsupported(fields))
    job = _refusable(lambda: _MAKER.build_job(1, prompt, fields))
    if job is not None:
        _check_job(job)
        settings = settings_of(job, _CONFIG, "model")
        orjson.dumps(select_fields({"generation_settings": settings}, fields.response_fields))


def _check_job(job: Job) -> None:
    assert job.prompt
    assert all(0 <= token < _N_VOCAB for token in job.prompt)
    assert job.n_predict >= -1
    assert job.n_keep >= -1
    assert job.id_slot >= -1
    assert all(job.stop)
    sampling = job.sampling
    assert 0 <= sampling.seed < 2**32
    assert 0 <= sampling.top_k < 2**31
    assert sampling.temperature >= 0
    for share in (sampling.top_p, sampling.min_p, sampling.xtc_probability, sampling.xtc_threshold):
        assert 0 <= share <= 1
    assert sampling.repeat_penalty > 0
    assert sampling.mirostat in (0, 1, 2)
    for token, bias in sampling.logit_bias:
        assert 0 <= token < _N_VOCAB
        assert not math.isnan(bias)
