"""The benchmark's client against fake servers, and the numbers it gives."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tools import bench_load, bench_reference, bench_servers
from tools.bench_load import (
    LOOPBACK,
    Exchange,
    LevelRun,
    LoadFailure,
    percentile,
    play,
    read_exchange,
    request_body,
    run_level,
    stream,
    summarize,
)
from tools.bench_prompts import make_prompts


class TestNumbers:
    @pytest.mark.parametrize(
        ("values", "share", "expected"),
        [
            ([5.0], 0.95, 5.0),
            ([3.0, 1.0, 2.0], 0.5, 2.0),
            ([1.0, 2.0, 3.0, 4.0], 0.5, 2.5),
            ([float(value) for value in range(101)], 0.95, 95.0),
            ([1.0, 2.0], 0.0, 1.0),
            ([1.0, 2.0], 1.0, 2.0),
        ],
    )
    def test_percentile(self, values: list[float], share: float, expected: float) -> None:
        assert percentile(values, share) == pytest.approx(expected)

    def test_percentile_of_nothing(self) -> None:
        assert math.isnan(percentile([], 0.5))

    def test_summarize(self) -> None:
        exchanges = (Exchange(9, 3, 100.0, (10.0, 30.0)), Exchange(9, 2, 300.0, (20.0,)))
        result = summarize(LevelRun(2, 0.5, exchanges), rss_mib=7.0)
        assert dataclasses.astuple(result) == pytest.approx((10.0, 200.0, 290.0, 20.0, 29.0, 7.0))


# -- client ---------------------------------------------------------------------------------------

Answer = Callable[[socketserver.StreamRequestHandler, bytes], None]


@contextmanager
def fake_server(answer: Answer) -> Iterator[int]:
    """A server on loopback that reads one request per connection and answers by hand; its port."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            length = 0
            while (line := self.rfile.readline()) not in (b"\r\n", b""):
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            answer(self, self.rfile.read(length))

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        request_queue_size = 64

    with Server((LOOPBACK, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def event(content: str, **fields: object) -> bytes:
    return b"data: " + json.dumps({"content": content, "stop": False, **fields}).encode() + b"\n\n"


END = event("", stop=True, tokens_evaluated=60, tokens_predicted=3)
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def send(*pieces: bytes, pause_s: float = 0.0) -> Answer:
    def answer(handler: socketserver.StreamRequestHandler, _: bytes) -> None:
        for piece in pieces:
            handler.wfile.write(piece)
            time.sleep(pause_s)

    return answer


def run_one(port: int, timeout_s: float = 10.0) -> LevelRun:
    return run_level(port, [["a prompt"]], n_predict=3, cache_prompt=True, timeout_s=timeout_s)


class TestClient:
    def test_times_are_those_of_events_with_text(self) -> None:
        pieces = [chunk(piece) for piece in (event(""), event("a"), event("b"), event("c"), END)]
        with fake_server(send(CHUNKED, *pieces, chunk(b"")[:-2] + b"\r\n", pause_s=0.02)) as port:
            run = run_one(port)
        (exchange,) = run.exchanges
        assert (exchange.n_prompt, exchange.n_tokens) == (60, 3)
        assert len(exchange.gaps_ms) == 2
        assert all(gap >= 15 for gap in exchange.gaps_ms)
        assert exchange.first_token_ms >= 35
        assert run.wall_s * 1e3 >= exchange.first_token_ms + sum(exchange.gaps_ms)

    def test_request(self) -> None:
        bodies = []

        def answer(handler: socketserver.StreamRequestHandler, body: bytes) -> None:
            bodies.append(json.loads(body))
            handler.wfile.write(PLAIN + event("a") + END)

        with fake_server(answer) as port:
            run_level(port, [["one", "two"]], n_predict=5, cache_prompt=False, timeout_s=10)
        assert [body["prompt"] for body in bodies] == ["one", "two"]
        assert bodies[0] | {"prompt": ""} == {
            "prompt": "", "n_predict": 5, "temperature": 0, "ignore_eos": True, "stream": True, "cache_prompt": False,
        }  # fmt: skip

    @pytest.mark.parametrize("size", [1, 7, 1000])
    def test_chunks_may_end_anywhere(self, size: int) -> None:
        stream = b": comment\n\n" + event("ä") + event("b") + END
        pieces = [chunk(stream[start : start + size]) for start in range(0, len(stream), size)]
        with fake_server(send(CHUNKED, *pieces, b"0\r\n\r\n")) as port:
            assert len(run_one(port).exchanges[0].gaps_ms) == 1

    def test_body_up_to_the_end_of_the_connection(self) -> None:
        with fake_server(send(PLAIN, event("a"), event("b") + END)) as port:
            assert len(run_one(port).exchanges[0].gaps_ms) == 1

    def test_clients_run_at_once(self) -> None:
        together = threading.Barrier(4, timeout=5)

        def answer(handler: socketserver.StreamRequestHandler, _: bytes) -> None:
            together.wait()
            handler.wfile.write(PLAIN + event("a") + END)

        with fake_server(answer) as port:
            prompts = make_prompts("x", 4, 2, n_words=3)
            run = run_level(port, prompts, n_predict=3, cache_prompt=True, timeout_s=10)
        assert (run.n_clients, len(run.exchanges)) == (4, 8)

    @pytest.mark.parametrize(
        ("pieces", "message"),
        [
            ((b"HTTP/1.1 503 Service Unavailable\r\n\r\nLoading model",), "503.*Loading model"),
            ((PLAIN, event("a")), "ended early"),
            ((PLAIN, END), "no text"),
            ((PLAIN, b'data: {"error": {"message": "too long"}}\n\n'), "too long"),
            ((PLAIN, b"data: nonsense\n\n"), "nonsense"),
            ((CHUNKED, chunk(event("a") + END)), "broke"),
            ((CHUNKED, b"10\r\nshort"), "broke"),
            ((CHUNKED, b"fffffffff\r\n"), "broke"),
            ((CHUNKED, b"-1\r\n"), "broke"),
            ((b"",), "answered"),
        ],
    )
    def test_what_is_no_completion_is_refused(self, pieces: tuple[bytes, ...], message: str) -> None:
        with fake_server(send(*pieces)) as port, pytest.raises(LoadFailure, match=f"(?s){message}"):
            run_one(port)

    def test_a_closed_port_is_a_failure(self) -> None:
        with pytest.raises(LoadFailure, match="broke"):
            run_one(bench_servers.free_port())

    def test_time_is_limited(self) -> None:
        done = threading.Event()

        def answer(handler: socketserver.StreamRequestHandler, _: bytes) -> None:
            done.wait(5)

        with fake_server(answer) as port:
            with pytest.raises(LoadFailure, match="not done after"):
                run_one(port, timeout_s=0.1)
            done.set()

    def test_events_are_limited(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bench_load, "_MAX_EVENTS", 3)
        with (
            fake_server(send(PLAIN, event("a") * 5)) as port,
            pytest.raises(LoadFailure, match="more than 3"),
        ):
            run_one(port)

    def test_read_exchange(self) -> None:
        events = [(1.5, b'{"content":"a"}'), (1.75, b'{"content":"b"}'), (2.0, END[6:])]
        assert read_exchange(1.0, events) == Exchange(60, 3, 500.0, (250.0,), text="ab")

    def test_what_the_server_says_of_its_cache(self) -> None:
        last = event(
            "", stop=True, tokens_evaluated=9, tokens_predicted=1, timings={"prompt_n": 2, "cache_n": 7}
        )
        exchange = read_exchange(0.0, [(1.0, b'{"content":"a"}'), (1.0, last[6:])])
        assert (exchange.n_evaluated, exchange.n_cached) == (2, 7)

    def test_a_scenario_waits_until_a_stream_is_under_way(self) -> None:
        async def scenario(port: int) -> Exchange:
            begun = asyncio.Event()
            running = asyncio.create_task(stream(port, request_body("x", 9, True), begun))
            await begun.wait()
            assert not running.done()
            goes_on.set()
            return await running

        def answer(handler: socketserver.StreamRequestHandler, _: bytes) -> None:
            handler.wfile.write(PLAIN + event("a") * 8)
            goes_on.wait(5)
            handler.wfile.write(END)

        goes_on = threading.Event()
        with fake_server(answer) as port:
            assert play(scenario(port), 10).text == "a" * 8


class TestReference:
    def test_tokens_are_counted_by_events(self) -> None:
        events = [(1.0 + number, b'{"choices":[{"text":"%d"}]}' % number) for number in range(3)]
        ends = [(4.0, b'{"choices":[{"text":""}]}'), (4.0, b"[DONE]")]
        exchange = bench_reference.read_exchange(0.5, events + ends)
        assert exchange == Exchange(0, 3, 500.0, (1000.0, 1000.0), text="012")

    @pytest.mark.parametrize(
        "data",
        [[], [b"[DONE]"], [b'{"choices":[]}', b"[DONE]"], [b'{"error":{}}', b"[DONE]"], [b'{"choices":1}']],
    )
    def test_what_is_no_completion_is_refused(self, data: list[bytes]) -> None:
        with pytest.raises(LoadFailure):
            bench_reference.read_exchange(0.0, [(1.0, one) for one in data])
