"""Request targets: every form becomes one decoded path and an ordered query."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import RemoteProtocolError, Target, parse_target

Query = tuple[tuple[str, str], ...]


@pytest.mark.parametrize(
    ("raw", "path", "query"),
    [
        (b"/", "/", ()),
        (b"*", "*", ()),
        (b"/v1/models", "/v1/models", ()),
        (b"/a%20b/%C3%A9%2Fc", "/a b/é/c", ()),
        (b"/a+b", "/a+b", ()),  # a plus is a space in queries only
        (b"/a%", "/a%", ()),
        (b"/a%zz%4", "/a%zz%4", ()),
        (b"/a%2541", "/a%41", ()),  # decoded once
        (b"/..//./x", "/..//./x", ()),
        (b"//host/x", "//host/x", ()),
        (b"/x#part?a=b", "/x", ()),
        (b"/x?", "/x", ()),
        (b"/x?a=1&b=2&a=3", "/x", (("a", "1"), ("b", "2"), ("a", "3"))),
        (b"/x?a", "/x", (("a", ""),)),
        (b"/x?a=&=b&&=", "/x", (("a", ""), ("", "b"), ("", ""))),
        (b"/x?a=b=c", "/x", (("a", "b=c"),)),
        (b"/x?a+b=c+d%2Be", "/x", (("a b", "c d+e"),)),
        (b"/x?%61=%C3%A9", "/x", (("a", "é"),)),
        (b"/x?a%26b=1%3D2", "/x", (("a&b", "1=2"),)),
        (b"/x?a=1?b=2", "/x", (("a", "1?b=2"),)),
        (b"/x?u=http://h/y", "/x", (("u", "http://h/y"),)),
        (b"http://host/x?a=b", "/x", (("a", "b"),)),
        (b"HTTPS://host:1/x", "/x", ()),
        (b"http://host", "/", ()),
        (b"http://host?a=b", "/", (("a", "b"),)),
        (b"/http://host/x", "/http://host/x", ()),
        (b"host:443", "host:443", ()),
        (b"", "", ()),
    ],
)
def test_a_target_is_decoded(raw: bytes, path: str, query: Query) -> None:
    assert parse_target(raw) == Target(path, query)


@pytest.mark.parametrize(
    "raw", [b"/%ff", b"/%C3", b"/x?%ff=1", b"/x?a=%e9", b"/%00", b"/x?a=%00", b"/%ed%a0%80"]
)
def test_what_is_no_text_is_refused(raw: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        parse_target(raw)
    assert caught.value.status_hint == 400


def test_first_takes_the_first_of_a_name() -> None:
    target = parse_target(b"/x?a=1&a=2&b")
    assert [target.first(name) for name in ("a", "b", "c")] == ["1", "", None]


@given(st.binary(max_size=40))
@settings(deadline=None, database=None, derandomize=True, max_examples=500)
def test_any_bytes_are_decoded_or_refused(raw: bytes) -> None:
    try:
        target = parse_target(raw)
    except RemoteProtocolError:
        return
    assert "\0" not in target.path + "".join(name + value for name, value in target.query)
