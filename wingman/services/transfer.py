"""One file from the Hub into its checked partial, through whatever the network does meanwhile.

On the loop; disk and hashing run in an executor, one call for about a MiB. A try that ends early is followed by
another from where it stopped, after a growing pause; only bytes further than ever before count as progress, so
a server that begins again and again wears the patience out. A wrong hash costs everything and is forgiven once.
"""

from __future__ import annotations

import asyncio
import errno
import random
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from typing import Final, ParamSpec, Protocol, TypeVar

from msgspec import Struct

from wingman.errors import InsufficientRoom, WingmanError
from wingman.services.pace import RateLimit
from wingman.services.partial import OpenFile, Partial, open_unbuffered
from wingman.services.remote import Body, Interrupted, RangeRefused, RemoteFile

_BLOCK_BYTES: Final = 1024**2
_BLOCK_S: Final = 0.25
"""A slow stream is written this often, so that what is shown as here is here."""
_REREAD_BYTES: Final = 8 * 1024**2
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})

P = ParamSpec("P")
T = TypeVar("T")


class TransferFailed(WingmanError):
    """The file can't be had; the message says why."""


class Source(Protocol):
    """Where bytes come from; `remote.Remote` is the real one."""

    def open(
        self, file: RemoteFile, start: int = 0, etag: str = ""
    ) -> AbstractAsyncContextManager[Body, bool | None]:
        """See `Remote.open`."""


class Patience(Struct, frozen=True):
    """When to try again, and when not any more."""

    max_tries: int = 5
    """In a row without a byte further than before."""
    backoff_s: float = 1.0
    """After the first; doubles each time."""
    max_backoff_s: float = 60.0
    max_retry_after_s: float = 300.0

    def pause_s(self, n_failures: int, asked_s: float, jitter: float) -> float:
        """Seconds before the next try; `jitter` is in 0..1, `asked_s` what the server wants."""
        pause_s = min(self.backoff_s * 2.0 ** (n_failures - 1), self.max_backoff_s)
        return max(pause_s * (0.5 + jitter / 2), min(asked_s, self.max_retry_after_s))


class Progress(Struct):
    """How far a file is: written by its transfer, read by whoever reports, both on the loop."""

    position: int = 0
    """Bytes of it that are on this machine."""
    received: int = 0
    """Bytes that came over the network, of all files and tries."""
    checked: float | None = None
    """Share of them that was read again; None when not at it."""


class Transfers:
    """Fetches files, any number at once, within one rate limit."""

    def __init__(
        self,
        source: Source,
        executor: Executor,
        *,
        limit: RateLimit | None = None,
        patience: Patience = Patience(),
        open_file: OpenFile = open_unbuffered,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._source = source
        self._executor = executor
        self._limit = limit or RateLimit(0)
        self._patience = patience
        self._open_file = open_file
        self._clock = clock
        self._sleep = sleep
        self._jitter = jitter

    async def fetch(self, file: RemoteFile, target: Path, progress: Progress) -> None:
        """Bring a file into its partial, checked and on the disk; goes on where an earlier call stopped.

        Raises NotFound, Forbidden, UpstreamFailure, InsufficientRoom, TransferFailed; the partial stays,
        unless its hash was wrong. When cancelled, it returns once the disk is left alone.
        """
        partial = Partial(target, file, self._open_file)
        try:
            await self._resume(partial, progress)
            await self._fill(partial, progress)
            if not await self._run(partial.check):
                await self._start_over(partial, progress)
                await self._fill(partial, progress)
                if not await self._run(partial.check):
                    await self._start_over(partial, progress)
                    raise TransferFailed(
                        f"the checksum of {file.path} is wrong, twice: the Hub's copy is damaged"
                    )
        except OSError as error:
            raise _explain(error) from error
        finally:
            await self._run(partial.close)

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """A blocking call, in the executor; ends before this does, also when cancelled."""
        return await self._run(lambda: call(*args, **kwargs))

    async def _run(self, call: Callable[..., T], *args: object) -> T:
        future = asyncio.get_running_loop().run_in_executor(self._executor, call, *args)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            while not future.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([future])
            if not future.cancelled():
                future.exception()  # seen: it no longer matters
            raise

    async def _resume(self, partial: Partial, progress: Progress) -> None:
        kept = await self._run(partial.open)
        progress.position = kept
        while partial.position < kept:
            await self._run(partial.reread, _REREAD_BYTES, kept)
            progress.checked = partial.position / kept
        progress.checked = None

    async def _start_over(self, partial: Partial, progress: Progress) -> None:
        await self._run(partial.restart)
        progress.position = 0

    async def _fill(self, partial: Partial, progress: Progress) -> None:
        """Try until all bytes are there. Raises TransferFailed when patience ends."""
        n_failures, furthest = 0, partial.position
        while partial.position < partial.file.size:
            try:
                await self._receive(partial, progress)
            except Interrupted as cut:
                if partial.position > furthest:
                    n_failures, furthest = 0, partial.position
                n_failures += 1
                if n_failures >= self._patience.max_tries:
                    raise TransferFailed(f"{cut.message}; gave up after {n_failures} tries") from cut
                if isinstance(cut, RangeRefused):
                    await self._start_over(partial, progress)
                await self._sleep(self._patience.pause_s(n_failures, cut.retry_after_s, self._jitter()))

    async def _receive(self, partial: Partial, progress: Progress) -> None:
        """One try, from where the partial ends. Raises Interrupted when not all bytes came."""
        async with self._source.open(partial.file, partial.position, partial.etag) as body:
            if body.start != partial.position:
                await self._start_over(partial, progress)
            await self._run(partial.begin, body.etag)
            await self._store(body, partial, progress)
        if partial.position < partial.file.size:
            raise Interrupted("the connection to the Hub was cut")

    async def _store(self, body: Body, partial: Partial, progress: Progress) -> None:
        """Write what comes, in blocks; what came before an error or the end is kept too."""
        block: list[bytes] = []
        n_bytes, written_s, missing = 0, self._clock(), partial.file.size - partial.position
        try:
            async for chunk in body.chunks:  # closed by the source
                block.append(chunk)
                n_bytes, missing = n_bytes + len(chunk), missing - len(chunk)
                if n_bytes >= _BLOCK_BYTES or self._clock() - written_s >= _BLOCK_S or missing <= 0:
                    chunks, block, n_bytes, written_s = block, [], 0, self._clock()
                    await self._append(partial, chunks, progress)
                if missing <= 0:
                    return
                if (pause_s := self._limit.take(len(chunk), self._clock())) > 0:
                    await self._sleep(pause_s)
        finally:
            if block:
                await self._append(partial, block, progress)

    async def _append(self, partial: Partial, chunks: list[bytes], progress: Progress) -> None:
        before = partial.position
        try:
            await self._run(partial.append, chunks)
        finally:
            progress.position = partial.position
            progress.received += partial.position - before


def _explain(error: OSError) -> WingmanError:
    if error.errno in _FULL:
        return InsufficientRoom("the disk is full: free some space and enqueue it again; what came is kept")
    return TransferFailed(f"the models folder can't be written: {error.strerror}")
