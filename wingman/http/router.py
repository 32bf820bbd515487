"""(method, path) -> endpoint. Pure; built once from the table in `wingman.app`.

Patterns are literal segments and `{name}` segments; a `{name}` in last place takes the rest
of the path, slashes included, because model ids hold slashes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

E = TypeVar("E")


@dataclass(frozen=True, slots=True)
class Match(Generic[E]):
    """An endpoint and the values of the pattern's `{name}` segments."""

    endpoint: E
    params: dict[str, str] = field(default_factory=dict)


class Router(Generic[E]):
    """Exact paths by dictionary, patterns in the order they were added."""

    def __init__(self) -> None:
        self._exact: dict[tuple[str, str], E] = {}
        self._patterns: list[tuple[str, tuple[str, ...], E]] = []

    def add(self, method: str, pattern: str, endpoint: E) -> None:
        """Route `method` requests for `pattern`; raises ValueError when it is taken."""
        segments = tuple(pattern.split("/"))
        if (method, pattern) in self._exact or (method, segments) in (known[:2] for known in self._patterns):
            raise ValueError(f"{method} {pattern} is routed twice")
        if "{" in pattern:
            self._patterns.append((method, segments, endpoint))
        else:
            self._exact[method, pattern] = endpoint

    def match(self, method: str, path: str) -> Match[E] | None:
        """The endpoint for a request, or None. HEAD is served by the GET endpoint."""
        wanted = "GET" if method == "HEAD" else method
        endpoint = self._exact.get((wanted, path))
        if endpoint is not None:
            return Match(endpoint)
        for pattern_method, segments, candidate in self._patterns:
            if pattern_method == wanted:
                params = _match_segments(segments, path)
                if params is not None:
                    return Match(candidate, params)
        return None


def _match_segments(segments: tuple[str, ...], path: str) -> dict[str, str] | None:
    parts = path.split("/", len(segments) - 1)
    if len(parts) != len(segments):
        return None
    params = {}
    for position, (segment, part) in enumerate(zip(segments, parts, strict=True)):
        if segment.startswith("{"):
            if not part or ("/" in part and position != len(segments) - 1):
                return None
            params[segment[1:-1]] = part
        elif segment != part:
            return None
    return params
