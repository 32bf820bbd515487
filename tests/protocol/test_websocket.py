"""WebSocket frames and handshakes, without a socket."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import (
    NEED_DATA,
    CloseReceived,
    FragmentReceived,
    Headers,
    Http1Connection,
    LocalProtocolError,
    PingReceived,
    PongReceived,
    RemoteProtocolError,
    RequestHead,
    ResponseHead,
    SocketState,
    TextMessage,
    WebSocketConnection,
    check_handshake,
    close_frame,
    is_upgrade,
    offered_subprotocols,
    ping_frame,
    text_frame,
)
from protocol.events import SocketEvent
from protocol.websocket import accept_key
from tests.support.frames import (
    BINARY,
    CAP,
    CASES,
    CLOSE,
    CONT,
    HELLO,
    PING,
    PONG,
    TEXT,
    Case,
    close,
    frame,
    read_frames,
)

EACH_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def pull(connection: WebSocketConnection) -> list[SocketEvent]:
    """Every event there is but fragments."""
    events = []
    while (event := connection.next_event()) is not NEED_DATA:
        if not isinstance(event, FragmentReceived):
            events.append(event)
    return events


def run(*split: bytes) -> tuple[list[SocketEvent], int | None]:
    """Events and the close code of the error that ended them."""
    connection = WebSocketConnection(CAP)
    events: list[SocketEvent] = []
    try:
        for piece in split:
            connection.receive_data(piece)
            while (event := connection.next_event()) is not NEED_DATA:
                if not isinstance(event, FragmentReceived):
                    events.append(event)
    except RemoteProtocolError as error:
        assert connection.state is SocketState.CLOSED
        return events, error.close_code
    return events, None


@EACH_CASE
def test_a_peer_is_understood(case: Case) -> None:
    events, error_code = run(case.data)
    assert [event.text for event in events if isinstance(event, TextMessage)] == list(case.texts)
    replies = [event.reply for event in events if isinstance(event, PingReceived)]
    assert [bytes(read_frames(reply)[0].data) for reply in replies] == list(case.pings)
    if events and isinstance(events[-1], CloseReceived):
        assert (events[-1].code, error_code) == (case.code, None)
    else:
        assert error_code == case.code


@EACH_CASE
def test_it_does_not_matter_how_bytes_arrive(case: Case) -> None:
    assert run(*(bytes([byte]) for byte in case.data)) == run(case.data)


def test_a_huge_message_is_refused_by_its_head() -> None:
    connection = WebSocketConnection()
    connection.receive_data(frame(TEXT, declared=1 << 40)[:-1])
    assert connection.next_event() is NEED_DATA  # its mask is not complete
    connection.receive_data(b"\x00")
    with pytest.raises(RemoteProtocolError, match="262144 bytes") as raised:
        connection.next_event()
    assert raised.value.close_code == 1009


@pytest.mark.parametrize(("payload", "code", "reason"), [(b"", 1005, ""), (b"\x03\xe9bye", 1001, "bye")])
def test_a_close_frame_is_answered_with_its_code(payload: bytes, code: int, reason: str) -> None:
    connection = WebSocketConnection()
    connection.receive_data(frame(CLOSE, payload))
    reply = bytes((0x88, len(payload[:2]))) + payload[:2]
    assert connection.next_event() == CloseReceived(code, reason, reply)
    assert connection.state is SocketState.CLOSED
    assert connection.send_close(1000) == b""


def test_after_our_close_frame_messages_are_dropped() -> None:
    connection = WebSocketConnection(CAP)
    connection.receive_data(frame(TEXT, b"he", fin=False))
    assert pull(connection) == []
    assert connection.send_close(1013, "later") == close_frame(1013, "later")
    assert connection.send_close(1000) == b""
    for byte in frame(CONT, b"llo") + HELLO + frame(PONG, b"p") + frame(BINARY, b"*" * (CAP + 1)):
        connection.receive_data(bytes([byte]))
        assert pull(connection) in ([], [PongReceived(b"p")])
    connection.receive_data(close(1013))
    assert pull(connection) == [CloseReceived(1013, "", b"")]
    assert connection.state is SocketState.CLOSED


@pytest.mark.parametrize("ending", [b"", close(1000)], ids=["gone", "closed"])
def test_nothing_follows_the_end(ending: bytes) -> None:
    connection = WebSocketConnection()
    connection.receive_data(HELLO[:3])
    pull(connection)
    connection.receive_data(HELLO[3:] + ending)
    pull(connection)
    connection.receive_data(ending)
    connection.receive_data(HELLO)
    assert connection.next_event() is NEED_DATA


# -- what we send ---------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 125, 126, 65535, 65536])
def test_frames_are_read_by_others(length: int) -> None:
    (received,) = read_frames(text_frame(b"*" * length))
    assert (received.opcode, received.fin, len(received.data)) == (TEXT, True, length)


def test_control_frames_are_read_by_others() -> None:
    (ping, closing) = read_frames(ping_frame(b"x") + close_frame(1001, "bye"))
    assert (ping.opcode, bytes(ping.data)) == (PING, b"x")
    assert (closing.opcode, bytes(closing.data)) == (CLOSE, b"\x03\xe9bye")
    with pytest.raises(LocalProtocolError):
        ping_frame(b"x" * 126)


@given(st.text(max_size=200))
def test_a_reason_is_cut_between_characters(reason: str) -> None:
    (closing,) = read_frames(close_frame(1000, reason))
    sent = bytes(closing.data)[2:].decode()
    assert reason.encode("utf-8", "replace").decode().startswith(sent)
    assert len(sent.encode()) > 119 or len(sent) == len(reason)


@pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000])
def test_reserved_close_codes_are_not_sent(code: int) -> None:
    connection = WebSocketConnection()
    with pytest.raises(LocalProtocolError):
        connection.send_close(code)
    assert connection.state is SocketState.OPEN


# -- the handshake --------------------------------------------------------------------------------

KEY = b"dGhlIHNhbXBsZSBub25jZQ=="
HANDSHAKE = {
    b"host": b"a",
    b"upgrade": b"websocket",
    b"connection": b"Upgrade",
    b"sec-websocket-key": KEY,
    b"sec-websocket-version": b"13",
}


def head(method: str = "GET", version: str = "1.1", **changes: bytes | None) -> RequestHead:
    fields = HANDSHAKE | {name.replace("_", "-").encode(): value for name, value in changes.items()}
    present = [(name, value) for name, value in fields.items() if value is not None]
    return RequestHead(method, b"/", Headers(present), version, 0)  # type: ignore[arg-type]


def test_the_key_is_answered_as_the_standard_says() -> None:
    assert accept_key(KEY) == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # RFC 6455, 1.3
    assert check_handshake(head()) == accept_key(KEY)


def test_header_values_may_be_lists_in_any_case() -> None:
    offered = head(upgrade=b"h2c, WebSocket", connection=b"keep-alive, uPGRADE")
    assert is_upgrade(offered.headers)
    assert check_handshake(offered) == accept_key(KEY)


@pytest.mark.parametrize(
    ("wrong", "status"),
    [
        (head("POST"), 400),
        (head(version="1.0"), 400),
        (head(upgrade=None), 426),
        (head(upgrade=b"h2c"), 426),
        (head(connection=b"keep-alive"), 426),
        (head(sec_websocket_version=None), 426),
        (head(sec_websocket_version=b"8"), 426),
        (head(sec_websocket_version=b"13, 8"), 426),
        (head(sec_websocket_key=None), 400),
        (head(sec_websocket_key=b""), 400),
        (head(sec_websocket_key=b"AAAA"), 400),
        (head(sec_websocket_key=KEY[:-1]), 400),
        (head(sec_websocket_key=KEY + b"!"), 400),
        (head(sec_websocket_key=b"\xff" * 24), 400),
    ],
)
def test_a_wrong_handshake_is_refused(wrong: RequestHead, status: int) -> None:
    with pytest.raises(RemoteProtocolError) as raised:
        check_handshake(wrong)
    assert raised.value.status_hint == status


def test_two_keys_are_refused() -> None:
    fields = [*HANDSHAKE.items(), (b"sec-websocket-key", KEY)]
    with pytest.raises(RemoteProtocolError):
        check_handshake(RequestHead("GET", b"/", Headers(fields), "1.1", 0))


def test_subprotocols_are_listed_in_order() -> None:
    name = b"Sec-WebSocket-Protocol"
    headers = Headers([(name, b"wingman, wingman.key.YQ"), (b"x", b"y"), (name, b"b,,two words, \xff,c")])
    assert offered_subprotocols(headers) == ("wingman", "wingman.key.YQ", "b", "c")
    assert offered_subprotocols(Headers()) == ()


# -- the change of protocol -----------------------------------------------------------------------

ASK = b"GET / HTTP/1.1\r\n" + b"".join(b"%b: %b\r\n" % field for field in HANDSHAKE.items()) + b"\r\n"


def test_bytes_after_the_handshake_are_frames() -> None:
    http = Http1Connection()
    http.receive_data(ASK + HELLO)
    assert isinstance(http.next_event(), RequestHead)
    http.next_event()
    assert http.is_request_complete
    answer = http.send(ResponseHead(101, Headers([(b"upgrade", b"websocket"), (b"connection", b"upgrade")])))
    assert answer.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
    assert http.trailing_data == HELLO
    assert not http.can_reuse


def test_a_request_that_asks_for_no_upgrade_gets_none() -> None:
    http = Http1Connection()
    http.receive_data(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    http.next_event()
    http.next_event()
    with pytest.raises(LocalProtocolError):
        http.send(ResponseHead(101, Headers([(b"upgrade", b"websocket"), (b"connection", b"upgrade")])))
