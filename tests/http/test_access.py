"""Who may call: keys in four spellings, Host and Origin, and the cross-origin policy with llama-server's values."""

from __future__ import annotations

import base64

import pytest

from protocol import Headers
from wingman.errors import Forbidden, Unauthenticated
from wingman.http.access import KEY_PROTOCOL, Cors, Guard, Hosts, Keys

KEYS = Keys(["first", "sécond", ""])


@pytest.mark.parametrize(
    ("fields", "is_allowed"),
    [
        ([("Authorization", "Bearer first")], True),
        ([("Authorization", "first")], True),
        ([("X-Api-Key", "first")], True),
        ([("authorization", "Bearer sécond")], True),
        ([], False),
        ([("Authorization", "")], False),
        ([("Authorization", "Bearer ")], False),
        ([("X-Api-Key", "")], False),
        ([("Authorization", "Bearer third")], False),
        ([("Authorization", "Bearer firs")], False),
        ([("Authorization", "Bearer firstt")], False),
        ([("Authorization", "Bearer FIRST")], False),
        ([("Authorization", "Bearer first ")], False),
        ([("Authorization", "Basic first")], False),
        ([("Authorization", "Bearer Bearer first")], False),
        ([("Authorization", "first,sécond")], False),
        ([("Authorization", "wrong"), ("X-Api-Key", "first")], False),  # a wrong Authorization is final
        ([("Authorization", "first"), ("X-Api-Key", "wrong")], True),
        ([("Authorization", "wrong"), ("Authorization", "first")], False),  # the first of a name counts
        ([("Cookie", "first")], False),
    ],
)
def test_a_key_lets_in(fields: list[tuple[str, str]], is_allowed: bool) -> None:
    headers = Headers((name.encode(), value.encode()) for name, value in fields)
    assert KEYS.allow(headers) == is_allowed


@pytest.mark.parametrize("keys", [[], [""]])
def test_without_keys_everybody_may_call(keys: list[str]) -> None:
    assert not Keys(keys)
    assert Keys(keys).allow(Headers())
    assert Keys(keys).allow(Headers([(b"authorization", b"anything")]))


def test_keys_are_truthy_when_there_are_any() -> None:
    assert KEYS


def spelt(key: str, pad: bool = False) -> str:
    """A key as a WebSocket subprotocol."""
    coded = base64.urlsafe_b64encode(key.encode()).decode()
    return KEY_PROTOCOL + (coded if pad else coded.rstrip("="))


@pytest.mark.parametrize(
    ("offered", "is_allowed"),
    [
        (spelt("first"), True),
        (spelt("first", pad=True), True),
        (f"wingman, {spelt('sécond')}", True),
        (f"{spelt('first')},wingman", True),
        (spelt("third"), False),
        (spelt(""), False),
        (f"{spelt('third')}, {spelt('first')}", False),  # one guess a request
        ("first", False),
        ("wingman.key.first", False),
        ("wingman.key.A", False),
        ("wingman.key.é", False),
        ("", False),
    ],
)
def test_a_key_comes_as_a_subprotocol(offered: str, is_allowed: bool) -> None:
    headers = Headers([(b"sec-websocket-protocol", offered.encode())])
    assert KEYS.allow(headers) == is_allowed


def test_a_wrong_authorization_is_final_for_subprotocols_too() -> None:
    headers = Headers(
        [(b"authorization", b"Bearer wrong"), (b"sec-websocket-protocol", spelt("first").encode())]
    )
    assert not KEYS.allow(headers)


LOOPBACK = Hosts(["127.0.0.1"])
LAN = Hosts(["192.168.1.5"], ["box.lan", "Wingman.Example"])
EVERYWHERE = Hosts(["0.0.0.0"])
EVERYWHERE6 = Hosts(["::"])


@pytest.mark.parametrize(
    ("hosts", "host", "is_allowed"),
    [
        (LOOPBACK, "127.0.0.1", True),
        (LOOPBACK, "127.0.0.1:6568", True),
        (LOOPBACK, "127.8.9.1", True),
        (LOOPBACK, "localhost:6568", True),
        (LOOPBACK, "LOCALHOST", True),
        (LOOPBACK, "localhost.", True),
        (LOOPBACK, "box.localhost", True),
        (LOOPBACK, "[::1]:6568", True),
        (LOOPBACK, "[::1]", True),
        (LOOPBACK, "[0:0:0:0:0:0:0:1]", True),
        (LOOPBACK, "evil.example", False),
        (LOOPBACK, "evil.example:6568", False),
        (LOOPBACK, "127.0.0.1.evil.example", False),
        (LOOPBACK, "localhost.evil.example", False),
        (LOOPBACK, "evillocalhost", False),
        (LOOPBACK, "127.0.0.1@evil.example", False),
        (LOOPBACK, "192.168.1.5", False),
        (LOOPBACK, "0.0.0.0:6568", False),
        (LOOPBACK, "[::]", False),
        (LOOPBACK, "127.1", False),
        (LOOPBACK, "2130706433", False),
        (LOOPBACK, "[::1", False),
        (LOOPBACK, ":6568", False),
        (LOOPBACK, "löcalhost", False),
        (LAN, "192.168.1.5:80", True),
        (LAN, "box.lan", True),
        (LAN, "BOX.lan.:80", True),
        (LAN, "wingman.example", True),
        (LAN, "a.box.lan", False),
        (LAN, "192.168.1.6", False),
        (EVERYWHERE, "192.168.1.6:80", True),  # an address can't be rebound
        (EVERYWHERE, "[fe80::1]:80", True),
        (EVERYWHERE, "evil.example", False),
        (EVERYWHERE6, "10.0.0.1", True),
        (EVERYWHERE6, "evil.example", False),
        (Hosts(["127.0.0.1"], ["*"]), "evil.example", True),
    ],
)
def test_a_host_is_one_this_server_is_called_by(hosts: Hosts, host: str, is_allowed: bool) -> None:
    guard = Guard(Keys(()), hosts)
    headers = Headers([(b"host", host.encode("latin-1"))])
    if is_allowed:
        guard.check_origin(headers)
    else:
        with pytest.raises(Forbidden, match="--allow-host"):
            guard.check_origin(headers)
        guard.check_origin(headers, is_unix=True)  # no page can come that way


def test_a_request_without_a_host_is_no_page_of_a_browser() -> None:
    Guard(Keys(()), LOOPBACK, ()).check_origin(Headers())


CONTROL = Guard(Keys(()), LAN, ("https://app.example",))


@pytest.mark.parametrize(
    ("host", "fields", "is_allowed"),
    [
        ("box.lan", {}, True),
        ("box.lan", {"origin": "http://box.lan"}, True),
        ("box.lan:6568", {"origin": "http://box.lan:3000"}, True),  # another port of this machine
        ("box.lan", {"origin": "http://BOX.lan"}, True),
        ("box.lan", {"origin": "http://192.168.1.5"}, True),
        ("127.0.0.1:6568", {"origin": "http://localhost:3000"}, True),
        ("127.0.0.1", {"origin": "http://[::1]:3000"}, True),
        ("127.0.0.1", {"origin": "https://app.example"}, True),
        ("127.0.0.1", {"origin": "https://app.example", "sec-fetch-site": "cross-site"}, True),
        ("127.0.0.1", {"origin": "https://app.example:8443"}, False),
        ("127.0.0.1", {"origin": "http://app.example"}, False),
        ("127.0.0.1", {"origin": "https://evil.example"}, False),
        ("127.0.0.1", {"origin": "https://evil.example", "sec-fetch-site": "same-origin"}, False),
        ("127.0.0.1", {"origin": "http://localhost.evil.example"}, False),
        ("127.0.0.1", {"origin": "http://tauri.localhost"}, True),  # always this machine: RFC 6761, 6.3
        ("127.0.0.1", {"origin": "http://127.0.0.1@evil.example"}, False),
        ("127.0.0.1", {"origin": "null"}, False),
        ("127.0.0.1", {"origin": ""}, False),
        ("127.0.0.1", {"origin": "file://"}, False),
        ("127.0.0.1", {"origin": "localhost"}, False),
        ("127.0.0.1", {"origin": "http://0.0.0.0"}, False),
        ("127.0.0.1", {"sec-fetch-site": "cross-site"}, False),
        ("127.0.0.1", {"sec-fetch-site": "same-site"}, True),
        ("127.0.0.1", {"sec-fetch-site": "same-origin"}, True),
        ("127.0.0.1", {"sec-fetch-site": "none"}, True),  # typed into the address bar
    ],
)
def test_pages_of_other_sites_may_not_call(host: str, fields: dict[str, str], is_allowed: bool) -> None:
    headers = Headers((name.encode(), value.encode()) for name, value in {"host": host, **fields}.items())
    if is_allowed:
        CONTROL.check_origin(headers)
    else:
        with pytest.raises(Forbidden, match="--cors-origins"):
            CONTROL.check_origin(headers)


def test_a_name_that_was_rebound_is_refused_though_the_page_has_the_same_origin() -> None:
    headers = Headers([(b"host", b"evil.example:6568"), (b"origin", b"http://evil.example:6568")])
    with pytest.raises(Forbidden, match="--allow-host"):
        CONTROL.check_origin(headers)


def test_where_all_addresses_are_listened_on_the_wildcard_is_no_name_of_a_page() -> None:
    guard = Guard(Keys(()), EVERYWHERE, ())
    with pytest.raises(Forbidden):
        guard.check_origin(Headers([(b"host", b"127.0.0.1"), (b"origin", b"http://0.0.0.0")]))
    guard.check_origin(Headers([(b"host", b"10.0.0.1"), (b"origin", b"http://10.0.0.1:3000")]))


def test_without_origins_to_check_all_pages_may_call() -> None:
    Guard(KEYS, LOOPBACK).check_origin(
        Headers([(b"host", b"localhost"), (b"origin", b"https://any.example")])
    )


def test_a_guard_asks_for_a_key() -> None:
    guard = Guard(KEYS)
    guard.check_key(Headers([(b"x-api-key", b"first")]))
    with pytest.raises(Unauthenticated, match="Invalid API Key"):
        guard.check_key(Headers())


LOCAL = Cors(origins="localhost")
LISTED = Cors(origins="https://a.example, https://b.example:8443")


@pytest.mark.parametrize(
    ("cors", "origin", "is_allowed"),
    [
        (Cors(), "https://any.example", True),
        (Cors(), "null", True),
        (LOCAL, "http://localhost", True),
        (LOCAL, "https://localhost:3000", True),
        (LOCAL, "http://127.0.0.1:8080", True),
        (LOCAL, "http://[::1]:8080", True),
        (LOCAL, "http://localhost.evil.example", False),
        (LOCAL, "http://evil.example#http://localhost", False),
        (LOCAL, "http://127.0.0.10", False),
        (LOCAL, "http://127x0x0x1", False),
        (LOCAL, "http://localhost:", False),
        (LOCAL, "http://localhost:80/x", False),
        (LOCAL, "ftp://localhost", False),
        (LOCAL, "null", False),
        (LISTED, "https://a.example", True),
        (LISTED, "https://b.example:8443", True),
        (LISTED, "https://b.example", False),
        (LISTED, "http://a.example", False),
        (LISTED, "https://A.example", False),
        (LISTED, "https://a.example, https://b.example:8443", False),
        (Cors(origins=""), "https://a.example", False),
    ],
)
def test_an_allowed_origin_is_named_in_the_answer(cors: Cors, origin: str, is_allowed: bool) -> None:
    headers = Headers([(b"Origin", origin.encode())])
    wanted = (("access-control-allow-origin", origin), ("vary", "Origin")) if is_allowed else ()
    assert cors.answer_headers(headers) == wanted


def test_a_request_without_origin_gets_no_header() -> None:
    assert Cors().answer_headers(Headers([(b"host", b"a")])) == ()


@pytest.mark.parametrize(
    ("cors", "wanted", "allowed"),
    [
        (Cors(), None, "*"),
        (Cors(), "content-type", "*"),
        (Cors(), "Content-Type, Authorization", "Content-Type, Authorization"),  # no wildcard covers it
        (Cors(headers="X-A"), "authorization", "X-A"),
    ],
)
def test_preflight_names_the_headers(cors: Cors, wanted: str | None, allowed: str) -> None:
    fields = [(b"access-control-request-headers", wanted.encode())] if wanted is not None else []
    answer = dict(cors.preflight_headers(Headers(fields)))
    assert answer["access-control-allow-headers"] == allowed
    assert answer["access-control-allow-methods"] == "GET, POST, DELETE, OPTIONS"
    assert answer["access-control-allow-credentials"] == "true"


def test_preflight_without_credentials() -> None:
    answer = dict(Cors(methods="GET", allows_credentials=False).preflight_headers(Headers()))
    assert answer == {"access-control-allow-methods": "GET", "access-control-allow-headers": "*"}
