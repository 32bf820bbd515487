"""`wingman hardware`, `shutdown`, `logs`, and what every command shares."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from tests.commands.fakes import HARDWARE, FakeApi, Terminal, download, error, parser, running
from wingman.commands import COMMANDS, _function
from wingman.commands.output import printable, size_text
from wingman.commands.pull import free_memory
from wingman.services.home import Home


def test_hardware(terminal: Terminal) -> None:
    status, out, _ = terminal.run("hardware")
    assert status == 0
    assert out.splitlines() == [
        "gpu     none",
        "cpu     Some\\x1b CPU, 2 cores, 4 logical, 8% busy",
        "memory  4.2 GB of 8.4 GB free",
        "disk    10.5 MB of 1.0 GB free",
        "os      Linux 6 riscv64",
        "llama   b1 RVV",
    ]
    assert orjson.loads(terminal.run("hardware", "--json")[1]) == HARDWARE


def test_hardware_with_a_gpu(terminal: Terminal, api: FakeApi) -> None:
    gpu = {"name": "G", "totalMemoryMB": 1000, "freeMemoryMB": 0, "utilizationPercent": 7, "temperatureC": 40}
    api.replies["/api/hardware"] = lambda _: (200, {"gpu": {"totalMemoryMB": 1000, "gpus": [gpu]}})
    assert "gpu     G, 0 B of 1.0 GB free, 7% busy, 40 \u00b0C\n" in terminal.run("hardware")[1]


def test_models_go_to_a_gpu_that_can_be_used() -> None:
    gpu = {"totalMemoryMB": 3, "freeMemoryMB": 2}
    machine = {"gpu": gpu, "cpu": {"freeMemoryMB": 1}, "llama": {"canOffload": True}}
    assert free_memory(machine) == (2 * 2**20, True)
    assert free_memory(machine | {"llama": {"canOffload": False}}) == (2**20, False)


def test_shutdown(terminal: Terminal, api: FakeApi) -> None:
    api.replies["/api/shutdown"] = lambda _: (200, {"status": "shutting down"})
    assert terminal.run("shutdown") == (0, "the server is shutting down\n", "")
    assert terminal.run("shutdown", "--json")[1] == '{"status":"shutting down"}\n'
    assert api.posted()[0] == ("/api/shutdown", {})


@pytest.mark.parametrize("command", [("shutdown",), ("logs", "-f")])
def test_what_needs_a_server_says_so(terminal: Terminal, api: FakeApi, command: tuple[str, ...]) -> None:
    api.is_daemon = False
    status, out, err = terminal.run(*command)
    assert (status, out) == (1, "")
    assert "wingman serve" in err


def test_logs_follow_events(terminal: Terminal, api: FakeApi) -> None:
    api.messages = [
        {"event": "download_status", "seq": 1, **download(status="error", error="gone\x1b")},
        None,
        {"event": "inference_status", "seq": 2, **running("smol", status="preparing"), "progress": 0.5},
        {"event": "metrics"},
    ]
    status, out, err = terminal.run("logs", "-f")
    lines = out.splitlines()
    assert status == 1
    assert "the server is gone" in err
    assert (
        lines[0][9:] == "download_status owner/tiny-GGUF/tiny.Q4_K_M.gguf error 2.0 MB of 2.0 MB: gone\\x1b"
    )
    assert lines[1][9:] == "inference_status smol preparing 50%"
    assert len(lines) == 2


def test_logs_as_json_is_a_document_a_line(terminal: Terminal, api: FakeApi) -> None:
    api.messages = [{"event": "custom", "seq": 1, "data": [1]}, {"event": "other"}]
    _, out, _ = terminal.run("logs", "-f", "--events", "custom", "--json")
    assert orjson.loads(out) == {"event": "custom", "seq": 1, "data": [1]}


def test_logs_show_the_end_of_the_newest_file(terminal: Terminal, tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert "there is no log" in terminal.run("logs")[2]
    home.create()
    (home.logs / "wingman.log").write_text("one\ntwo\nth\x1bree\n")
    assert terminal.run("logs", "-n", "2")[1] == "two\nth\\x1bree\n"
    lines = terminal.run("logs", "-n2", "--json")[1].splitlines()
    assert [orjson.loads(line) for line in lines] == [{"line": "two"}, {"line": "th\x1bree"}]


def test_a_missing_key_says_which_flag(terminal: Terminal, api: FakeApi) -> None:
    api.replies["/api/hardware"] = lambda _: error(401, "Invalid API Key")
    status, out, err = terminal.run("hardware", "--json")
    assert (status, out) == (1, "")
    assert "--admin-key" in err
    assert api.is_closed


def test_an_answer_of_another_program_is_an_error(terminal: Terminal, api: FakeApi) -> None:
    api.replies["/api/inference"] = lambda _: (200, {"WingmanItems": [{"status": 3}]})
    assert terminal.run("ps") == (
        1,
        "",
        "wingman: the server's answer can't be understood; is it of another version?\n",
    )


def test_every_command_has_its_function_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        assert callable(_function(command.name))
        with pytest.raises(SystemExit):
            parser().parse_args([command.name, "--help"])
        assert "--json" in capsys.readouterr().out


def test_words_may_stand_behind_flags() -> None:
    parsed = parser().parse_args(["run", "--json", "m", "-c", "64", "a", "--system=-s", "--", "--b", "-1"])
    assert (parsed.model, parsed.prompt, parsed.ctx_size, parsed.system) == (
        "m",
        ["a", "--b", "-1"],
        64,
        "-s",
    )
    assert parser().parse_args(["run", "m", "-c64", "a"]).prompt == ["a"]


@pytest.mark.parametrize("arguments", [["start", "m", "--ctx-size", "x"], ["start"], ["stop", "--no-such"]])
def test_wrong_arguments_end_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parser().parse_args(arguments)
    assert end.value.code == 2
    assert capsys.readouterr().out == ""


def test_sizes_and_characters() -> None:
    assert [size_text(n) for n in (0, 999, 1500, 1.5e9, 2e15)] == ["", "999 B", "2 kB", "1.5 GB", "2000.0 TB"]
    assert printable("a\nb\x7f\u2028é") == "a\\nb\\x7f\\u2028é"
