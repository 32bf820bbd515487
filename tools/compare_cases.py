"""What a case of `compare_server` is, and the requests that generate text. Data only.

`compare_routes` has the other routes, `compare_refusals` the requests that must be refused; a `Setup` says with
which model and flags both servers run for groups of cases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from tools.compare_answers import View, parts, streamed, without

JSON = dict[str, Any]

PROMPTS: Final = (
    "Once upon a time",
    "The capital of France is",
    "def fib(n):\n",
    "Write a poem about the sea.\n\n",
    "1 2 3 4",
)
SAMPLERS: Final[dict[str, JSON]] = {
    "greedy": {"temperature": 0},
    "seed": {"seed": 42},
    "hot": {"seed": 7, "temperature": 1.2},
    "penalties": {"seed": 1, "repeat_penalty": 1.3, "frequency_penalty": 0.2, "presence_penalty": 0.1},
    "penalties, greedy": {"temperature": 0, "repeat_penalty": 1.2, "repeat_last_n": 256},
    "dry": {"temperature": 0, "dry_multiplier": 0.8},
    "dry, seed": {"seed": 3, "dry_multiplier": 0.8, "dry_penalty_last_n": 128},
    "xtc": {"seed": 3, "xtc_probability": 0.5},
    "typical": {"seed": 3, "typical_p": 0.7},
    "top-n-sigma": {"seed": 3, "top_n_sigma": 1.0},
    "mirostat 1": {"seed": 3, "mirostat": 1},
    "mirostat 2": {"seed": 3, "mirostat": 2},
    "dynatemp": {"seed": 4, "dynatemp_range": 0.5},
    "adaptive-p": {
        "seed": 4,
        "samplers": ["top_k", "min_p", "temperature", "adaptive_p"],
        "adaptive_target": 0.5,
    },
    "sampler list": {"seed": 4, "samplers": ["top_k", "temperature"]},
    "sampler letters": {"seed": 4, "samplers": "kt"},
    "infill sampler": {"seed": 5, "samplers": ["top_k", "infill"]},
    "logit bias": {"seed": 4, "logit_bias": [[" the", False], [260, -2]]},
    "min keep": {"seed": 5, "min_keep": 5, "top_p": 0.1},
    "ignore eos": {"seed": 5, "ignore_eos": True},
    "stop": {"temperature": 0, "stop": ["\n", " the", "."]},
    "indent": {"temperature": 0, "n_indent": 2},
}
PREFILL: Final = "One, two,"
"""An assistant turn to be continued; llama-server repeats it in its answer, Wingman does not."""
CHATS: Final[dict[str, list[JSON]]] = {
    "question": [{"role": "user", "content": "What is the capital of France?"}],
    "system": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Name three colours."},
    ],
    "turns, parts": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": [{"type": "text", "text": "Who"}, {"type": "text", "text": "are you?"}]},
    ],
    "prefill": [{"role": "user", "content": "Count to five."}, {"role": "assistant", "content": PREFILL}],
    "other scripts": [{"role": "user", "content": "Grüße! 你好 🦜 <|im_end|> what is this?"}],
}
GRAMMARS: Final = {
    "yes or no": 'root ::= "yes" | "no"',
    "list": 'root ::= item+\nitem ::= "- " [^\\n]+ "\\n"',
    "json": """\
root ::= object
value ::= object | array | string | number | "true" | "false" | "null"
object ::= "{" ws (pair ("," ws pair)*)? "}" ws
pair ::= string ":" ws value ws
array ::= "[" ws (value (ws "," ws value)*)? ws "]"
string ::= "\\"" ([^"\\\\\\x00-\\x1f] | "\\\\" ["\\\\/bfnrt])* "\\""
number ::= "-"? ("0" | [1-9] [0-9]{0,8}) ("." [0-9]{1,6})?
ws ::= [ \\n]{0,4}
""",
    "arithmetic": """\
root ::= (sum " = " number "\\n"){1,4}
sum ::= term (" " [-+*/] " " term)*
term ::= number | "(" sum ")"
number ::= [0-9]{1,4}
""",
    "unicode": """\
root ::= (greek | emoji | "é" | [\\u4e00-\\u9fff])+ "."
greek ::= [\\u03b1-\\u03c9]{1,6} " "
emoji ::= [😀-😎]
""",
}
CONSTRAINED_SAMPLING: Final[dict[str, JSON]] = {
    "greedy": {"temperature": 0},
    "seed": {"seed": 7},
    "hot": {"seed": 9, "temperature": 1.5, "top_k": 0, "top_p": 1, "min_p": 0},
}
_NAME: Final[JSON] = {"type": "string", "maxLength": 12}
SCHEMAS: Final[dict[str, Any]] = {
    "anything": {},
    "object": {"type": "object"},
    "properties": {
        "type": "object",
        "properties": {"name": _NAME, "age": {"type": "integer"}, "nice": {"type": "boolean"}},
        "required": ["name", "age"],
    },
    "closed": {
        "type": "object",
        "properties": {"a": {"type": "number"}, "b": {"type": "null"}},
        "required": ["b"],
        "additionalProperties": False,
    },
    "map": {"type": "object", "additionalProperties": {"type": "integer"}},
    "array": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, _NAME]},
    "enum": {"enum": ["red", "green", 3, None, {"a": [1]}]},
    "const": {"const": "42"},
    "range": {"type": "integer", "minimum": -7, "maximum": 1234},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}(x|y)?$"},
    "format": {"type": "object", "properties": {"day": {"type": "string", "format": "date"}}, "required": ["day"]},
    "any of": {"anyOf": [{"type": "string", "minLength": 3}, {"type": "array", "items": {"type": "null"}}]},
    "all of": {"allOf": [{"properties": {"a": _NAME}}, {"properties": {"b": {"type": "boolean"}}}]},
    "type list": {"type": ["integer", "null"]},
    "reference": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"v": {"type": "integer"}, "next": {"$ref": "#/$defs/rest"}},
                "required": ["v", "next"],
            },
            "rest": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
        },
    },
}  # fmt: skip

SAID: Final = (
    "content",
    "stop_type",
    "stopping_word",
    "truncated",
    "has_new_line",
    "prompt",
    "tokens_evaluated",
)
COUNTED: Final = (*SAID, "tokens", "tokens_predicted", "tokens_cached")
TEXT: Final = (
    "choices/*/text",
    "choices/*/index",
    "choices/*/finish_reason",
    "usage/prompt_tokens",
    "usage/completion_tokens",
)
CHAT: Final = ("choices/*/message", *TEXT[1:])
NATIVE_LAST: Final = ("stop_type", "stopping_word", "tokens_predicted", "tokens_evaluated", "truncated")


@dataclass(frozen=True, slots=True)
class Case:
    """A request and what of its answer must be equal. A body of bytes is sent as it is, None sends none."""

    section: str
    name: str
    path: str
    body: Any
    view: View
    method: str = "POST"


@dataclass(frozen=True, slots=True)
class Setup:
    """The model ("given", or a kind of tiny one), slots, context in tokens and flags for groups of cases."""

    groups: tuple[Callable[[], Iterator[Case]], ...]
    model: str = "given"
    n_slots: int = 1
    n_ctx: int = 2048
    flags: tuple[str, ...] = ()


def one_shot(**fields: Any) -> JSON:
    """A body that reuses nothing of the request before it, which would change the batches."""
    return {"cache_prompt": False, "n_predict": 48} | fields


def plain() -> Iterator[Case]:
    """Every sampler on every prompt."""
    for name, sampling in SAMPLERS.items():
        # after two line breaks llama-server notices a missing indent one token late, with the same text
        view = parts(*(SAID if name == "indent" else COUNTED))
        for prompt in PROMPTS:
            body = one_shot(prompt=prompt, return_tokens=True, **sampling)
            yield Case("plain", f"{name}: {prompt}", "/completion", body, view)
    for prompt in PROMPTS:
        body = one_shot(prompt=prompt, n_predict=24, temperature=0)
        yield Case("plain", f"text: {prompt}", "/v1/completions", body, parts(*TEXT))
        body = body | {"stream": True}
        yield Case("plain", f"stream: {prompt}", "/completion", body, streamed("content", NATIVE_LAST))
        view = streamed("choices/0/text", ("choices/0/finish_reason", "usage"))
        yield Case("plain", f"text stream: {prompt}", "/v1/completions", body, view)
    others: dict[str, Any] = {"ids": [504, 3575], "mixed": ["One ", 504, " two"], "empty": ""}
    for name, form in others.items():
        yield Case("plain", name, "/completion", one_shot(prompt=form, temperature=0), parts(*SAID))


def chat() -> Iterator[Case]:
    """Conversations, whole and streamed."""
    last = ("choices/0/finish_reason",)
    for name, messages in CHATS.items():
        for sampling in ({"temperature": 0}, {"seed": 11}):
            body = one_shot(messages=messages, max_tokens=48, **sampling)
            label = f"{name} {sampling}"
            view = without(PREFILL, parts(*CHAT))
            yield Case("chat", label, "/v1/chat/completions", body, view)
            view = without(PREFILL, streamed("choices/0/delta/content", last))
            yield Case("chat", f"stream: {label}", "/v1/chat/completions", body | {"stream": True}, view)
    stopped = one_shot(messages=CHATS["system"], temperature=0, stop=[",", "\n"])
    yield Case("chat", "stop", "/v1/chat/completions", stopped, parts(*CHAT))


def grammar() -> Iterator[Case]:
    """Grammars of several shapes; the last prompt is far from what they allow."""
    for name, gbnf in GRAMMARS.items():
        for how, sampling in CONSTRAINED_SAMPLING.items():
            for prompt in (PROMPTS[1], PROMPTS[2]):
                body = one_shot(prompt=prompt, grammar=gbnf, return_tokens=True, **sampling)
                yield Case("grammar", f"{name}, {how}: {prompt}", "/completion", body, parts(*COUNTED))
        body = one_shot(messages=CHATS["question"], grammar=gbnf, temperature=0)
        yield Case("grammar", f"{name}, chat", "/v1/chat/completions", body, parts(*CHAT))


def schema() -> Iterator[Case]:
    """JSON schemas on the native route and as `response_format`."""
    for name, rules in SCHEMAS.items():
        for how in ("greedy", "seed"):
            sampling = CONSTRAINED_SAMPLING[how]
            body = one_shot(prompt="A person as JSON: ", json_schema=rules, return_tokens=True, **sampling)
            yield Case("schema", f"{name}, {how}", "/completion", body, parts(*COUNTED))
        wrapped = {"type": "json_schema", "json_schema": {"name": "it", "schema": rules}}
        body = one_shot(messages=CHATS["question"], response_format=wrapped, temperature=0)
        yield Case("schema", f"{name}, chat", "/v1/chat/completions", body, parts(*CHAT))
    body = one_shot(messages=CHATS["question"], response_format={"type": "json_object"}, temperature=0)
    yield Case("schema", "json_object", "/v1/chat/completions", body, parts(*CHAT))
    body = one_shot(prompt="Say: ", json_schema=SCHEMAS["array"], grammar=GRAMMARS["yes or no"], seed=3)
    yield Case("schema", "grammar wins", "/completion", body, parts(*SAID))


def probabilities() -> Iterator[Case]:
    """Alternatives before and after sampling, in all three shapes, whole and streamed."""
    for how, sampling in (
        {"greedy": {"temperature": 0}} | {key: SAMPLERS[key] for key in ("hot", "xtc")}
    ).items():
        for is_post in (False, True):
            label = f"{how}, {'after' if is_post else 'before'} sampling"
            body = one_shot(
                prompt=PROMPTS[0], n_predict=16, post_sampling_probs=is_post, n_probs=5, **sampling
            )
            yield Case(
                "probabilities", label, "/completion", body, parts("content", "completion_probabilities")
            )
            view = streamed("content", NATIVE_LAST, "completion_probabilities")
            yield Case("probabilities", f"stream: {label}", "/completion", body | {"stream": True}, view)
            view = parts("choices/0/text", "choices/0/logprobs/content")
            yield Case("probabilities", f"text: {label}", "/v1/completions", body, view)
    body = one_shot(prompt=PROMPTS[3], n_probs=3, stop=["sea"], temperature=0)
    view = parts("content", "stop_type", "completion_probabilities")
    yield Case("probabilities", "stop word", "/completion", body, view)
    body = one_shot(prompt="世界 🦜🦜🦜", n_probs=1, seed=2)
    yield Case("probabilities", "broken characters", "/completion", body, view)
    chat_body = one_shot(messages=CHATS["question"], logprobs=True, top_logprobs=4, n_predict=16)
    for how in ("greedy", "seed"):
        body = chat_body | SAMPLERS[how]
        view = parts("choices/0/message/content", "choices/0/logprobs/content")
        yield Case("probabilities", f"chat, {how}", "/v1/chat/completions", body, view)
        view = streamed("choices/0/delta/content", probs="choices/0/logprobs/content")
        yield Case(
            "probabilities", f"chat stream, {how}", "/v1/chat/completions", body | {"stream": True}, view
        )
    for name, fields in {
        "text logprobs": {"logprobs": 3},
        "more than the vocabulary": {"n_probs": 60_000},
    }.items():
        body = one_shot(prompt=PROMPTS[1], n_predict=1, temperature=0, **fields)
        view = parts("choices/0/text", "choices/0/logprobs/content")
        yield Case("probabilities", name, "/v1/completions", body, view)


def several() -> Iterator[Case]:
    """Several answers to a prompt, several prompts, and both."""
    counts = ("*/content", "*/index", "*/stop_type", "*/tokens_predicted", "*/tokens_evaluated")
    for how in ("greedy", "seed", "hot"):
        short = one_shot(n_predict=24, **SAMPLERS[how])
        forms: dict[str, JSON] = {
            "n": {"prompt": PROMPTS[0], "n_cmpl": 3},
            "prompts": {"prompt": list(PROMPTS[:3])},
            "id prompts": {"prompt": [[504, 3575], [18, 216, 34]]},
            "both": {"prompt": list(PROMPTS[:2]), "n_cmpl": 2},
        }
        for name, fields in forms.items():
            body = short | fields
            yield Case("several answers", f"{name}, {how}", "/completion", body, parts(*counts))
            view = parts("choices/*/text", "choices/*/index", "choices/*/finish_reason")
            yield Case("several answers", f"{name}, text, {how}", "/v1/completions", body, view)
            view = streamed("content", ("index", "stop_type"))
            yield Case(
                "several answers", f"{name}, stream, {how}", "/completion", body | {"stream": True}, view
            )
        body = short | {"messages": CHATS["question"], "n": 3}
        path = "/v1/chat/completions"
        view = parts("choices/*/message/content", "choices/*/index", "choices/*/finish_reason")
        yield Case("several answers", f"chat, {how}", path, body, view)
        view = streamed("choices/0/delta/content", ("choices/0/finish_reason", "choices/0/index"))
        yield Case("several answers", f"chat stream, {how}", path, body | {"stream": True}, view)
