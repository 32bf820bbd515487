"""How fast bytes may come, and how fast they do. Pure; the clock's time is passed in."""

from __future__ import annotations

from collections import deque
from typing import Final

_WINDOW_S: Final = 3.0
_UNITS: Final = ("B", "kB", "MB", "GB", "TB")


class RateLimit:
    """Shares a bandwidth between all that ask; 0 bytes a second: no limit."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at_s = 0.0

    def take(self, n_bytes: int, now_s: float) -> float:
        """Book bytes that came; the seconds to wait before asking for more."""
        if not self._bytes_per_s:
            return 0.0
        self._free_at_s = max(self._free_at_s, now_s) + n_bytes / self._bytes_per_s
        return self._free_at_s - now_s


class Speed:
    """Bytes a second over the last three seconds."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def update(self, n_received: int, now_s: float) -> float:
        """Note how much came so far, which only grows; bytes a second."""
        samples = self._samples
        samples.append((now_s, n_received))
        while len(samples) > 2 and samples[1][0] <= now_s - _WINDOW_S:
            samples.popleft()
        first_s, first = samples[0]
        return (n_received - first) / (now_s - first_s) if now_s > first_s else 0.0


def speed_text(bytes_per_s: float) -> str:
    """As DownloadItem shows it, such as `12.3 MB/s`."""
    return f"{bytes_per_s / 1e6:.1f} MB/s"


def size_text(n_bytes: float) -> str:
    """For people, in powers of 1000."""
    for unit in _UNITS:
        if n_bytes < 1000 or unit == _UNITS[-1]:
            break
        n_bytes /= 1000
    return f"{n_bytes:.0f} {unit}" if unit in ("B", "kB") else f"{n_bytes:.1f} {unit}"
