"""The benchmark of monitors: frames, watchers and probe against fakes, and one small run."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from protocol import ping_frame
from protocol.websocket import text_frame
from tools import bench_monitors
from tools.bench_load import LOOPBACK, Summary
from tools.bench_monitors import Turn, Watcher, child, hear, probe, ratios, read_frame, watch
from tools.bench_serve import BenchFailure

HANDSHAKE = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n"


@contextmanager
def serving(handler: type[socketserver.BaseRequestHandler]) -> Iterator[int]:
    """The port of a server with a thread for each connection."""
    with socketserver.ThreadingTCPServer((LOOPBACK, 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536])
def test_frames_are_found_wherever_they_are_cut(size: int) -> None:
    frame = text_frame(b"x" * size)
    data = b"?" + frame
    assert read_frame(data + b"more", 1) == (1, len(data) - size, len(data))
    assert all(read_frame(data[:end], 1) is None for end in {1, 2, 3, 5, len(data) - 1} if end < len(data))


class Monitored(socketserver.BaseRequestHandler):
    """Sends three messages with a ping between them, in pieces, and expects its pong."""

    def handle(self) -> None:
        while b"\r\n\r\n" not in self.request.recv(4096):
            pass
        sent = HANDSHAKE + text_frame(b"a" * 300) + ping_frame(b"there?") + 2 * text_frame(b"b")
        for start in range(0, len(sent), 7):
            self.request.sendall(sent[start : start + 7])
        pong = b"\x8a\x86\0\0\0\0there?"
        assert self.request.recv(len(pong)) == pong
        self.request.sendall(text_frame(b"pong came"))
        self.request.recv(1)


def test_watchers_count_messages_and_answer_pings() -> None:
    with serving(Monitored) as port, child(watch, port, 3) as pipe:
        counts = hear(pipe)
        while counts.n_messages < 3 * 4:
            pipe.send("count")
            counts = hear(pipe)
        assert (counts.n_open, counts.n_messages) == (3, 12)


class Refusing(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.recv(4096)
        self.request.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")


async def test_a_refused_watcher_says_so() -> None:
    with serving(Refusing) as port:
        _, watcher = await asyncio.get_running_loop().create_connection(Watcher, LOOPBACK, port)
        with pytest.raises(EOFError, match="a monitor was refused"):
            await watcher.opened


class Live(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        while self.rfile.readline().strip() or self.connection.fileno() < 0:
            while self.rfile.readline().strip():
                pass
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


def test_the_probe_tells_every_latency() -> None:
    with serving(Live) as port, child(probe, port) as pipe:
        assert hear(pipe) == "ready"
        pipe.send("stop")
        lags = hear(pipe)
    assert all(lag > 0 for lag in lags)


@pytest.mark.parametrize(("main", "arguments"), [(watch, (2,)), (probe, ())])
def test_nobody_there_is_told(main: object, arguments: tuple[int, ...]) -> None:
    with child(main, 9, *arguments) as pipe, pytest.raises(BenchFailure, match=r"connect|does not answer"):  # type: ignore[arg-type]
        hear(pipe)


def test_ratios_are_of_turns_side_by_side() -> None:
    alone = Turn(1, 0, 0, Summary(100.0, 1, 1, 1, 1, 1), 1, 1, 1, 0, 0)
    watched = dataclasses.replace(alone, n_monitors=5, summary=Summary(90.0, 1, 1, 1, 1, 1))
    assert ratios([alone, watched, watched, alone]) == pytest.approx([0.9, 1 / 0.9])


def test_a_small_run(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--monitors", "5", "--clients", "2", "--rounds", "1", "--requests", "10", "--predict", "200"]
    numbers = tmp_path / "numbers.json"
    assert bench_monitors.main(["-m", str(tiny_model), "--json", str(numbers), *flags]) == 0
    alone, watched = json.loads(numbers.read_text())["turns"]
    assert (alone["n_left"], watched["n_left"]) == (0, 5)
    assert alone["messages_per_s"] == 0 < watched["messages_per_s"]
    assert alone["lag_p50_ms"] > 0
    report = capsys.readouterr().out.splitlines()
    assert report[-1].endswith("; 0 monitors lost")
    assert [line.split()[0] for line in report[3:6]] == ["monitors", "0", "5"]


def test_a_missing_model_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_monitors.main(["-m", "nowhere.gguf"]) == 1
    assert capsys.readouterr().err == "bench_monitors: nowhere.gguf is not a file\n"
