"""Routing: exact paths before patterns, patterns in order, a last name takes the rest of the path."""

from __future__ import annotations

import pytest

from wingman.http.router import Match, Router


def make_router() -> Router[str]:
    router: Router[str] = Router()
    for method, pattern in (
        ("GET", "/"),
        ("GET", "/models"),
        ("POST", "/models"),
        ("GET", "/models/{id}"),
        ("GET", "/models/special"),
        ("GET", "/jobs/{job}/log"),
        ("GET", "/jobs/{job}/{rest}"),
        ("DELETE", "/jobs/{job}"),
    ):
        router.add(method, pattern, f"{method} {pattern}")
    return router


@pytest.mark.parametrize(
    ("method", "path", "endpoint", "params"),
    [
        ("GET", "/", "GET /", {}),
        ("GET", "/models", "GET /models", {}),
        ("POST", "/models", "POST /models", {}),
        ("HEAD", "/models", "GET /models", {}),
        ("HEAD", "/models/a", "GET /models/{id}", {"id": "a"}),
        ("GET", "/models/special", "GET /models/special", {}),  # exact wins, though added later
        ("GET", "/models/a", "GET /models/{id}", {"id": "a"}),
        ("GET", "/models/a/b/c.gguf", "GET /models/{id}", {"id": "a/b/c.gguf"}),
        ("GET", "/models/a/", "GET /models/{id}", {"id": "a/"}),
        ("GET", "/models//a", "GET /models/{id}", {"id": "/a"}),
        ("GET", "/models/{id}", "GET /models/{id}", {"id": "{id}"}),
        ("GET", "/jobs/1/log", "GET /jobs/{job}/log", {"job": "1"}),
        ("GET", "/jobs/1/log/2", "GET /jobs/{job}/{rest}", {"job": "1", "rest": "log/2"}),
        ("DELETE", "/jobs/1", "DELETE /jobs/{job}", {"job": "1"}),
    ],
)
def test_a_path_finds_its_endpoint(method: str, path: str, endpoint: str, params: dict[str, str]) -> None:
    assert make_router().match(method, path) == Match(endpoint, params)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", ""),
        ("GET", "*"),
        ("GET", "models"),
        ("GET", "/Models"),
        ("GET", "/models/"),  # a name is never empty
        ("GET", "//models"),
        ("GET", "/jobs"),
        ("GET", "/jobs/1"),
        ("GET", "/jobs//log"),
        ("DELETE", "/models"),
        ("DELETE", "/jobs/"),
        ("get", "/models"),
        ("PUT", "/"),
        ("OPTIONS", "/models"),
    ],
)
def test_anything_else_finds_nothing(method: str, path: str) -> None:
    assert make_router().match(method, path) is None


def test_a_path_is_routed_once() -> None:
    router = make_router()
    with pytest.raises(ValueError, match="GET /models is routed twice"):
        router.add("GET", "/models", "again")
    assert router.match("GET", "/models") == Match("GET /models")


def test_a_pattern_is_routed_once() -> None:
    router: Router[str] = Router()
    router.add("GET", "/a/{b}", "x")
    with pytest.raises(ValueError, match="twice"):
        router.add("GET", "/a/{b}", "y")
