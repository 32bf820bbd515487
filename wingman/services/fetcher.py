"""One download from its turn in the queue to its end: find the files, fetch them, check them, rename them.

On the loop, in the download's own task. A model is `complete` only when all its files are in place, hashed,
and make a GGUF model; the files of a set appear together.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final, Protocol

import msgspec
from msgspec import Struct, field

from wingman.errors import WingmanError
from wingman.services.downloadstates import (
    DownloadMove,
    advance,
    at_bytes,
    described,
    files_of,
    key_of,
    located,
    read_metadata,
    text_of,
)
from wingman.services.gguf import GgufHeader
from wingman.services.gguffile import BadGguf
from wingman.services.home import split_parts
from wingman.services.ledger import Key, Ledger
from wingman.services.pace import Speed, speed_text
from wingman.services.partial import delete, publish, where_it_lies
from wingman.services.remote import RemoteFile
from wingman.services.shelf import Shelf
from wingman.services.transfer import Progress, Source, TransferFailed, Transfers

log = logging.getLogger("wingman.downloads")

_LOCATE_AT_ONCE: Final = 8


class Remote(Source, Protocol):
    """The Hub; `remote.Remote` is the real one."""

    async def locate(self, repo: str, path: str, revision: str = "main") -> RemoteFile:
        """See `Remote.locate`."""

    async def aclose(self) -> None:
        """Close the connections."""


class Extent(Struct):
    """How much of a download is here, and how fast the rest comes."""

    other_bytes: int
    """On the disk, of the files beside the one that `progress` is about."""
    progress: Progress = field(default_factory=Progress)
    speed: Speed = field(default_factory=Speed)

    @property
    def n_bytes(self) -> int:
        """On the disk, of all its files."""
        return self.other_bytes + self.progress.position

    def speed_text(self, now_s: float) -> str:
        """As DownloadItem shows it; while bytes are read again, how far that is."""
        text = speed_text(self.speed.update(self.progress.received, now_s))
        return text if self.progress.checked is None else f"checking {self.progress.checked:.0%}"


class Fetcher:
    """Does downloads."""

    def __init__(self, ledger: Ledger, shelf: Shelf, remote: Remote, transfers: Transfers) -> None:
        self._ledger = ledger
        self._shelf = shelf
        self._remote = remote
        self._transfers = transfers
        self._run = transfers.run

    async def download(self, key: Key, extent: Extent) -> None:
        """Do a queued one. Its end is in the ledger, unless this is cancelled; raises nothing else."""
        try:
            if await self._begin(key):
                files = await self._files(key)
                await self._fetch(key, files, extent)
                await self._finish(key, await self._check(key, extent))
        except WingmanError as error:
            await self._fail(key, error.message, extent)
        except Exception:
            log.exception("a download failed unexpectedly")
            await self._fail(key, "it failed unexpectedly; see the log", extent)

    async def _begin(self, key: Key) -> bool:
        """False when it was cancelled or deleted before its turn came."""
        async with self._ledger.turn:
            item = self._ledger.get(key)
            if item is None or item.status != "queued":
                return False
            await self._ledger.put(advance(item, DownloadMove.START))
            return True

    async def _files(self, key: Key) -> tuple[RemoteFile, ...]:
        """What is to be fetched; a row of an older version doesn't say."""
        item = self._ledger.known(key)
        if files := files_of(item):
            return files
        revision = read_metadata(item).revision
        files = await self.locate(key_of(*key), revision)
        async with self._ledger.turn:
            item = msgspec.structs.replace(
                self._ledger.known(key),
                total_bytes=sum(file.size for file in files),
                metadata=text_of(located(files, revision)),
            )
            await self._ledger.put(item)
        return files

    async def _fetch(self, key: Key, files: tuple[RemoteFile, ...], extent: Extent) -> None:
        held = await self.check_room(key, files, 0)
        for index, (file, target) in enumerate(zip(files, self._shelf.targets(*key), strict=True)):
            extent.progress.position = held[index]
            extent.other_bytes = sum(held) - held[index]
            await self._transfers.fetch(file, target, extent.progress)
            held[index] = file.size

    async def _check(self, key: Key, extent: Extent) -> GgufHeader:
        """What the files say; those that can't be used are deleted, and TransferFailed is raised."""
        targets = self._shelf.targets(*key)
        try:
            return await self._run(self._shelf.read, await self._run(where_it_lies, targets))
        except BadGguf as error:
            if not isinstance(error.__cause__, OSError):  # then it is no fault of the file
                await self._run(delete, targets)
                extent.other_bytes = extent.progress.position = 0
            raise TransferFailed(f"not a usable GGUF file: {error.message}") from error

    async def _finish(self, key: Key, header: GgufHeader) -> None:
        async with self._ledger.turn:
            try:
                await self._run(publish, self._shelf.targets(*key))
            except OSError as error:
                raise TransferFailed(f"the models folder can't be written: {error.strerror}") from error
            item = self._ledger.known(key)
            metadata = text_of(described(read_metadata(item), header))
            item = advance(item, DownloadMove.FINISH, metadata=metadata)
            await self._ledger.put(at_bytes(item, item.total_bytes, ""))

    async def _fail(self, key: Key, message: str, extent: Extent) -> None:
        async with self._ledger.turn:
            item = advance(self._ledger.known(key), DownloadMove.FAIL, error=message)
            await self._ledger.put_failure(at_bytes(item, extent.n_bytes, ""))

    # -- also for who enqueues ------------------------------------------------------------------

    async def locate(self, key: Key, revision: str) -> tuple[RemoteFile, ...]:
        """Facts of all files of a model, at the commit that the first was found at. Raises as Remote.locate."""
        repo, path = key
        first = await self._remote.locate(repo, path, revision or "main")
        files, rest = [first], split_parts(path)[1:]
        for start in range(0, len(rest), _LOCATE_AT_ONCE):
            some = rest[start : start + _LOCATE_AT_ONCE]
            files += await asyncio.gather(*(self._remote.locate(repo, part, first.commit) for part in some))
        return tuple(files)

    async def check_room(self, key: Key, files: tuple[RemoteFile, ...], reserved: int) -> list[int]:
        """Bytes of each file that are here already.

        Raises InsufficientRoom when the rest does not fit beside what is `reserved` for others.
        """
        sizes = [file.size for file in files]
        held = await self._run(self._shelf.held, self._shelf.targets(*key), sizes)
        missing = sum(sizes) - sum(held)
        await self._run(self._shelf.check_room, missing + reserved if missing else 0)
        return held
