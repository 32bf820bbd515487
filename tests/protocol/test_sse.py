"""Server-Sent Events: what is encoded comes back, and no split of the bytes changes what is parsed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import (
    LocalProtocolError,
    RemoteProtocolError,
    SseEvent,
    SseParser,
    encode_comment,
    encode_event,
)

PROPERTY = settings(deadline=None, database=None, derandomize=True, max_examples=300)


def parse(*pieces: bytes) -> list[SseEvent]:
    parser = SseParser()
    return [event for piece in pieces for event in parser.feed(piece)]


def bytewise(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


@pytest.mark.parametrize(
    ("data", "name", "block"),
    [
        (b"a", None, b"data: a\n\n"),
        (b"", None, b"data: \n\n"),
        (b"a\nb", None, b"data: a\ndata: b\n\n"),
        (b"a\r\nb\rc\n", None, b"data: a\ndata: b\ndata: c\ndata: \n\n"),
        (b"a", "error", b"event: error\ndata: a\n\n"),
        (b"a", "é", b"event: \xc3\xa9\ndata: a\n\n"),
        (b" :a", None, b"data:  :a\n\n"),
    ],
)
def test_encoding(data: bytes, name: str | None, block: bytes) -> None:
    assert encode_event(data, name) == block


@pytest.mark.parametrize("name", ["a\nb", "\r", "a\r\n"])
def test_a_name_with_a_line_break_is_refused(name: str) -> None:
    with pytest.raises(LocalProtocolError):
        encode_event(b"a", name)


@pytest.mark.parametrize(
    ("text", "block"),
    [(b"", b":\n\n"), (b"ping", b": ping\n\n"), (b"a\r\ndata: b\n\n", b": a  data: b  \n\n")],
)
def test_a_comment_is_one_line_and_no_event(text: bytes, block: bytes) -> None:
    assert encode_comment(text) == block
    assert parse(block, encode_event(b"x")) == [SseEvent("x")]


M = SseEvent
STREAMS = {
    "several": (b"data: a\n\ndata: b\n\n", [M("a"), M("b")]),
    "CRLF": (b"data: a\r\ndata: b\r\n\r\ndata: c\r\n\r\n", [M("a\nb"), M("c")]),
    "CR": (b"data: a\rdata: b\r\rdata: c\r\r", [M("a\nb"), M("c")]),
    "mixed line ends": (b"data: a\rdata: b\ndata: c\r\n\r\n\n\r", [M("a\nb\nc")]),
    "CR and LF of two lines": (b"data: a\n\rdata: b\r\n\r", [M("a"), M("b")]),
    "name": (b"event: e\ndata: a\n\ndata: b\n\n", [M("a", "e"), M("b")]),
    "last name wins": (b"event: e\nevent: f\ndata: a\n\n", [M("a", "f")]),
    "name without data": (b"event: e\n\ndata: a\n\n", [M("a")]),
    "id stays": (b"id: 1\ndata: a\n\ndata: b\n\nid\ndata: c\n\n",
        [M("a", last_event_id="1"), M("b", last_event_id="1"), M("c")]),
    "id with NUL": (b"id: 1\nid: a\0b\ndata: a\n\n", [M("a", last_event_id="1")]),
    "BOM": (b"\xef\xbb\xbfdata: a\n\n", [M("a")]),
    "second BOM": (b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\ndata: b\n\n", [M("b")]),
    "BOM later": (b"\n\xef\xbb\xbfdata: a\n\n", []),
    "BOM in data": (b"data: \xef\xbb\xbfa\n\n", [M("\ufeffa")]),
    "comments": (b": c\n\n:\ndata: a\n:d\ndata: b\n\n", [M("a\nb")]),
    "one space": (b"data:a\ndata: b\ndata:  c\ndata:\td\n\n", [M("a\nb\n c\n\td")]),
    "colons": (b"data: a:b\n\n", [M("a:b")]),
    "no value": (b"data\n\ndata:\n\ndata\ndata\n\n", [M(""), M(""), M("\n")]),
    "unknown fields": (b"retry: 1\nfoo: b\nData: c\ndata : d\ndata: a\n\n", [M("a")]),
    "unfinished": (b"data: a\n\ndata: b\n", [M("a")]),
    "other line breaks": ("data: a\u2028b\x85c\x0bd\x0ce\n\n".encode(), [M("a\u2028b\x85c\x0bd\x0ce")]),
    "bad UTF-8": (b"data: \xff\xe2\x82\n\n", [M("\ufffd\ufffd")]),
    "nothing": (b"\n\r\n\r\r", []),
}  # fmt: skip


@pytest.mark.parametrize(("stream", "events"), STREAMS.values(), ids=STREAMS.keys())
def test_parsing(stream: bytes, events: list[SseEvent]) -> None:
    assert parse(stream) == events
    assert parse(*bytewise(stream)) == events
    for cut in range(len(stream)):
        assert parse(stream[:cut], b"", stream[cut:]) == events


@given(
    st.lists(
        st.sampled_from([b"data: ", b"event: ", b"id:", b":", b"\r", b"\n", b"\xef\xbb\xbf", b"\xc3", b"a"])
    )
)
@PROPERTY
def test_the_split_of_the_bytes_does_not_matter(pieces: list[bytes]) -> None:
    stream = b"".join(pieces)
    assert parse(*pieces) == parse(stream) == parse(*bytewise(stream))


@given(st.text(), st.none() | st.text().filter(lambda name: not set(name) & {"\r", "\n"}))
@PROPERTY
def test_what_is_encoded_comes_back(text: str, name: str | None) -> None:
    normal = text.replace("\r\n", "\n").replace("\r", "\n")
    block = encode_event(text.encode(), name)
    assert parse(block) == parse(*bytewise(block)) == [SseEvent(normal, name or "message")]


@pytest.mark.parametrize(
    "unfinished",
    [b"data: " + b"a" * 95, b"a" * 101, b"data: aaaaaaaaaaaaaaaaaaaa\n" * 5 + b"a", b":" + b"a" * 100],
    ids=["a line", "no field", "many lines", "comment"],
)
def test_an_unfinished_event_has_a_size_cap(unfinished: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        SseParser(100).feed(unfinished)
    parser = SseParser(100)
    with pytest.raises(RemoteProtocolError):
        [parser.feed(piece) for piece in bytewise(unfinished)]


def test_the_cap_is_for_each_event() -> None:
    parser = SseParser(100)
    for _ in range(5):
        assert parser.feed(b"data: " + b"a" * 90 + b"\n\n") == [SseEvent("a" * 90)]


def test_a_name_that_is_no_text_is_refused() -> None:
    with pytest.raises(LocalProtocolError):
        encode_event(b"a", "\ud800")


def test_the_cap_counts_bytes_of_a_finished_event_too() -> None:
    with pytest.raises(RemoteProtocolError):
        SseParser(max_event_bytes=16).feed(b"data: " + "é".encode() * 6 + b"\n\n")
