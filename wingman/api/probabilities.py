"""Token probabilities -> what clients read: llama-server's items, the original's keys, OpenAI's legacy
shape. Pure."""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence
from typing import Any

from wingman.engine.runner import Tokenizer
from wingman.engine.types import Finished, Job, StopType, TokenProb


def native_probs(finished: Finished, job: Job, tokenizer: Tokenizer) -> tuple[TokenProb, ...]:
    """All of a native answer that was not streamed, less as many as its stop string has tokens, as
    llama-server does it."""
    if finished.stop_type is not StopType.WORD or job.stream:
        return finished.probs
    n_dropped = len(tokenizer.tokenize(finished.stopping_word, add_special=False, parse_special=False))
    return finished.probs[: max(len(finished.probs) - n_dropped, 0)]


def shown_probs(finished: Finished, job: Job, tokenizer: Tokenizer) -> tuple[TokenProb, ...]:
    """All of a chat answer that was not streamed; after a stop string those whose text is seen, as in a
    stream."""
    if finished.stop_type is not StopType.WORD or job.stream:
        return finished.probs
    n_bytes, start = len(finished.text.encode("utf-8", "replace")), 0
    for index, prob in enumerate(finished.probs):
        if start >= n_bytes:
            return finished.probs[:index]
        start += len(tokenizer.piece(prob.token))
    return finished.probs


def prob_items(probs: Sequence[TokenProb], tokenizer: Tokenizer, *, is_post: bool) -> list[dict[str, Any]]:
    """llama-server's items (completion_token_output::probs_vector_to_json), used by chat too."""
    value, top = ("prob", "top_probs") if is_post else ("logprob", "top_logprobs")
    return [
        {
            **_named(prob.token, prob.value, tokenizer, value),
            top: [_named(token, number, tokenizer, value) for token, number in prob.top],
        }
        for prob in probs
    ]


def native_items(probs: Sequence[TokenProb], tokenizer: Tokenizer, *, is_post: bool) -> list[dict[str, Any]]:
    """The same with the original Wingman's `content` and `probs` beside."""
    items = prob_items(probs, tokenizer, is_post=is_post)
    for item, prob in zip(items, probs, strict=True):
        item["content"] = item["token"]
        item["probs"] = [
            {"tok_str": _text(token, tokenizer), "prob": number if is_post else math.exp(number)}
            for token, number in prob.top
        ]
    return items


def text_logprobs(
    probs: Sequence[TokenProb], tokenizer: Tokenizer, offset: int, *, is_post: bool
) -> dict[str, Any]:
    """`logprobs` of a text completion: OpenAI's legacy keys, and `content` as in chat. `offset` is where the
    first token begins in the text, in characters."""
    texts = [_text(prob.token, tokenizer) for prob in probs]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "content": prob_items(probs, tokenizer, is_post=is_post),
        "tokens": texts,
        "token_logprobs": [_log(prob.value, is_post=is_post) for prob in probs],
        "top_logprobs": [
            {_text(token, tokenizer): _log(number, is_post=is_post) for token, number in prob.top}
            for prob in probs
        ],
        "text_offset": offsets,
    }


def _named(token: int, number: float, tokenizer: Tokenizer, key: str) -> dict[str, Any]:
    data = tokenizer.piece(token)
    return {"id": token, "token": _decode(data), "bytes": list(data), key: number}


def _text(token: int, tokenizer: Tokenizer) -> str:
    return _decode(tokenizer.piece(token))


def _decode(data: bytes) -> str:
    """The text of a token; an incomplete character at its end is left out."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


def _log(number: float, *, is_post: bool) -> float:
    if not is_post:
        return number
    return math.log(number) if number > 0 else -9999.0
