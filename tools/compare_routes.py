"""The requests of `compare_server` to the routes beside generation, and those that need models of their own.
Data only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from tools.compare_answers import key_set, parts, streamed
from tools.compare_cases import CHATS, JSON, NATIVE_LAST, SAID, Case, one_shot

TEXTS: Final = (
    "Hello world",
    "Grüße, 世界! 🦜",
    "<|im_start|>user\nhi<|im_end|>",
    "   two  spaces\n\n\tx",
    "",
)


_COUNT: Final = "/v1/chat/completions/input_tokens"


def tokens() -> Iterator[Case]:
    """Tokenizing and its reverse."""
    for content in TEXTS:
        for special in (True, False):
            body = {"content": content, "add_special": special, "parse_special": special, "with_pieces": True}
            yield Case("tokens", f"{content!r}, special {special}", "/tokenize", body, parts("tokens"))
    mixed = ["a", 5, " b<|im_end|>"]
    yield Case("tokens", "mixed", "/tokenize", {"content": mixed}, parts("tokens"))
    yield Case("tokens", "nothing", "/tokenize", {}, parts("tokens"))
    ids = list(range(0, 3000, 7))
    yield Case("tokens", "detokenize", "/detokenize", {"tokens": ids}, parts("content"))
    yield Case("tokens", "detokenize nothing", "/detokenize", {}, parts("content"))


def templates() -> Iterator[Case]:
    """Rendered conversations and their token counts."""
    unprompted = {"add_generation_prompt": False}
    for name, messages in CHATS.items():
        forms: dict[str, JSON] = {"prompted": {}, "unprompted": unprompted}
        if name == "prefill":  # llama-server continues a user's message as if the assistant had said it
            forms["continued"] = unprompted | {"continue_final_message": True}
        for how, fields in forms.items():
            body: JSON = {"messages": messages} | fields
            yield Case("templates", f"{name}, {how}", "/apply-template", body, parts("prompt"))
            yield Case("templates", f"{name}, {how}, count", _COUNT, body, parts("input_tokens"))


def slots() -> Iterator[Case]:
    """Reuse of a slot's tokens, and saving, restoring and erasing it; the order counts."""

    def told(name: str, prompt: str, **fields: Any) -> Case:
        body = {"prompt": prompt, "n_predict": 16, "temperature": 0, "id_slot": 0} | fields
        view = parts("content", "tokens_cached", "tokens_evaluated", "timings/cache_n", "timings/prompt_n")
        return Case("slots", name, "/completion", body, view)

    def changed(action: str, *compared: str, **body: Any) -> Case:
        return Case(
            "slots", action, f"/slots/0?action={action}", body, parts("id_slot", "filename", *compared)
        )

    story = "Once upon a time there was a king who had a daughter."
    yield told("first", story, cache_prompt=False)
    yield changed("save", "n_saved", filename="story")
    yield told("again", story)
    yield told("longer", story + " She was tall.")
    yield told("other end", "Once upon a time there was a queen.")
    yield told("not reused", story, cache_prompt=False)
    yield told("something else", "def add(a, b):")
    yield changed("restore", "n_restored", filename="story")
    yield told("after restoring", story)
    yield changed("erase", "n_erased")
    yield told("after erasing", story)
    yield told("nothing to predict", "Two words", n_predict=0)
    yield told("one token", "Two words", n_predict=1)
    yield told("to the end of the context", "word " * 2040, n_predict=-1)


def keys() -> Iterator[Case]:
    """Every route's answer: Wingman must have every key that llama-server has."""
    said = one_shot(n_predict=4, n_probs=1, return_tokens=True, verbose=True, timings_per_token=True)
    native = said | {"prompt": "Hi", "return_progress": True}
    messages = {"messages": CHATS["system"]}
    posts: dict[str, JSON] = {
        "/completion": native,
        "/v1/completions": native,
        "/v1/chat/completions": said | messages | {"logprobs": True},
        "/apply-template": messages,
        _COUNT: messages,
        "/tokenize": {"content": "Hi", "with_pieces": True},
        "/detokenize": {"tokens": [5]},
    }
    for path, body in posts.items():
        yield Case("keys", path, path, body, key_set)
    options = {"stream": True, "stream_options": {"include_usage": True}, "return_progress": True}
    for path in ("/completion", "/v1/completions", "/v1/chat/completions"):
        yield Case("keys", f"stream: {path}", path, posts[path] | options, key_set)
    for path in ("/health", "/props", "/slots", "/v1/models", "/lora-adapters"):
        yield Case("keys", path, path, None, key_set, "GET")
    for action in ("save", "restore", "erase"):
        yield Case("keys", f"slot {action}", f"/slots/0?action={action}", {"filename": "keys"}, key_set)


# -- other models ----------------------------------------------------------------------------------

_INPUTS: Final[dict[str, Any]] = {
    "text": "Hello world",
    "texts": ["Hello world", "a", "The sea, the sea, the open sea!"],
    "ids": [5, 6, 7, 8],
    "id lists": [[5, 6, 7], [9, 10]],
    "mixed": ["Hi", 7, " there"],
}
_NORMS: Final = (-1, 0, 1, 2, 3, 6)


def vectors() -> Iterator[Case]:
    """Vectors in the native shape, which any pooling has."""
    for name, text in _INPUTS.items():
        yield Case("embeddings", f"native: {name}", "/embedding", {"content": text}, parts(""))
    for norm in _NORMS:
        body = {"input": _INPUTS["texts"], "embd_normalize": norm}
        yield Case("embeddings", f"native: norm {norm}", "/embedding", body, parts(""))


def embeddings() -> Iterator[Case]:
    """Pooled vectors in OpenAI's shape."""
    whole = parts("object", "data", "usage")
    path = "/v1/embeddings"
    for name, text in _INPUTS.items():
        yield Case("embeddings", name, path, {"input": text}, whole)
    for norm in _NORMS:
        yield Case("embeddings", f"norm {norm}", path, {"input": "The sea", "embd_normalize": norm}, whole)
    body = {"input": _INPUTS["texts"], "encoding_format": "base64", "model": "mine"}
    yield Case("embeddings", "base64", path, body, parts("data/*/encoding_format", "usage", "model"))
    yield Case("embeddings", "keys", path, body, key_set)
    yield Case("embeddings", "/embeddings", "/embeddings", {"input": "Hello"}, parts(""))


def rerank() -> Iterator[Case]:
    """Scores of documents in the forms of Jina and TEI."""
    documents = ["a hello world", "one two", "most people", "the time of the year", ""]
    asked = {"query": "hello people", "documents": documents}
    forms: dict[str, JSON] = {
        "documents": asked,
        "two of them": asked | {"top_n": 2},
        "more than there are": asked | {"top_n": 99},
        "one document": asked | {"documents": documents[:1]},
        "model": asked | {"model": "mine"},
        "long": asked | {"documents": ["one two three " * 20, "time"]},
    }
    for name, body in forms.items():
        view = parts("object", "results", "usage") if name != "model" else parts("model")
        yield Case("rerank", name, "/v1/rerank", body, view)
    texts = {"query": "time", "texts": documents[:3]}
    tei_forms: dict[str, JSON] = {"texts": texts, "texts, returned": texts | {"return_text": True}}
    for name, body in tei_forms.items():
        yield Case("rerank", name, "/rerank", body, parts(""))
    yield Case("rerank", "keys", "/reranking", asked, key_set)


def infill() -> Iterator[Case]:
    """Prefix, suffix and the files around them."""
    base: JSON = {"input_prefix": "def add(a, b):\n    ", "input_suffix": "\n    return sum\n"}
    extra = [{"text": "one two three", "filename": "one.py"}, {"text": "some words"}]
    forms: dict[str, JSON] = {
        "plain": base,
        "empty": {"input_prefix": "", "input_suffix": ""},
        "prompt": base | {"prompt": "one "},
        "extra": base | {"input_extra": extra},
        "all": base | {"input_extra": extra, "prompt": "two"},
        "long": {"input_prefix": "people time " * 60, "input_suffix": " the year" * 60},
        "special text": {"input_prefix": "a<|fim_middle|>b", "input_suffix": "<s>"},
    }
    for name, fields in forms.items():
        for how, sampling in {"greedy": {"temperature": 0}, "seed": {"seed": 6}}.items():
            body = one_shot(n_predict=24, **(sampling | fields))
            yield Case("infill", f"{name}, {how}", "/infill", body, parts(*SAID))
    body = one_shot(stream=True, seed=8, **base)
    yield Case("infill", "stream", "/infill", body, streamed("content", NATIVE_LAST))
    yield Case("infill", "keys", "/infill", one_shot(n_predict=2, **base), key_set)
