"""An Api without a server: answers from tables, events from a list, and a record of what was asked."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from wingman.cli import build_parser
from wingman.commands import add_commands, run_command
from wingman.commands.api import EventsRefused
from wingman.commands.session import Hooks

REPO = "owner/tiny-GGUF"
Reply = Callable[[dict[str, str]], tuple[int, Any]]


def download(file_path: str = "tiny.Q4_K_M.gguf", repo: str = REPO, **facts: Any) -> dict[str, Any]:
    """A DownloadItem as JSON has it."""
    item = {
        "isa": "DownloadItem", "modelRepo": repo, "filePath": file_path, "status": "complete",
        "totalBytes": 2_000_000, "downloadedBytes": 2_000_000, "downloadSpeed": "", "progress": 1.0,
        "metadata": "{}", "error": "", "created": 1, "updated": 2,
    }  # fmt: skip
    return item | facts


def running(alias: str = "tiny.Q4_K_M", **facts: Any) -> dict[str, Any]:
    """A WingmanItem as JSON has it."""
    item = {
        "isa": "WingmanItem", "alias": alias, "status": "inferring", "modelRepo": REPO,
        "filePath": "tiny.Q4_K_M.gguf", "address": "127.0.0.1", "port": 6567, "contextSize": 0,
        "gpuLayers": -1, "chatTemplate": "", "force": False, "error": "", "created": 1, "updated": 2,
    }  # fmt: skip
    return item | facts


def offer(quantization: str, memory_mb: int = 100, repo: str = REPO, **facts: Any) -> dict[str, Any]:
    """A DownloadableItem as JSON has it."""
    item = {
        "isa": "DownloadableItem", "modelRepo": repo, "modelRepoName": "tiny",
        "filePath": f"tiny.{quantization}.gguf", "quantization": quantization, "quantizationName": "",
        "isDownloaded": False, "available": True, "hasError": False, "location": "", "isInferable": True,
        "normalizedQuantizedMemRequired": memory_mb, "sizeBytes": 0,
    }  # fmt: skip
    return item | facts


def model(*items: dict[str, Any], repo: str = REPO) -> dict[str, Any]:
    """An AIModel as JSON has it, as far as commands read it."""
    return {"id": repo, "size": "1B", "downloads": 7, "likes": 3, "items": list(items)}


def error(status: int, message: str) -> tuple[int, Any]:
    """An answer that is an error."""
    return status, {"error": {"code": status, "message": message, "type": "x"}}


HARDWARE = {
    "gpu": {"totalMemoryMB": 0, "freeMemoryMB": 0, "gpus": []},
    "cpu": {
        "totalMemoryMB": 8000,
        "freeMemoryMB": 4000,
        "name": "Some\x1b CPU",
        "physicalCores": 2,
        "logicalCores": 4,
        "loadPercent": 8.0,
    },
    "disk": {"totalMB": 1000, "freeMB": 10},
    "os": {"name": "Linux", "release": "6", "machine": "riscv64"},
    "llama": {"build": "b1", "systemInfo": "RVV", "canOffload": True},
}


class FakeApi:
    """Set `downloads`, `items`, `models`, `messages`, `chunks` and `replies`; read `calls` and `inferred`."""

    def __init__(self, *, is_daemon: bool = True) -> None:
        self.is_daemon = is_daemon
        self.downloads: list[dict[str, Any]] = []
        self.items: list[dict[str, Any]] = []
        self.models: dict[str, dict[str, Any]] = {}
        self.messages: list[dict[str, Any] | None] | None = []
        """What the event socket says; None: there is no socket."""
        self.chunks: list[list[Any]] = []
        """Chunks of each answer; an exception among them is raised."""
        self.replies: dict[str, Reply] = {}
        self.calls: list[tuple[str, str, dict[str, str]]] = []
        self.inferred: list[Any] = []
        self.n_cancelled = 0
        self.is_closed = False

    def call(self, path: str, query: Mapping[str, str], *, method: str = "GET") -> tuple[int, Any]:
        self.calls.append((method, path, dict(query)))
        if path in self.replies:
            return self.replies[path](dict(query))
        if path == "/api/downloads":
            return 200, {"DownloadItems": [item for item in self.downloads if _fits(item, query)]}
        if path == "/api/inference":
            return 200, {"WingmanItems": [item for item in self.items if _fits(item, query)]}
        if path == "/api/models":
            return self._models(query.get("modelRepo"))
        if path == "/api/hardware":
            return 200, HARDWARE
        return error(404, "File Not Found")

    def _models(self, repo: str | None) -> tuple[int, Any]:
        if repo is None:
            return 200, {"models": list(self.models.values())}
        return (200, {"models": [self.models[repo]]}) if repo in self.models else error(404, f"no {repo}")

    @contextmanager
    def events(self, names: Sequence[str], idle_s: float = 1.0) -> Iterator[Iterator[dict[str, Any] | None]]:
        if self.messages is None:
            raise EventsRefused("no socket")
        yield iter(self.messages)

    def infer(self, path: str, body: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        self.inferred.append(dict(body))
        try:
            for chunk in self.chunks.pop(0):
                if isinstance(chunk, BaseException):
                    raise chunk
                yield chunk
        except (GeneratorExit, KeyboardInterrupt):
            self.n_cancelled += 1
            raise

    def close(self) -> None:
        self.is_closed = True

    def posted(self) -> list[tuple[str, dict[str, str]]]:
        """Path and query of every call that changes something."""
        return [(path, query) for method, path, query in self.calls if method == "POST"]


def _fits(item: Mapping[str, Any], query: Mapping[str, str]) -> bool:
    return all(item[name] == value for name, value in query.items())


def said(*words: str, reason: str = "stop") -> list[Any]:
    """The chunks of a streamed answer."""
    chunks = [{"choices": [{"delta": {"content": word}, "finish_reason": None}]} for word in words]
    end = {"choices": [{"delta": {}, "finish_reason": reason}]}
    return [*chunks, end, {"choices": [], "usage": {"completion_tokens": len(words)}}]


class Terminal:
    """Runs commands from their arguments, as the `wingman` command would."""

    def __init__(self, api: FakeApi, capsys: pytest.CaptureFixture[str], home: Path) -> None:
        self.api = api
        self.served: list[tuple[Any, dict[str, str]]] = []
        self._capsys = capsys
        self._home = home

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Exit status, stdout and stderr."""
        hooks = Hooks(
            serve_with=self._serve,
            find_daemon=lambda _arguments, _home: self.api if self.api.is_daemon else None,
            open_local=lambda _config: self.api,
        )
        parsed = parser().parse_args([*arguments, "--home", str(self._home)])
        status = run_command(parsed, hooks)
        printed = self._capsys.readouterr()
        return status, printed.out, printed.err

    def _serve(self, config: Any, query: Mapping[str, str]) -> int:
        assert self.api.is_closed
        self.served.append((config, dict(query)))
        return 0


def parser() -> Any:
    """The whole command line, with the commands in it."""
    whole = build_parser()
    subparsers = next(action for action in whole._actions if action.dest == "command")
    if "pull" not in (subparsers.choices or {}):
        add_commands(subparsers)
    return whole
