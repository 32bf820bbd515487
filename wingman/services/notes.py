"""What is to be written down of WingmanItems, in order, by one task. On the loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from msgspec import Struct

from wingman.services.items import WingmanItem

log = logging.getLogger("wingman.inference")


class Note(Struct, frozen=True):
    """An item to be stored and announced; `progress` of a load is announced only."""

    item: WingmanItem
    progress: float | None
    done: asyncio.Future[None]


class Notes:
    """A queue of notes and the task that empties it."""

    def __init__(self, write: Callable[[Note], Awaitable[None]]) -> None:
        self._write = write
        self._queue: asyncio.Queue[Note] = asyncio.Queue()
        self._writer: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to write."""
        self._writer = asyncio.get_running_loop().create_task(self._run())

    def put(self, item: WingmanItem, progress: float | None = None) -> asyncio.Future[None]:
        """Have a note written; the future says when it is."""
        done = asyncio.get_running_loop().create_future()
        self._queue.put_nowait(Note(item, progress, done))
        return done

    async def flush(self) -> None:
        """Wait until all notes are written."""
        await self._queue.join()

    async def close(self) -> None:
        """Write what is left, and end."""
        if self._writer is not None:
            await self.flush()
            self._writer.cancel()
            await asyncio.wait((self._writer,))

    async def _run(self) -> None:
        while True:
            note = await self._queue.get()
            try:
                await self._write(note)
            except Exception:
                log.exception("the state of %s could not be stored", note.item.alias)
            finally:
                self._queue.task_done()
                if not note.done.done():
                    note.done.set_result(None)
