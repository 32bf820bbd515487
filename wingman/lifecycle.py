"""Running a server from start to exit: listen, load, serve, drain, unload.

Listeners open before the model loads, so that probes see "loading" instead of a refused
connection. The first SIGTERM or SIGINT drains, a second one ends at once. Runs on the loop thread.
"""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import logging
import os
import signal
import sys

from wingman import __version__
from wingman.app import App, connection_limits, read_keys
from wingman.config import Config
from wingman.errors import ConfigurationError
from wingman.http.server import Server
from wingman.services.residency import MakeRunner, ModelState, Residency, ServedModel

log = logging.getLogger("wingman")

CLOSE_GRACE_S = 3.0
"""How long finished answers get to leave before their connections are closed."""
_KILLED = 130
_HUNG = 3


class Wingman:
    """One running server. Tests use it in-process; `serve` runs it until a signal."""

    def __init__(self, config: Config, make_runner: MakeRunner | None = None) -> None:
        """Raises ConfigurationError when keys or addresses can't be used as given."""
        keys = read_keys(config.server)
        if not keys and not config.server.insecure:
            _refuse_exposed(config.server.host)
        self._config = config
        self._residency = Residency(config, make_runner)
        self._app = App(config, self._residency, keys)
        self._server = Server(self._app, connection_limits(config.server), config.server.max_connections)
        self._stop = asyncio.Event()

    @property
    def addresses(self) -> list[str]:
        """Where it listens."""
        return self._server.addresses

    @property
    def residency(self) -> Residency:
        """What is loaded."""
        return self._residency

    async def start(self) -> ServedModel:
        """Listen, then load. Raises ConfigurationError or ModelLoadFailure."""
        for host in self._config.server.host:
            await self._server.listen(host, self._config.server.port)
        served = await self._residency.load()
        gc.freeze()  # modules and vocabulary stay: looking through them again takes tens of milliseconds
        return served

    async def run(self) -> None:
        """Serve until `stop` is called or the engine dies."""
        watch = asyncio.create_task(self._residency.watch())
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait((watch, stop), return_when=asyncio.FIRST_COMPLETED)
        for task in (watch, stop):
            task.cancel()
        await asyncio.wait((watch, stop))

    @property
    def is_stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stop.is_set()

    def stop(self) -> None:
        """Ask `run` to return."""
        self._stop.set()

    async def close(self) -> bool:
        """Drain, close every connection, unload; False when the model hangs and could not be freed."""
        self._app.is_draining = True
        await self._residency.drain(self._config.server.drain_timeout)
        await self._server.aclose(CLOSE_GRACE_S)
        return await self._residency.unload()


def _refuse_exposed(hosts: tuple[str, ...]) -> None:
    """Raise ConfigurationError when others could reach an address that no key guards."""
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


async def serve(config: Config) -> int:
    """Run a server until a signal; the exit status. Raises ConfigurationError or ModelLoadFailure."""
    wingman = Wingman(config)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, wingman)
    starting = asyncio.create_task(wingman.start())
    stopping = asyncio.create_task(wingman.run())
    await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
    try:
        if not starting.done():  # told to stop while the model loads, which can't be interrupted
            log.info("stopped while loading")
            os._exit(0)
        served = starting.result()
        print(banner(served, wingman.addresses), file=sys.stderr, flush=True)
        await stopping
        return 1 if wingman.residency.state is ModelState.FAILED else 0
    finally:
        stopping.cancel()
        await asyncio.wait((stopping,))
        if not await wingman.close():
            os._exit(_HUNG)  # threads in native code would keep the interpreter from ending


def _on_signal(wingman: Wingman) -> None:
    if wingman.is_stopping:
        os._exit(_KILLED)
    log.info("shutting down; a second signal ends at once")
    wingman.stop()


def banner(served: ServedModel, addresses: list[str]) -> str:
    """What a person wants to know once the server is up."""
    info = served.info
    address = addresses[0]
    is_unix = address.startswith(("/", "."))
    target = f"--unix-socket {address} http://localhost" if is_unix else f"http://{address}"
    lines = (
        f"Wingman {__version__} serves {served.name}",
        f"  model    {info.description}, {info.n_params / 1e6:.0f}M parameters, {info.size_bytes / 1e6:.0f} MB",
        f"  slots    {info.n_slots} with {info.n_ctx_slot} tokens of context each",
        *(f"  listens  {'unix:' if item.startswith(('/', '.')) else 'http://'}{item}" for item in addresses),
        "Try it:",
        f"  curl {target}/v1/chat/completions -d "
        '\'{"messages":[{"role":"user","content":"Say hello."}]}\'',
    )
    return "\n".join(lines)
