"""Parameters of control requests: out of the query, or out of a JSON object or form that was posted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from protocol import Target
from wingman.api.schema import parse_json
from wingman.errors import InvalidRequest, MissingParameter
from wingman.http.messages import Request

_TRUE: Final = frozenset({"1", "true", "on", "yes", ""})
_FALSE: Final = frozenset({"0", "false", "off", "no"})
MAX_POSTED_BYTES: Final = 256 * 1024


def with_posted(request: Request) -> Request:
    """The request with the fields of its JSON body as further parameters. Raises InvalidRequest."""
    if not request.body.strip():
        return request
    check_posted(request)
    fields = parse_json(request.body, dict[str, str | int | float | bool | None])
    posted = tuple((name, _text(value)) for name, value in fields.items() if value is not None)
    return replace(request, target=Target(request.target.path, request.target.query + posted))


def check_posted(request: Request) -> None:
    """Raise InvalidRequest for a body so large that reading it would hold up the loop."""
    if len(request.body) > MAX_POSTED_BYTES:
        raise InvalidRequest(f"the body is larger than {MAX_POSTED_BYTES} bytes")


def _text(value: str | float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def parameters(request: Request) -> Mapping[str, str]:
    """All parameters; of one that is given again the first counts, so the query before what was posted."""
    return dict(reversed(request.target.query))


def required(query: Mapping[str, str], name: str) -> str:
    """A parameter that has to be there, and not empty; raises MissingParameter."""
    value = query.get(name)
    if not value:
        raise MissingParameter(name)
    return value


def integer(query: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    """A whole number, `default` when it is absent or empty; raises InvalidRequest out of [low, high]."""
    text = query.get(name)
    if not text:
        return default
    digits = text.removeprefix("-")
    is_number = digits.isascii() and digits.isdigit() and len(digits) < 12
    if not is_number or not low <= int(text) <= high:
        raise InvalidRequest(f"{name} must be a whole number from {low} to {high}", name)
    return int(text)


def flag(query: Mapping[str, str], name: str) -> bool:
    """A switch; a bare name is on. Raises InvalidRequest for a word that is neither on nor off."""
    text = query.get(name, "false").lower()
    if text not in _TRUE | _FALSE:
        raise InvalidRequest(f"{name} must be true or false", name)
    return text in _TRUE
