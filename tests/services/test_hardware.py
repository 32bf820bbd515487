"""Hardware: with two GPUs, with one that is lost, without any; limits of containers; the answer's JSON."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import psutil
import pytest

from wingman.api.hardware import get_hardware
from wingman.http.messages import Request
from wingman.services.hardware import Hardware, HardwareInfo, Llama

MIB = 2**20
GIB = 2**30


class FakeNvml:
    """pynvml as far as it is used; `lost` names calls that fail."""

    class NVMLError(Exception):
        """As in pynvml."""

    def __init__(
        self, n_gpus: int = 2, lost: frozenset[tuple[str, int]] = frozenset(), driver: bool = True
    ) -> None:
        self.n_gpus, self.lost, self.driver = n_gpus, lost, driver
        self.n_inits = 0

    def nvmlInit(self) -> None:
        self.n_inits += 1
        if not self.driver:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:
        return self.n_gpus

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return self._tell("memory", handle, SimpleNamespace(total=(handle + 1) * 8 * GIB, free=GIB, used=0))

    def nvmlDeviceGetName(self, handle: int) -> Any:
        return self._tell("name", handle, b"Fake GPU" if handle else "Fake GPU")

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        return self._tell("utilization", handle, SimpleNamespace(gpu=37, memory=1))

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> Any:
        return self._tell("temperature", handle, 50 + sensor)

    def nvmlSystemGetDriverVersion(self) -> str:
        return "570.1"

    def _tell(self, what: str, handle: int, value: Any) -> Any:
        if (what, handle) in self.lost:
            raise self.NVMLError("Not Supported")
        return value


def files(root: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def json_of(info: HardwareInfo) -> Any:

    return json.loads(msgspec.json.encode(info))


async def test_two_gpus(tmp_path: Path) -> None:
    nvml = FakeNvml()
    hardware = Hardware(tmp_path, Llama(build="b1", system_info="AVX2 = 1"), nvml=nvml)
    assert not hardware.has_gpu
    for _ in range(2):
        info = await hardware.refresh()
    assert nvml.n_inits == 1
    gpu = {
        "name": "Fake GPU",
        "freeMemoryMB": 1024,
        "utilizationPercent": 37,
        "temperatureC": 50,
        "driver": "570.1",
    }
    assert json_of(info)["gpu"] == {
        "totalMemoryMB": 24 * 1024,
        "freeMemoryMB": 2048,
        "gpus": [gpu | {"totalMemoryMB": 8192}, gpu | {"totalMemoryMB": 16384}],
    }
    assert json_of(info)["llama"] == {"build": "b1", "systemInfo": "AVX2 = 1", "canOffload": True}
    assert hardware.has_gpu
    assert hardware.memory_bytes() == (24 * GIB, 2 * GIB)


async def test_gpus_that_the_runtime_cannot_use(tmp_path: Path) -> None:
    hardware = Hardware(tmp_path, Llama(can_offload=False), nvml=FakeNvml())
    info = await hardware.refresh()
    assert len(info.gpu.gpus) == 2
    assert not hardware.has_gpu
    assert hardware.memory_bytes() == (info.cpu.total_memory_mb * MIB, info.cpu.free_memory_mb * MIB)


async def test_what_a_gpu_does_not_tell_is_zero(tmp_path: Path) -> None:
    nvml = FakeNvml(lost=frozenset({("memory", 0), ("name", 1), ("utilization", 1), ("temperature", 1)}))
    info = await Hardware(tmp_path, nvml=nvml).refresh()
    (gpu,) = info.gpu.gpus
    assert (gpu.name, gpu.utilization_percent, gpu.temperature_c, gpu.total_memory_mb) == ("", 0, 0, 16384)


@pytest.mark.parametrize("nvml", [FakeNvml(0), FakeNvml(driver=False)])
async def test_no_gpu_is_zeros(tmp_path: Path, nvml: FakeNvml) -> None:
    hardware = Hardware(tmp_path, nvml=nvml)
    for _ in range(2):
        await hardware.refresh()
    assert json_of(hardware.current)["gpu"] == {"totalMemoryMB": 0, "freeMemoryMB": 0, "gpus": []}
    assert nvml.n_inits == 1
    total, free = hardware.memory_bytes()
    assert 0 < free <= total


async def test_the_machine_itself(tmp_path: Path) -> None:
    info = await Hardware(tmp_path / "not" / "made" / "yet").refresh()
    assert 0 < info.cpu.physical_cores <= info.cpu.logical_cores == psutil.cpu_count()
    assert 0 <= info.cpu.load_percent <= 100
    assert 0 < info.cpu.free_memory_mb <= info.cpu.total_memory_mb <= psutil.virtual_memory().total // MIB
    assert 0 < info.disk.free_mb <= info.disk.total_mb
    assert info.os.name
    assert info.cpu.name


async def test_nothing_that_can_be_read_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Any:
        raise OSError

    for name in ("virtual_memory", "cpu_count", "cpu_times"):
        monkeypatch.setattr(psutil, name, fail)
    info = await Hardware(tmp_path, nvml=FakeNvml(0), proc=tmp_path, cgroups=tmp_path).refresh()
    assert json_of(info)["cpu"] == {
        "totalMemoryMB": 0,
        "freeMemoryMB": 0,
        "name": "",
        "physicalCores": 0,
        "logicalCores": 0,
        "loadPercent": 0.0,
    }


STAT = f"anon 5\ninactive_file {64 * MIB}\n\ntotal_inactive_file {64 * MIB}\n"
UNIFIED = {
    "memory.max": f"{512 * MIB}\n",
    "memory.current": f"{192 * MIB}\n",
    "memory.stat": STAT,
}
LEGACY = {
    "memory/memory.limit_in_bytes": f"{512 * MIB}\n",
    "memory/memory.usage_in_bytes": f"{192 * MIB}\n",
    "memory/memory.stat": STAT,
}


@pytest.mark.parametrize(
    ("group", "texts", "expected"),
    [
        ("0::/\n", UNIFIED, (512, 384)),
        ("0::/a/b\n", {f"a/{name}": text for name, text in UNIFIED.items()}, (512, 384)),
        ("0::/a/b\n", UNIFIED | {"a/b/memory.max": "max\n"}, (512, 384)),
        ("3:cpu:/\n2:memory:/docker/1\n0::/\n", LEGACY, (512, 384)),
        ("2:memory:/\n", LEGACY | {"memory/memory.usage_in_bytes": str(GIB)}, (512, 0)),
        ("2:cpu:/\n0::/x\n", LEGACY, None),
        ("0::/../..\nodd", {"memory.max": "many", "memory.current": "1", "memory.stat": ""}, None),
        ("0::/\n", {"memory.max": "\u2603"}, None),
    ],
)
async def test_limits_of_a_container(
    tmp_path: Path, group: str, texts: dict[str, str], expected: tuple[int, int] | None
) -> None:
    proc = files(
        tmp_path / "proc", {"self/cgroup": group, "cpuinfo": "processor: 0\nmodel name\t: Fast: 9000\n"}
    )
    hardware = Hardware(tmp_path, nvml=FakeNvml(0), proc=proc, cgroups=files(tmp_path / "cgroup", texts))
    info = await hardware.refresh()
    if expected is None:
        assert info.cpu.total_memory_mb == psutil.virtual_memory().total // MIB
    else:
        assert (info.cpu.total_memory_mb, info.cpu.free_memory_mb) == expected
    assert info.cpu.name == "Fast: 9000"


async def test_load_is_that_since_the_look_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Times(tuple[float, float, float]):
        idle = property(lambda self: self[1])
        iowait = property(lambda self: self[2])

    looks = iter([Times((100, 100, 0)), Times((130, 160, 10)), Times((130, 160, 10)), Times((100, 170, 0))])
    monkeypatch.setattr(psutil, "cpu_times", lambda: next(looks))
    hardware = Hardware(tmp_path, nvml=FakeNvml(0))
    assert [(await hardware.refresh()).cpu.load_percent for _ in range(4)] == [50.0, 30.0, 0.0, 0.0]


class Blocking(FakeNvml):
    """Waits in each look until it is let go."""

    def __init__(self) -> None:
        super().__init__(1)
        self.go = threading.Event()
        self.n_looks = 0

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        self.n_looks += 1
        self.go.wait(30)
        return super().nvmlDeviceGetMemoryInfo(handle)


async def test_who_asks_meanwhile_shares_the_answer(tmp_path: Path) -> None:
    nvml = Blocking()
    hardware = Hardware(tmp_path, nvml=nvml)
    waiting = [asyncio.create_task(hardware.refresh()) for _ in range(5)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    nvml.go.set()
    first, *others = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(first, asyncio.CancelledError)
    assert all(other is hardware.current for other in others)
    assert nvml.n_looks == 1
    await hardware.refresh()
    assert nvml.n_looks == 2


async def test_a_young_look_is_good_enough(tmp_path: Path) -> None:
    now = 100.0
    hardware = Hardware(tmp_path, nvml=FakeNvml(0), clock=lambda: now)
    first = await hardware.refresh(1.0)
    now = 100.9
    assert await hardware.refresh(1.0) is first
    now = 101.0
    assert await hardware.refresh(1.0) is not first


async def test_the_endpoint(tmp_path: Path) -> None:
    hardware = Hardware(tmp_path, nvml=FakeNvml(1))
    answer = await get_hardware(hardware, cast(Request, None))
    body = json.loads(answer.body)
    assert answer.status == 200
    assert set(body) == {"gpu", "cpu", "disk", "os", "llama"}
    assert body["gpu"]["totalMemoryMB"] == 8192
