"""Header fields: case does not matter in names, order and repeats are kept."""

from __future__ import annotations

import pytest

from protocol import Headers

RAW = [(b"Host", b"a"), (b"ACCEPT", b"x"), (b"accept", b"Y, z"), (b"Name", b"\xe9")]
HEADERS = Headers(RAW)


@pytest.mark.parametrize(
    ("name", "first", "every"),
    [
        (b"host", b"a", (b"a",)),
        (b"HOST", b"a", (b"a",)),
        (b"Accept", b"x", (b"x", b"Y, z")),
        (b"missing", None, ()),
        (b"", None, ()),
    ],
)
def test_lookup_ignores_case(name: bytes, first: bytes | None, every: tuple[bytes, ...]) -> None:
    assert HEADERS.get(name) == first
    assert HEADERS.get_all(name) == every


def test_text_is_latin_1() -> None:
    assert HEADERS.get_text(b"name") == "é"
    assert HEADERS.get_text(b"missing") is None
    every_byte = bytes(range(256))
    assert Headers([(b"a", every_byte)]).get_text(b"a") == every_byte.decode("latin-1")


@pytest.mark.parametrize(
    ("value", "token", "is_there"),
    [
        (b"close", b"close", True),
        (b"Close", b"cLOSE", True),
        (b"keep-alive, close", b"close", True),
        (b" keep-alive ,\tclose ", b"close", True),
        (b",,close,", b"close", True),
        (b"closed", b"close", False),
        (b"not close", b"close", False),
        (b"", b"close", False),
    ],
)
def test_a_token_is_one_item_of_a_list(value: bytes, token: bytes, is_there: bool) -> None:
    assert (
        Headers([(b"connection", b"x"), (b"Connection", value)]).has_token(b"CONNECTION", token) == is_there
    )


def test_it_is_an_immutable_sequence() -> None:
    assert list(HEADERS) == [(name.lower(), value) for name, value in RAW]
    assert len(HEADERS) == 4
    assert HEADERS[1] == (b"accept", b"x")
    assert HEADERS[2:] == ((b"accept", b"Y, z"), (b"name", b"\xe9"))
    assert (b"host", b"a") in HEADERS
    assert len(Headers()) == 0
    with pytest.raises(TypeError):
        HEADERS[0] = (b"a", b"b")  # type: ignore[index]


def test_equality_is_by_value() -> None:
    same = Headers((bytearray(name.upper()), value) for name, value in RAW)
    assert same == HEADERS
    assert hash(same) == hash(HEADERS)
    assert Headers(reversed(RAW)) != HEADERS  # order is part of the meaning
    assert Headers([(b"Host", b"A")]) != Headers([(b"Host", b"a")])
    assert HEADERS != RAW
    assert repr(Headers([(b"A", b"b")])) == "Headers([(b'a', b'b')])"
