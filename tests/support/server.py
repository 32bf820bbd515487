"""`wingman serve` as a child process, as a user runs it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import TracebackType
from typing import Any

import httpx

START_TIMEOUT_S = 120.0


class ServerProcess:
    """A running server; `url` is its first TCP address, `log` what it wrote so far."""

    def __init__(self, arguments: list[str], environment: dict[str, str] | None = None) -> None:
        if "--port" not in arguments:
            arguments = [*arguments, "--port", "0"]
        self._arguments = arguments
        self._environment = os.environ | (environment or {})
        self._lines: list[str] = []
        self._is_up = threading.Event()
        self.url = ""

    def __enter__(self) -> ServerProcess:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "wingman", "serve", *self._arguments],
            stderr=subprocess.PIPE,
            text=True,
            env=self._environment,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._is_up.wait(START_TIMEOUT_S) or not self.url:
            self.process.kill()
            self.__exit__(None, None, None)
            raise AssertionError(f"the server did not start:\n{self.log}")
        self.client = httpx.Client(base_url=self.url, timeout=120)
        return self

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.append(line)
            match = re.match(r"  listens  (http://\S+)", line)
            if match and not self.url:
                self.url = match[1]
            if line.startswith("Try it"):
                self._is_up.set()
        self._is_up.set()

    @property
    def log(self) -> str:
        return "".join(self._lines)

    def post(self, path: str, body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.client.get(path, **options)

    def complete(self, prompt: Any, **fields: Any) -> dict[str, Any]:
        response = self.post("/completion", {"prompt": prompt, "temperature": 0, **fields})
        assert response.status_code == 200, response.text
        body: dict[str, Any] = response.json()
        return body

    def wait_idle(self, timeout_s: float = 20.0) -> float:
        """Wait until every slot is idle; seconds it took."""
        started = time.monotonic()
        while time.monotonic() - started < timeout_s:
            if self.get("/health").json()["slots_processing"] == 0:
                return time.monotonic() - started
            time.sleep(0.005)
        raise AssertionError(f"slots still busy: {self.get('/slots').text}")

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 30.0) -> int:
        """Send a signal and wait for the end; the exit status."""
        self.process.send_signal(number)
        status = self.process.wait(timeout_s)
        self._reader.join(5)
        return status

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if hasattr(self, "client"):
            self.client.close()
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join(5)
        if self.process.stderr is not None:
            self.process.stderr.close()
