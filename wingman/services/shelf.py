"""The models folder as downloads see it: which models lie there, and whether one is usable.

All calls block and run in an executor. Nothing here changes a file.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from msgspec import Struct

from wingman.errors import InsufficientRoom
from wingman.services.gguf import GgufHeader, read_parts
from wingman.services.home import Home, parse_stored_name, split_parts
from wingman.services.pace import size_text
from wingman.services.partial import held_bytes

_SPARE_BYTES: Final = 64 * 1024**2
"""Left free for the database and the logs."""


class Shelved(Struct, frozen=True):
    """A model that lies in the folder with all its files."""

    n_bytes: int
    changed_ns: int
    """When the last of them was written."""


def _disk_free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


class Shelf:
    """The models folder of a home."""

    def __init__(
        self,
        home: Home,
        read: Callable[[Sequence[Path]], GgufHeader] = read_parts,
        free_bytes: Callable[[Path], int] = _disk_free,
    ) -> None:
        self._home = home
        self._read = read
        self._free_bytes = free_bytes

    def targets(self, repo: str, file_path: str) -> tuple[Path, ...]:
        """Where a model's files belong, in order. Raises InvalidRequest."""
        return tuple(self._home.model_file(repo, part) for part in split_parts(file_path))

    def scan(self) -> dict[tuple[str, str], Shelved]:
        """All models whose names tell repository and path. Raises OSError."""
        seen: dict[tuple[str, str], os.stat_result] = {}
        with os.scandir(self._home.models) as entries:
            for entry in entries:
                key = parse_stored_name(entry.name)
                if key is not None and entry.is_file():
                    seen[key] = entry.stat()
        firsts = {(repo, split_parts(path)[0]) for repo, path in seen}
        sets = {(repo, first): [(repo, part) for part in split_parts(first)] for repo, first in firsts}
        return {
            key: Shelved(
                sum(seen[part].st_size for part in parts), max(seen[part].st_mtime_ns for part in parts)
            )
            for key, parts in sets.items()
            if all(part in seen for part in parts)
        }

    def look(self, repo: str, file_path: str) -> Shelved | None:
        """One model; None when a file of it is missing."""
        try:
            found = [path.stat() for path in self.targets(repo, file_path)]
        except OSError:
            return None
        return Shelved(sum(one.st_size for one in found), max(one.st_mtime_ns for one in found))

    def read(self, paths: Sequence[Path]) -> GgufHeader:
        """The header of a model's files, which need not have their names yet. Raises BadGguf."""
        return self._read(paths)

    def held(self, targets: Sequence[Path], sizes: Sequence[int]) -> list[int]:
        """Bytes of each file that need not be fetched any more."""
        return [min(held_bytes(target), size) for target, size in zip(targets, sizes, strict=True)]

    def check_room(self, n_bytes: int) -> None:
        """Raises InsufficientRoom when so many bytes more don't fit."""
        free = self._free_bytes(self._home.models)
        if n_bytes > 0 and n_bytes + _SPARE_BYTES > free:
            raise InsufficientRoom(
                f"{size_text(n_bytes)} are still to come and the disk of the models folder "
                f"has {size_text(free)} free"
            )
