"""HTTP/1.1 from a hostile peer.

Invariant: for any bytes, in any split, only RemoteProtocolError escapes `Http1Connection`; the
split changes nothing but where body chunks are cut; after an error an answer can be sent as long
as `can_answer` says so, and the connection is never reusable; the events of a request come in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fuzz.mutate import pieces
from protocol import (
    NEED_DATA,
    BodyChunk,
    ConnectionClosed,
    EndOfRequest,
    EndOfResponse,
    Event,
    Headers,
    Http1Connection,
    Limits,
    RemoteProtocolError,
    RequestHead,
    ResponseHead,
)

TOKENS = (
    b"\r\n", b"\n", b"\r", b"\r\n\r\n", b" ", b"\t", b"\x00", b":", b",", b";", b"0\r\n\r\n", b"HTTP/1.0", b"HTTP/1.1",
    b"GET ", b"HEAD ", b"POST ", b"CONNECT ", b"OPTIONS * ", b"Host: a\r\n", b"Content-Length: 5\r\n",
    b"Content-Length: 99999999999999999999\r\n", b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n",
    b"Connection: keep-alive\r\n", b"Expect: 100-continue\r\n", b"Upgrade: h2c\r\n", b"ffffffffffffffff\r\n",
    b"5;x=y\r\n", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
)  # fmt: skip

_TIGHT = Limits(max_head_bytes=256, max_body_bytes=16, max_pipelined_bytes=32)


@dataclass
class _Transcript:
    """What a connection said; `failed` when it ended with an error."""

    events: list[Event] = field(default_factory=list)
    failed: bool = False

    def add(self, event: Event) -> None:
        last = self.events[-1] if self.events else None
        if isinstance(event, BodyChunk):
            assert event.data, "an empty body chunk"
            assert isinstance(last, RequestHead | BodyChunk), last
            if isinstance(last, BodyChunk):
                self.events[-1] = BodyChunk(last.data + event.data)
                return
        elif isinstance(event, EndOfRequest):
            assert isinstance(last, RequestHead | BodyChunk), last
        else:
            assert last is None or isinstance(last, EndOfRequest), last
        self.events.append(event)


def one(data: bytes) -> None:
    """Check the invariant for `data`."""
    whole = _serve([data], Limits())
    for split in ([data[at : at + 1] for at in range(len(data))], pieces(data)):
        assert _serve(split, Limits()) == whole, split
    for split in ([data], pieces(data)):  # how much of a refused body is seen depends on the split
        received = 0
        for event in _serve(split, _TIGHT).events:
            received = len(event.data) if isinstance(event, BodyChunk) else 0
            assert received <= _TIGHT.max_body_bytes


def _serve(split: Sequence[bytes], limits: Limits) -> _Transcript:
    connection = Http1Connection(limits)
    transcript = _Transcript()
    refusal = None
    try:
        for piece in (*(piece for piece in split if piece), b""):
            connection.receive_data(piece)
            if not _pull(connection, transcript):
                break
    except RemoteProtocolError as error:
        refusal = error
    if refusal is not None:
        transcript.failed = True
        assert 400 <= refusal.status_hint <= 599
        assert not connection.can_reuse
        assert not connection.is_streaming
        if connection.can_answer:
            _answer(connection, refusal.status_hint)
    return transcript


def _pull(connection: Http1Connection, transcript: _Transcript) -> bool:
    """Take every event there is and answer what is complete; whether more bytes are wanted."""
    method = next((e.method for e in reversed(transcript.events) if isinstance(e, RequestHead)), "")
    while True:
        event = connection.next_event()
        if event is NEED_DATA:
            return True
        # never PAUSED: a complete request is answered before the next event is asked for
        assert isinstance(event, RequestHead | BodyChunk | EndOfRequest | ConnectionClosed), event
        transcript.add(event)
        if isinstance(event, ConnectionClosed):
            return False
        if isinstance(event, RequestHead):
            _check_head(event)
            method = event.method
            if connection.wants_continue:
                assert connection.send_continue().startswith(b"HTTP/1.1 100 ")
                assert not connection.wants_continue
        if isinstance(event, EndOfRequest):
            _answer(connection, 404 if method == "CONNECT" else 200)
            if not connection.can_reuse:
                return False
            connection.start_next_cycle()


def _check_head(head: RequestHead) -> None:
    assert head.http_version in ("1.0", "1.1"), head
    assert all(name == name.lower() for name, _ in head.headers)
    is_chunked = head.headers.has_token(b"transfer-encoding", b"chunked")
    assert (head.content_length is None) == is_chunked


def _answer(connection: Http1Connection, status: int) -> None:
    assert connection.can_answer
    sized = Headers([(b"content-length", b"2")]) if status % 2 == 0 else Headers()
    assert connection.send(ResponseHead(status, sized)).startswith(b"HTTP/1.1 ")
    assert connection.is_streaming
    connection.send(BodyChunk(b"ok"))
    connection.send(EndOfResponse())
    assert not connection.is_streaming
    assert not connection.can_answer
