"""The GGUF files below the models folder, and what their headers tell.

`scan` blocks for the disk and is called in an executor; when calls overlap, the last one's findings are
kept. Headers are read once and again only when a file's size or time changes. Nothing is followed out of the
folder but links to single files, and nothing is ever written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Literal

from msgspec import Struct

from wingman.errors import InvalidRequest
from wingman.services.gguf import BadGguf, GgufHeader, read_parts
from wingman.services.home import LOCAL, Home, parse_stored_name, split_parts
from wingman.services.quantization import is_model_file

Key = tuple[str, str]
"""Repository, and path of the file or of the first part of a set."""

_MAX_DEPTH: Final = 4
_MAX_FILES: Final = 4096


class ModelFile(Struct, frozen=True):
    """A model that lies in the models folder, whole."""

    repo: str
    file_path: str
    location: str
    """Of its first part."""
    versions: tuple[tuple[int, int], ...]
    """Size in bytes and time of change in ns of each part."""
    kind: Literal["model", "damaged", "other"]
    """As its headers say; other: an adapter or a projector."""
    need_bytes: int
    """Memory to run it."""
    context_length: int
    """Tokens it was trained for."""

    @property
    def key(self) -> Key:
        """What names it."""
        return self.repo, self.file_path

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(size for size, _ in self.versions)


class LocalModels:
    """Looks into the models folder. `need_bytes` says how much memory a model takes with its settings."""

    def __init__(self, home: Home, need_bytes: Callable[[GgufHeader], int]) -> None:
        self._home, self._need_bytes = home, need_bytes
        self._known: dict[Key, ModelFile] = {}

    def scan(self) -> dict[Key, ModelFile]:
        """All models that are there, by key; equal to the last answer while nothing changes. Blocks."""
        versions = dict(_walk(self._home.models))
        keys = sorted({_key(path) for path in versions})
        found = (self._look(key, versions) for key in keys if is_model_file(key[1]))
        self._known = {file.key: file for file in found if file is not None}
        return self._known

    def _look(self, key: Key, versions: dict[str, tuple[int, int]]) -> ModelFile | None:
        """A model, read anew when it changed; None while parts are missing or its name can't be used."""
        try:
            paths = [self._home.model_file(key[0], part) for part in split_parts(key[1])]
        except InvalidRequest:
            return None
        stamps = [versions.get(str(path.relative_to(self._home.models))) for path in paths]
        whole = tuple(stamp for stamp in stamps if stamp is not None)
        if len(whole) < len(stamps):
            return None
        known = self._known.get(key)
        return known if known and known.versions == whole else self._read(key, paths, whole)

    def _read(self, key: Key, paths: list[Path], versions: tuple[tuple[int, int], ...]) -> ModelFile:
        try:
            header = read_parts(paths)
        except BadGguf:
            return ModelFile(*key, str(paths[0]), versions, "damaged", 0, 0)
        if header.text("general.type") not in ("", "model"):
            return ModelFile(*key, str(paths[0]), versions, "other", 0, 0)
        need, context = self._need_bytes(header), header.context_length
        return ModelFile(*key, str(paths[0]), versions, "model", need, context)


def _key(path: str) -> Key:
    """What a file below the folder is called; any part of a set is called by the first."""
    repo, file_path = parse_stored_name(path) or (LOCAL, path)
    return repo, split_parts(file_path)[0]


def _walk(folder: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """Relative paths of GGUF files with size and time of change, up to a cap. Blocks."""
    found, pending = 0, [("", 0)]
    while pending and found < _MAX_FILES:
        below, depth = pending.pop()
        for entry in _entries(folder / below):
            path = f"{below}{entry.name}"
            if depth < _MAX_DEPTH and entry.is_dir(follow_symlinks=False):
                pending.append((f"{path}/", depth + 1))
            elif entry.name.lower().endswith(".gguf") and (version := _version(entry)) and found < _MAX_FILES:
                found += 1
                yield path, version


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """In order of their names; none when it can't be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return []


def _version(entry: os.DirEntry[str]) -> tuple[int, int] | None:
    """Of a plain file; None for anything else."""
    try:
        status = entry.stat()
        return (status.st_size, status.st_mtime_ns) if entry.is_file() else None
    except OSError:
        return None
