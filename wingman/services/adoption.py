"""Keeps the items of downloads true to the models folder, where people add and delete files too.

On the loop. A model that lies there under a name that tells its repository becomes a complete download, if it
is a usable one; a complete download whose file is gone or of another size becomes an error. No file is
changed, and what a download is at work on is left alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from wingman.errors import InvalidRequest
from wingman.services.downloadstates import DownloadMove, Metadata, advance, at_bytes, described, text_of
from wingman.services.gguf import GgufHeader
from wingman.services.gguffile import BadGguf
from wingman.services.items import DownloadItem
from wingman.services.ledger import Key, Ledger
from wingman.services.quantization import quantization_of
from wingman.services.shelf import Shelf, Shelved

log = logging.getLogger("wingman.downloads")

_GONE = "the file is gone from the models folder, or was changed; enqueue it to fetch it again"


class Adoption:
    """Compares ledger and folder; `run` runs a blocking call in an executor."""

    def __init__(self, ledger: Ledger, shelf: Shelf, run: Callable[..., Awaitable[Any]]) -> None:
        self._ledger = ledger
        self._shelf = shelf
        self._run = run
        self._refused: dict[Key, Shelved] = {}
        """Not usable; looked at again when it changes."""

    async def compare(self) -> None:
        """Bring the items in line with what lies in the folder."""
        try:
            found: dict[Key, Shelved] = await self._run(self._shelf.scan)
        except OSError as error:
            log.warning("the models folder can't be read: %s", error.strerror)
            return
        for item in self._ledger:
            if item.status == "complete" and not _is_there(item, found.get(item.key)):
                await self._lose(item.key)
        for key, shelved in found.items():
            if self._ledger.is_free(key) and self._refused.get(key) != shelved:
                await self._examine(key, shelved)

    async def _lose(self, key: Key) -> None:
        async with self._ledger.turn:
            item = self._ledger.get(key)
            if item is None or item.status != "complete" or _is_there(item, await self._look(key)):
                return
            await self._ledger.put(at_bytes(advance(item, DownloadMove.LOSE, error=_GONE), 0, ""))

    async def _look(self, key: Key) -> Shelved | None:
        try:
            shelved: Shelved | None = await self._run(self._shelf.look, *key)
        except InvalidRequest:  # a row of an older version, with a name that can't be stored
            return None
        return shelved

    async def _examine(self, key: Key, shelved: Shelved) -> None:
        try:
            header = await self._run(self._shelf.read, self._shelf.targets(*key))
        except BadGguf as error:
            self._refused[key] = shelved
            log.warning("%s of %s is not adopted: %s", key[1], key[0], error.message)
            return
        async with self._ledger.turn:
            if self._ledger.is_free(key) and await self._look(key) == shelved:
                await self._ledger.put(self._adopted(key, shelved, header))

    def _adopted(self, key: Key, shelved: Shelved, header: GgufHeader) -> DownloadItem:
        now_s = int(time.time())
        item = self._ledger.get(key) or DownloadItem(model_repo=key[0], file_path=key[1], created=now_s)
        metadata = text_of(described(Metadata(quantization=quantization_of(key[1])), header))
        item = advance(item, DownloadMove.ADOPT, total_bytes=shelved.n_bytes, metadata=metadata)
        return at_bytes(item, shelved.n_bytes, "")


def _is_there(item: DownloadItem, shelved: Shelved | None) -> bool:
    """Whether a complete item's files are; older rows don't tell their size."""
    return shelved is not None and item.total_bytes in (0, shelved.n_bytes)
