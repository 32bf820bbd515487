"""Aliases that many callers start, stop, forget and use at once."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator

import pytest

from tests.support.fleet import ENOUGH_S, Fleet, deployment
from wingman.config import Config
from wingman.errors import ConfigurationError, NotFound, Unavailable, WingmanError
from wingman.services.deployments import Deployer, Deployment, Start
from wingman.services.inference import Inference
from wingman.services.items import DownloadItem, WingmanItem
from wingman.services.itemstore import NoStore
from wingman.services.residency import Change, Residency


class Here(Deployer):
    """Every model is here."""

    def __init__(self) -> None:
        self.is_gone = False
        """No model is."""

    async def deploy(self, request: Start) -> Deployment:
        await asyncio.sleep(0)
        if self.is_gone:
            raise NotFound("it is not in the models folder")
        model = deployment(f"{request.alias}-{request.file_path}".replace("/", "-"))
        return Deployment(request.alias, model.config, (request.alias,))


class Memory(NoStore):
    """A store that takes its time."""

    def __init__(self) -> None:
        self.rows: dict[str, WingmanItem] = {}
        self.settings: dict[tuple[str, str], str] = {}

    async def items(self) -> list[WingmanItem]:
        return list(self.rows.values())

    async def setting(self, name: str, key: str) -> str | None:
        return self.settings.get((name, key))

    async def put_setting(self, name: str, key: str, value: str) -> None:
        self.settings[name, key] = value

    async def put_item(self, item: WingmanItem) -> None:
        await asyncio.sleep(0)
        self.rows[item.alias] = item

    async def delete_item(self, alias: str) -> None:
        await asyncio.sleep(0)
        self.rows.pop(alias, None)


class Port:
    """A listener."""

    def __init__(self, bench: Bench, port: int) -> None:
        self._bench, self._port = bench, port
        bench.ports.append(port)

    async def aclose(self, _: float) -> None:
        self._bench.ports.remove(self._port)
        self._bench.a_port_closed.set()
        await asyncio.sleep(0)


class Bench:
    """An Inference over models that are not there."""

    def __init__(self, store: Memory) -> None:
        self.fleet = Fleet()
        self.store = store
        self.taken: set[int] = set()
        """Ports of others."""
        self.here = Here()
        self.downloads: list[DownloadItem] = []
        self.ports: list[int] = []
        """Those that are listened on."""
        self.a_port_closed = asyncio.Event()
        self.residency = Residency(n_max=2, make_runner=self.fleet, on_change=self._told)
        self.inference = Inference(
            Config(),
            self.here,
            self.store,
            self.residency,
            downloads=lambda: self.downloads,
            announce=lambda _item, _progress: None,
            listen=self._listen,
        )

    def _told(self, change: Change) -> None:
        self.inference.on_change(change)

    async def _listen(self, _alias: str, _address: str, port: int) -> Port:
        await asyncio.sleep(0)
        if port in self.taken:
            raise ConfigurationError("taken")
        return Port(self, port)

    async def start(self, alias: str = "a", model: str = "m", port: int = 0) -> bool:
        return (await self.inference.start(Start(alias, "local", model, port=port)))[1]

    async def use(self, alias: str) -> None:
        lease = await self.inference.lease(alias)
        await asyncio.sleep(0)
        lease.release()


@contextlib.asynccontextmanager
async def a_bench(store: Memory | None = None) -> AsyncIterator[Bench]:
    bench = Bench(store or Memory())
    await bench.inference.start_up()
    try:
        async with asyncio.timeout(ENOUGH_S):
            yield bench
    finally:
        bench.fleet.gates.clear()
        await bench.residency.close()
        await bench.inference.close()


async def test_of_two_starts_at_once_one_counts() -> None:
    async with a_bench() as bench:
        answers = await asyncio.gather(bench.start(model="m"), bench.start(model="n"))
        assert list(answers) == [True, False]
        await bench.use("a")
        assert bench.fleet.loads == ["a-m"]
        assert bench.inference.item("a").file_path == "m"


async def test_two_starts_at_once_open_one_port() -> None:
    async with a_bench() as bench:
        await asyncio.gather(bench.start(port=7001), bench.start(port=7002))
        assert bench.ports == [7001]
        await bench.inference.reset("a")
        assert bench.ports == []


async def test_of_many_resets_at_once_one_finds_something() -> None:
    async with a_bench() as bench:
        await bench.start()
        answers = await asyncio.gather(
            *(bench.inference.reset("a") for _ in range(5)), return_exceptions=True
        )
        assert sum(isinstance(answer, WingmanItem) for answer in answers) == 1
        assert sum(isinstance(answer, NotFound) for answer in answers) == 4
        assert bench.fleet.in_memory == []


async def test_a_stop_nobody_waits_for_closes_the_port() -> None:
    async with a_bench() as bench:
        gate = bench.fleet.hold("a-m")
        await bench.start(port=7001)
        stopping = asyncio.create_task(bench.inference.stop("a"))
        await asyncio.sleep(0)
        stopping.cancel()
        gate.set()
        await bench.a_port_closed.wait()


async def test_a_start_without_a_port_gives_the_old_one_back() -> None:
    async with a_bench() as bench:
        bench.fleet.failures["a-m"] = RuntimeError("broken")
        await bench.start(port=7001)
        with pytest.raises(WingmanError):
            await bench.use("a")
        await bench.start(model="n")
        assert bench.ports == []


async def test_a_start_while_the_server_stops_leaves_no_queued_item() -> None:
    async with a_bench() as bench:
        await bench.residency.close()
        with pytest.raises(Unavailable):
            await bench.start()
        await bench.inference.close()
        assert bench.store.rows["a"].status == "error"


async def test_the_files_of_a_model_are_looked_at_again_before_it_is_loaded_again() -> None:
    async with a_bench() as bench:
        await bench.start()
        await bench.use("a")
        await bench.inference.stop("a")
        bench.here.is_gone = True
        with pytest.raises(NotFound):
            await bench.use("a")
        assert bench.fleet.loads == ["a-m"]


async def test_a_model_is_found_though_another_one_goes_by_its_name() -> None:
    async with a_bench() as bench:
        bench.downloads = [DownloadItem(model_repo="own/repo-GGUF", file_path="n.gguf", status="complete")]
        await bench.start("n", "m")
        await bench.use("own/repo-GGUF")
        assert bench.inference.item("own/repo-GGUF/n.gguf").file_path == "n.gguf"
        assert len(bench.fleet.loads) == 2


async def test_a_restored_model_has_its_port_again() -> None:
    async with a_bench() as bench:
        await bench.start(port=7001)
        await bench.inference.remember()
        async with a_bench(bench.store) as next_bench:
            await next_bench.inference.restore()
            assert (next_bench.ports, next_bench.inference.item("a").port) == ([7001], 7001)


async def test_a_restored_model_does_without_its_port_when_that_is_taken() -> None:
    async with a_bench() as bench:
        await bench.start(port=7001)
        await bench.inference.remember()
        async with a_bench(bench.store) as next_bench:
            next_bench.taken.add(7001)
            await next_bench.inference.restore()
            assert (next_bench.ports, next_bench.inference.item("a").port) == ([], 0)
            await next_bench.use("a")


@pytest.mark.parametrize("seed", range(8))
async def test_whatever_happens_at_once_a_reset_leaves_nothing(seed: int) -> None:
    rnd = random.Random(seed)

    async def act(bench: Bench) -> None:
        alias = rnd.choice("ab")
        calls = (
            lambda: bench.start(alias, rnd.choice("mn"), rnd.choice((0, 7001, 7002))),
            lambda: bench.inference.stop(alias),
            lambda: bench.inference.reset(alias),
            lambda: bench.use(alias),
        )
        with contextlib.suppress(WingmanError):
            await rnd.choice(calls)()

    async with a_bench() as bench:
        tasks: list[asyncio.Task[None]] = []
        for _ in range(120):
            tasks.append(asyncio.create_task(act(bench)))
            if rnd.random() < 0.1:
                rnd.choice(tasks).cancel()
            for _ in range(rnd.randrange(40)):
                await asyncio.sleep(0)
        for answer in await asyncio.gather(*tasks, return_exceptions=True):
            assert answer is None or isinstance(answer, asyncio.CancelledError)
        for item in bench.inference.items():
            await bench.inference.reset(item.alias)
        assert (bench.inference.items(), bench.store.rows) == ([], {})
        assert (bench.fleet.in_memory, bench.ports, bench.fleet.faults) == ([], [], [])
