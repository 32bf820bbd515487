"""For tests of downloads: a store that can be inspected, a Hub without a network, and small GGUF files."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import io
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wingman.errors import NotFound
from wingman.services.downloads import Downloads, Limits
from wingman.services.home import Home, stored_name
from wingman.services.items import DownloadItem
from wingman.services.remote import Body, Interrupted, RemoteFile
from wingman.services.shelf import Shelf
from wingman.services.transfer import Patience

REPO = "o/Tiny-GGUF"
PATH = "m.Q8_0.gguf"


def make_remote_file(content: bytes, path: str = PATH, repo: str = REPO) -> RemoteFile:
    """The facts of a file as the Hub tells them."""
    sha256 = hashlib.sha256(content).hexdigest()
    return RemoteFile(repo=repo, path=path, commit="c" * 40, size=len(content), etag=sha256, sha256=sha256)


class MemoryStore:
    """Rows in memory; `fails` makes every write raise."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], DownloadItem] = {}
        self.fails = False

    async def downloads(self) -> list[DownloadItem]:
        return list(self.rows.values())

    async def put_download(self, item: DownloadItem) -> None:
        await asyncio.sleep(0)
        if self.fails:
            raise RuntimeError("disk I/O error")
        self.rows[item.key] = item

    async def delete_download(self, repo: str, file_path: str) -> None:
        await asyncio.sleep(0)
        del self.rows[repo, file_path]


@dataclass
class ScriptedHub:
    """Files in memory. What `script` holds happens to the next tries, one entry each."""

    files: dict[tuple[str, str], bytes] = field(default_factory=dict)
    script: list[str] = field(default_factory=list)
    """`cut` or `hang` half-way, `refuse`, `damage` a byte."""
    chunk_bytes: int = 1000
    opened: list[tuple[str, int, str]] = field(default_factory=list)
    """Path, start and ETag of each try."""
    open_now: list[tuple[str, str]] = field(default_factory=list)
    most_open: int = 0

    async def locate(self, repo: str, path: str, revision: str = "main") -> RemoteFile:
        await asyncio.sleep(0)
        if (repo, path) not in self.files:
            raise NotFound(f"{repo} has no file {path} at {revision}")
        return make_remote_file(self.files[repo, path], path, repo)

    async def aclose(self) -> None:
        await asyncio.sleep(0)

    @asynccontextmanager
    async def open(self, file: RemoteFile, start: int = 0, etag: str = "") -> AsyncIterator[Body]:
        assert (file.repo, file.path) not in self.open_now, "one file is fetched twice at once"
        self.open_now.append((file.repo, file.path))
        self.most_open = max(self.most_open, len(self.open_now))
        self.opened.append((file.path, start, etag))
        try:
            yield Body(start, '"e"', self._chunks(file, start, self.script.pop(0) if self.script else ""))
        finally:
            self.open_now.remove((file.repo, file.path))

    async def _chunks(self, file: RemoteFile, start: int, event: str) -> AsyncGenerator[bytes, None]:
        await asyncio.sleep(0)
        content = self.files[file.repo, file.path]
        half = start + (len(content) - start) // 2
        stop = {"cut": half, "hang": half, "refuse": start}.get(event, len(content))
        if event == "damage":
            content = content[:-1] + bytes([content[-1] ^ 1])
        for position in range(start, stop, self.chunk_bytes):
            yield content[position : min(position + self.chunk_bytes, stop)]
            await asyncio.sleep(0)
        if event == "hang":
            await asyncio.Event().wait()
        if stop < len(content):
            raise Interrupted("the connection to the Hub was cut")


class House:
    """A home folder with everything around its downloads; `open` starts a process, so to speak."""

    def __init__(self, root: Path) -> None:
        self.home = Home(root)
        self.home.create()
        self.hub = ScriptedHub(chunk_bytes=50_000)
        self.store = MemoryStore()
        self.told: list[DownloadItem] = []
        self.used: set[tuple[str, str]] = set()
        self.free_bytes = 10**12
        self.opened: list[Downloads] = []

    def announce(self, item: DownloadItem) -> None:
        """What is told is stored."""
        assert self.store.rows.get(item.key, item) == item
        self.told.append(item)

    async def open(self, **options: Any) -> Downloads:
        settings: dict[str, Any] = {
            "patience": Patience(max_tries=2, backoff_s=0.0),
            "limits": Limits(2, 256),
            "shelf": Shelf(self.home, free_bytes=lambda _: self.free_bytes),
        } | options
        downloads = Downloads(
            self.home,
            self.store,
            self.hub,
            self.announce,
            in_use=lambda repo, path: (repo, path) in self.used,
            **settings,
        )
        self.opened.append(downloads)
        await downloads.start()
        return downloads

    def path(self, file_path: str = PATH, repo: str = REPO) -> Path:
        return self.home.models / stored_name(repo, file_path)

    def statuses(self, file_path: str = PATH) -> list[str]:
        """Of what was told, without repeats."""
        seen = [item.status for item in self.told if item.file_path == file_path]
        return [one for index, one in enumerate(seen) if index == 0 or seen[index - 1] != one]


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not is_so():  # noqa: ASYNC110 - executors and tasks have their say
            await asyncio.sleep(0.001)


async def ended(downloads: Downloads, file_path: str = PATH, repo: str = REPO) -> DownloadItem:
    """The item once it does not move by itself."""

    def item() -> DownloadItem:
        found = downloads.item(repo, file_path)
        assert found is not None
        return found

    await until(lambda: item().status not in {"queued", "downloading"})
    return item()


class FullDisk(io.FileIO):
    """Takes `room` bytes, then none, as write(2) does."""

    room = 1_500_000
    error = errno.ENOSPC

    def write(self, data: Any, /) -> int:
        size = min(len(data), self.room - self.tell())
        if size <= 0:
            raise OSError(self.error, os.strerror(self.error))
        return super().write(data[:size])


def open_full(path: Path) -> Any:
    """Opens a partial on a disk that fills up."""
    path.touch()
    return FullDisk(path, "r+")


def names(folder: Path) -> list[str]:
    """What lies in a folder."""
    return sorted(path.name for path in folder.iterdir())
