"""The items of all downloads, in memory as in the store, and the order in which they change.

On the loop. `put` is the only way to change one: the store has it before memory, memory before it is announced.
Changes are made one at a time by who holds `turn`; only who holds it may cancel a download's task, so none is
cancelled half-way through one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Protocol, TypeVar

import msgspec

from wingman.errors import NotFound, Unavailable
from wingman.services.calls import Calls
from wingman.services.downloadstates import at_bytes
from wingman.services.items import ACTIVE_DOWNLOADS, DownloadItem

log = logging.getLogger("wingman.downloads")

Key = tuple[str, str]
T = TypeVar("T")


class DownloadStore(Protocol):
    """Where items are kept; what returned is durable."""

    async def downloads(self) -> list[DownloadItem]:
        """All items."""

    async def put_download(self, item: DownloadItem) -> None:
        """Add or replace one."""

    async def delete_download(self, repo: str, file_path: str) -> None:
        """Remove one."""


class Ledger:
    """All items by key. `announce` is called on the loop and must neither block nor raise."""

    def __init__(self, store: DownloadStore, announce: Callable[[DownloadItem], None]) -> None:
        self.turn = asyncio.Lock()
        self.is_closing = False
        self._store = store
        self._announce = announce
        self._items: dict[Key, DownloadItem] = {}
        self._calls = Calls()

    def __iter__(self) -> Iterator[DownloadItem]:
        """Oldest first; a copy, so items may change meanwhile."""
        return iter(sorted(self._items.values(), key=lambda item: item.created))

    def get(self, key: Key) -> DownloadItem | None:
        """One item."""
        return self._items.get(key)

    def known(self, key: Key) -> DownloadItem:
        """One item; raises NotFound."""
        if key not in self._items:
            raise NotFound(f"there is no download of {key[1]} from {key[0]}")
        return self._items[key]

    def is_free(self, key: Key) -> bool:
        """Whether it may be enqueued or adopted: neither here nor on its way."""
        item = self._items.get(key)
        return item is None or item.status not in {"complete", *ACTIVE_DOWNLOADS}

    async def load(self) -> None:
        """Read what the store has."""
        self._items = {row.key: row for row in await self._store.downloads()}

    async def put(self, item: DownloadItem) -> DownloadItem:
        """Add or replace an item; `turn` is held."""
        item = msgspec.structs.replace(item, updated=int(time.time()))
        await self._store.put_download(item)
        return self._set(item)

    async def put_failure(self, item: DownloadItem) -> None:
        """As `put`, but a store that refuses, as when the disk is full, does not hide the failure.

        The row there is still an active one, so the next start takes it up again.
        """
        try:
            await self.put(item)
        except Exception:
            log.exception("the failure of a download could not be stored")
            self._set(item)

    async def delete(self, key: Key) -> DownloadItem:
        """Remove an item, announced as idle; as it was. `turn` is held."""
        await self._store.delete_download(*key)
        item = self._items.pop(key)
        self._announce(at_bytes(msgspec.structs.replace(item, status="idle", error=""), 0, ""))
        return item

    async def whole(self, call: Coroutine[Any, Any, T]) -> T:
        """Run a change to its end, also when who waits for it is cancelled. Raises Unavailable once closing."""
        if self.is_closing:
            call.close()
            raise Unavailable("the server is shutting down")
        return await self._calls.whole(call)

    async def settle(self) -> None:
        """Wait for the changes that `whole` has under way."""
        await self._calls.settle()

    def _set(self, item: DownloadItem) -> DownloadItem:
        self._items[item.key] = item
        self._announce(item)
        return item
