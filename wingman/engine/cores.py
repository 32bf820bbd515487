"""The cores of this machine that engines may use, and how the engines of this process share them.

`CORES` is the one table of the process: cores are shared whether the engines know each other or not. Engine
threads enter it while they compute; set operations are atomic, so no lock is needed for a number that may
be a step old.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import psutil

_CGROUP_ROOT: Final = Path("/sys/fs/cgroup")
_OWN_CGROUPS: Final = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Physical cores this process may use, by affinity and control group; hyper-threads only get in each
    other's way here."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or usable
    return max(1, int(min(usable, physical, cgroup_cores())))


def cgroup_cores(root: Path = _CGROUP_ROOT, own: Path = _OWN_CGROUPS) -> float:
    """CPU time per time that control groups grant this process (cgroup-v2 `cpu.max`, v1 `cpu.cfs_*`);
    infinite without a limit."""
    return min((_quota(folder) for folder in _cgroup_folders(root, own)), default=math.inf)


def _cgroup_folders(root: Path, own: Path) -> Iterable[Path]:
    """The folders of the process's groups and of those they are in. A container may see its own as root."""
    yield from (root, root / "cpu")
    for line in _read(own).splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "cpu" if controllers else root
        inner = Path(path.lstrip("/"))
        yield from (top / folder for folder in (inner, *inner.parents) if ".." not in folder.parts)


def _quota(folder: Path) -> float:
    words = _read(folder / "cpu.max").split()
    if not words:
        words = [_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    try:
        quota, period = map(int, words)
    except ValueError:  # "max", or there is none
        return math.inf
    return quota / period if quota > 0 and period > 0 else math.inf


def _read(path: Path) -> str:
    try:
        return path.read_text("ascii", "replace")
    except OSError:
        return ""


class CoreShares:
    """Who computes now, and how many of `n_cores` each may use."""

    def __init__(self, n_cores: int) -> None:
        self.n_cores = n_cores
        self._busy: set[object] = set()

    def enter(self, engine: object) -> None:
        """Count an engine; harmless when it is counted already. Any thread."""
        self._busy.add(engine)

    def leave(self, engine: object) -> None:
        """Count it no more; harmless when it is not counted. Any thread."""
        self._busy.discard(engine)

    @property
    def share(self) -> int:
        """Cores for each engine that computes, at least one."""
        return max(1, self.n_cores // max(1, len(self._busy)))


CORES: Final = CoreShares(usable_cores())
