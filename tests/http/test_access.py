"""Who may call: keys in three spellings, and the cross-origin policy with llama-server's values."""

from __future__ import annotations

import pytest

from protocol import Headers
from wingman.http.access import Cors, Keys

KEYS = Keys(["first", "sécond", ""])


@pytest.mark.parametrize(
    ("fields", "is_allowed"),
    [
        ([("Authorization", "Bearer first")], True),
        ([("Authorization", "first")], True),
        ([("X-Api-Key", "first")], True),
        ([("authorization", "Bearer sécond")], True),
        ([], False),
        ([("Authorization", "")], False),
        ([("Authorization", "Bearer ")], False),
        ([("X-Api-Key", "")], False),
        ([("Authorization", "Bearer third")], False),
        ([("Authorization", "Bearer firs")], False),
        ([("Authorization", "Bearer firstt")], False),
        ([("Authorization", "Bearer FIRST")], False),
        ([("Authorization", "Bearer first ")], False),
        ([("Authorization", "Basic first")], False),
        ([("Authorization", "Bearer Bearer first")], False),
        ([("Authorization", "first,sécond")], False),
        ([("Authorization", "wrong"), ("X-Api-Key", "first")], False),  # a wrong Authorization is final
        ([("Authorization", "first"), ("X-Api-Key", "wrong")], True),
        ([("Authorization", "wrong"), ("Authorization", "first")], False),  # the first of a name counts
        ([("Cookie", "first")], False),
    ],
)
def test_a_key_lets_in(fields: list[tuple[str, str]], is_allowed: bool) -> None:
    headers = Headers((name.encode(), value.encode()) for name, value in fields)
    assert KEYS.allow(headers) == is_allowed


@pytest.mark.parametrize("keys", [[], [""]])
def test_without_keys_everybody_may_call(keys: list[str]) -> None:
    assert not Keys(keys)
    assert Keys(keys).allow(Headers())
    assert Keys(keys).allow(Headers([(b"authorization", b"anything")]))


def test_keys_are_truthy_when_there_are_any() -> None:
    assert KEYS


LOCAL = Cors(origins="localhost")
LISTED = Cors(origins="https://a.example, https://b.example:8443")


@pytest.mark.parametrize(
    ("cors", "origin", "is_allowed"),
    [
        (Cors(), "https://any.example", True),
        (Cors(), "null", True),
        (LOCAL, "http://localhost", True),
        (LOCAL, "https://localhost:3000", True),
        (LOCAL, "http://127.0.0.1:8080", True),
        (LOCAL, "http://[::1]:8080", True),
        (LOCAL, "http://localhost.evil.example", False),
        (LOCAL, "http://evil.example#http://localhost", False),
        (LOCAL, "http://127.0.0.10", False),
        (LOCAL, "http://127x0x0x1", False),
        (LOCAL, "http://localhost:", False),
        (LOCAL, "http://localhost:80/x", False),
        (LOCAL, "ftp://localhost", False),
        (LOCAL, "null", False),
        (LISTED, "https://a.example", True),
        (LISTED, "https://b.example:8443", True),
        (LISTED, "https://b.example", False),
        (LISTED, "http://a.example", False),
        (LISTED, "https://A.example", False),
        (LISTED, "https://a.example, https://b.example:8443", False),
        (Cors(origins=""), "https://a.example", False),
    ],
)
def test_an_allowed_origin_is_named_in_the_answer(cors: Cors, origin: str, is_allowed: bool) -> None:
    headers = Headers([(b"Origin", origin.encode())])
    wanted = (("access-control-allow-origin", origin), ("vary", "Origin")) if is_allowed else ()
    assert cors.answer_headers(headers) == wanted


def test_a_request_without_origin_gets_no_header() -> None:
    assert Cors().answer_headers(Headers([(b"host", b"a")])) == ()


@pytest.mark.parametrize(
    ("cors", "wanted", "allowed"),
    [
        (Cors(), None, "*"),
        (Cors(), "content-type", "*"),
        (Cors(), "Content-Type, Authorization", "Content-Type, Authorization"),  # no wildcard covers it
        (Cors(headers="X-A"), "authorization", "X-A"),
    ],
)
def test_preflight_names_the_headers(cors: Cors, wanted: str | None, allowed: str) -> None:
    fields = [(b"access-control-request-headers", wanted.encode())] if wanted is not None else []
    answer = dict(cors.preflight_headers(Headers(fields)))
    assert answer["access-control-allow-headers"] == allowed
    assert answer["access-control-allow-methods"] == "GET, POST, DELETE, OPTIONS"
    assert answer["access-control-allow-credentials"] == "true"


def test_preflight_without_credentials() -> None:
    answer = dict(Cors(methods="GET", allows_credentials=False).preflight_headers(Headers()))
    assert answer == {"access-control-allow-methods": "GET", "access-control-allow-headers": "*"}
