"""Downloads in any order of requests, faults, crashes and people at the models folder."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.support.downloads import REPO, House, until
from wingman.errors import WingmanError
from wingman.services.downloads import Downloads, Limits
from wingman.services.downloadstates import TRANSITIONS
from wingman.services.gguf import GgufHeader
from wingman.services.gguffile import BadGguf
from wingman.services.home import split_parts
from wingman.services.items import ACTIVE_DOWNLOADS
from wingman.services.partial import partial_path, sidecar_path
from wingman.services.shelf import Shelf

T = TypeVar("T")

SET = "s-00001-of-00002.gguf"
MODELS = ["a.gguf", "b.gguf", "c.gguf", SET]
BAD = "bad.gguf"
CONTENTS = {path: b"GGUF" + path.encode() * 700 for model in MODELS for path in split_parts(model)}
LEGAL = {(old, new) for (old, _), new in TRANSITIONS.items()} | {
    ("idle", "idle"),
    ("downloading", "downloading"),
}

models = st.sampled_from([*MODELS, BAD])


def read(paths: Sequence[Path]) -> GgufHeader:
    """Stands for the header reader: a model begins with GGUF."""
    if not all(path.read_bytes().startswith(b"GGUF") for path in paths):
        raise BadGguf("no magic")
    return GgufHeader(
        version=3, metadata={}, file_size=0, tensor_bytes=0, tensor_types={}, n_tensors=0, n_params=0
    )


class DownloadStates(RuleBasedStateMachine):
    """One home folder through the lives of several processes."""

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.runner = asyncio.Runner()
        self.house = House(Path(self.folder.name))
        self.house.hub.files = {(REPO, path): content for path, content in CONTENTS.items()}
        self.house.hub.files[REPO, BAD] = b"no model"
        self.errors = _Errors(logging.ERROR)
        logging.getLogger("wingman.downloads").addHandler(self.errors)
        self.told = 0
        self.last: dict[str, str] = {}
        self.downloads = self.run(self.open())

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(call)

    async def open(self) -> Downloads:
        return await self.house.open(
            limits=Limits(2, 4), shelf=Shelf(self.house.home, read=read), sleep=_blink
        )

    async def attempt(self, call: Coroutine[Any, Any, Any], n_turns: int) -> None:
        """A request that may be refused, and a while after it."""
        with contextlib.suppress(WingmanError):
            await call
        for _ in range(n_turns):
            await asyncio.sleep(0)

    @rule(path=models, n_turns=st.integers(0, 30))
    def enqueue(self, path: str, n_turns: int) -> None:
        self.run(self.attempt(self.downloads.enqueue(REPO, split_parts(path)[-1]), n_turns))

    @rule(path=models, n_turns=st.integers(0, 30))
    def cancel(self, path: str, n_turns: int) -> None:
        self.run(self.attempt(self.downloads.cancel(REPO, path), n_turns))
        assert not partial_path(self.house.path(path)).exists() or self.last_status(path) != "cancelled"

    @rule(path=models, n_turns=st.integers(0, 30), is_loaded=st.booleans())
    def reset(self, path: str, n_turns: int, is_loaded: bool) -> None:
        had = self.downloads.item(REPO, path)
        self.house.used = {(REPO, path)} if is_loaded else set()
        self.run(self.attempt(self.downloads.reset(REPO, path), n_turns))
        if had is not None:
            assert (self.downloads.item(REPO, path) is not None) == is_loaded

    @rule(
        wishes=st.lists(
            st.tuples(st.sampled_from(["enqueue", "cancel", "reset", "adopt"]), models), max_size=6
        )
    )
    def at_once(self, wishes: list[tuple[str, str]]) -> None:
        """Requests that meet."""
        self.house.used = set()
        self.run(self.all_of(wishes))

    async def all_of(self, wishes: list[tuple[str, str]]) -> None:
        calls = [
            self.downloads.adopt() if verb == "adopt" else getattr(self.downloads, verb)(REPO, path)
            for verb, path in wishes
        ]
        await asyncio.gather(*(self.attempt(call, 0) for call in calls))

    @rule(events=st.lists(st.sampled_from(["cut", "refuse", "damage", "hang", ""]), max_size=4))
    def fate(self, events: list[str]) -> None:
        self.house.hub.script = events

    @rule(n_turns=st.integers(1, 200))
    def wait(self, n_turns: int) -> None:
        self.run(self.attempt(asyncio.sleep(0), n_turns))

    @rule()
    def restart(self) -> None:
        self.run(self.downloads.close())
        self.downloads = self.run(self.open())

    @rule(kept=st.integers(0, 3000), has_sidecar=st.booleans())
    def crash(self, kept: int, has_sidecar: bool) -> None:
        """What was not yet on the disk is lost, whatever the sidecar says."""
        self.run(self.downloads.close())
        for path in CONTENTS:
            partial = partial_path(self.house.path(path))
            if partial.exists():
                partial.write_bytes(partial.read_bytes()[:kept])
                if not has_sidecar:
                    sidecar_path(self.house.path(path)).unlink(missing_ok=True)
        self.downloads = self.run(self.open())

    @rule(path=st.sampled_from(list(CONTENTS)))
    def lose(self, path: str) -> None:
        if self.downloads.is_complete(REPO, path):
            self.house.path(path).unlink()
            self.run(self.downloads.adopt())
            assert not self.downloads.is_complete(REPO, path)

    @rule(path=st.sampled_from(list(CONTENTS)))
    def put(self, path: str) -> None:
        item = self.downloads.item(REPO, path)
        if item is None or item.status not in ACTIVE_DOWNLOADS:
            for part in split_parts(path):
                self.house.path(part).write_bytes(CONTENTS[part])
            self.run(self.downloads.adopt())
            assert self.downloads.is_complete(REPO, path)

    @rule()
    def settle(self) -> None:
        """Left alone, everything ends."""
        self.run(self.finish())

    async def finish(self) -> None:
        self.house.hub.script = []
        if self.house.hub.open_now:  # some hang: a process that ends frees them
            await self.downloads.close()
            self.downloads = await self.open()
        await until(lambda: not any(item.status in ACTIVE_DOWNLOADS for item in self.downloads.items()))

    def last_status(self, path: str) -> str:
        return self.last.get(path, "idle")

    @invariant()
    def told_is_legal(self) -> None:
        for item in self.house.told[self.told :]:
            old = self.last_status(item.file_path)
            assert item.status == "idle" or (old, item.status) in LEGAL, (old, item.status)
            assert 0 <= item.downloaded_bytes <= item.total_bytes or item.total_bytes == 0
            self.last[item.file_path] = item.status
        self.told = len(self.house.told)

    @invariant()
    def memory_and_disk_agree(self) -> None:
        rows = self.house.store.rows
        assert {item.key: item for item in self.downloads.items()} == rows
        for (_, path), item in rows.items():
            if item.status == "complete":
                assert all(self.house.path(part).read_bytes() == CONTENTS[part] for part in split_parts(path))
        assert BAD not in {path for (_, path), item in rows.items() if item.status == "complete"}

    @invariant()
    def nothing_failed_unexpectedly(self) -> None:
        assert self.errors.records == []

    @invariant()
    def no_more_than_two_at_once(self) -> None:
        assert self.house.hub.most_open <= 2

    def teardown(self) -> None:
        self.run(self.finish())
        self.run(self.downloads.close())
        self.runner.close()
        logging.getLogger("wingman.downloads").removeHandler(self.errors)
        self.folder.cleanup()


class _Errors(logging.Handler):
    """Keeps what is logged as an error."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(self.format(record))


async def _blink(_: float) -> None:
    await asyncio.sleep(0)


DownloadStates.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestDownloadStates = DownloadStates.TestCase
