"""Server-Sent Events (WHATWG HTML, 9.2): an encoder, and an incremental parser for clients and tests."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.errors import LocalProtocolError, RemoteProtocolError

COMMENT = b":\n\n"


def encode_event(data: bytes, event: str | None = None) -> bytes:
    """One event block: an optional `event:` line, one `data:` line per line of `data`, a blank line.

    Raises LocalProtocolError when the event name holds a line break.
    """
    if event is None and b"\n" not in data and b"\r" not in data:
        return b"data: " + data + b"\n\n"
    head = b""
    if event is not None:
        if "\n" in event or "\r" in event:
            raise LocalProtocolError("an event name can't hold a line break")
        try:
            head = b"event: " + event.encode() + b"\n"
        except UnicodeEncodeError:
            raise LocalProtocolError("an event name must be valid Unicode") from None
    lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    return head + b"".join(b"data: " + line + b"\n" for line in lines) + b"\n"


def encode_comment(text: bytes = b"") -> bytes:
    """A comment block, which clients ignore: it keeps proxies from closing an idle stream."""
    if not text:
        return COMMENT
    flat = text.replace(b"\r", b" ").replace(b"\n", b" ")
    return b": " + flat + b"\n\n"


@dataclass(frozen=True, slots=True)
class SseEvent:
    """One dispatched event; `event` is "message" unless named."""

    data: str
    event: str = "message"
    last_event_id: str = ""


class SseParser:
    """Bytes in any split -> events, by the rules of WHATWG HTML 9.2.6.

    A lone CR ends a line at once; the LF of a CRLF that comes later is dropped. `feed`
    raises RemoteProtocolError when an unfinished event outgrows `max_event_bytes`.
    """

    def __init__(self, max_event_bytes: int = 16 * 1024 * 1024) -> None:
        self._max_event_bytes = max_event_bytes
        self._line = bytearray()
        self._data: list[str] = []
        self._data_bytes = 0
        self._event = ""
        self._last_event_id = ""
        self._skip_lf = False
        self._at_start = True

    def feed(self, data: bytes) -> list[SseEvent]:
        """Take the next bytes of the stream; return the events they completed."""
        events: list[SseEvent] = []
        start = 0
        for index, byte in enumerate(data):
            if byte not in b"\r\n":
                self._skip_lf = False
                continue
            if byte == 0x0A and self._skip_lf:
                self._skip_lf = False
                start = index + 1
                continue
            self._skip_lf = byte == 0x0D
            self._line += data[start:index]
            start = index + 1
            self._check_size()
            event = self._end_line()
            if event is not None:
                events.append(event)
        self._line += data[start:]
        self._check_size()
        return events

    def _check_size(self) -> None:
        if len(self._line) + self._data_bytes > self._max_event_bytes:
            raise RemoteProtocolError("an event of the stream is too large")

    def _end_line(self) -> SseEvent | None:
        line = self._line.decode("utf-8", "replace")
        n_bytes = len(self._line)
        self._line.clear()
        if self._at_start:
            self._at_start = False
            line = line.removeprefix("\ufeff")
        if not line:
            return self._dispatch()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
            self._data_bytes += n_bytes
        elif name == "event":
            self._event = value
        elif name == "id" and "\x00" not in value:
            self._last_event_id = value
        return None

    def _dispatch(self) -> SseEvent | None:
        event = None
        if self._data:
            event = SseEvent("\n".join(self._data), self._event or "message", self._last_event_id)
        self._data.clear()
        self._data_bytes = 0
        self._event = ""
        return event
