"""What of two servers' answers is compared, and whether it is equal. Pure.

A view turns an answer into named parts. Wingman may say more than llama-server, so objects are compared on
llama-server's keys; numbers may differ by rounding, because the two link different builds of the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Final

TOLERANCE: Final = 1e-3
"""Logprobs, vectors and scores may differ by this much, relative to the largest of a vector."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A status and a JSON body; of a stream the events, and the body is None."""

    status: int
    body: Any
    events: tuple[Any, ...] = ()


View = Callable[[Answer], dict[str, Any]]


# -- views ----------------------------------------------------------------------------------------


def pick(body: Any, path: str) -> Any:
    """The value at `a/0/b` of a JSON value, None when there is none; `*` gives a list of every item's."""
    if not path:
        return body
    key, _, rest = path.partition("/")
    if isinstance(body, list):
        if key == "*":
            return [pick(item, rest) for item in body]
        return pick(body[int(key)], rest) if key.isdigit() and int(key) < len(body) else None
    return pick(body.get(key), rest) if isinstance(body, dict) else None


def parts(*paths: str) -> View:
    """The status and the values at these paths."""
    return lambda answer: {"status": answer.status} | {path: pick(answer.body, path) for path in paths}


def streamed(text: str, last: tuple[str, ...] = (), probs: str = "") -> View:
    """Texts and token probabilities of a stream joined by choice, and of the last event the values at `last`.

    Paths begin at an event; a choice's number is its `index`, or that of the event.
    """

    def view(answer: Answer) -> dict[str, Any]:
        texts: dict[int, str] = {}
        items: dict[int, list[Any]] = {}
        for event in filter(None, answer.events):
            index = pick(event, "choices/0/index") or pick(event, "index") or 0
            texts[index] = texts.get(index, "") + (pick(event, text) or "")
            items.setdefault(index, []).extend(pick(event, probs) or [] if probs else [])
        ends = {path: [pick(event, path) for event in _last_events(answer.events)] for path in last}
        return {"status": answer.status, "text": texts, "probabilities": items} | ends

    return view


def _last_events(events: Iterable[Any]) -> list[Any]:
    """The events that end a completion, by its index."""
    ends = [one for one in events if pick(one, "stop") or pick(one, "choices/0/finish_reason")]
    return sorted(ends, key=lambda event: pick(event, "choices/0/index") or pick(event, "index") or 0)


def without(prefix: str, view: View) -> View:
    """A view whose texts begin behind `prefix`, for servers of which one repeats it."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(one) for key, one in value.items()}
        if isinstance(value, list):
            return [strip(one) for one in value]
        return value.removeprefix(prefix) if isinstance(value, str) else value

    return lambda answer: {part: strip(value) for part, value in view(answer).items()}


def refusal(answer: Answer) -> dict[str, Any]:
    """The status and the type of an error."""
    return {"status": answer.status, "type": pick(answer.body, "error/type")}


def key_set(answer: Answer) -> dict[str, Any]:
    """The status and every path of keys; items of lists and events of streams are taken together."""
    body = list(answer.events) if answer.body is None else answer.body
    return {"status": answer.status, "keys": frozenset(_key_paths(body))}


def _key_paths(body: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(body, list):
        for item in body:
            yield from _key_paths(item, f"{prefix}*/")
    elif isinstance(body, dict):
        for key, value in body.items():
            yield prefix + key
            yield from _key_paths(value, f"{prefix}{key}/")


# -- equality -------------------------------------------------------------------------------------


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[tuple[str, str]]:
    """Path and description of the first difference in each part of a view, and of every missing key."""
    found = []
    for part, value in theirs.items():
        if isinstance(value, frozenset):
            found += [(f"{part}/{key}", "wingman lacks it") for key in _topmost(value - ours[part])]
        else:
            difference = first_difference(ours[part], value, part)
            found += [difference] if difference is not None else []
    return found


def _topmost(paths: frozenset[str]) -> list[str]:
    """The paths that don't lie under another one."""
    return sorted(path for path in paths if not any(path.startswith(f"{other}/") for other in paths))


def first_difference(ours: Any, theirs: Any, path: str) -> tuple[str, str] | None:
    """Where two JSON values differ, and how; None when they don't."""
    if _is_vector(ours) and _is_vector(theirs) and len(ours) == len(theirs):
        largest = max(map(abs, theirs))
        error = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        return (path, f"vectors differ by {error:.3g}") if error > TOLERANCE * max(1.0, largest) else None
    pairs = _pairs(ours, theirs)
    if pairs is None:
        is_equal = _is_equal(ours, theirs)
        return None if is_equal else (path, f"wingman {ours!r:.160}, llama-server {theirs!r:.160}")
    return next(filter(None, (first_difference(a, b, f"{path}/{key}") for key, a, b in pairs)), None)


def _pairs(ours: Any, theirs: Any) -> list[tuple[Any, Any, Any]] | None:
    """What is in both of two objects or lists, by key; None for other values and lists of unequal length."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [(key, ours.get(key), value) for key, value in theirs.items()]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return list(zip(range(len(theirs)), ours, theirs, strict=True))
    return None


def _is_vector(value: Any) -> bool:
    """Whether it is a list of numbers that are not all ids."""
    return isinstance(value, list) and set(map(type, value)) in ({float}, {float, int})


def _is_equal(ours: Any, theirs: Any) -> bool:
    """Numbers are equal within the tolerance when one of them is no integer."""
    if {type(ours), type(theirs)} in ({float}, {float, int}):
        return bool(abs(ours - theirs) <= TOLERANCE * max(1.0, abs(theirs)))
    return type(ours) is type(theirs) and bool(ours == theirs)


# -- ties -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Split:
    """Where two answers part: the number of the token, and how far the two likeliest logits of each server
    are apart there."""

    token: int
    our_gap: float
    their_gap: float

    @property
    def is_tie(self) -> bool:
        """Whether rounding alone may have decided."""
        return min(self.our_gap, self.their_gap) < TOLERANCE

    def __str__(self) -> str:
        name = "tie" if self.is_tie else "no tie"
        return (
            f"{name}: at token {self.token} the top two are {self.our_gap:.4f} and {self.their_gap:.4f} apart"
        )


def first_split(ours: Answer, theirs: Answer) -> Split | None:
    """The first token at which two answers with two alternatives a token part; None when they don't."""
    for mine, other in zip(_token_items(ours.body), _token_items(theirs.body), strict=False):
        for number, (a, b) in enumerate(zip_longest(mine, other)):
            if a is None or b is None:
                return None
            if a["id"] != b["id"]:
                return Split(number, _gap(a), _gap(b))
    return None


def _token_items(body: Any) -> list[Any]:
    """The lists of token items of each completion in an answer."""
    if isinstance(body, list):
        return [pick(one, "completion_probabilities") or [] for one in body]
    found = pick(body, "choices/*/logprobs/content") or [pick(body, "completion_probabilities")]
    return [items or [] for items in found]


def _gap(item: dict[str, Any]) -> float:
    top = [one["logprob"] for one in item["top_logprobs"]]
    return float(top[0] - top[1])
