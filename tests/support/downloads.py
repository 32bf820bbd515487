"""For tests of downloads: a store that can be inspected, a Hub without a network, and small GGUF files."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from wingman.errors import NotFound
from wingman.services.items import DownloadItem
from wingman.services.remote import Body, Interrupted, RemoteFile

REPO = "o/Tiny-GGUF"


def make_remote_file(content: bytes, path: str = "m.Q8_0.gguf", repo: str = REPO) -> RemoteFile:
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


def names(folder: Path) -> list[str]:
    """What lies in a folder."""
    return sorted(path.name for path in folder.iterdir())
