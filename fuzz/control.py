"""The control API in the hands of a hostile client: scripts of requests to real services, without sockets.

Each line of the input is a request, `METHOD TARGET BODY`; `&` before it lets the next one begin meanwhile, and
`HUB event ...` says what happens to the next tries of downloads. The bytes also choose a script of well-formed
requests. Invariant: every answer is one of its path's statuses, in JSON, a refusal with the error object;
what is listed is legal and true to disk and memory; nothing is logged as unforeseen; nothing outside the home
folder is written. In the end everything is reset, and nothing is left.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from unittest import mock
from urllib.parse import quote_from_bytes

import msgspec
import orjson

from fuzz import gguf
from fuzz.application import run
from protocol import Headers, RemoteProtocolError, parse_target
from tests.support.downloads import ScriptedHub
from tests.support.runner import ScriptedRunner
from wingman import assembly
from wingman.api.control import CONTROL_ROUTES, LOG_PATH, DownloadItems, WingmanItems
from wingman.app import App, open_gates
from wingman.config import ContextConfig, configure
from wingman.errors import ModelLoadFailure
from wingman.http.messages import Request, Response
from wingman.lifecycle import Wingman
from wingman.services.home import LOCAL, split_parts, stored_name

GUARD_S: Final = 60.0
"""Ends a script that hangs; nothing is measured with it."""
_MAX_REQUESTS: Final = 12
_NOBODY: Final = "http://127.0.0.1:9"
"""Where no Hub listens."""
_REPO, _HERE, _OFFERED, _SPLIT = "o/r-GGUF", "here.Q8_0.gguf", "m.Q4_0.gguf", "s-00001-of-00002.gguf"
_BROKEN_CONTEXT: Final = 73
"""Tokens of context with which loading fails."""
_EVENTS: Final = frozenset({"cut", "hang", "refuse", "damage"})

_MOVING: Final = frozenset({"queued", "preparing", "cancelling"})
"""Statuses that no model keeps for ever."""
_READ: Final = frozenset({200, 400})
_CHANGE: Final = _READ | {404, 409, 422}
STATUSES: Final[dict[str, frozenset[int]]] = {
    "/api/models": _READ | {403, 404, 502},
    "/api/downloads": _READ,
    "/api/downloads/enqueue": (_CHANGE - {200}) | {202, 208, 403, 429, 502, 507},
    "/api/downloads/cancel": _CHANGE,
    "/api/downloads/reset": _CHANGE,
    "/api/inference": _READ,
    "/api/inference/status": _READ,
    "/api/inference/start": (_CHANGE - {200}) | {202, 208, 507},
    "/api/inference/stop": _CHANGE,
    "/api/inference/reset": _CHANGE,
    "/api/hardware": _READ,
    "/api/hardwareinfo": _READ,
    "/api/shutdown": _READ,
    LOG_PATH: _READ | {404},
    "/live": frozenset({200}),
    "/ready": frozenset({200}),
    "/openapi.json": frozenset({200}),
}
"""What a path may answer; any other path is unknown."""
_SAMPLES: Final[dict[str, tuple[Any, ...]]] = {
    "modelRepo": (_REPO, _REPO, _REPO, LOCAL, "o/other", f"hf://{_REPO}@main", "../x", ""),
    "filePath": (_HERE, _OFFERED, _OFFERED, _SPLIT, "own.gguf", "bad.gguf", "../x.gguf", "/etc/x.gguf", "x.txt"),
    "alias": ("a", "b", "c", "A", "\u00e9", " a", "x" * 200, ""),
    "revision": ("main", "v1", "../x"),
    "address": ("127.0.0.1", "::1", "a b", "0.0.0.0"),
    "port": (0, 1, 70000, "x", -1),
    "contextSize": (0, 64, _BROKEN_CONTEXT, 2**24, 2**40, "1e3"),
    "gpuLayers": (-1, 0, 99999, "all"),
    "chatTemplate": ("{{ messages }}", "{% for", "x" * 70_000),
    "force": (True, "on", "", "no", "maybe"),
    "message": ("hello", "\x1b[2J\n", "x" * 9000), "level": ("warn", "x", 5, None), "timestamp": (0, "now"),
}  # fmt: skip
"""Values for parameters: good ones, and some that are not."""
_LOG: Final = ("message", "level", "timestamp")
_ROUTES: Final = (
    *((path, names) for paths, _, names, *_ in CONTROL_ROUTES for path in paths),
    *(("/api/inference/start", ("alias", "modelRepo", "filePath")),) * 4,
    *(("/api/downloads/enqueue", ("modelRepo", "filePath")),) * 4,
    (LOG_PATH, _LOG),
)
TOKENS = (
    *(f"GET {path}?".encode() for path in STATUSES),
    *(f"\nPOST {path} ".encode() for path in STATUSES),
    *(f"&{name}={sample}".encode() for name, samples in _SAMPLES.items() for sample in samples),
    *(json.dumps({name: sample}).encode() for name, samples in _SAMPLES.items() for sample in samples[:2]),
    *(f"\nHUB {event}\n".encode() for event in _EVENTS),
    b"HEAD ", b"OPTIONS ", b"&", b"& GET ", b"?", b"=", b"%00", b"%ff", b"%2e%2e%2f", b"/..", b"/", b"\n", b" ", b"#",
    b"http://x", b"{", b"}", b"[", b"null", b"\"\\ud800\"", b"1e999", b"\xff",
)  # fmt: skip


def one(data: bytes) -> None:
    """Check the invariant for the script that `data` is, and for one that it chooses."""
    for script in (data.split(b"\n"), list(_made(data))):
        run(_house().play(script[:_MAX_REQUESTS]))


def _made(data: bytes) -> Iterator[bytes]:
    """Lines of a script of well-formed requests; some values are bytes of `data`."""
    rng = random.Random(data)
    for _ in range(rng.randrange(1, 8)):
        path, names = rng.choice(_ROUTES)
        given = {name: _value(rng, name, data) for name in names if rng.random() < 0.8}
        method = rng.choice((b"GET", b"GET", b"POST", b"HEAD"))
        body = b""
        if path == LOG_PATH or (method == b"POST" and rng.random() < 0.7):
            texts = {
                name: _text(value) if isinstance(value, bytes) else value for name, value in given.items()
            }
            method, body, given = b"POST", json.dumps(texts).encode(), {}
        query = "&".join(f"{name}={quote_from_bytes(_raw(value))}" for name, value in given.items())
        target = f"{rng.choice((path, path, path.upper(), path + '/'))}?{query}".encode()
        yield b"& " * (rng.random() < 0.3) + b" ".join((method, target, body))
        if rng.random() < 0.1:
            yield b"HUB " + rng.choice(sorted(_EVENTS)).encode()


def _value(rng: random.Random, name: str, data: bytes) -> Any:
    if rng.random() < 0.9:
        return rng.choice(_SAMPLES[name][: rng.choice((2, None))])
    start = rng.randrange(len(data) + 1)
    return data[start : start + rng.choice((1, 4, 16))]


def _raw(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")


class _House:
    """A server in a temporary home; its Hub is a dictionary, its catalog's Hub is away."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="control-")
        self._root = Path(self._folder.name).resolve() / "home"
        self._whole = gguf.seeds()["whole"]
        files = {_OFFERED: self._whole, _HERE: self._whole, _SPLIT: b"GGUF", "s-00002-of-00002.gguf": b"",
                 "bad.gguf": b"no"}  # fmt: skip
        self._hub = ScriptedHub({(_REPO, path): content for path, content in files.items()})
        config = configure(home=str(self._root), hf_endpoint=_NOBODY, parallel_downloads=1, max_downloads=2,
                           models_max=2, models_memory=64, parallel=1)  # fmt: skip
        self._wingman = Wingman(config, lambda _, context, __: _runner(context), listen=False)

    async def start(self) -> None:
        """Open the home, with a downloaded model and one of unknown origin in it."""
        models = self._root / "models"
        models.mkdir(parents=True)
        self._kept = {models / stored_name(_REPO, _HERE), models / "own.gguf"}
        for path in self._kept:
            path.write_bytes(self._whole)
        with mock.patch.object(assembly, "Remote", return_value=self._hub):
            await self._wingman.start()
        services, plane = self._wingman._services, self._wingman._plane
        assert services is not None
        self._services, self._inference = services, self._wingman.inference
        self._app = App(self._wingman._config, open_gates(), None, plane)
        await self._answer("GET", "/api/models?modelRepo=o/r-GGUF")  # loads what is slow to load

    async def play(self, script: Sequence[bytes]) -> None:
        """Send requests, look at everything, tidy up. Raises AssertionError when something is wrong."""
        with _nothing_unforeseen(), _writes_stay_in(self._root):
            async with asyncio.timeout(GUARD_S):
                async with asyncio.TaskGroup() as meanwhile:
                    for line in script:
                        if line.startswith(b"&"):
                            meanwhile.create_task(self._obey(line[1:].lstrip()))
                        else:
                            await self._obey(line)
                await self._check_state()
                await self._tidy()

    async def _obey(self, line: bytes) -> None:
        method, _, rest = line.partition(b" ")
        target, _, body = rest.partition(b" ")
        if method == b"HUB":
            self._hub.script += [event for event in rest.decode("latin-1").split() if event in _EVENTS][:4]
        else:
            await self._answer(method.decode("latin-1"), target, body)

    async def _answer(self, method: str, target: bytes | str, body: bytes = b"") -> Response:
        """The checked answer to a request."""
        raw = target if isinstance(target, bytes) else target.encode()
        path = "bad"
        try:
            request = Request(method, parse_target(raw), Headers(), "id", "fuzz", body)
        except RemoteProtocolError as error:
            answer = self._app.refuse(error.status_hint, str(error))
        else:
            path = request.path
            screened = self._app.screen(request)
            handled = screened or await self._app.handle(request)
            assert isinstance(handled, Response)  # no route here streams
            answer = handled
        _check_answer(method, path, answer)
        return answer

    # -- the state ------------------------------------------------------------------------------------

    async def _check_state(self) -> None:
        answer = await self._answer("GET", "/api/downloads")
        downloads = msgspec.json.decode(answer.body, type=DownloadItems).DownloadItems
        assert len({item.key for item in downloads}) == len(downloads)
        for item in downloads:
            assert 0 <= item.downloaded_bytes <= item.total_bytes
            assert 0.0 <= item.progress <= 1.0
            assert bool(item.error) == (item.status == "error")
            if item.status == "complete":
                names = [stored_name(item.model_repo, part) for part in split_parts(item.file_path)]
                assert all((self._root / "models" / name).is_file() for name in names)
        while any(item.status in _MOVING for item in self._inference._intended.values()):  # noqa: ASYNC110
            await asyncio.sleep(0.001)  # engine threads have their say
        await self._inference.settle()
        answer = await self._answer("POST", "/api/inference")
        items = msgspec.json.decode(answer.body, type=WingmanItems).WingmanItems
        assert len({item.alias for item in items}) == len(items)
        assert all(bool(item.error) == (item.status == "error") for item in items)
        assert {item.alias for item in items if item.status == "inferring"} == {
            served.name for served in self._inference.loaded
        }

    async def _tidy(self) -> None:
        """Reset everything; nothing but the models of the beginning is left, in memory, store and folder."""
        self._hub.script.clear()
        for item in self._inference.items():
            await self._change("/api/inference/reset", alias=item.alias)
        for download in self._services.downloads.items():
            if (download.file_path, download.status) != (_HERE, "complete"):
                key = {"modelRepo": download.model_repo, "filePath": download.file_path}
                await self._change("/api/downloads/reset", **key)
        for path in self._kept:
            if not path.exists():
                path.write_bytes(self._whole)
                await self._services.downloads.adopt()
        (kept,) = self._services.downloads.items()
        assert (kept.file_path, kept.status) == (_HERE, "complete")
        assert await self._services.store.downloads() == [kept]
        assert await self._services.store.items() == self._inference.items() == []
        assert self._inference.loaded == []
        assert set((self._root / "models").iterdir()) == self._kept

    async def _change(self, path: str, **fields: str) -> None:
        answer = await self._answer("POST", path, json.dumps(fields).encode())
        assert answer.status == 200, answer.body


def _runner(context: ContextConfig) -> ScriptedRunner:
    if context.ctx_size == _BROKEN_CONTEXT:
        raise ModelLoadFailure("scripted")
    return ScriptedRunner(n_slots=context.parallel)


def _check_answer(method: str, path: str, answer: Response) -> None:
    if method == "OPTIONS" and answer.content_type == "text/html":
        assert (answer.status, answer.body) == (200, b"")
        return
    if path == "/" and answer.status == 200:
        assert answer.content_type == "text/html; charset=utf-8"
        return
    known = path.lower().rstrip("/") if path.lower().startswith("/api/") else path
    allowed = STATUSES.get(known, frozenset[int]()) | ({400} if path == "bad" else {404})
    assert answer.status in allowed, (answer.status, path, answer.body)
    assert answer.content_type == "application/json; charset=utf-8"
    body = orjson.loads(answer.body)
    if answer.status >= 400:
        assert body["error"]["code"] == answer.status
        assert body["error"]["type"].endswith("_error")
        assert isinstance(body["error"]["message"], str)
        assert body["error"]["message"]


class _Unforeseen(logging.Handler):
    """Collects the exceptions that are logged."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record."""
        if record.exc_info is not None:
            self.found.append(logging.Formatter().format(record))


@contextmanager
def _nothing_unforeseen() -> Iterator[None]:
    """Raise AssertionError when an exception is logged meanwhile."""
    handler, logger = _Unforeseen(), logging.getLogger("wingman")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    assert not handler.found, handler.found[0]


# -- what is written ----------------------------------------------------------------------------------

_CHANGES: Final = frozenset({
    "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
    "os.utime", "shutil.rmtree", "shutil.move",
})  # fmt: skip
"""Audit events of calls that change the file whose name comes first, or second."""
_watched: list[tuple[str, list[str]]] = []
"""The folder that may be written to, and what was written beside it; empty: nobody wants to know."""


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched or (event != "open" and event not in _CHANGES):
        return
    if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return
    folder, beside = _watched[-1]
    names = arguments[:2] if event in ("os.rename", "os.link", "shutil.move") else arguments[:1]
    paths = [os.path.abspath(os.fsdecode(name)) for name in names if not isinstance(name, int)]  # noqa: PTH100
    beside += [path for path in paths if not path.startswith(folder + os.sep) and "__pycache__" not in path]


@contextmanager
def _writes_stay_in(folder: Path) -> Iterator[None]:
    """Raise AssertionError when any thread changes a file elsewhere meanwhile."""
    beside: list[str] = []
    _watched.append((str(folder), beside))
    try:
        yield
    finally:
        _watched.pop()
    assert beside == []


@functools.cache
def _house() -> _House:
    """The server; made once."""
    sys.addaudithook(_audit)
    house = _House()
    run(house.start())
    return house
