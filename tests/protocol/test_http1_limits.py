"""Heads at the edge: what is counted, which versions are spoken, and that a refusal can be sent."""

from __future__ import annotations

import pytest

from protocol import (
    BodyChunk,
    EndOfResponse,
    Event,
    Headers,
    Http1Connection,
    Limits,
    RemoteProtocolError,
    ResponseHead,
    Signal,
)

SMALL = Limits(max_head_bytes=64)


def pull(connection: Http1Connection, *pieces: bytes) -> list[Event]:
    events: list[Event] = []
    for piece in pieces:
        connection.receive_data(piece)
        while not isinstance(event := connection.next_event(), Signal):
            events.append(event)
    return events


def test_head_over_the_limit_in_one_piece_can_be_answered_to_head() -> None:
    connection = Http1Connection(SMALL)
    with pytest.raises(RemoteProtocolError):
        pull(connection, b"HEAD / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 64 + b"\r\n\r\n")
    connection.send(ResponseHead(431, Headers([(b"content-length", b"2")])))
    assert connection.send(BodyChunk(b"no")) == b""
    connection.send(EndOfResponse())


@pytest.mark.parametrize("version", [b"2.0", b"0.9", b"1.2", b"9.1"])
def test_other_versions_are_refused(version: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        pull(Http1Connection(), b"GET / HTTP/" + version + b"\r\nHost: a\r\n\r\n")
    assert caught.value.status_hint == 505


@pytest.mark.parametrize("size", [1, 10_000])
def test_the_head_limit_counts_what_is_sent_in_any_split(size: int) -> None:
    raw = b"GET / HTTP/1.1\r\nHost: a\r\nX:" + b" " * 64 + b"a\r\n\r\n"
    with pytest.raises(RemoteProtocolError) as caught:
        pull(Http1Connection(SMALL), *(raw[start : start + size] for start in range(0, len(raw), size)))
    assert caught.value.status_hint == 431


def test_a_head_of_exactly_the_limit_passes_in_any_split() -> None:
    start = b"GET / HTTP/1.1\r\nHost: a\r\nX: "
    raw = start + b"a" * (64 - len(start) - 4) + b"\r\n\r\n"
    assert len(raw) == 64
    whole = pull(Http1Connection(SMALL), raw)
    assert pull(Http1Connection(SMALL), *(raw[i : i + 1] for i in range(64))) == whole


def test_a_partial_head_is_noticed() -> None:
    connection = Http1Connection()
    assert not connection.has_partial_head
    pull(connection, b"GET / HT")
    assert connection.has_partial_head
    pull(connection, b"TP/1.1\r\nHost: a\r\n\r\n")
    assert not connection.has_partial_head
    assert connection.is_request_complete


def test_what_follows_a_head_in_the_same_piece_is_not_counted_with_it() -> None:
    body = b"x" * 500
    post = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 500\r\n\r\n" + body
    assert BodyChunk(body) in pull(Http1Connection(SMALL), post)
    get = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    assert len(pull(Http1Connection(SMALL), get * 20)) == 2
