"""Requests that both servers must refuse, with the same status and type of error. Data only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from tools.compare_answers import refusal
from tools.compare_cases import CHATS, Case

_USER: Final = {"role": "user", "content": "Hi"}
_ASSISTANT: Final = {"role": "assistant", "content": "Yes"}
COMPLETIONS: Final[dict[str, Any]] = {
    "not JSON": b"{",
    "no body": b"",
    "not UTF-8": b'{"prompt": "\xff"}',
    "no object": b"[1]",
    "no prompt": {},
    "prompt: number": {"prompt": 5},
    "prompt: empty list": {"prompt": []},
    "prompt: object": {"prompt": {"a": 1}},
    "prompt: id not in the vocabulary": {"prompt": [1, 9_999_999]},
    "prompt: negative id": {"prompt": [-5]},
    "prompt: too long": {"prompt": "word " * 2100},
    "prompt: too long, streamed": {"prompt": "word " * 2100, "stream": True},
    "n_predict: text": {"prompt": "Hi", "n_predict": "5"},
    "n_predict: -2": {"prompt": "Hi", "n_predict": -2},
    "n_cmpl: more than slots": {"prompt": "Hi", "n_cmpl": 2},
    "temperature: text": {"prompt": "Hi", "temperature": "hot"},
    "stream: number": {"prompt": "Hi", "stream": 1},
    "stop: number": {"prompt": "Hi", "stop": [1]},
    "repeat_last_n: -2": {"prompt": "Hi", "repeat_last_n": -2},
    "repeat_penalty: 0": {"prompt": "Hi", "repeat_penalty": 0},
    "no dry breakers": {"prompt": "Hi", "dry_sequence_breakers": []},
    "adaptive_decay: 2": {"prompt": "Hi", "adaptive_decay": 2},
    "grammar: open": {"prompt": "Hi", "grammar": "root ::= ("},
    "grammar: no root": {"prompt": "Hi", "grammar": 'a ::= "b"'},
    "grammar: unknown rule": {"prompt": "Hi", "grammar": "root ::= other"},
    "grammar: left recursion": {"prompt": "Hi", "grammar": 'root ::= root "a" | "b"'},
    "grammar: number": {"prompt": "Hi", "grammar": 5},
    "schema: number": {"prompt": "Hi", "json_schema": 123},
    "schema: type number": {"prompt": "Hi", "json_schema": {"type": 123}},
    "schema: unknown type": {"prompt": "Hi", "json_schema": {"type": "hiccup"}},
    "schema: dangling reference": {"prompt": "Hi", "json_schema": {"$ref": "#/$defs/x"}},
    "lora: object": {"prompt": "Hi", "lora": {}},
}
CHAT_FIELDS: Final[dict[str, dict[str, Any]]] = {
    "no messages": {},
    "messages: text": {"messages": "Hi"},
    "no role": {"messages": [{"content": "Hi"}]},
    "content: number": {"messages": [{"role": "user", "content": 5}]},
    "no content": {"messages": [{"role": "user"}]},
    "image": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    "unknown part": {"messages": [{"role": "user", "content": [{"type": "smell"}]}]},
    "two answers at the end": {"messages": [_USER, _ASSISTANT, _ASSISTANT]},
    "top_logprobs alone": {"messages": [_USER], "top_logprobs": 3},
    "response_format: unknown": {"messages": [_USER], "response_format": {"type": "poem"}},
    "response_format: bad schema": {
        "messages": [_USER],
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "hiccup"}}},
    },
    "schema and grammar": {"messages": [_USER], "json_schema": {}, "grammar": 'root ::= "a"'},
    "tools: text": {"messages": [_USER], "tools": "hammer"},
    "tool_choice: unknown": {"messages": [_USER], "tools": [], "tool_choice": "maybe"},
    "answer and continue": {
        "messages": [_USER, _ASSISTANT],
        "add_generation_prompt": True,
        "continue_final_message": True,
    },
    "continue, with the default prompt": {"messages": [_USER, _ASSISTANT], "continue_final_message": True},
    "n: more than slots": {"messages": [_USER], "n": 2},
    "too long": {"messages": [{"role": "user", "content": "word " * 2100}]},
}
OTHERS: Final[tuple[tuple[str, str, Any], ...]] = (
    ("GET", "/nowhere", None),
    ("GET", "/completion", None),
    ("POST", "/props", {}),
    ("POST", "/health", {}),
    ("GET", "/metrics", None),
    ("POST", "/completion/", {"prompt": "Hi"}),
    ("POST", "/tokenize", {"content": 5}),
    ("POST", "/detokenize", {"tokens": "5"}),
    ("POST", "/detokenize", {"tokens": [9_999_999]}),
    ("POST", "/v1/embeddings", {"input": "Hi"}),
    ("POST", "/rerank", {"query": "a", "documents": ["b"]}),
    ("POST", "/infill", {"input_prefix": "a"}),
    ("POST", "/infill", {"input_prefix": "a", "input_suffix": "b", "input_extra": [{}]}),
    ("POST", "/apply-template", {}),
    ("POST", "/v1/chat/completions/input_tokens", {"messages": 5}),
    ("POST", "/slots/a?action=erase", {}),
    ("POST", "/slots/7?action=erase", {}),
    ("POST", "/slots/0", {}),
    ("POST", "/slots/0?action=eat", {}),
    ("POST", "/slots/0?action=save", {}),
    ("POST", "/slots/0?action=save", {"filename": "../up"}),
    ("POST", "/slots/0?action=save", {"filename": ""}),
    ("POST", "/slots/0?action=restore", {"filename": "missing"}),
    ("POST", "/lora-adapters", {}),
    ("POST", "/lora-adapters", [{"id": 3, "scale": 1}]),
)
EMBEDDINGS: Final[dict[str, Any]] = {
    "no input": {},
    "input: empty list": {"input": []},
    "input: number": {"input": 5},
    "input: empty": {"input": ""},
    "input: one is empty": {"input": ["a", ""]},
    "input: id not in the vocabulary": {"input": [9_999_999]},
    "encoding_format: unknown": {"input": "a", "encoding_format": "hex"},
    "too long": {"input": "word " * 2100},
}
RERANKS: Final[dict[str, Any]] = {
    "no query": {"documents": ["a"]},
    "query: number": {"query": 5, "documents": ["a"]},
    "no documents": {"query": "a"},
    "documents: empty": {"query": "a", "documents": []},
    "documents: too long": {"query": "a", "documents": ["time " * 600]},
}
INFILLS: Final[dict[str, Any]] = {
    "no prefix": {"input_suffix": "a"},
    "no suffix": {"input_prefix": "a"},
    "prompt: number": {"input_prefix": "a", "input_suffix": "b", "prompt": 5},
    "extra: no text": {"input_prefix": "a", "input_suffix": "b", "input_extra": [{"filename": "a"}]},
    "extra: text": {"input_prefix": "a", "input_suffix": "b", "input_extra": "a"},
    "extra: name is a number": {"input_prefix": "a", "input_suffix": "b", "input_extra": [{"text": "", "filename": 1}]},
}  # fmt: skip


def generating() -> Iterator[Case]:
    """What a server with one slot, without embeddings, refuses."""
    yield from _refused("errors", "/completion", {name: _short(body) for name, body in COMPLETIONS.items()})
    yield from _refused(
        "errors", "/v1/chat/completions", {name: _short(body) for name, body in CHAT_FIELDS.items()}
    )
    for method, path, body in OTHERS:
        name = f"{method} {path} {body}"
        yield Case("errors", name, path, body, refusal, method)
    yield Case("errors", "POST /v1/completions {}", "/v1/completions", {}, refusal)


def embedding() -> Iterator[Case]:
    """What a server with pooled embeddings refuses."""
    yield from _refused("errors", "/v1/embeddings", EMBEDDINGS)


def unpooled() -> Iterator[Case]:
    """OpenAI's shape has no place for a vector of each token."""
    yield Case("errors", "pooling none", "/v1/embeddings", {"input": "Hi"}, refusal)


def ranking() -> Iterator[Case]:
    """What a reranker refuses, among it generation."""
    yield from _refused("errors", "/v1/rerank", RERANKS)
    for path, body in {
        "/completion": {"prompt": "Hi"},
        "/v1/chat/completions": {"messages": CHATS["question"]},
        "/infill": {"input_prefix": "a", "input_suffix": "b"},
        "/v1/embeddings": {"input": "Hi"},
    }.items():
        yield Case("errors", f"reranker: {path}", path, body, refusal)


def infilling() -> Iterator[Case]:
    """What a model with tokens for infill refuses."""
    yield from _refused("errors", "/infill", INFILLS)


def _refused(section: str, path: str, bodies: dict[str, Any]) -> Iterator[Case]:
    for name, body in bodies.items():
        yield Case(section, f"{path}: {name}", path, body, refusal)


def _short(body: Any) -> Any:
    """The body with few tokens to predict, for when a server does not refuse it."""
    return {"n_predict": 2} | body if isinstance(body, dict) else body
