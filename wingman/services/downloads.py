"""Downloads: a queue of model files from the Hub, in order of arrival, a few at a time.

On the loop; embedding code and the command line use it directly. Each download has a task, see `fetcher`; what
order changes of state keep says `ledger`, which are legal `downloadstates`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from msgspec import Struct

from wingman.errors import (
    Conflict,
    InsufficientRoom,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unavailable,
    UpstreamFailure,
)
from wingman.services.adoption import Adoption
from wingman.services.downloadstates import (
    DownloadMove,
    advance,
    at_bytes,
    check_revision,
    key_of,
    located,
    parse_repo,
    text_of,
)
from wingman.services.fetcher import Extent, Fetcher, Remote
from wingman.services.home import LOCAL, Home, split_parts
from wingman.services.items import ACTIVE_DOWNLOADS, DownloadItem
from wingman.services.ledger import DownloadStore, Key, Ledger
from wingman.services.pace import RateLimit
from wingman.services.partial import OpenFile, delete, discard, open_unbuffered
from wingman.services.remote import Interrupted, RemoteFile
from wingman.services.shelf import Shelf
from wingman.services.transfer import Patience, Transfers

log = logging.getLogger("wingman.downloads")

_TICK_S: Final = 0.25
"""Progress is told this often at most."""
_RETRY_AFTER_S: Final = 60
_CANCEL_AGAIN_S: Final = 1.0


class Limits(Struct, frozen=True):
    """What the flags set."""

    parallel: int = 2
    max_queued: int = 256
    max_rate_bytes_s: float = 0.0
    """Of all downloads together; 0: none."""


class Enqueued(Struct, frozen=True):
    """The answer to `enqueue`: the item, and whether that put it into the queue."""

    item: DownloadItem
    is_new: bool


class _Running(Struct, frozen=True):
    """A download that has a task."""

    task: asyncio.Task[None]
    extent: Extent


class Downloads:
    """All downloads of a home folder; owns `remote`.

    `announce` is called on the loop and must neither block nor raise.
    """

    def __init__(
        self,
        home: Home,
        store: DownloadStore,
        remote: Remote,
        announce: Callable[[DownloadItem], None],
        *,
        limits: Limits = Limits(),
        in_use: Callable[[str, str], bool] = lambda _repo, _path: False,
        patience: Patience | None = None,
        shelf: Shelf | None = None,
        open_file: OpenFile = open_unbuffered,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._remote = remote
        self._limits = limits
        self._in_use = in_use
        self._sleep = sleep
        self._shelf = shelf or Shelf(home)
        self._executor = ThreadPoolExecutor(limits.parallel + 1, "downloads")
        transfers = Transfers(
            remote,
            self._executor,
            limit=RateLimit(limits.max_rate_bytes_s),
            patience=patience or Patience(),
            open_file=open_file,
            sleep=sleep,
        )
        self._run = transfers.run
        self._ledger = Ledger(store, announce)
        self._fetcher = Fetcher(self._ledger, self._shelf, remote, transfers)
        self._adoption = Adoption(self._ledger, self._shelf, self._run)
        self._running: dict[Key, _Running] = {}
        self._reporter: asyncio.Task[None] | None = None
        self._n_asking = 0

    def items(self) -> list[DownloadItem]:
        """All downloads, oldest first."""
        return list(self._ledger)

    def item(self, repo: str, file_path: str) -> DownloadItem | None:
        """One download, by any file of its set."""
        return self._ledger.get((repo, split_parts(file_path)[0]))

    def is_complete(self, repo: str, file_path: str) -> bool:
        """Whether a model is here with all its files."""
        item = self.item(repo, file_path)
        return item is not None and item.status == "complete"

    # -- life -----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take up what an earlier process left, however it ended."""
        await self._ledger.load()
        async with self._ledger.turn:
            for row in self._ledger:
                await self._recover(row)
        await self.adopt()
        self._pump()

    async def _recover(self, row: DownloadItem) -> None:
        if row.status in ACTIVE_DOWNLOADS:
            await self._ledger.put(advance(row, DownloadMove.RECOVER))
        if row.status == "cancelled":  # perhaps its files were not deleted any more
            with contextlib.suppress(InvalidRequest, OSError):
                await self._run(discard, self._shelf.targets(*row.key))

    async def adopt(self) -> None:
        """Compare the models folder with what is known of it; meant to be called every few seconds."""
        if not self._ledger.is_closing:
            await self._ledger.whole(self._adoption.compare())

    async def close(self) -> None:
        """Pause: tasks end, what came is kept, and the next `start` goes on. Idempotent."""
        self._ledger.is_closing = True
        async with self._ledger.turn:
            tasks = [running.task for running in self._running.values()]
            tasks += [self._reporter] if self._reporter is not None else []
            await _end(tasks)
        await self._ledger.settle()
        await self._remote.aclose()
        self._executor.shutdown()

    # -- requests -------------------------------------------------------------------------------

    async def enqueue(self, repo: str, file_path: str, revision: str | None = None) -> Enqueued:
        """Ask for a model; `repo` may be `hf://owner/name@revision`.

        Raises InvalidRequest, NotFound, Forbidden, UpstreamFailure, InsufficientRoom, Overloaded, Unavailable,
        and Conflict when another revision of it is here.
        """
        repo, revision = parse_repo(repo, revision)
        key = key_of(repo, file_path)
        if repo == LOCAL:
            raise NotFound("local files can't be downloaded")
        if (present := self._present(key, revision)) is not None:
            return present
        self._check_queue()
        self._n_asking += 1
        try:
            files = await self._fetcher.locate(key, revision)
        except Interrupted as error:
            raise UpstreamFailure(error.message) from error
        finally:
            self._n_asking -= 1
        return await self._ledger.whole(self._accept(key, files, revision))

    async def cancel(self, repo: str, file_path: str) -> DownloadItem:
        """Give a download up; nothing of it is kept. Raises NotFound, and Conflict when it is complete."""
        return await self._ledger.whole(self._cancel(key_of(repo, file_path)))

    async def reset(self, repo: str, file_path: str) -> DownloadItem:
        """Delete a download and its files; the item as it was. Raises NotFound, and Conflict while in use."""
        return await self._ledger.whole(self._reset(key_of(repo, file_path)))

    def _present(self, key: Key, revision: str) -> Enqueued | None:
        """The answer when it is here or on its way."""
        if self._ledger.is_free(key):
            return None
        item = self._ledger.known(key)
        check_revision(item, revision)
        return Enqueued(item, is_new=False)

    def _check_queue(self) -> None:
        if self._ledger.is_closing:
            raise Unavailable("the server is shutting down")
        n_queued = sum(item.status == "queued" for item in self._ledger)
        if n_queued + self._n_asking >= self._limits.max_queued:
            raise Overloaded("too many downloads are queued", _RETRY_AFTER_S)

    async def _accept(self, key: Key, files: tuple[RemoteFile, ...], revision: str) -> Enqueued:
        async with self._ledger.turn:
            if (present := self._present(key, revision)) is not None:
                return present
            held = sum(await self._fetcher.check_room(key, files, self._still_to_come()))
            item = self._ledger.get(key) or DownloadItem(model_repo=key[0], file_path=key[1])
            item = advance(
                item,
                DownloadMove.ENQUEUE,
                total_bytes=sum(file.size for file in files),
                metadata=text_of(located(files, revision)),
                created=int(time.time()),
            )
            item = await self._ledger.put(at_bytes(item, held, ""))
        self._pump()
        return Enqueued(item, is_new=True)

    def _still_to_come(self) -> int:
        active = [item for item in self._ledger if item.status in ACTIVE_DOWNLOADS]
        return sum(item.total_bytes - item.downloaded_bytes for item in active)

    async def _cancel(self, key: Key) -> DownloadItem:
        async with self._ledger.turn:
            item = self._ledger.known(key)
            if item.status == "complete":
                raise Conflict("the download is complete; reset deletes it")
            await self._stop(key)
            if item.status != "cancelled":
                item = await self._give_up(item)
            await self._delete(discard, key)
        self._pump()
        return item

    async def _reset(self, key: Key) -> DownloadItem:
        async with self._ledger.turn:
            item = self._ledger.known(key)
            if self._in_use(*key):
                raise Conflict("the model is loaded; stop it first")
            await self._stop(key)
            if item.status in ACTIVE_DOWNLOADS:  # true even if it ends here
                await self._give_up(item)
            await self._delete(delete, key)
            await self._ledger.delete(key)
        self._pump()
        return item

    async def _give_up(self, item: DownloadItem) -> DownloadItem:
        """Make it cancelled; where the disk is too full to store that, what came of it goes first."""
        cancelled = at_bytes(advance(item, DownloadMove.CANCEL), 0, "")
        try:
            return await self._ledger.put(cancelled)
        except InsufficientRoom:
            await self._delete(discard, item.key)
            return await self._ledger.put(cancelled)

    async def _delete(self, how: Callable[[tuple[Path, ...]], None], key: Key) -> None:
        try:
            await self._run(how, self._shelf.targets(*key))
        except OSError as error:
            raise Conflict(f"the files can't be deleted: {error.strerror}") from error

    # -- tasks ----------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Start what is queued, as far as it may run at once."""
        n_free = 0 if self._ledger.is_closing else self._limits.parallel - len(self._running)
        queued = [item for item in self._ledger if item.status == "queued" and item.key not in self._running]
        for item in queued[: max(0, n_free)]:
            extent = Extent(item.downloaded_bytes)
            task = asyncio.create_task(self._fetcher.download(item.key, extent))
            self._running[item.key] = _Running(task, extent)
            task.add_done_callback(functools.partial(self._ended, item.key))
        if self._running and self._reporter is None:
            self._reporter = asyncio.create_task(self._report())

    def _ended(self, key: Key, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the task of a download died", exc_info=error)
        del self._running[key]
        self._pump()

    async def _stop(self, key: Key) -> None:
        """End the task of a download; the turn is held."""
        if (running := self._running.get(key)) is not None:
            await _end([running.task])

    async def _report(self) -> None:
        """Tell how far downloads are, while there are any."""
        while self._running:
            await self._sleep(_TICK_S)
            for key in tuple(self._running):
                try:
                    async with self._ledger.turn:
                        await self._report_one(key)
                except Exception:  # this task must live as long as there are downloads
                    log.exception("the progress of a download could not be stored")
        self._reporter = None

    async def _report_one(self, key: Key) -> None:
        item, running = self._ledger.get(key), self._running.get(key)
        if item is None or running is None or item.status != "downloading":
            return
        fresh = at_bytes(item, running.extent.n_bytes, running.extent.speed_text(time.monotonic()))
        if fresh != item:
            await self._ledger.put(fresh)


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancel tasks until they end: an error while one cleans up takes the place of the cancellation."""
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=_CANCEL_AGAIN_S)
