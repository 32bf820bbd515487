"""The server side of HTTP/1.1: what is sent for an answer, and what the state forbids to send."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import (
    BodyChunk,
    EndOfRequest,
    EndOfResponse,
    Event,
    Headers,
    Http1Connection,
    LocalProtocolError,
    ResponseHead,
    Signal,
)

POST = b"POST / HTTP/1.1\r\nHost: a\r\n"
GET = b"GET /next HTTP/1.1\r\nHost: n\r\n\r\n"


def receive(connection: Http1Connection, data: bytes) -> list[Event]:
    connection.receive_data(data)
    events: list[Event] = []
    while not isinstance(event := connection.next_event(), Signal):
        events.append(event)
    return events


def answer(connection: Http1Connection, status: int = 200, body: bytes = b"ok") -> bytes:
    fields = Headers([(b"content-length", b"%d" % len(body))])
    sent = connection.send(ResponseHead(status, fields))
    return sent + connection.send(BodyChunk(body)) + connection.send(EndOfResponse())


def test_expect_is_answered_once_and_only_while_the_body_is_held_back() -> None:
    connection = Http1Connection()
    with pytest.raises(LocalProtocolError):
        connection.send_continue()
    connection = Http1Connection()
    receive(connection, POST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n")
    assert connection.wants_continue
    assert connection.send_continue() == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert not connection.wants_continue
    assert receive(connection, b"ok") == [BodyChunk(b"ok"), EndOfRequest()]
    answer(connection)
    assert connection.can_reuse


def test_an_answer_before_the_body_ends_the_wait_and_the_connection() -> None:
    connection = Http1Connection()
    receive(connection, POST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n")
    answer(connection, 401)
    assert not connection.wants_continue
    assert not connection.can_reuse


@pytest.mark.parametrize(
    "raw",
    [
        b"POST / HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n",  # 1.0 knows no 1xx
        POST + b"Content-Length: 2\r\n\r\n",
        POST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\no",  # did not wait
    ],
)
def test_nobody_waits_for_continue(raw: bytes) -> None:
    connection = Http1Connection()
    receive(connection, raw)
    assert not connection.wants_continue


@pytest.mark.parametrize(
    ("raw", "head_bytes", "chunk_bytes", "end_bytes"),
    [
        (
            GET,
            b"HTTP/1.1 200 OK\r\nx: y\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"2\r\nok\r\n",
            b"0\r\n\r\n",
        ),
        (b"GET / HTTP/1.0\r\n\r\n", b"HTTP/1.1 200 OK\r\nx: y\r\nConnection: close\r\n\r\n", b"ok", b""),
        (
            b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nx: y\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"",
            b"",
        ),
    ],
    ids=["chunked", "until close", "HEAD"],
)
def test_a_body_of_unknown_size(raw: bytes, head_bytes: bytes, chunk_bytes: bytes, end_bytes: bytes) -> None:
    connection = Http1Connection()
    receive(connection, raw)
    assert connection.send(ResponseHead(200, Headers([(b"x", b"y")]))) == head_bytes
    assert connection.is_streaming
    assert not connection.can_answer
    assert connection.send(BodyChunk(b"ok")) == chunk_bytes
    assert connection.send(BodyChunk(b"")) == b""
    assert connection.send(EndOfResponse()) == end_bytes
    assert not connection.is_streaming


@given(
    st.lists(st.binary(max_size=300)),
    st.sampled_from(["GET / HTTP/1.1", "HEAD / HTTP/1.1", "GET / HTTP/1.0"]),
)
def test_every_chunk_is_framed_as_h11_frames_it(parts: list[bytes], line: str) -> None:
    raw = line.encode() + b"\r\nHost: a\r\n\r\n"
    connection, plain = Http1Connection(), h11.Connection(h11.SERVER)
    receive(connection, raw)
    plain.receive_data(raw)
    plain.next_event()
    connection.send(ResponseHead(200))
    plain.send(h11.Response(status_code=200, headers=[]))
    for part in parts:
        expected = plain.send(h11.Data(data=b"" if line.startswith("HEAD") else part))
        assert connection.send(BodyChunk(part)) == expected
    assert connection.send(EndOfResponse()) == plain.send(h11.EndOfMessage())
    with pytest.raises(LocalProtocolError):
        connection.send(BodyChunk(b"late"))


def test_a_sized_body_that_looks_like_a_chunk_stays_as_it_is() -> None:
    connection = Http1Connection()
    receive(connection, GET)
    connection.send(ResponseHead(200, Headers([(b"content-length", b"14")])))
    assert [connection.send(BodyChunk(b"2\r\nok\r\n")) for _ in range(2)] == [b"2\r\nok\r\n"] * 2
    assert connection.send(EndOfResponse()) == b""


def test_head_keeps_the_length_and_drops_the_body() -> None:
    connection = Http1Connection()
    receive(connection, b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n")
    assert answer(connection) == b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"
    connection.start_next_cycle()
    receive(connection, GET)
    assert answer(connection) == b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@pytest.mark.parametrize(
    ("status", "line"),
    [
        (404, b"HTTP/1.1 404 Not Found\r\n"),
        (431, b"HTTP/1.1 431 Request Header Fields Too Large\r\n"),
        (499, b"HTTP/1.1 499 \r\n"),
    ],
)
def test_the_reason_phrase_is_the_registered_one(status: int, line: bytes) -> None:
    connection = Http1Connection()
    receive(connection, GET)
    assert answer(connection, status).startswith(line)


TWO = Headers([(b"content-length", b"2")])


@pytest.mark.parametrize(
    "sent",
    [
        (BodyChunk(b"x"),),
        (EndOfResponse(),),
        (ResponseHead(200, TWO), ResponseHead(200, TWO)),
        (ResponseHead(200, TWO), BodyChunk(b"abc")),
        (ResponseHead(200, TWO), BodyChunk(b"a"), EndOfResponse()),
        (ResponseHead(200, TWO), BodyChunk(b"ok"), EndOfResponse(), BodyChunk(b"x")),
        (ResponseHead(200, Headers([(b"a b", b"c")])),),
        (ResponseHead(200, Headers([(b"a", b"b\r\nc: d")])),),
        (ResponseHead(100),),
    ],
    ids=[
        "body first", "end first", "two heads", "too much", "too little", "after the end", "bad name", "split value",
        "interim head",
    ],
)  # fmt: skip
def test_a_misuse_is_a_local_error(sent: tuple[ResponseHead | BodyChunk | EndOfResponse, ...]) -> None:
    connection = Http1Connection()
    receive(connection, GET)
    for event in sent[:-1]:
        connection.send(event)
    with pytest.raises(LocalProtocolError):
        connection.send(sent[-1])
    assert not connection.can_reuse


def test_the_next_cycle_needs_a_finished_answer() -> None:
    connection = Http1Connection()
    receive(connection, GET)
    with pytest.raises(LocalProtocolError):
        connection.start_next_cycle()
    assert "SEND_RESPONSE" in repr(connection)
