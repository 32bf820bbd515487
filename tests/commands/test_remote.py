"""`RemoteApi` against real servers on loopback, and how a server is found."""

from __future__ import annotations

import argparse
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from websockets.sync.server import ServerConnection, serve

from protocol.websocket import text_frame
from tests.commands.loopback import Loopback, json_reply, socket_of, wingman_replies
from wingman.commands import daemon
from wingman.commands.api import CommandFailed, EventsRefused, ask
from wingman.commands.daemon import beside, find_daemon, read_runtime_file
from wingman.commands.remote import Address, RemoteApi
from wingman.http.messages import Response
from wingman.services.home import Home

CHUNK = b'data: {"choices": [{"delta": {"content": "hi"}}]}\n\n'


@pytest.fixture
def server() -> Iterator[Loopback]:
    with Loopback(wingman_replies()) as server:
        yield server


def api_of(server: Loopback, **keys: str) -> RemoteApi:
    return RemoteApi(Address(server.url, server.url), **keys)


# -- calls ----------------------------------------------------------------------------------------


def test_a_call_carries_query_and_key(server: Loopback) -> None:
    server.replies["/api/x"] = lambda request: json_reply(dict(request.target.query), 202)
    api = api_of(server, admin_key="secret")
    query = {"a": "b c&d", "e": "/é"}
    assert api.call("/api/x", query) == (202, query)
    assert server.keys() == ["Bearer secret"]


def test_what_is_posted_goes_into_the_body(server: Loopback) -> None:
    server.replies["/api/x"] = lambda request: json_reply(
        {"method": request.method, "body": request.body.decode()}
    )
    api = api_of(server)
    assert api.call("/api/x", {"a": "b"}, method="POST") == (200, {"method": "POST", "body": '{"a":"b"}'})
    assert api.call("/api/x", {}, method="POST") == (200, {"method": "POST", "body": ""})


def test_one_key_serves_both_apis_and_two_are_kept_apart(server: Loopback) -> None:
    server.replies["/chat"] = lambda _: server.stream(b"data: [DONE]\n\n")
    for api in (api_of(server, api_key="k"), api_of(server, admin_key="a", api_key="k")):
        api.call("/api/inference", {})
        assert list(api.infer("/chat", {})) == []
    assert server.keys() == ["Bearer k", "Bearer k", "Bearer a", "Bearer k"]


def test_an_error_is_told_in_the_servers_words(server: Loopback) -> None:
    with pytest.raises(CommandFailed, match="File Not Found") as failure:
        ask(api_of(server), "/api/none")
    assert failure.value.status == 404


def test_an_answer_that_is_no_json_is_none(server: Loopback) -> None:
    server.replies["/api/x"] = lambda _: Response(200, b"Shutting down")
    assert api_of(server).call("/api/x", {}) == (200, None)


def test_no_server_is_an_error() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    api = RemoteApi(Address(url, url))
    with pytest.raises(CommandFailed, match="does the server run"):
        api.call("/api/inference", {})
    with pytest.raises(CommandFailed, match="does the server run"):
        next(api.infer("/chat", {}))
    with pytest.raises(EventsRefused), api.events(("status",)):
        pass


@pytest.mark.parametrize(
    "url", ["ftp://a", "localhost:6568", "http://", "http://a:x", "http://a:99999", "http://[::1"]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(CommandFailed, match="is no address"):
        RemoteApi(Address(url, url))


# -- streams --------------------------------------------------------------------------------------


def test_a_streamed_answer(server: Loopback) -> None:
    server.replies["/chat"] = lambda _: server.stream(
        b": ping\n\n", CHUNK[:9], CHUNK[9:], b"data: [DONE]\n\n"
    )
    chunks = list(api_of(server).infer("/chat", {"stream": True}))
    assert chunks == [{"choices": [{"delta": {"content": "hi"}}]}]
    assert server.requests[0].body == b'{"stream":true}'


def test_closing_a_stream_cancels_it(server: Loopback) -> None:
    server.replies["/chat"] = lambda _: server.stream(CHUNK, hangs=True)
    with closing(api_of(server).infer("/chat", {})) as chunks:
        next(chunks)
        assert not server.stream_closed.is_set()
    assert server.stream_closed.wait(10)


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ((CHUNK,), "ended in the middle"),
        ((b'data: {"error": {"message": "the model is gone"}}\n\n',), "the model is gone"),
        ((b"data: {\n\n",), "can't be understood"),
        ((b"data: 3\n\n",), "can't be understood"),
    ],
)
def test_a_broken_stream_is_an_error(server: Loopback, blocks: tuple[bytes, ...], words: str) -> None:
    server.replies["/chat"] = lambda _: server.stream(*blocks)
    with pytest.raises(CommandFailed, match=words):
        list(api_of(server).infer("/chat", {}))


def test_a_refused_stream_is_an_error(server: Loopback) -> None:
    server.replies["/chat"] = lambda _: json_reply({"error": {"message": "too long"}}, 400)
    with pytest.raises(CommandFailed, match="too long") as failure:
        next(api_of(server).infer("/chat", {}))
    assert failure.value.status == 400


# -- the event socket -----------------------------------------------------------------------------


def test_events_come_with_the_names_and_the_key(server: Loopback) -> None:
    frames = (
        text_frame(b'{"event":"status"}'),
        text_frame(b"no json"),
        text_frame(b"[1]"),
        text_frame(b'{"n":2}'),
    )
    server.replies["/ws"] = socket_of(*frames)
    with api_of(server, admin_key="k").events(("status", "metrics")) as messages:
        assert [next(messages), next(messages)] == [{"event": "status"}, {"n": 2}]
    assert dict(server.requests[0].target.query) == {"events": "status,metrics"}
    assert server.keys() == ["Bearer k"]


def test_silence_is_told(server: Loopback) -> None:
    server.replies["/ws"] = socket_of()
    with api_of(server).events(("status",), idle_s=0.01) as messages:
        assert next(messages) is None


def test_a_refused_socket_is_an_error(server: Loopback) -> None:
    server.replies["/ws"] = lambda _: json_reply({"error": {}}, 403)
    with pytest.raises(EventsRefused) as failure, api_of(server).events(("status",)):
        pass
    assert failure.value.status == 403


@contextmanager
def stranger(handler: Callable[[ServerConnection], None]) -> Iterator[RemoteApi]:
    """Another library's server, which does to the client whatever `handler` does."""
    with serve(handler, "127.0.0.1", 0, compression=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.socket.getsockname()[1]}"
        try:
            yield RemoteApi(Address(url, url))
        finally:
            server.shutdown()
            thread.join(10)


def test_pings_fragments_and_the_end() -> None:
    answered = threading.Event()

    def handler(connection: ServerConnection) -> None:
        pong = connection.ping(b"there?")
        connection.send(['{"a', '":"', "é" * 70_000, '"}'])
        if pong.wait(10):
            answered.set()
        connection.close(1001)

    with stranger(handler) as api, api.events(("x",)) as messages:
        assert list(messages) == [{"a": "é" * 70_000}]
    assert answered.is_set()


def test_a_connection_that_breaks_ends_the_events() -> None:
    def handler(connection: ServerConnection) -> None:
        connection.send("{}")
        connection.socket.shutdown(socket.SHUT_RDWR)

    with stranger(handler) as api, api.events(("x",)) as messages:
        assert list(messages) == [{}]


# -- where the server is --------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home folder, no environment, and nobody at the default ports."""
    for name in ("WINGMAN_URL", "WINGMAN_ADMIN_KEY", "WINGMAN_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(daemon, "DEFAULT", Address("http://127.0.0.1:9", "http://127.0.0.1:9"))
    home = Home(tmp_path)
    home.create()
    return home


def find(home: Home, **given: Any) -> RemoteApi | None:
    return find_daemon(argparse.Namespace(**{"url": None, "admin_key": None, "api_key": None} | given), home)


def tell(home: Home, url: str) -> None:
    home.runtime_file.write_bytes(orjson.dumps({"pid": 1, "control": url, "inference": url, "version": "1"}))


def test_the_runtime_file_tells(home: Home, server: Loopback) -> None:
    tell(home, server.url)
    api = find(home, admin_key="k")
    assert api is not None
    api.call("/api/inference", {})
    assert server.keys() == [None, "Bearer k"]  # recognized first


def test_a_stale_file_and_nobody_is_nobody(home: Home) -> None:
    tell(home, "http://127.0.0.1:9")
    assert find(home) is None


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"3", b'{"control": 1}', b"\xff" * 100_000])
def test_a_damaged_file_is_ignored(home: Home, damage: bytes) -> None:
    home.runtime_file.write_bytes(damage)
    assert read_runtime_file(home.runtime_file) is None
    assert find(home) is None


def test_the_default_ports_are_tried(home: Home, server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "DEFAULT", Address(server.url, server.url))
    tell(home, "http://127.0.0.1:9")
    assert find(home) is None  # that one has another home
    monkeypatch.setattr(daemon, "DEFAULT_HOME", home.root)
    assert find(home) is not None


def test_a_server_that_wants_a_key_is_one(home: Home, server: Loopback) -> None:
    server.replies["/api/inference"] = lambda _: json_reply({"error": {"message": "Invalid API Key"}}, 401)
    tell(home, server.url)
    assert find(home) is not None


@pytest.mark.parametrize("answer", [Response(200, b"<html>"), Response(200, b"{}"), Response(404, b"nope")])
def test_another_program_is_no_server(home: Home, server: Loopback, answer: Response) -> None:
    server.replies["/api/inference"] = lambda _: answer
    tell(home, server.url)
    assert find(home) is None


def test_a_named_server_must_answer(home: Home, server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    tell(home, server.url)
    with pytest.raises(CommandFailed, match="no Wingman answers at"):
        find(home, url="http://127.0.0.1:9")
    monkeypatch.setenv("WINGMAN_URL", f"{server.url}/")
    monkeypatch.setenv("WINGMAN_API_KEY", "one,two")
    api = find(home)
    assert api is not None
    api.call("/api/inference", {})
    assert server.keys()[-1] == "Bearer one"


def test_inference_lies_one_port_below_or_behind_the_same_name() -> None:
    assert beside("http://h:6568") == Address("http://h:6568", "http://h:6567")
    assert beside("https://h/w") == Address("https://h/w", "https://h/w")
