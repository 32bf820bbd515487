"""`wingman serve` as the daemon of a home folder: a child process that can be killed and started again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import orjson
from websockets.sync.client import ClientConnection, connect

TIMEOUT_S = 120.0
"""For everything: generous, as the machine may be busy."""
_NOBODY = "http://127.0.0.1:9"
_ADDRESS = re.compile(r"  (listens|control)  http://(\S+)")


class Daemon:
    """A server of `home`; `url` serves models, `control` the control API, `log` is its standard error.

    Entering starts it, leaving ends it however it is. `hub` is the endpoint it downloads from.
    """

    def __init__(
        self,
        home: Path,
        *arguments: str,
        hub: str = _NOBODY,
        environment: dict[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        """`prefix` is put before the command, such as `("prlimit", "--fsize=1000000")`."""
        self.home = home
        self.arguments = arguments
        self.prefix = prefix
        self.environment = environment_of(home, hub) | (environment or {})
        self.key: str | None = None
        """Sent with every request, if any."""
        self.url = self.control = self.log = ""
        self._is_up = threading.Event()

    # -- life -----------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self.start()

    def start(self, *arguments: str) -> Self:
        """Start it, with further arguments, and wait until it serves."""
        self.log = self.url = self.control = ""
        self._is_up = threading.Event()
        ports = ["--home", str(self.home), "--port", "0", "--control-port", "0"]
        command = [
            *self.prefix,
            sys.executable,
            "-m",
            "wingman",
            "serve",
            *ports,
            *self.arguments,
            *arguments,
        ]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=self.environment)
        self._reader = threading.Thread(target=self._read, args=(self.process,))
        self._reader.start()
        if not self._is_up.wait(TIMEOUT_S) or not self.url:
            self.kill()
            raise AssertionError(f"the daemon did not start:\n{self.log}")
        self.control = self.control or self.url  # of --single-port
        return self

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            self.log += line
            if (match := _ADDRESS.match(line)) is not None:
                name = "url" if match[1] == "listens" else "control"
                setattr(self, name, getattr(self, name) or f"http://{match[2]}")
            if line.startswith("Try it"):
                self._is_up.set()
        self._is_up.set()
        process.stderr.close()

    def kill(self) -> None:
        """`kill -9`, and reap it."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()

    def wait(self) -> int:
        """Wait until it has ended by itself; the exit status."""
        status = self.process.wait(TIMEOUT_S)
        self._reader.join()
        return status

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; the exit status."""
        self.process.send_signal(number)
        return self.wait()

    def restart(self, *arguments: str) -> Self:
        """Stop it, unless it has ended, and start it again with further arguments."""
        if self.process.poll() is None:
            self.stop()
        return self.start(*arguments)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None and kind is None:
            self.process.terminate()
            try:
                self.process.wait(TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.kill()
                raise AssertionError(f"the daemon does not end:\n{self.log}") from None
        self.kill()
        if kind is not None:
            sys.stderr.write(self.log)

    # -- requests -------------------------------------------------------------------------------------

    def api(self, path: str, method: str = "GET", **query: Any) -> httpx.Response:
        """Call `/api/...`; what is posted goes into a JSON body."""
        how: dict[str, Any] = {"json": query} if method == "POST" else {"params": query}
        return httpx.request(method, self.control + path, timeout=TIMEOUT_S, headers=self._headers(), **how)

    def ask(self, path: str, method: str = "GET", **query: Any) -> Any:
        """The JSON of a successful answer."""
        answer = self.api(path, method, **query)
        assert answer.is_success, f"{answer.status_code} {answer.text}\n{self.log}"
        return answer.json()

    def chat(self, model: str | None, text: str = "Say hello.", **fields: Any) -> httpx.Response:
        """A chat completion of a few tokens."""
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 4, "temperature": 0, **fields}
        if model is not None:
            body["model"] = model
        url = f"{self.url}/v1/chat/completions"
        return httpx.post(url, json=body, timeout=TIMEOUT_S, headers=self._headers())

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def events(self, query: str = "", **options: Any) -> AbstractContextManager[ClientConnection]:
        """A WebSocket client, connected when it is entered."""
        settings: dict[str, Any] = {"additional_headers": self._headers(), "open_timeout": TIMEOUT_S}
        address = self.control.replace("http://", "ws://")
        connection: AbstractContextManager[ClientConnection] = connect(
            f"{address}/{query}", max_size=2**24, proxy=None, **(settings | options)
        )
        return connection

    # -- models ---------------------------------------------------------------------------------------

    def download(self, repo: str, path: str) -> dict[str, Any]:
        """A DownloadItem."""
        (item,) = self.ask("/api/downloads", modelRepo=repo, filePath=path)["DownloadItems"]
        return dict(item)

    def item(self, alias: str) -> dict[str, Any]:
        """A WingmanItem."""
        (item,) = self.ask("/api/inference", alias=alias)["WingmanItems"]
        return dict(item)

    def fetch(self, repo: str, path: str) -> dict[str, Any]:
        """Download a model and wait for it; its item."""
        self.ask("/api/downloads/enqueue", modelRepo=repo, filePath=path)
        return wait_until(lambda: self.download(repo, path), is_over)

    def start_model(self, alias: str, repo: str, path: str, **query: Any) -> dict[str, Any]:
        """Start a model and wait until it is loaded, or has failed; its item."""
        self.ask("/api/inference/start", alias=alias, modelRepo=repo, filePath=path, **query)
        return wait_until(
            lambda: self.item(alias), lambda item: item["status"] not in ("queued", "preparing")
        )


def environment_of(home: Path, hub: str = _NOBODY) -> dict[str, str]:
    """The environment of a process that uses `home`, without any setting of who runs the tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WINGMAN_", "HF_"))}
    return kept | {
        "WINGMAN_HOME": str(home),
        "HF_ENDPOINT": hub,
        "HF_HOME": str(home / "no-hub-settings"),
        "LLAMA_ARG_THREADS": "1",
    }


def is_over(item: dict[str, Any]) -> bool:
    """Whether a DownloadItem will not move by itself any more."""
    return item["status"] not in ("queued", "downloading")


def wait_until(look: Callable[[], dict[str, Any]], is_it: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Look until it is so; what was seen then."""
    deadline = time.monotonic() + TIMEOUT_S
    while not is_it(seen := look()):
        assert time.monotonic() < deadline, f"still {seen}"
        time.sleep(0.02)
    return seen


def receive(socket: ClientConnection) -> dict[str, Any]:
    """The next message."""
    message: dict[str, Any] = orjson.loads(socket.recv(TIMEOUT_S))
    return message


class Watcher:
    """Collects what a WebSocket client gets, in a thread, until the server closes; a context manager."""

    def __init__(self, connection: AbstractContextManager[ClientConnection]) -> None:
        self._connection = connection
        self.messages: list[dict[str, Any]] = []
        self._has_news = threading.Condition()
        self._thread = threading.Thread(target=self._collect)

    def __enter__(self) -> Self:
        self.socket = self._connection.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.__exit__(None, None, None)
        self._thread.join()

    def _collect(self) -> None:
        for text in self.socket:
            with self._has_news:
                self.messages.append(orjson.loads(text))
                self._has_news.notify_all()

    def of(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        """Messages of an event that have these fields, so far."""
        wanted = {"event": event} | fields
        return [message for message in tuple(self.messages) if wanted.items() <= _flat(message).items()]

    def wait(self, event: str, **fields: Any) -> dict[str, Any]:
        """The first message of an event that has these fields; waits for it."""
        with self._has_news:
            has_come = self._has_news.wait_for(lambda: self.of(event, **fields), TIMEOUT_S)
        assert has_come, f"no {event} with {fields} among {len(self.messages)} messages"
        return self.of(event, **fields)[0]

    def join(self) -> tuple[int | None, str | None]:
        """Wait until the server has closed; code and reason."""
        self._thread.join(TIMEOUT_S)
        return self.socket.close_code, self.socket.close_reason


def _flat(message: dict[str, Any]) -> dict[str, Any]:
    """What of a message can be compared as a set."""
    return {name: value for name, value in message.items() if not isinstance(value, dict | list)}
