"""Models under aliases: starting, stopping, finding the one that a request names.

Owner of the WingmanItems. Residency tells what becomes of each model; every change of status is stored
first and announced then, in order, by one task. What an alias stands for is changed by one caller at a time,
and to the end. Runs on the loop; files are read elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import Final
from weakref import WeakValueDictionary

import msgspec
import orjson
from msgspec import structs

from wingman.config import Config
from wingman.errors import (
    Conflict,
    EngineFailure,
    InsufficientRoom,
    NotFound,
    WingmanError,
)
from wingman.services.calls import Calls
from wingman.services.deployments import Deployer, Deployment, Start, check_alias
from wingman.services.items import ACTIVE_INFERENCE, DownloadItem, WingmanItem, WingmanStatus
from wingman.services.itemstore import ItemStore
from wingman.services.listeners import Listen, Listeners
from wingman.services.modelnames import find_download, model_name, model_names
from wingman.services.notes import Note, Notes
from wingman.services.quantization import quantization_of
from wingman.services.readings import MonitoredModel, Placement
from wingman.services.residency import Change, Lease, Residency
from wingman.services.roster import State
from wingman.services.served import ServedModel

log = logging.getLogger("wingman.inference")

STOP_GRACE_S: Final = 30.0
"""How long a stop may take beyond the drain time-out."""
_STATUSES: Final[dict[State, WingmanStatus]] = {
    State.QUEUED: "queued",
    State.LOADING: "preparing",
    State.ABANDONED: "cancelling",
    State.READY: "inferring",
    State.DRAINING: "inferring",
    State.UNLOADING: "cancelling",
    State.ABSENT: "complete",
}
_STAYING: Final = ACTIVE_INFERENCE - {"cancelling"}
_RUNNING: Final = ("inference", "running")
_AFTER_CRASH: Final = {
    "queued": "failed to load",
    "preparing": "failed to load",
    "inferring": "stopped unexpectedly",
    "cancelling": "stopped unexpectedly",
}
"""Statuses that no stopped server can have, and what is said of them."""


class Inference:
    """All models that run, ran, or may be asked for."""

    def __init__(
        self,
        config: Config,
        deployer: Deployer,
        store: ItemStore,
        residency: Residency,
        *,
        downloads: Callable[[], Iterable[DownloadItem]],
        announce: Callable[[WingmanItem, float | None], None],
        listen: Listen | None = None,
    ) -> None:
        """`announce` is told each item after the store has it; `listen` opens a listener for an alias at an
        address and port."""
        self._config = config
        self._deployer = deployer
        self._store = store
        self._residency = residency
        self._downloads = downloads
        self._announce = announce
        self._listeners = Listeners(listen)
        self._items: dict[str, WingmanItem] = {}
        """As stored and announced."""
        self._intended: dict[str, WingmanItem] = {}
        """With the changes that are on their way to the store."""
        self._deployments: dict[str, Deployment] = {}
        self._volatile: set[str] = set()
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._calls = Calls()
        self._notes = Notes(self._write)
        self.default: str | None = None
        """The alias of `--model`; whoever names no model, or one that is unknown, gets it."""
        self._address: tuple[str, int] = ("", 0)

    # -- life -----------------------------------------------------------------------------------------

    async def start_up(self) -> None:
        """Read what is stored and tell the truth about what a crash left."""
        self._notes.start()
        for item in await self._store.items():
            self._items[item.alias] = self._intended[item.alias] = item
        crashed = [item for item in self._items.values() if item.status in _AFTER_CRASH]
        if crashed:
            await self._remember([item.alias for item in crashed])
        for item in crashed:
            await self._put(_with(item, "error", _AFTER_CRASH[item.status]))

    async def restore(self) -> None:
        """Start again what was running when the server ended, be it gracefully or not."""
        for alias in orjson.loads(await self._store.setting(*_RUNNING) or "[]"):
            if alias not in self._items:  # it was reset since
                continue
            try:
                await self._start_again(self._items[alias])
            except WingmanError as error:
                log.error("can't start %s again: %s", alias, error.message)

    async def _start_again(self, item: WingmanItem) -> None:
        """Start an item as it was; without a port of its own when that can't be had any more."""
        request = _start_of(item)
        try:
            await self.start(structs.replace(request, address=item.address, port=item.port))
        except Conflict as error:
            log.warning("%s gets no port of its own: %s", item.alias, error.message)
            await self.start(request)

    async def remember(self) -> None:
        """Keep what is running, for `restore`: the server is about to stop."""
        active = [item.alias for item in self.items() if _is_active(item)]
        await self._remember([alias for alias in active if alias not in self._volatile])

    async def _remember(self, aliases: list[str]) -> None:
        try:
            await self._store.put_setting(*_RUNNING, orjson.dumps(aliases).decode())
        except WingmanError as error:  # no reason not to stop properly
            log.error("what runs could not be stored for --restore: %s", error.message)

    def note_address(self, host: str, port: int) -> None:
        """Take the address of the shared listener; items without one of their own show it."""
        self._address = (host, port)
        for alias in self._volatile:
            item = msgspec.structs.replace(self._intended[alias], address=host, port=port)
            self._items[alias] = self._intended[alias] = item

    async def close(self) -> None:
        """Store what is still to be stored; Residency is closed before."""
        await self._calls.settle()
        await self._listeners.aclose()
        await self._notes.close()

    async def settle(self) -> None:
        """Wait until every change so far is stored and announced."""
        await self._notes.flush()

    # -- items ----------------------------------------------------------------------------------------

    def items(self) -> list[WingmanItem]:
        """All items as they are stored, oldest first."""
        return sorted(self._items.values(), key=lambda item: (item.created, item.alias))

    def item(self, alias: str) -> WingmanItem:
        """One item; raises NotFound."""
        found = self._items.get(alias)
        if found is None:
            raise NotFound(f"no model was started as {alias!r}")
        return found

    def in_use(self, repo: str, file_path: str) -> bool:
        """Whether an active item needs this file."""
        return any(_is_active(item) and item.key == (repo, file_path) for item in self._items.values())

    async def start(self, request: Start) -> tuple[WingmanItem, bool]:
        """Queue a model for loading; the item, and False when that alias is active already.

        Raises NotFound for a model that is not here, InvalidRequest for one that is no model, Conflict when
        its port is taken, InsufficientRoom when it can't fit, Unavailable while the server stops.
        """
        check_alias(request.alias)
        return await self._calls.whole(self._start(request))

    async def _start(self, request: Start) -> tuple[WingmanItem, bool]:
        alias = request.alias
        async with self._turn(alias):
            if self._is_wanted(alias):
                return self._intended[alias], False
            deployment = await self._deployer.deploy(request)
            self._check_room(deployment)
            await self._open_listener(request)
            if self._is_wanted(alias):  # by a request that named it meanwhile
                await self._listeners.close(alias, self._listeners.get(alias))
                return self._intended[alias], False
            self._deployments[alias] = deployment
            item = self._new_item(request)
            stored = self._put(item)
            self._want(deployment, item)
            await stored
        return item, True

    def _turn(self, alias: str) -> asyncio.Lock:
        """Held by who changes what an alias stands for."""
        return self._turns.setdefault(alias, asyncio.Lock())

    def _is_wanted(self, alias: str) -> bool:
        return self._residency.state(alias) is not State.ABSENT

    def _check_room(self, deployment: Deployment) -> None:
        capacity = self._residency.capacity_bytes
        if deployment.need_bytes > capacity and not deployment.is_forced:
            raise InsufficientRoom(
                f"{deployment.name} needs about {deployment.need_bytes / 1e6:.0f} MB of memory, "
                f"{capacity / 1e6:.0f} MB can be had; force=true tries nevertheless"
            )

    def _want(self, deployment: Deployment, item: WingmanItem) -> None:
        try:
            self._residency.want(deployment)
        except WingmanError as error:
            self._put(_with(item, "error", error.message))
            raise

    async def serve_file(self) -> Deployment:
        """The model of `--model`: not stored, loaded whatever memory there is, and the default one. Raises
        ModelLoadFailure when it is no model."""
        deployment = await self._deployer.deploy_file()
        self.serve(deployment)
        return deployment

    def serve(self, deployment: Deployment) -> None:
        """Make a model the default one; it is loaded when it is wanted."""
        name = deployment.name
        self.default = name
        self._volatile.add(name)
        self._deployments[name] = deployment
        start = Start(name, "", str(deployment.config.model.model), force=True)
        self._items[name] = self._intended[name] = self._new_item(start)

    async def stop(self, alias: str) -> WingmanItem:
        """Stop a model and return its item once it is gone; one that does not run stays as it is. Raises
        NotFound, or EngineFailure when it does not end in time."""
        return await self._calls.whole(self._stop(alias))

    async def _stop(self, alias: str) -> WingmanItem:
        self.item(alias)
        listener = self._listeners.get(alias)
        try:
            async with asyncio.timeout(self._config.server.drain_timeout + STOP_GRACE_S):
                await self._residency.stop(alias)
                await self._listeners.close(alias, listener)
                if alias not in self._volatile and not self._is_wanted(alias):
                    self._deployments.pop(alias, None)  # without --models-autoload it stays away
        except TimeoutError:
            raise EngineFailure(f"{alias} does not stop; see the log") from None
        await self._notes.flush()
        return self.item(alias)

    async def reset(self, alias: str) -> WingmanItem:
        """Stop a model and forget it; its last item. Raises as `stop`, and Conflict for that of `--model`."""
        if alias in self._volatile:
            raise Conflict(f"{alias} is the model of --model; it can be stopped only")
        return await self._calls.whole(self._reset(alias))

    async def _reset(self, alias: str) -> WingmanItem:
        while True:
            await self._stop(alias)
            async with self._turn(alias):
                await self._listeners.close(alias, self._listeners.get(alias))
                await self._notes.flush()
                item = self.item(alias)
                if not self._is_wanted(alias):  # else a request or a start came between
                    await self._forget(item)
                    return item

    async def _forget(self, item: WingmanItem) -> None:
        """Drop all that is kept of an alias; its turn is held."""
        alias = item.alias
        self._residency.forget(alias)
        self._deployments.pop(alias, None)
        del self._intended[alias]  # what may still be told of it is not stored any more
        try:
            await self._store.delete_item(alias)
        except WingmanError:
            self._intended[alias] = item
            raise
        del self._items[alias]
        self._announce(item, None)

    def _new_item(self, request: Start) -> WingmanItem:
        now = int(time.time())
        known = self._items.get(request.alias)
        address, port = self._address
        if not self._is_shared(request):
            address, port = request.address or address, request.port
        return WingmanItem(
            alias=request.alias,
            status="queued",
            model_repo=request.model_repo,
            file_path=request.file_path,
            address=address,
            port=port,
            context_size=request.context_size,
            gpu_layers=request.gpu_layers,
            chat_template=request.chat_template,
            force=request.force,
            created=known.created if known else now,
            updated=now,
        )

    # -- requests -------------------------------------------------------------------------------------

    async def lease(self, name: str | None, default: str | None = None) -> Lease:
        """A lease on the model that a request names; a downloaded one is loaded for it. `default` is the
        alias of the listener it came by. Raises NotFound naming what there is, and what loading raises."""
        alias, found = self._choose(name, default), None
        if alias is None:
            alias, found = self._find(name or "")
        if alias in self._volatile:
            self._residency.peek(alias)  # the model of --model is not waited for: "Loading model"
        elif not self._is_wanted(alias):
            await self._redeploy(alias, found)
        deployment = self._deployments[alias]
        return await self._residency.acquire(deployment)

    def peek(self, name: str | None, default: str | None = None) -> ServedModel:
        """The loaded model that a request names, to look at only. Raises NotFound or Unavailable."""
        alias = self._choose(name, default)
        if alias is None:
            raise self._unknown(name or "")
        return self._residency.peek(alias)

    @property
    def loaded(self) -> list[ServedModel]:
        """Models in memory."""
        return self._residency.loaded

    def monitored(self, gpu_name: str = "") -> list[MonitoredModel]:
        """Models in memory as the monitor looks at them; `gpu_name` is of the GPU that layers go to."""
        return [
            MonitoredModel(
                alias=served.name,
                engine=served.engine,
                loaded_at=served.loaded_at,
                load_s=served.load_s,
                tensor_types=deployment.tensor_types,
                quantization=quantization_of(served.info.path),
                placement=Placement(
                    n_gpu_layers=served.n_gpu_layers if deployment.n_layers else 0,
                    gpu_name=gpu_name if deployment.n_layers else "",
                    required_mb=round(deployment.need_bytes / 1e6),
                ),
            )
            for deployment, served in self._residency.deployed
        ]

    def startable(self) -> list[str]:
        """Names of downloaded models that are loaded when a request names them."""
        if not self._config.control.models_autoload:
            return []
        active = {item.key for item in self._items.values() if _is_active(item)}
        names = model_names(self._downloads())
        return [name for key, name in names.items() if key not in active]

    def check_loading(self) -> None:
        """Raise Unavailable while the model of `--model` is not there, or the server stops."""
        if self.default is not None:
            self._residency.peek(self.default)

    def readiness(self) -> str | None:
        """None when a request sent now would be served; else why not."""
        if self.default is not None:
            return self._residency.readiness(self.default)
        names = [item.alias for item in self._items.values() if item.status == "inferring"]
        return next((reason for name in names if (reason := self._residency.readiness(name))), None)

    def _choose(self, name: str | None, default: str | None) -> str | None:
        """The alias of a request; None for a name that is not an alias, or when none is named nor loaded."""
        if name and name in self._items:
            return name
        fallback = default or self.default
        if fallback is not None:
            return fallback
        if name:
            return None
        staying = [item for item in self._items.values() if item.status in _STAYING]
        return max(reversed(staying), key=lambda item: item.updated).alias if staying else None

    def _find(self, name: str) -> tuple[str, Start]:
        """The alias of a downloaded model that a request names, and how to start it if that is a new one; "" is
        the only model there is."""
        here = self.startable()
        if not name and len(here) == 1:
            name = here[0]
        found = find_download(name, self._downloads()) if self._config.control.models_autoload else None
        if found is None:
            raise self._unknown(name)
        alias = model_name(found, self._downloads())
        same = [one.alias for one in self._items.values() if one.key == found.key and one.status in _STAYING]
        if same and alias not in same:
            alias = same[0]  # somebody started it under another name
        elif (known := self._items.get(alias)) and known.key != found.key:
            alias = "/".join(found.key)  # somebody called another model so
        return alias, Start(alias, *found.key)

    async def _redeploy(self, alias: str, found: Start | None) -> None:
        """Look at the files of a model that is to be loaded, perhaps again: they may be other ones by now."""
        if found is None and alias not in self._deployments and not self._config.control.models_autoload:
            raise self._unknown(alias)
        async with self._turn(alias):
            if self._is_wanted(alias):
                return
            is_new = found is not None and alias not in self._items
            request = found if found is not None and is_new else _start_of(self.item(alias))
            self._deployments[alias] = await self._deployer.deploy(request)
            if is_new:
                await self._put(_with(self._new_item(request), "complete"))

    def _unknown(self, name: str) -> NotFound:
        if not name:
            return NotFound("no model is loaded, and the request names none")
        loaded = [item.alias for item in self.items() if item.status == "inferring"]
        there = f"loaded: {', '.join(loaded)}" if loaded else "none is loaded"
        return NotFound(f"no model is called {name!r}; {there}")

    # -- changes --------------------------------------------------------------------------------------

    def on_change(self, change: Change) -> None:
        """Take what Residency tells."""
        item = self._intended.get(change.name)
        if item is None:
            return
        status = "error" if change.error else _STATUSES[change.state]
        if change.progress is None and (item.status, item.error) == (status, change.error):
            return
        if change.state is State.LOADING and item.status == "preparing":
            self._put(item, change.progress)
            return
        self._put(_with(item, status, change.error), change.progress)

    def _put(self, item: WingmanItem, progress: float | None = None) -> asyncio.Future[None]:
        """Store and announce an item; the future says when that is done."""
        self._intended[item.alias] = item
        return self._notes.put(item, progress)

    async def _write(self, note: Note) -> None:
        alias = note.item.alias
        if alias not in self._intended:  # it was forgotten
            return
        if self._items.get(alias) != note.item:
            if alias not in self._volatile:
                await self._keep(note.item)
            self._items[alias] = note.item
        self._announce(note.item, note.progress)

    async def _keep(self, item: WingmanItem) -> None:
        """Store an item. A model can run although the disk is full: then it is in memory only."""
        try:
            await self._store.put_item(item)
        except WingmanError as error:
            log.error("the state of %s could not be stored: %s", item.alias, error.message)

    # -- listeners ------------------------------------------------------------------------------------

    async def _open_listener(self, request: Start) -> None:
        alias = request.alias
        await self._listeners.close(alias, self._listeners.get(alias))
        if not self._is_shared(request):
            address = request.address or self._address[0] or "127.0.0.1"
            await self._listeners.open(alias, address, request.port)

    def _is_shared(self, request: Start) -> bool:
        return request.port in (0, self._address[1])


def _is_active(item: WingmanItem) -> bool:
    return item.status in ACTIVE_INFERENCE


def _with(item: WingmanItem, status: WingmanStatus, error: str = "") -> WingmanItem:
    return msgspec.structs.replace(item, status=status, error=error, updated=int(time.time()))


def _start_of(item: WingmanItem) -> Start:
    """Starts an item again as it was; the shared listener's port is not its own."""
    return Start(
        item.alias,
        item.model_repo,
        item.file_path,
        context_size=item.context_size,
        gpu_layers=item.gpu_layers,
        chat_template=item.chat_template,
        force=item.force,
    )
