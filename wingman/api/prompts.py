"""`prompt` and `input` of a request, in all their forms -> token ids. In the engine's executor."""

from __future__ import annotations

from typing import Any

from wingman.engine.runner import Tokenizer
from wingman.engine.types import ModelInfo
from wingman.errors import ContextOverflow, InvalidRequest


def refuse_endless(text: str, tokenizer: Tokenizer, info: ModelInfo) -> None:
    """Raise ContextOverflow for a text that no tokenisation can fit into a slot: tokenising megabytes
    takes seconds and can't be interrupted. The count reported is the least there could be."""
    if len(text) < info.n_ctx_slot:
        return
    n_least = -(-len(text) // tokenizer.max_piece_bytes)
    if n_least >= info.n_ctx_slot:
        raise ContextOverflow(n_least, info.n_ctx_slot)


def read_prompts(raw: Any, tokenizer: Tokenizer, info: ModelInfo, field: str = "prompt") -> list[list[int]]:
    """Token ids of each prompt: `raw` is one, or a list of several (tokenize_input_prompts of
    llama-server). Raises InvalidRequest naming the field at fault, ContextOverflow for an endless one."""
    return [read_prompt(item, tokenizer, info, where) for item, where in split_prompts(raw, field)]


def split_prompts(raw: Any, field: str) -> list[tuple[Any, str]]:
    """Each prompt of a request with its path: a list with a number in it is one prompt, any other several."""
    if not isinstance(raw, list) or not raw or any(isinstance(item, int | float) for item in raw):
        return [(raw, field)]
    return [(item, f"{field}[{index}]" if len(raw) > 1 else field) for index, item in enumerate(raw)]


def read_prompt(raw: Any, tokenizer: Tokenizer, info: ModelInfo, where: str) -> list[int]:
    """Token ids of one prompt, which is at `where` in the request. A string gets BOS as the model wants; in a
    list of strings and ids only a leading string does."""
    raw = _unwrap(raw, where)
    if isinstance(raw, str):
        refuse_endless(raw, tokenizer, info)
        return tokenizer.tokenize(raw, add_special=True, parse_special=True)
    if not isinstance(raw, list) or not raw:
        raise InvalidRequest(f"Field '{where}': must be a string, or a list of strings and token ids", where)
    tokens: list[int] = []
    for index, item in enumerate(raw):
        if isinstance(item, str):
            refuse_endless(item, tokenizer, info)
            tokens += tokenizer.tokenize(item, add_special=index == 0, parse_special=True)
        elif isinstance(item, int) and not isinstance(item, bool) and 0 <= item < info.n_vocab:
            tokens.append(item)
        else:
            raise InvalidRequest(f"Field '{where}[{index}]': must be a string or a token id", where)
    return tokens


def _unwrap(raw: Any, where: str) -> Any:
    """The prompt inside {"prompt_string": ...} or {"content": [text parts]}; refuses multimodal data."""
    if not isinstance(raw, dict):
        return raw
    if raw.get("multimodal_data"):
        raise InvalidRequest(f"Field '{where}': this model takes no multimodal data", where)
    parts = raw.get("content")
    if not isinstance(parts, list):
        return raw.get("prompt_string")
    texts = []
    for index, part in enumerate(parts):
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise InvalidRequest(f"Field '{where}.content[{index}]': must be a text part", where)
        texts.append(part["text"])
    return "\n".join(texts)
