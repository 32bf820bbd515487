"""Requests to every POST route from a hostile client, through the whole application.

The input is a target, a line break and a body; a target that is unknown stands for one that is chosen by the
bytes. It is sent as it is, and again with a body made for that route's type of body out of the bytes.
Invariant: the answer is a success or a refusal of the error table, never a 5xx but 501; JSON, or a stream
of events that ends as it has to; nothing is left running.
"""

from __future__ import annotations

import functools
import json
import random
import zlib
from collections.abc import Callable
from typing import Any, get_type_hints

import msgspec
import orjson
from msgspec import inspect

from fuzz.application import run, served
from protocol import SseParser
from wingman.api.routes import MODEL_ROUTES

STATUSES = frozenset({200, 400, 404, 413, 429, 501})
ERROR_TYPES = {
    400: ("invalid_request_error", "exceed_context_size_error"),
    404: ("not_found_error",),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error",),
    501: ("not_supported_error", "api_error"),
}
LAST_TYPES = frozenset({"message_stop", "response.completed", "response.incomplete"})
"""`type` of the last event where none is [DONE]."""

_BODIES = {path: body for method, paths, _, body, _ in MODEL_ROUTES if method == "POST" for path in paths}
_ACTIONS = ("save", "restore", "erase", "x")
TARGETS = tuple(
    target
    for path in _BODIES
    for target in (
        [f"/slots/{slot}?action={action}" for slot in (0, 9) for action in _ACTIONS]
        if "{" in path
        else [path]
    )
)
_FUNCTION: dict[str, Any] = {"name": "f", "parameters": {"properties": {"s": {"type": "string"}}}}
_TOOL = {"type": "function", "function": _FUNCTION}
_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
_CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
_TALK = (
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "a"}]}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [_CALL]},
     {"role": "tool", "tool_call_id": "c1", "content": "r"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    [{"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]},
     {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "r"}]}],
)  # fmt: skip
_ITEMS = (
    [{"role": "user", "content": "a"}, {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
     {"type": "function_call_output", "call_id": "c", "output": "r"}],
    [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}, {"type": "reasoning", "summary": []}],
)  # fmt: skip
_SAMPLES: dict[str, tuple[Any, ...]] = {
    "messages": _TALK,
    "input": ("a", ["a", "b"], [5, 6], [[5], "a"], *_ITEMS),
    "prompt": ("a b", ["a", "b"], [5, "a", 6], [[5, 6], "a"], {"prompt_string": "a"}),
    "content": ("a", ["a", 5], [{"type": "text", "text": "a"}]),
    "tools": ([_TOOL], [_FUNCTION | {"type": "function"}], [{"name": "f", "input_schema": _SCHEMA}]),
    "functions": ([_FUNCTION],),
    "tool_choice": ("auto", "none", "required", {"type": "function", "function": {"name": "f"}}, {"type": "any"}),
    "function_call": ("auto", {"name": "f"}),
    "grammar": ('root ::= "a"+', "root ::= [0-9]* x\nx ::= \"y\" | x", "root ::= (", "root ::= root"),
    "grammar_triggers": ([{"type": 1, "value": "a"}], [{"type": 0, "token": 5}]),
    "json_schema": (_SCHEMA, {"$ref": "#"}, {"enum": [1, None]}, {"type": "string", "pattern": "^(a|b)+$"}, {}),
    "schema": (_SCHEMA,),
    "response_format": ({"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": _SCHEMA}}),
    "format": ({"type": "json_schema", "name": "n", "schema": _SCHEMA},),
    "stop": ("a", ["a", "", None], ["x" * 600]),
    "logit_bias": ([[5, 1.5], ["a", False]], {"5": -1, "ab": 2}, [[5]]),
    "samplers": ("kt", ["top_k", "min-p"], ["infill"], []),
    "lora": ([{"id": 0, "scale": 0.5}], [{"id": 1}], [{"id": 7}], [{}]),
    "logprobs": (True, 2, 0),
    "top_logprobs": (3, 0, -1),
    "type": ("text", "function", "message", "tool_use", "tool_result", "input_text", "thinking", "json_schema"),
    "role": ("user", "assistant", "system", "tool", "developer"),
    "name": ("f", "g", ""),
    "filename": ("a", "b.bin", "../a", "", "x" * 300),
    "tokens": ([5, 6, 7], [299], [300], [-1]),
    "query": ("a",), "documents": (["a", "b"],), "texts": (["a", "b"],),
    "encoding_format": ("base64", "float", "x"),
    "input_prefix": ("a", ["b", 5]), "input_suffix": ("a",), "suffix": ("b", ""),
    "input_extra": ([{"text": "a", "filename": "b"}], [{}]),
    "reasoning_effort": ("none", "low", 5), "reasoning_format": ("none", "deepseek", "auto", "x"),
    "response_fields": (["content", "generation_settings/stop"], [1]),
    "include": (["message.output_text.logprobs"],),
    "max_tokens": (0, 1, 9), "n_predict": (0, 1, 30), "n": (1, 2), "n_cmpl": (2,),
}  # fmt: skip
"""Values that are right for a field of this name somewhere, and some that are nearly so."""
_WILD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 1.5, -0.5, 1e308, -1e308, 1e-320, 2**31, 2**63, -(2**63), 10**30, "", "a", "\x00",
    "\U0001f600", "257", [], {}, [[]], [{}], [None], {"a": 1}, {"type": "text", "text": "a"}, [[[[1]]]], "x" * 2000,
)  # fmt: skip
TOKENS = (
    *(target.encode() + b"\n" for target in TARGETS),
    *(json.dumps(name).encode() + b":" for name in _SAMPLES),
    *(orjson.dumps(sample) for samples in _SAMPLES.values() for sample in samples),
    *(json.dumps(value).encode() for value in _WILD),
    b'"stream":true', b",", b":", b"{", b"}", b"[", b"]", b"[" * 200, b"\\u0000", b"\\ud800", b"\xff", b"NaN",
)  # fmt: skip


def one(data: bytes) -> None:
    """Check the invariant for `data`, and for a well-formed body made of it."""
    head, _, body = data.partition(b"\n")
    target = head.decode("latin-1")
    if target not in TARGETS:
        target, body = TARGETS[zlib.crc32(data) % len(TARGETS)], data
    _check(target, body)
    _check(target, _Builder(data).body(target))


class _Builder:
    """Bytes -> a body of a route's type, chosen at random but by them alone: mutated text seldom gets past the
    JSON parser, and wild fields seldom past the first check."""

    def __init__(self, data: bytes) -> None:
        self._rng = random.Random(data)
        self._wildness = self._rng.choice((0.0, 0.02, 0.2))

    def body(self, target: str) -> bytes:
        """JSON for the route of a target."""
        path = next((path for path in _BODIES if "{" in path), "") if "?" in target else target
        made = self._value(_type_info(_BODIES[path]), 0)
        if isinstance(made, dict) and self._rng.random() < 0.3:
            made["stream"] = True
        return json.dumps(made).encode()

    def _value(self, kind: inspect.Type, depth: int) -> Any:
        if self._rng.random() < self._wildness:
            return self._rng.choice(_WILD)
        make = _MAKERS.get(type(kind))
        return make(self, kind, depth) if make else self._rng.choice(_WILD)

    def _struct(self, kind: Any, depth: int) -> Any:
        share = self._rng.choice((0.01, 0.05, 0.3)) / (1 + depth)
        is_left_out = {"prompt"} if any(field.name == "input" for field in kind.fields) else ()
        made = {}
        for field in kind.fields:
            is_needed = field.required or (field.name in _NEEDED and field.name not in is_left_out)
            if self._rng.random() < (0.95 if is_needed else share):
                made[field.encode_name] = self._field(kind.cls, field, depth + 1)
        return made

    def _field(self, owner: type, field: Any, depth: int) -> Any:
        samples = _SAMPLES.get(field.name, ())
        if self._rng.random() >= self._wildness:
            samples = _fitting(owner, field.name)
        return (
            self._rng.choice(samples)
            if samples and self._rng.random() < 0.8
            else self._value(field.type, depth)
        )

    def _union(self, kind: Any, depth: int) -> Any:
        kinds = [one for one in kind.types if not isinstance(one, inspect.NoneType)]
        return self._value(self._rng.choice(kinds), depth)

    def _list(self, kind: Any, depth: int) -> Any:
        return [self._value(kind.item_type, depth + 1) for _ in range(self._rng.randrange(max(1, 4 - depth)))]

    def _dict(self, kind: Any, depth: int) -> Any:
        return {self._rng.choice(("a", "b", "type")): self._value(kind.value_type, depth + 1)}

    def _literal(self, kind: Any, depth: int) -> Any:
        return self._rng.choice(kind.values)

    def _number(self, kind: Any, depth: int) -> Any:
        return self._rng.choice((0, 1, 2, 5, 0.5, 1.0, -1, True))

    def _text(self, kind: Any, depth: int) -> Any:
        return self._rng.choice(("a", "hello", "", "{}", "f", "auto", "\u00e9"))

    def _bool(self, kind: Any, depth: int) -> Any:
        return self._rng.random() < 0.5


_NEEDED = frozenset(
    "messages prompt input content documents query tokens filename input_prefix input_suffix text name role "
    "call_id arguments output tool_use_id id thinking max_tokens".split()
)
"""Fields without which most routes refuse at once."""
_MAKERS: dict[type, Callable[..., Any]] = {
    inspect.StructType: _Builder._struct,
    inspect.TypedDictType: _Builder._struct,
    inspect.UnionType: _Builder._union,
    inspect.ListType: _Builder._list,
    inspect.DictType: _Builder._dict,
    inspect.LiteralType: _Builder._literal,
    inspect.IntType: _Builder._number,
    inspect.FloatType: _Builder._number,
    inspect.StrType: _Builder._text,
    inspect.BoolType: _Builder._bool,
}


@functools.cache
def _type_info(body: Any) -> inspect.Type:
    return inspect.type_info(Any if body is None else body)


@functools.cache
def _fitting(owner: Any, name: str) -> tuple[Any, ...]:
    """Samples that have the type of a struct's field."""
    kind = get_type_hints(owner, include_extras=True)[name]
    return tuple(sample for sample in _SAMPLES.get(name, ()) if _fits(sample, kind))


def _fits(sample: Any, kind: Any) -> bool:
    try:
        msgspec.convert(sample, kind)
    except msgspec.ValidationError:
        return False
    return True


def _check(target: str, body: bytes) -> None:
    seed = zlib.crc32(body)
    application = served(ranks="rank" in target or seed % 3 == 0)
    if "?action" in target:  # so that there is something to save, and a file to restore
        run(application.answer("/completion", b'{"prompt":"abc","id_slot":0}', seed, keeps=True))
        run(application.answer(target.replace("restore", "save"), body, seed, keeps=True))
    status, kind, answer = run(application.answer(target, body, seed))
    assert status in STATUSES, (status, answer)
    if kind == "text/event-stream":
        _check_events(answer, is_whole=b"response_fields" not in body)
        return
    parsed = orjson.loads(answer)
    if status != 200:
        error = parsed["error"]
        assert error["code"] == status
        assert error["type"] in ERROR_TYPES[status], error
        assert error["message"]


def _check_events(stream: bytes, *, is_whole: bool) -> None:
    """`is_whole`: no field of a native event was left out on request."""
    events = [event.data for event in SseParser().feed(stream)]
    assert events, "an empty stream"
    last = None if events[-1] == "[DONE]" else msgspec.json.decode(events[-1])
    for data in events[:-1]:
        body = msgspec.json.decode(data)
        assert "error" not in body or body["error"] is None, "something follows an error"
    if last is None:
        return
    if "error" in last and last["error"] is not None:
        assert last["error"]["type"] not in ("server_error", "api_error"), last
        return
    assert last.get("stop") is True or last.get("type") in LAST_TYPES or not is_whole, last
