"""The server side of one HTTP/1.1 connection, over h11 (RFC 9110, RFC 9112).

h11 parses and keeps the state machine; this module adds what a server needs around it:
limits on head, body and pipelined bytes, refusal of ambiguous framing, 100-continue, and
HEAD. Two rules: everything the peer may do wrong raises RemoteProtocolError, and after any
error the caller asks `can_answer` and `can_reuse`, which read h11's own states; there are
no flags to fall out of step. Chunks of a body whose first chunk h11 framed as chunked are
framed here alike, as its checks are what a streamed token would cost most.

Call order: `receive_data` with whatever arrived (b"" at end of file), then `next_event`
until it says NEED_DATA or PAUSED. After a finished response, `start_next_cycle`. After a head with
status 101 only `trailing_data` is left to be asked for.
"""

from __future__ import annotations

import http
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

import h11

from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.events import (
    NEED_DATA,
    PAUSED,
    BodyChunk,
    ConnectionClosed,
    EndOfRequest,
    EndOfResponse,
    Event,
    RequestHead,
    ResponseHead,
    Signal,
)
from protocol.headers import Headers

_MIGHT_SWITCH: Final = h11.MIGHT_SWITCH_PROTOCOL  # type: ignore[attr-defined]  # documented, not in __all__
_REASONS: Final = {status.value: status.phrase.encode("ascii") for status in http.HTTPStatus}


@dataclass(frozen=True, slots=True)
class Limits:
    """Caps in bytes. The head default is h11's own; larger heads only help attackers."""

    max_head_bytes: int = 16 * 1024
    max_body_bytes: int = 32 * 1024 * 1024
    max_pipelined_bytes: int = 64 * 1024


class Http1Connection:
    """One connection, any number of requests one after the other."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=self.limits.max_head_bytes)
        self._body_bytes = 0
        self._paused_bytes = 0
        self._n_buffered = 0
        self._method = ""
        self._frames_chunks = False

    def receive_data(self, data: bytes) -> None:
        """Take bytes from the peer; b"" means that it closed its sending side.

        Raises RemoteProtocolError (413) when more than `max_pipelined_bytes` arrive while a
        response is still owed.
        """
        if data and self._h11.their_state in (h11.DONE, h11.MUST_CLOSE, _MIGHT_SWITCH):
            self._paused_bytes += len(data)
            if self._paused_bytes > self.limits.max_pipelined_bytes:
                raise RemoteProtocolError("too many bytes sent ahead of the response", 413)
        try:
            self._h11.receive_data(data)
        except RuntimeError:  # bytes after the end of file: only a broken caller can do that
            raise LocalProtocolError("bytes fed after the end of file") from None

    def next_event(self) -> Event | Signal:
        """The next thing the peer did, or NEED_DATA, or PAUSED.

        Raises RemoteProtocolError with the status to answer: 400 for broken syntax or framing,
        413 for a body and 431 for a head over its limit.
        """
        while True:
            if self._h11.their_state is h11.IDLE:  # a head may come; counting copies what is buffered
                self._n_buffered = len(self._h11.trailing_data[0])
            try:
                event = self._h11.next_event()
            except h11.RemoteProtocolError as error:
                status = error.error_status_hint
                message = (
                    "the request head is too large" if status == 431 else "the request is not valid HTTP/1.1"
                )
                raise RemoteProtocolError(message, status) from error
            if event is h11.NEED_DATA:
                return NEED_DATA
            if event is h11.PAUSED:
                return PAUSED
            translated = self._translate(event)
            if translated is not None:
                return translated

    def _translate(self, event: Any) -> Event | None:
        if isinstance(event, h11.Request):
            return self._request_head(event)
        if isinstance(event, h11.Data):
            data = bytes(event.data)
            self._body_bytes += len(data)
            if self._body_bytes > self.limits.max_body_bytes:
                raise RemoteProtocolError(self._body_message(), 413)
            return BodyChunk(data) if data else None
        if isinstance(event, h11.EndOfMessage):
            return EndOfRequest()
        return ConnectionClosed()

    def _request_head(self, request: h11.Request) -> RequestHead:
        self._method = request.method.decode("ascii")
        self._body_bytes = 0
        if self._n_buffered - len(self._h11.trailing_data[0]) > self.limits.max_head_bytes:
            raise RemoteProtocolError("the request head is too large", 431)
        if request.http_version not in (b"1.0", b"1.1"):
            raise RemoteProtocolError("only HTTP/1.0 and HTTP/1.1 are spoken here", 505)
        version = cast("Literal['1.0', '1.1']", request.http_version.decode("ascii"))
        headers = Headers(request.headers)
        length = self._content_length(headers, version)
        return RequestHead(self._method, request.target, headers, version, length)

    def _content_length(self, headers: Headers, version: str) -> int | None:
        """Declared body size; refuses what two parsers could read in two ways (RFC 9112, 6.1)."""
        declared = headers.get(b"content-length")
        if headers.get(b"transfer-encoding") is None:
            length = int(declared) if declared is not None else 0
            if length > self.limits.max_body_bytes:
                raise RemoteProtocolError(self._body_message(), 413)
            return length
        if declared is not None:
            raise RemoteProtocolError("Transfer-Encoding and Content-Length exclude each other")
        if version == "1.0":
            raise RemoteProtocolError("HTTP/1.0 has no Transfer-Encoding")
        return None

    def _body_message(self) -> str:
        return f"the request body is larger than {self.limits.max_body_bytes} bytes"

    def send(self, event: ResponseHead | BodyChunk | EndOfResponse) -> bytes:
        """Bytes to write for `event`. The body of an answer to HEAD is dropped here.

        Raises LocalProtocolError when the event does not fit the state, e.g. a second head, or status
        101 for a request that asked for no upgrade.
        """
        if isinstance(event, BodyChunk) and self._frames_chunks and self.is_streaming:
            return _chunk_frame(event.data)
        try:
            sent = self._h11.send(self._untranslate(event)) or b""
        except h11.LocalProtocolError as error:
            raise LocalProtocolError(str(error)) from None
        self._frames_chunks = isinstance(event, BodyChunk) and sent == _chunk_frame(event.data) != b""
        return sent

    def _untranslate(self, event: ResponseHead | BodyChunk | EndOfResponse) -> h11.Event:
        if isinstance(event, ResponseHead):
            reason = _REASONS.get(event.status, b"")
            kind = h11.InformationalResponse if event.status == 101 else h11.Response
            return kind(status_code=event.status, headers=list(event.headers), reason=reason)
        if isinstance(event, BodyChunk):
            return h11.Data(data=b"" if self._method == "HEAD" else event.data)
        return h11.EndOfMessage()

    def send_continue(self) -> bytes:
        """The 100 (Continue) that the peer waits for before it sends its body (RFC 9110, 10.1.1)."""
        try:
            return (
                self._h11.send(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue"))
                or b""
            )
        except h11.LocalProtocolError as error:
            raise LocalProtocolError(str(error)) from None

    @property
    def trailing_data(self) -> bytes:
        """What arrived after the request: the first bytes of the new protocol after an upgrade."""
        return self._h11.trailing_data[0]

    @property
    def has_partial_head(self) -> bool:
        """Whether some bytes of the next request have arrived."""
        return self._h11.their_state is h11.IDLE and bool(self._h11.trailing_data[0])

    @property
    def is_request_complete(self) -> bool:
        """Whether nothing of the current request is outstanding; else the connection can't be reused."""
        return self._h11.their_state in (h11.DONE, _MIGHT_SWITCH)

    @property
    def wants_continue(self) -> bool:
        """Whether the peer holds its body back until `send_continue`."""
        return self._h11.they_are_waiting_for_100_continue

    @property
    def can_answer(self) -> bool:
        """Whether a response head can still be sent for the current request (or a broken one)."""
        return self._h11.our_state in (h11.IDLE, h11.SEND_RESPONSE)

    @property
    def can_reuse(self) -> bool:
        """Whether both sides finished and the connection may carry another request."""
        return self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE

    @property
    def is_streaming(self) -> bool:
        """Whether a response head went out and its body is not finished."""
        return self._h11.our_state is h11.SEND_BODY

    def start_next_cycle(self) -> None:
        """Make ready for the next request; raises LocalProtocolError unless `can_reuse`."""
        try:
            self._h11.start_next_cycle()
        except h11.LocalProtocolError as error:
            raise LocalProtocolError(str(error)) from None
        self._paused_bytes = 0
        self._method = ""

    def __repr__(self) -> str:
        return f"<Http1Connection us={self._h11.our_state} them={self._h11.their_state}>"


def _chunk_frame(data: bytes) -> bytes:
    """A chunk (RFC 9112, 7.1); none for no data, as that would end the body."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""
