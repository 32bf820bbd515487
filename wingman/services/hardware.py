"""What the machine has and what of it is free: GPUs by NVML, the rest by psutil.

`refresh` looks in an executor, once at a time; everybody reads `current`, which never waits. No GPU, no driver
or a broken one means zeros, never an error. Limits of the container (cgroup v1 and v2) count as the
machine's memory. MB are 2**20 bytes, as the original Wingman's.
"""

from __future__ import annotations

import asyncio
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import psutil
from msgspec import Struct

_MB: Final = 2**20
_PROC: Final = Path("/proc")
_CGROUPS: Final = Path("/sys/fs/cgroup")
_SENSOR: Final = 0
"""NVML_TEMPERATURE_GPU."""
_ERRORS: Final[tuple[type[Exception], ...]] = (OSError, ValueError, psutil.Error)
"""What a system raises that tells less than others."""
T = TypeVar("T")


class _Part(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Base of the parts below; all numbers are 0 and all texts empty while unknown."""


class Gpu(_Part, frozen=True, kw_only=True):
    """One GPU."""

    name: str = ""
    total_memory_mb: int = msgspec.field(default=0, name="totalMemoryMB")
    free_memory_mb: int = msgspec.field(default=0, name="freeMemoryMB")
    utilization_percent: int = 0
    temperature_c: int = msgspec.field(default=0, name="temperatureC")
    driver: str = ""


class Gpus(_Part, frozen=True, kw_only=True):
    """All GPUs; the first two keys are the original's."""

    total_memory_mb: int = msgspec.field(default=0, name="totalMemoryMB")
    free_memory_mb: int = msgspec.field(default=0, name="freeMemoryMB")
    gpus: tuple[Gpu, ...] = ()


class Cpu(_Part, frozen=True, kw_only=True):
    """The processor and the main memory; the first two keys are the original's."""

    total_memory_mb: int = msgspec.field(default=0, name="totalMemoryMB")
    free_memory_mb: int = msgspec.field(default=0, name="freeMemoryMB")
    """Free or to be had at once."""
    name: str = ""
    physical_cores: int = 0
    logical_cores: int = 0
    load_percent: float = 0.0
    """Since the refresh before."""


class Disk(_Part, frozen=True, kw_only=True):
    """Where the models lie."""

    total_mb: int = msgspec.field(default=0, name="totalMB")
    free_mb: int = msgspec.field(default=0, name="freeMB")


class System(_Part, frozen=True, kw_only=True):
    """The operating system."""

    name: str = ""
    release: str = ""
    machine: str = ""


class Llama(_Part, frozen=True, kw_only=True):
    """The runtime, as its owner tells."""

    build: str = ""
    system_info: str = ""
    can_offload: bool = True
    """Whether it was built to use GPUs."""


class HardwareInfo(_Part, frozen=True, kw_only=True):
    """GET /api/hardware."""

    gpu: Gpus = Gpus()
    cpu: Cpu = Cpu()
    disk: Disk = Disk()
    os: System = System()
    llama: Llama = Llama()


class Hardware:
    """Looks at the machine. `nvml` is the module pynvml or one like it; `proc` and `cgroups` are where Linux tells
    of processors and limits. The loop's, but for `look`."""

    def __init__(
        self,
        models_folder: Path,
        llama: Llama = Llama(),  # noqa: B008 - frozen
        *,
        nvml: Any = None,
        proc: Path = _PROC,
        cgroups: Path = _CGROUPS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if nvml is None:
            import pynvml  # who only asks for memory does without

            nvml = pynvml
        self.current = HardwareInfo(llama=llama)
        """What the last refresh found."""
        self._folder = models_folder
        self._gpus = _Gpus(nvml)
        self._load = _Load()
        self._proc, self._cgroups = proc, cgroups
        self._clock = clock
        self._looked_at: float | None = None
        self._looking: asyncio.Task[None] | None = None

    async def refresh(self, max_age_s: float = 0.0) -> HardwareInfo:
        """Look again unless the last look is younger; who calls while another looks shares the answer."""
        is_young = self._looked_at is not None and self._clock() - self._looked_at < max_age_s
        if not is_young:
            if self._looking is None:
                self._looking = asyncio.create_task(self._look_once(), name="hardware")
            await asyncio.shield(self._looking)
        return self.current

    async def _look_once(self) -> None:
        try:
            self.current = await asyncio.to_thread(self.look)
            self._looked_at = self._clock()
        finally:
            self._looking = None

    def look(self) -> HardwareInfo:
        """The machine as it is now. Blocks; one at a time."""
        return HardwareInfo(
            gpu=_sum_up(self._gpus.read()),
            cpu=self._look_at_cpu(),
            disk=_fact(Disk(), lambda: _disk(self._folder)),
            os=System(name=platform.system(), release=platform.release(), machine=platform.machine()),
            llama=self.current.llama,
        )

    def _look_at_cpu(self) -> Cpu:
        total, free = _fact((0, 0), lambda: host_memory(self._proc, self._cgroups))
        return Cpu(
            total_memory_mb=total // _MB,
            free_memory_mb=free // _MB,
            name=_fact("", lambda: _cpu_name(self._proc)),
            physical_cores=_fact(0, lambda: psutil.cpu_count(logical=False) or 0),
            logical_cores=_fact(0, lambda: psutil.cpu_count() or 0),
            load_percent=_fact(0.0, self._load.percent),
        )

    @property
    def has_gpu(self) -> bool:
        """Whether there is GPU memory that layers can go to."""
        return self.current.llama.can_offload and self.current.gpu.total_memory_mb > 0

    @property
    def gpu_name(self) -> str:
        """Of the first GPU that can be used; "" without one."""
        return self.current.gpu.gpus[0].name if self.has_gpu and self.current.gpu.gpus else ""

    def memory_bytes(self) -> tuple[int, int]:
        """Memory for models, in all and free: the GPUs' where they can be used, else the machine's."""
        part = self.current.gpu if self.has_gpu else self.current.cpu
        return part.total_memory_mb * _MB, part.free_memory_mb * _MB


def _fact(default: T, read: Callable[[], T], errors: tuple[type[Exception], ...] = _ERRORS) -> T:
    """What can be read, else the default."""
    try:
        return read()
    except errors:
        return default


# -- GPUs -------------------------------------------------------------------------------------------


class _Gpus:
    """NVML, opened once and kept open: opening takes tens of milliseconds."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._errors = (*_ERRORS, nvml.NVMLError)
        self._handles: list[Any] | None = None

    def read(self) -> tuple[Gpu, ...]:
        """Every GPU that answers."""
        if self._handles is None:
            self._handles = _fact([], self._open, self._errors)  # no driver, no GPU
        gpus = [_fact(None, partial(self._read_one, handle), self._errors) for handle in self._handles]
        return tuple(gpu for gpu in gpus if gpu is not None)

    def _open(self) -> list[Any]:
        self._nvml.nvmlInit()
        return [
            self._nvml.nvmlDeviceGetHandleByIndex(index) for index in range(self._nvml.nvmlDeviceGetCount())
        ]

    def _read_one(self, handle: Any) -> Gpu:
        """Raises NVMLError when it does not even tell its memory: it is lost."""
        nvml = self._nvml
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        return Gpu(
            name=self._ask("", lambda: _plain(nvml.nvmlDeviceGetName(handle))),
            total_memory_mb=int(memory.total) // _MB,
            free_memory_mb=int(memory.free) // _MB,
            utilization_percent=self._ask(0, lambda: int(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)),
            temperature_c=self._ask(0, lambda: int(nvml.nvmlDeviceGetTemperature(handle, _SENSOR))),
            driver=self._ask("", lambda: _plain(nvml.nvmlSystemGetDriverVersion())),
        )

    def _ask(self, default: T, read: Callable[[], T]) -> T:
        return _fact(default, read, self._errors)


def _sum_up(gpus: tuple[Gpu, ...]) -> Gpus:
    return Gpus(
        total_memory_mb=sum(gpu.total_memory_mb for gpu in gpus),
        free_memory_mb=sum(gpu.free_memory_mb for gpu in gpus),
        gpus=gpus,
    )


def _plain(name: str | bytes) -> str:
    """Older versions of the module give bytes."""
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else name


# -- processor, memory, disk ------------------------------------------------------------------------


class _Load:
    """How busy the processors were since the last call; psutil's own would keep count by thread."""

    def __init__(self) -> None:
        self._before = (0.0, 0.0)

    def percent(self) -> float:
        """0 to 100; since the start of the machine at first."""
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # they are in user
        total = sum(times) - guests
        past_idle, past_total = self._before
        self._before = idle, total
        if total <= past_total:
            return 0.0
        return round(max(0.0, min(100.0, 100 * (1 - (idle - past_idle) / (total - past_total)))), 1)


def _cpu_name(proc: Path) -> str:
    with (proc / "cpuinfo").open(encoding="utf-8", errors="replace") as lines:
        names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        return next(names, platform.machine())


def host_memory(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> tuple[int, int]:
    """Bytes in all and to be had, within the limits of the container."""
    memory = psutil.virtual_memory()
    total, free = int(memory.total), int(memory.available)
    for limit, used in _limits(proc, cgroups):
        total, free = min(total, limit), min(free, max(0, limit - used))
    return total, free


def _limits(proc: Path, cgroups: Path) -> Iterator[tuple[int, int]]:
    """Limit and use of every control group that this process is in, outer ones too."""
    for line in _fact("", lambda: (proc / "self" / "cgroup").read_text("utf-8")).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for layout in _LAYOUTS:
            if (number == "0") == layout.is_unified and layout.controller in controllers.split(","):
                for folder in _upwards(cgroups / layout.root, path):
                    limit = _fact(None, partial(layout.read, folder))
                    if limit is not None:
                        yield limit


class _Layout(Struct, frozen=True):
    """Where a version of cgroups keeps its numbers (cgroup-v1/memory, cgroup-v2 of the kernel's documentation)."""

    is_unified: bool
    controller: str
    root: str
    limit: str
    usage: str
    cache: str

    def read(self, folder: Path) -> tuple[int, int]:
        """Limit and use in bytes; ValueError when there is none. Pages of files that wait to be dropped
        don't count as used."""
        limit, usage = (int((folder / name).read_text("ascii")) for name in (self.limit, self.usage))
        stat = _fact("", lambda: (folder / "memory.stat").read_text("ascii"))
        lines = (line.partition(" ") for line in stat.splitlines())
        return limit, max(0, usage - next((int(value) for name, _, value in lines if name == self.cache), 0))


_V1: Final = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2: Final = ("memory.max", "memory.current", "inactive_file")
_LAYOUTS: Final = (_Layout(True, "", "", *_V2), _Layout(False, "memory", "memory", *_V1))


def _upwards(root: Path, path: str) -> Iterator[Path]:
    """The folder of a group and those of the groups it is in; in a container only the root may be there."""
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    for length in range(len(parts), -1, -1):
        yield root.joinpath(*parts[:length])


def _disk(folder: Path) -> Disk:
    """The file system that holds the folder, or will hold it."""
    there = next((path for path in (folder, *folder.parents) if path.exists()), Path("/"))
    usage = shutil.disk_usage(there)
    return Disk(total_mb=usage.total // _MB, free_mb=usage.free // _MB)
