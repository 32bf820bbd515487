"""A file that is not all here yet: `NAME.partial`, and `NAME.partial.json` that says what it is part of.

All calls block and run one after the other in an executor. Bytes are hashed as they are written. The sidecar is
replaced only after the bytes it vouches for are on the disk. What was written before the process died is still
in the system's cache, so after a crash all of it counts; after a crash of the machine only what the sidecar
vouches for, told apart by the boot's id. A hash's state can't be stored, so to go on means to read again.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final, Protocol

import msgspec

from wingman.services.remote import RemoteFile

SYNC_BYTES: Final = 64 * 1024**2
SYNC_S: Final = 3.0
"""The sidecar is brought up to date after so many bytes, or seconds."""
_GIT_ID: Final = re.compile(r"[0-9a-f]{40}")
_MAX_SIDECAR_BYTES: Final = 64 * 1024


class Digest(Protocol):
    """What hashlib makes."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Add bytes."""

    def hexdigest(self) -> str:
        """The hash of all so far."""


class Sidecar(msgspec.Struct, frozen=True):
    """What the JSON file beside a partial holds."""

    file: RemoteFile
    etag: str = ""
    """Of the server that has the bytes, for If-Range."""
    verified: int = 0
    """Bytes known to be on the disk."""
    is_checked: bool = False
    """The whole file is here and its hash is right."""
    boot: str = ""


def open_unbuffered(path: Path) -> BinaryIO:
    """Open for reading and writing, made when it is not there; a link is not followed."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    return open(descriptor, "r+b", buffering=0)  # noqa: PTH123 - a descriptor


OpenFile = Callable[[Path], BinaryIO]


def partial_path(target: Path) -> Path:
    """Where the bytes of a file gather."""
    return target.with_name(target.name + ".partial")


def sidecar_path(target: Path) -> Path:
    """What is known of them."""
    return target.with_name(target.name + ".partial.json")


class Partial:
    """One file on its way to `target`. Calls raise OSError."""

    def __init__(self, target: Path, file: RemoteFile, open_file: OpenFile = open_unbuffered) -> None:
        self.file = file
        self.etag = ""
        self.position = 0
        """Bytes written and hashed."""
        self.is_checked = False
        self._target = target
        self._open_file = open_file
        self._path = partial_path(target)
        self._digest = _new_digest(file)
        self._sink: BinaryIO | None = None
        self._synced = (0, 0.0)

    def open(self) -> int:
        """Open what is there, if it is of this file; the number of its bytes that can be kept.

        They are to be passed through `reread` before anything is appended.
        """
        kept = self._held()
        self._sink = self._open_file(self._path)
        self._synced = (kept, time.monotonic())
        if self._path != self._target:
            self._sink.truncate(kept)
        if self.is_checked:
            self.position = kept
        return kept

    def _held(self) -> int:
        size, file = _size(self._path), self.file
        if size is None and _size(self._target) == file.size:
            self._path = self._target  # of a set that was being renamed, or put there by someone
            return file.size
        sidecar = read_sidecar(self._target)
        if size is None or sidecar is None or not _is_same(sidecar.file, file):
            return 0
        self.etag = sidecar.etag
        is_same_boot = sidecar.boot == _boot_id() != ""
        kept = min(size, file.size, size if is_same_boot else sidecar.verified)
        self.is_checked = sidecar.is_checked and kept == file.size
        return kept

    def reread(self, n_bytes: int, limit: int) -> None:
        """Hash the next bytes of what is there, up to position `limit`."""
        sink = self._opened()
        sink.seek(self.position)
        chunk = sink.read(min(n_bytes, limit - self.position))
        if not chunk:
            raise OSError(0, "the file became shorter while it was read")
        self._digest.update(chunk)
        self.position += len(chunk)

    def append(self, chunks: Sequence[bytes]) -> None:
        """Write and hash bytes; what exceeds the file's size is dropped."""
        data = memoryview(b"".join(chunks))[: self.file.size - self.position]
        sink = self._opened()
        sink.seek(self.position)
        n_written = 0
        while n_written < len(data):
            n_written += sink.write(data[n_written:])
        self._digest.update(data)
        self.position += len(data)
        n_synced, synced_s = self._synced
        if self.position - n_synced >= SYNC_BYTES or time.monotonic() - synced_s >= SYNC_S:
            self.sync()

    def begin(self, etag: str) -> None:
        """Note the ETag of the bytes that come now."""
        if etag != self.etag or not self._synced[0]:
            self.etag = etag
            self.sync()

    def restart(self) -> None:
        """Forget everything that is there."""
        if self._path == self._target:
            self.close()
            self._path = partial_path(self._target)
            self._sink = self._open_file(self._path)
        self.etag, self.position, self.is_checked = "", 0, False
        self._digest = _new_digest(self.file)
        self._opened().truncate(0)
        self.sync()

    def check(self) -> bool:
        """Whether the whole file is here and is the one that was asked for; then it is on the disk too."""
        is_right = self._digest.hexdigest() == _expected(self.file) if _expected(self.file) else True
        self.is_checked = self.is_checked or (self.position == self.file.size and is_right)
        if self.is_checked:
            self.sync()
        return self.is_checked

    def sync(self) -> None:
        """Bring the bytes to the disk, then the sidecar."""
        if self._path == self._target:
            return
        os.fdatasync(self._opened().fileno())
        sidecar = Sidecar(self.file, self.etag, self.position, self.is_checked, _boot_id())
        _replace(sidecar_path(self._target), msgspec.json.encode(sidecar))
        self._synced = (self.position, time.monotonic())

    def close(self) -> None:
        """Keep what is there for another time; an empty file is not kept. Raises nothing."""
        if self._sink is None:
            return
        with suppress(OSError):
            if self.position > self._synced[0]:
                self.sync()
        with suppress(OSError):
            is_empty = not os.fstat(self._sink.fileno()).st_size
            self._sink.close()
            if is_empty and not self.is_checked:
                discard([self._target])
        self._sink = None

    def _opened(self) -> BinaryIO:
        if self._sink is None:
            raise OSError(0, "the partial file is closed")
        return self._sink


def publish(targets: Sequence[Path]) -> None:
    """Rename checked partials into place, the first last: it names the set. Blocks; raises OSError."""
    for target in reversed(targets):
        if partial_path(target).exists():
            partial_path(target).replace(target)
    _sync_folder(targets[0].parent)
    for target in targets:
        sidecar_path(target).unlink(missing_ok=True)


def discard(targets: Sequence[Path]) -> None:
    """Delete partials and sidecars. Blocks; raises OSError."""
    for target in targets:
        partial_path(target).unlink(missing_ok=True)
        sidecar_path(target).unlink(missing_ok=True)


def delete(targets: Sequence[Path]) -> None:
    """Delete files, whole or partial. Blocks; raises OSError."""
    discard(targets)
    for target in targets:
        target.unlink(missing_ok=True)


def where_it_lies(targets: Sequence[Path]) -> list[Path]:
    """Where the bytes of files are before they are published. Blocks."""
    return [path if (path := partial_path(target)).exists() else target for target in targets]


def held_bytes(target: Path) -> int:
    """Bytes of a file that are on the disk, here or as its partial. Blocks."""
    return _size(partial_path(target)) or _size(target) or 0


def read_sidecar(target: Path) -> Sidecar | None:
    """What the sidecar says; None when there is none that can be read. Blocks."""
    try:
        with sidecar_path(target).open("rb") as file:
            return msgspec.json.decode(file.read(_MAX_SIDECAR_BYTES), type=Sidecar)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


def _replace(path: Path, data: bytes) -> None:
    fresh = path.with_suffix(".new")
    with fresh.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _is_same(old: RemoteFile, new: RemoteFile) -> bool:
    """Whether two commits hold the same bytes, as far as can be told."""
    if old.sha256 or new.sha256:
        return (old.sha256, old.size) == (new.sha256, new.size)
    return (old.commit, old.etag, old.size) == (new.commit, new.etag, new.size)


def _expected(file: RemoteFile) -> str:
    """The hash that the file must have; "" when the Hub tells none."""
    return file.sha256 or (file.etag if _GIT_ID.fullmatch(file.etag) else "")


def _new_digest(file: RemoteFile) -> Digest:
    """Small files have no sha256 but git's id of a blob, a sha1 that begins with a header."""
    if file.sha256 or not _expected(file):
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)


def _boot_id() -> str:
    """Differs after each start of the machine; "" where that is not told."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
