"""A home folder with small models in it and an Inference over them; what it tells is checked against its store."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from tests.support.fleet import ENOUGH_S, Fleet
from wingman.config import Config, ContextConfig, ControlConfig, ModelConfig, ServerConfig
from wingman.errors import ConfigurationError, UpstreamFailure
from wingman.services.deployments import Deployer, Start
from wingman.services.home import Home, stored_name
from wingman.services.inference import Inference
from wingman.services.items import DownloadItem, WingmanItem
from wingman.services.residency import Residency
from wingman.services.served import ServedModel

REPO = "o/Tiny-GGUF"
PATH = "m.Q8_0.gguf"


class Rows:
    """An ItemStore in memory; `fails` makes every write fail."""

    def __init__(self) -> None:
        self.rows: dict[str, WingmanItem] = {}
        self.settings: dict[tuple[str, str], str] = {}
        self.n_puts = 0
        self.fails = False

    async def items(self) -> list[WingmanItem]:
        return list(self.rows.values())

    async def put_item(self, item: WingmanItem) -> None:
        await asyncio.sleep(0)
        if self.fails:
            raise UpstreamFailure("the disk is full")
        self.n_puts += 1
        self.rows[item.alias] = item

    async def delete_item(self, alias: str) -> None:
        await asyncio.sleep(0)
        del self.rows[alias]

    async def setting(self, name: str, key: str) -> str | None:
        return self.settings.get((name, key))

    async def put_setting(self, name: str, key: str, value: str) -> None:
        self.settings[name, key] = value


class Counter:
    """A listener of one alias."""

    def __init__(self, shop: Shop, alias: str) -> None:
        self._shop, self._alias = shop, alias

    async def aclose(self, grace_s: float) -> None:
        del self._shop.listening[self._alias]


class Shop:
    """One run of a server, so to speak; `restarted` is the next one."""

    def __init__(self, root: Path, model: Path, store: Rows | None = None, **options: Any) -> None:
        self.home = Home(root)
        self.home.create()
        self.model = model
        self.store = store or Rows()
        self.fleet = Fleet()
        self.downloads: list[DownloadItem] = []
        self.told: list[tuple[WingmanItem, float | None]] = []
        self.is_truthful = True
        """What was told was stored before."""
        self.capacity = 2**40
        self.taken: set[int] = set()
        """Ports that others listen on."""
        self.listening: dict[str, tuple[str, int]] = {}
        self.residency = Residency(
            n_max=options.pop("n_max", 4),
            idle_unload_s=options.pop("idle_unload_s", 0.0),
            drain_timeout_s=0.0,
            capacity=lambda _: self.capacity,
            on_change=lambda change: self.inference.on_change(change),  # noqa: PLW0108 - it is made below
            make_runner=self.fleet,
        )
        config = Config(
            model=ModelConfig(model=options.pop("file", None)),
            context=ContextConfig(parallel=2),
            server=ServerConfig(drain_timeout=0.0),
            control=ControlConfig(**options),
        )
        self.inference = Inference(
            config,
            Deployer(config, self.home, lambda: self.downloads),
            self.store,
            self.residency,
            downloads=lambda: self.downloads,
            announce=self._announce,
            listen=self._listen,
        )

    def _announce(self, item: WingmanItem, progress: float | None) -> None:
        is_known = any(item.alias == one.alias for one in self.inference.items())
        if is_known and item.alias != self.inference.default and not self.store.fails:
            self.is_truthful &= self.store.rows.get(item.alias) == item
        self.told.append((item, progress))

    async def _listen(self, alias: str, address: str, port: int) -> Counter:
        await asyncio.sleep(0)
        if port in self.taken:
            raise ConfigurationError(f"can't listen on {address}, port {port}: it is in use")
        self.listening[alias] = (address, port)
        return Counter(self, alias)

    # -- what tests do ------------------------------------------------------------------------------

    def add(self, repo: str = REPO, file_path: str = PATH, status: Any = "complete") -> DownloadItem:
        """Download a model."""
        self.path(repo, file_path).hardlink_to(self.model)
        item = DownloadItem(model_repo=repo, file_path=file_path, status=status)
        self.downloads.append(item)
        return item

    def path(self, repo: str = REPO, file_path: str = PATH) -> Path:
        """Where a model lies."""
        return self.home.models / stored_name(repo, file_path)

    def stem(self, repo: str = REPO, file_path: str = PATH) -> str:
        """What the Fleet calls it."""
        return self.path(repo, file_path).stem

    async def start(
        self, alias: str, repo: str = REPO, file_path: str = PATH, **fields: Any
    ) -> tuple[WingmanItem, bool]:
        """Start a model under an alias."""
        return await self.inference.start(Start(alias, repo, file_path, **fields))

    async def use(self, name: str | None, default: str | None = None) -> str:
        """What serves a request that names a model so."""
        lease = await self.inference.lease(name, default)
        lease.release()
        return lease.served.name

    async def loaded(self, alias: str) -> ServedModel:
        """A model once it is there, as everybody is told."""
        (await self.inference.lease(alias)).release()
        await self.inference.settle()
        return self.inference.peek(alias)

    def statuses(self, alias: str) -> list[str]:
        """Of what was told, without repeats."""
        seen = [item.status for item, _ in self.told if item.alias == alias]
        return [one for index, one in enumerate(seen) if index == 0 or seen[index - 1] != one]

    def restarted(self) -> contextlib.AbstractAsyncContextManager[Shop]:
        """The next run in the same home."""
        return a_shop(self.home.root, self.model, self.store, self.downloads)

    async def close(self) -> None:
        for gate in self.fleet.gates.values():
            gate.set()
        await self.residency.close()
        await self.inference.close()
        assert self.is_truthful
        assert self.fleet.in_memory == []
        assert self.listening == {}


@contextlib.asynccontextmanager
async def a_shop(
    root: Path,
    model: Path,
    store: Rows | None = None,
    downloads: list[DownloadItem] | None = None,
    **options: Any,
) -> AsyncIterator[Shop]:
    """A Shop that is open; `options` are flags of ControlConfig, `file` for --model, `n_max` and `idle_unload_s`."""
    shop = Shop(root, model, store, **options)
    shop.downloads += downloads or []
    async with asyncio.timeout(ENOUGH_S):
        await shop.inference.start_up()
        try:
            yield shop
        finally:
            await shop.close()
