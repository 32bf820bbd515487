"""Builds the services behind the control API out of a Config. Called by `wingman.lifecycle` on the loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import orjson

from wingman import __version__
from wingman.api.control import ControlPlane
from wingman.api.events import EventLimits, EventsEndpoint
from wingman.config import Config, ControlConfig
from wingman.errors import ConfigurationError
from wingman.services.broadcast import BACKLOG, HISTORY, Bounds, Broadcast
from wingman.services.catalog import Catalog, Room
from wingman.services.deployments import estimate_need
from wingman.services.downloads import Downloads, Limits
from wingman.services.hardware import Hardware, Llama
from wingman.services.home import Home, Lock
from wingman.services.hub import Hub
from wingman.services.inference import Inference
from wingman.services.monitor import Monitor
from wingman.services.remote import Remote
from wingman.services.store import Store

# huggingface_hub reads this when it is loaded, which is later: it would look through the environment for what
# runs it, ask the Hub for a list to compare that with, and tell what it found.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

HUB: Final = "https://huggingface.co"
_MB: Final = 2**20
_USABLE: Final = 0.95
"""Share of the machine's memory that models may take."""


@dataclass(slots=True)
class Services:
    """Everything that has a home folder."""

    home: Home
    lock: Lock
    store: Store
    hardware: Hardware
    broadcast: Broadcast
    downloads: Downloads
    catalog: Catalog
    monitor: Monitor

    def plane_of(
        self, inference: Inference, config: ControlConfig, shutdown: Callable[[], None]
    ) -> ControlPlane:
        """What the control API works on."""
        return ControlPlane(
            inference=inference,
            downloads=self.downloads,
            catalog=self.catalog,
            hardware=self.hardware,
            sockets=EventsEndpoint(
                self.broadcast,
                self.monitor,
                shutdown,
                EventLimits(config.max_monitors, config.max_message_rate, 2 * config.max_message_rate),
            ),
            shutdown=shutdown,
        )

    def capacity_of(self, config: ControlConfig, held: int) -> int:
        """Bytes that models may take in all, those `held` already included."""
        if config.models_memory:
            return config.models_memory * _MB
        total, free = self.hardware.memory_bytes()
        return min(int(total * _USABLE), free + held)

    async def announce(self, inference: str, control: str) -> None:
        """Tell commands where this server is."""
        await asyncio.to_thread(_write_runtime_file, self.home, inference, control)

    async def close(self) -> None:
        """Pause downloads, write what is to be written, give the home back."""
        await asyncio.to_thread(_remove_runtime_file, self.home)
        try:
            await self.downloads.close()
        finally:
            await self.store.close()
            self.lock.release()


async def open_services(config: Config, home: Home, inference: Callable[[], Inference]) -> Services:
    """The services of a home folder, which is taken; `inference` is there once they are used. Raises
    ConfigurationError or ModelLoadFailure."""
    llama = await asyncio.to_thread(_read_llama)  # may fail: nothing is held yet
    lock, store = await _open_home(home)
    return _make_services(config, home, lock, store, inference, llama)


def _read_llama() -> Llama:
    """Facts of llama.cpp as it is installed. Blocks while the library is loaded."""
    from wingman.engine.llama.binding import build_info, can_offload, system_info

    return Llama(build=build_info(), system_info=system_info(), can_offload=can_offload())


async def _open_home(home: Home) -> tuple[Lock, Store]:
    """Take a home folder and open its database. Raises ConfigurationError when another process has it, or it
    can't be used. Blocks: nobody is served yet."""
    home.create()
    lock = Lock(home)
    if not lock.acquire():
        raise ConfigurationError(
            f"another Wingman uses {home.root}, a server or a command without one: wait for it, or give "
            "this one a --home of its own; beside wingman serve any number of commands can run"
        )
    try:
        for file in (home.exit_file, home.kill_file):
            file.unlink(missing_ok=True)
        return lock, await Store.open(home.database)
    except OSError as error:
        lock.release()
        raise ConfigurationError(f"can't use {home.root}: {error.strerror}") from error
    except BaseException:
        lock.release()
        raise


def _make_services(
    whole: Config,
    home: Home,
    lock: Lock,
    store: Store,
    inference: Callable[[], Inference],
    llama: Llama,
) -> Services:
    config = whole.control
    hardware = Hardware(home.models, llama)
    broadcast = Broadcast(
        Bounds(config.max_history, HISTORY.n_bytes),
        Bounds(config.max_backlog, BACKLOG.n_bytes),
        seq=int(time.time() * 1000),
    )
    endpoint = config.hf_endpoint or HUB
    downloads = Downloads(
        home,
        store,
        Remote(endpoint, config.hf_token, stall_s=config.download_stall, is_offline=config.offline),
        lambda item: monitor.on_download(item),  # noqa: PLW0108 - it is made below
        limits=Limits(config.parallel_downloads, config.max_downloads, config.max_download_rate),
        in_use=lambda repo, path: inference().in_use(repo, path),
    )
    monitor = Monitor(
        broadcast,
        models=lambda: inference().monitored(hardware.gpu_name),
        items=lambda: inference().items(),
        downloads=downloads.items,
        hardware=lambda: hardware.current,
        shows_content=config.monitor_content,
    )
    hub = Hub(
        endpoint,
        config.hf_token,
        home.cache,
        config.catalog_ttl,
        limit=config.catalog_limit,
        is_offline=config.offline,
    )
    catalog = Catalog(
        home,
        hub,
        downloads=downloads.items,
        room=lambda: _room(hardware),
        need_bytes=lambda header: estimate_need(header, whole),
    )
    return Services(home, lock, store, hardware, broadcast, downloads, catalog, monitor)


def _room(hardware: Hardware) -> Room:
    total, free = hardware.memory_bytes()
    return Room(total // _MB, free // _MB)


def _write_runtime_file(home: Home, inference: str, control: str) -> None:
    body = {"pid": os.getpid(), "inference": inference, "control": control, "version": __version__}
    partial = home.runtime_file.with_suffix(".partial")
    partial.write_bytes(orjson.dumps(body))
    partial.replace(home.runtime_file)


def _remove_runtime_file(home: Home) -> None:
    """Nothing listens any more. Never raises."""
    with contextlib.suppress(OSError):
        home.runtime_file.unlink(missing_ok=True)
