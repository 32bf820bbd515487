"""The server side of HTTP/1.1: which bytes become which events, in any split, and what can still be sent.

One table holds every valid request with the events it must give, one every refusal with its status.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import (
    NEED_DATA,
    PAUSED,
    BodyChunk,
    ConnectionClosed,
    EndOfRequest,
    EndOfResponse,
    Event,
    Headers,
    Http1Connection,
    Limits,
    LocalProtocolError,
    RemoteProtocolError,
    RequestHead,
    ResponseHead,
    Signal,
)

NEXT = b"GET /next HTTP/1.1\r\nHost: n\r\n\r\n"
NEXT_HEAD = RequestHead("GET", b"/next", Headers([(b"host", b"n")]), "1.1", 0)
LIMITS = Limits(max_head_bytes=256, max_body_bytes=16, max_pipelined_bytes=64)


def head(
    method: str, target: bytes, length: int | None, *fields: tuple[bytes, bytes], v: str = "1.1"
) -> Event:
    host = [(b"host", b"a")] if v == "1.1" else []
    return RequestHead(method, target, Headers([*host, *fields]), v, length)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Valid:
    raw: bytes
    events: tuple[Event, ...]
    keeps_alive: bool = True


CHUNKED = (b"transfer-encoding", b"chunked")
VALID = {
    "get": Valid(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", (head("GET", b"/", 0), EndOfRequest())),
    "bare line feeds": Valid(b"GET / HTTP/1.1\nHost: a\n\n", (head("GET", b"/", 0), EndOfRequest())),
    "head": Valid(b"HEAD /x HTTP/1.1\r\nHost: a\r\n\r\n", (head("HEAD", b"/x", 0), EndOfRequest())),
    "any method": Valid(b"B-REW /x HTTP/1.1\r\nHost: a\r\n\r\n", (head("B-REW", b"/x", 0), EndOfRequest())),
    "asterisk": Valid(b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", (head("OPTIONS", b"*", 0), EndOfRequest())),
    "raw target": Valid(
        b"GET http://a/%2f?q=%00#f HTTP/1.1\r\nHost: a\r\n\r\n",
        (head("GET", b"http://a/%2f?q=%00#f", 0), EndOfRequest()),
    ),
    "fields": Valid(
        b"GET / HTTP/1.1\r\nHost: a\r\nX-A:1\r\nx-a: \t2 \t\r\nX-B:\r\nX-C: \xe9\r\n\r\n",
        (
            head("GET", b"/", 0, (b"x-a", b"1"), (b"x-a", b"2"), (b"x-b", b""), (b"x-c", b"\xe9")),
            EndOfRequest(),
        ),
    ),
    "folded field": Valid(
        b"GET / HTTP/1.1\r\nHost: a\r\nX: 1\r\n  2\r\n\r\n",
        (head("GET", b"/", 0, (b"x", b"1 2")), EndOfRequest()),
    ),
    "sized body": Valid(
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
        (head("POST", b"/", 5, (b"content-length", b"5")), BodyChunk(b"hello"), EndOfRequest()),
    ),
    "empty sized body": Valid(
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
        (head("POST", b"/", 0, (b"content-length", b"0")), EndOfRequest()),
    ),
    "same length twice": Valid(
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2, 2\r\nContent-Length: 2\r\n\r\nok",
        (head("POST", b"/", 2, (b"content-length", b"2")), BodyChunk(b"ok"), EndOfRequest()),
    ),
    "body that looks like a request": Valid(
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 16\r\n\r\nGET /x HTTP/1.1\r",
        (
            head("POST", b"/", 16, (b"content-length", b"16")),
            BodyChunk(b"GET /x HTTP/1.1\r"),
            EndOfRequest(),
        ),
    ),
    "chunked body": Valid(
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n5\r\nhello\r\nA\r\n0123456789\r\n0\r\n\r\n",
        (head("POST", b"/", None, CHUNKED), BodyChunk(b"hello0123456789"), EndOfRequest()),
    ),
    "chunk extensions and trailers": Valid(
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        b'002;a="b";c\r\n\r\n\r\n0;z\r\nTrailer: t\r\n\r\n',
        (head("POST", b"/", None, CHUNKED), BodyChunk(b"\r\n"), EndOfRequest()),
    ),
    "empty chunked body": Valid(
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        (head("POST", b"/", None, CHUNKED), EndOfRequest()),
    ),
    "expect": Valid(
        b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-Continue\r\nContent-Length: 2\r\n\r\nok",
        (
            head("POST", b"/", 2, (b"expect", b"100-Continue"), (b"content-length", b"2")),
            BodyChunk(b"ok"),
            EndOfRequest(),
        ),
    ),
    "close": Valid(
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: x, Close\r\n\r\n",
        (head("GET", b"/", 0, (b"connection", b"x, Close")), EndOfRequest()),
        keeps_alive=False,
    ),
    "refused upgrade": Valid(
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n",
        (head("GET", b"/", 0, (b"connection", b"upgrade"), (b"upgrade", b"h2c")), EndOfRequest()),
    ),
    "1.0": Valid(
        b"GET / HTTP/1.0\r\n\r\n", (head("GET", b"/", 0, v="1.0"), EndOfRequest()), keeps_alive=False
    ),
    "1.0 keep-alive": Valid(  # allowed to close all the same (RFC 9112, 9.3)
        b"POST / HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok",
        (
            head("POST", b"/", 2, (b"connection", b"keep-alive"), (b"content-length", b"2"), v="1.0"),
            BodyChunk(b"ok"),
            EndOfRequest(),
        ),
        keeps_alive=False,
    ),
}
VALID_CASES = pytest.mark.parametrize("case", VALID.values(), ids=VALID.keys())


def pull(connection: Http1Connection, events: list[Event]) -> Signal | None:
    """Append every event there is, joining body chunks; the signal that ended it, None at end of file."""
    while True:
        event = connection.next_event()
        if isinstance(event, Signal):
            return event
        if isinstance(event, BodyChunk) and events and isinstance(events[-1], BodyChunk):
            assert event.data
            events[-1] = BodyChunk(events[-1].data + event.data)
        else:
            events.append(event)
        if isinstance(event, ConnectionClosed):
            return None


def receive(connection: Http1Connection, pieces: Sequence[bytes]) -> list[Event]:
    events: list[Event] = []
    for piece in pieces:
        connection.receive_data(piece)
        pull(connection, events)
    return events


def answer(connection: Http1Connection, status: int = 200, body: bytes = b"ok") -> bytes:
    fields = Headers([(b"content-length", b"%d" % len(body))])
    sent = connection.send(ResponseHead(status, fields))
    return sent + connection.send(BodyChunk(body)) + connection.send(EndOfResponse())


def bytewise(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


@VALID_CASES
def test_a_request_gives_its_events_whole_and_byte_by_byte(case: Valid) -> None:
    for pieces in ([case.raw], bytewise(case.raw)):
        connection = Http1Connection(LIMITS)
        assert receive(connection, pieces) == list(case.events)
        assert all(type(e.target) is bytes for e in case.events if isinstance(e, RequestHead))
        assert (connection.can_answer, connection.can_reuse, connection.is_streaming) == (True, False, False)
        answer(connection)
        assert connection.can_reuse == case.keeps_alive


@VALID_CASES
def test_what_follows_a_request_waits_for_its_answer(case: Valid) -> None:
    connection = Http1Connection(LIMITS)
    connection.receive_data(case.raw + NEXT)
    events: list[Event] = []
    if not case.keeps_alive:  # nothing may follow
        with pytest.raises(RemoteProtocolError):
            pull(connection, events)
        assert events == list(case.events)
        assert connection.can_answer
        return
    assert pull(connection, events) is PAUSED
    assert events == list(case.events)
    answer(connection)
    connection.start_next_cycle()
    assert receive(connection, [b""]) == [NEXT_HEAD, EndOfRequest(), ConnectionClosed()]


@VALID_CASES
def test_no_request_is_complete_before_its_last_byte(case: Valid) -> None:
    connection = Http1Connection(LIMITS)
    assert EndOfRequest() not in receive(connection, [case.raw[:-1]])
    with pytest.raises(RemoteProtocolError) as caught:
        receive(connection, [b""])
    assert caught.value.status_hint == 400
    assert connection.can_answer


@st.composite
def splits(draw: st.DrawFn) -> tuple[list[Valid], list[bytes]]:
    cases = draw(st.lists(st.sampled_from(list(VALID.values())), min_size=1, max_size=3))
    raw = b"".join(case.raw for case in cases)
    cuts = sorted(draw(st.lists(st.integers(0, len(raw)), max_size=12)))
    pieces = [raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True) if start < end]
    return cases, pieces


@given(splits())
@settings(deadline=None, database=None, derandomize=True, max_examples=300)
def test_the_split_of_the_bytes_does_not_matter(split: tuple[list[Valid], list[bytes]]) -> None:
    cases, pieces = split
    wanted: list[Event] = []
    for case in cases:
        wanted += case.events
        if not case.keeps_alive:
            break
    else:
        wanted.append(ConnectionClosed())
    connection = Http1Connection()
    events: list[Event] = []
    for piece in (*pieces, b""):
        connection.receive_data(piece)
        while True:
            event = connection.next_event()
            if event is NEED_DATA:
                break
            assert not isinstance(event, Signal)
            if isinstance(event, BodyChunk) and isinstance(events[-1], BodyChunk):
                events[-1] = BodyChunk(events[-1].data + event.data)
            else:
                events.append(event)
            if isinstance(event, ConnectionClosed):
                break
            if isinstance(event, EndOfRequest):
                answer(connection)
                if not connection.can_reuse:
                    assert events == wanted
                    return
                connection.start_next_cycle()
    assert events == wanted


# -- refusals -------------------------------------------------------------------------------------

POST = b"POST / HTTP/1.1\r\nHost: a\r\n"
TE = b"Transfer-Encoding: chunked\r\n"
INVALID = {
    "no request line": (b"\r\n\r\n", 400),
    "no version": (b"GET /\r\n\r\n", 400),
    "two spaces": (b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "space in target": (b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "raw byte in target": (b"GET /\xe9 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
    "space before colon": (POST + b"Content-Length : 2\r\n\r\nok", 400),
    "field without colon": (POST + b"Content-Length 2\r\n\r\nok", 400),
    "NUL in a field": (POST + b"X: a\0b\r\n\r\n", 400),
    "bare CR in a field": (POST + b"X: a\rb\r\n\r\n", 400),
    "fold before any field": (b"GET / HTTP/1.1\r\n Host: a\r\n\r\n", 400),
    "two lengths": (POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nok", 400),
    "two lengths in a list": (POST + b"Content-Length: 2, 3\r\n\r\nok", 400),
    "signed length": (POST + b"Content-Length: +2\r\n\r\nok", 400),
    "negative length": (POST + b"Content-Length: -2\r\n\r\nok", 400),
    "hex length": (POST + b"Content-Length: 0x2\r\n\r\nok", 400),
    "empty length": (POST + b"Content-Length:\r\n\r\nok", 400),
    "length over the limit": (POST + b"Content-Length: 17\r\n\r\n", 413),
    "length of 20 digits": (POST + b"Content-Length: " + b"9" * 20 + b"\r\n\r\n", 413),
    "length of 200 digits": (POST + b"Content-Length: " + b"9" * 200 + b"\r\n\r\n", 400),
    "TE and CL": (POST + TE + b"Content-Length: 2\r\n\r\n0\r\n\r\n", 400),
    "CL and TE": (POST + b"Content-Length: 2\r\n" + TE + b"\r\n0\r\n\r\n", 400),
    "TE in 1.0": (b"POST / HTTP/1.0\r\n" + TE + b"\r\n0\r\n\r\n", 400),
    "TE twice": (POST + TE + TE + b"\r\n0\r\n\r\n", 501),
    "unknown TE": (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
    "disguised TE": (POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n", 400),
    "chunk size": (POST + TE + b"\r\nxyz\r\n", 400),
    "negative chunk size": (POST + TE + b"\r\n-1\r\n", 400),
    "chunk size of 21 digits": (POST + TE + b"\r\n" + b"f" * 21 + b"\r\n", 400),
    "chunk longer than its size": (POST + TE + b"\r\n2\r\nokay\r\n0\r\n\r\n", 400),
    "trailer without colon": (POST + TE + b"\r\n0\r\nx\r\n\r\n", 400),
    "chunks over the limit": (POST + TE + b"\r\n10\r\n0123456789abcdef\r\n1\r\nx\r\n0\r\n\r\n", 413),
    "head over the limit": (POST + b"X: " + b"a" * 256 + b"\r\n\r\n", 431),
    "target over the limit": (b"GET /" + b"a" * 256 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 431),
    "many fields over the limit": (POST + b"a:b\r\n" * 60 + b"\r\n", 431),
    "endless line": (b"G" * 300, 431),
}


@pytest.mark.parametrize(("raw", "status"), INVALID.values(), ids=INVALID.keys())
@pytest.mark.parametrize("cut", [list, bytewise], ids=["whole", "byte by byte"])
def test_a_refusal_has_its_status_and_can_be_answered(raw: bytes, status: int, cut: object) -> None:
    connection = Http1Connection(LIMITS)
    with pytest.raises(RemoteProtocolError) as caught:
        receive(connection, [raw] if cut is list else bytewise(raw))
    assert caught.value.status_hint == status
    assert str(caught.value)
    assert (connection.can_answer, connection.can_reuse, connection.is_streaming) == (True, False, False)
    assert answer(connection, status, b"no").endswith(b"\r\n\r\nno")
    assert (connection.can_answer, connection.can_reuse, connection.is_streaming) == (False, False, False)


@pytest.mark.parametrize(
    ("limits", "raw"),
    [
        (Limits(max_head_bytes=len(POST) + 2), POST + b"\r\n"),
        (Limits(max_body_bytes=5), POST + b"Content-Length: 5\r\n\r\nhello"),
        (Limits(max_body_bytes=5), POST + TE + b"\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"),
    ],
    ids=["head", "sized body", "chunked body"],
)
def test_what_just_fits_a_limit_is_let_in(limits: Limits, raw: bytes) -> None:
    for pieces in ([raw], bytewise(raw)):
        assert receive(Http1Connection(limits), pieces)[-1] == EndOfRequest()


def test_the_body_limit_counts_each_request_anew() -> None:
    connection = Http1Connection(Limits(max_body_bytes=5))
    for _ in range(3):
        assert receive(connection, [POST + TE + b"\r\n5\r\nhello\r\n0\r\n\r\n"])[-1] == EndOfRequest()
        answer(connection)
        connection.start_next_cycle()


def test_bytes_sent_ahead_are_capped() -> None:
    connection = Http1Connection(Limits(max_pipelined_bytes=10))
    for _ in range(2):  # the count starts anew with each request
        assert receive(connection, [POST + b"\r\n"])[-1] == EndOfRequest()
        connection.receive_data(NEXT[:6])
        connection.receive_data(NEXT[6:10])
        answer(connection)
        connection.start_next_cycle()
        receive(connection, [NEXT[10:]])
        with pytest.raises(RemoteProtocolError) as caught:
            connection.receive_data(b"x" * 11)
        assert caught.value.status_hint == 413
        assert connection.can_answer
        answer(connection)
        connection.start_next_cycle()


@pytest.mark.parametrize("raw", [b"", POST + b"\r\n"], ids=["before a request", "after a request"])
def test_end_of_file_between_requests_is_no_error(raw: bytes) -> None:
    connection = Http1Connection()
    if raw:
        receive(connection, [raw])
        answer(connection)
        connection.start_next_cycle()
    assert receive(connection, [b""]) == [ConnectionClosed()]
    assert not connection.can_answer


def test_nothing_is_received_after_end_of_file() -> None:
    connection = Http1Connection()
    connection.receive_data(b"")
    with pytest.raises(LocalProtocolError):
        connection.receive_data(b"x")


def test_a_connection_in_error_stays_in_error() -> None:
    connection = Http1Connection()
    for data in (b"\x00", NEXT):
        with pytest.raises(RemoteProtocolError):
            receive(connection, [data])
    answer(connection, 400)
    with pytest.raises(LocalProtocolError):
        connection.start_next_cycle()
