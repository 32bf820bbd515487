"""The home folder: where things lie, how model files are named, and who owns it.

Layout and names are the original Wingman's: `data/wingman.db`, `data/logs/`, and `models/` with files
named `owner[-]repo[=]file.gguf`; a slash in the file's path is written `[-]` too. Every name from outside
passes `check_repo` or `check_file_path`, so nothing outside `models/` can be named. Used everywhere; pure but
for `Lock` and what says that it blocks.
"""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path
from typing import IO, Final

from msgspec import Struct

from wingman.errors import ConfigurationError, InvalidRequest

LOCAL: Final = "local"
"""The repository of model files whose names tell none; their path is relative to the models folder."""
_SLASH: Final = "[-]"
_FILE: Final = "[=]"
_REPO: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}", re.ASCII)
_SEGMENT: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@() -]{0,199}", re.ASCII)
_MAX_NAME_BYTES: Final = 240
"""Leaves room for the suffix of a partial file within the 255 bytes of a file system."""
_SPLIT: Final = re.compile(r"-(\d{5})-of-(\d{5})(\.(?i:gguf))\Z", re.ASCII)
_MAX_PARTS: Final = 512


def check_repo(text: str) -> str:
    """A repository id, `owner/name`, or `local`. Raises InvalidRequest."""
    is_plain = _REPO.fullmatch(text) is not None and ".." not in text and "--" not in text
    if text != LOCAL and not is_plain:
        raise InvalidRequest("modelRepo must be owner/name", "modelRepo")
    return text


def check_file_path(text: str) -> str:
    """The path of a GGUF file within a repository. Raises InvalidRequest."""
    segments = text.split("/")
    if not text.lower().endswith(".gguf") or not all(
        _SEGMENT.fullmatch(part) and ".." not in part for part in segments
    ):
        raise InvalidRequest("filePath must be the path of a .gguf file in the repository", "filePath")
    return text


def split_parts(file_path: str) -> tuple[str, ...]:
    """All files of a model given any part of it; a single file is its own only part."""
    match = _SPLIT.search(file_path)
    if match is None:
        return (file_path,)
    n_parts, stem, suffix = int(match[2]), file_path[: match.start()], match[3]
    if not 1 <= int(match[1]) <= n_parts <= _MAX_PARTS:
        return (file_path,)
    return tuple(f"{stem}-{index:05d}-of-{match[2]}{suffix}" for index in range(1, n_parts + 1))


def stored_name(repo: str, file_path: str) -> str:
    """The file name of a repository's file in the models folder. Raises InvalidRequest."""
    check_repo(repo)
    name = f"{repo}{_FILE}{check_file_path(file_path)}".replace("/", _SLASH)
    if len(name.encode()) > _MAX_NAME_BYTES:
        raise InvalidRequest(f"filePath is too long: {_MAX_NAME_BYTES} bytes with modelRepo", "filePath")
    return name


def parse_stored_name(name: str) -> tuple[str, str] | None:
    """Repository and file path of a name made by `stored_name`; None for any other."""
    repo, _, file_path = name.partition(_FILE)
    repo, file_path = repo.replace(_SLASH, "/"), file_path.replace(_SLASH, "/")
    try:
        is_stored = repo != LOCAL and stored_name(repo, file_path) == name
    except InvalidRequest:
        return None
    return (repo, file_path) if is_stored else None


def file_name(path: str) -> str:
    """The name that a model's file has in its repository, folders left out."""
    name = path.replace("\\", "/").rpartition("/")[2]
    _, is_stored, file_path = name.rpartition(_FILE)
    return file_path.rpartition(_SLASH)[2] if is_stored else name


class Home(Struct, frozen=True):
    """Paths below the home folder."""

    root: Path

    @property
    def models(self) -> Path:
        """Model files."""
        return self.root / "models"

    @property
    def data(self) -> Path:
        """Everything that is Wingman's own."""
        return self.root / "data"

    @property
    def database(self) -> Path:
        """The SQLite database."""
        return self.data / "wingman.db"

    @property
    def logs(self) -> Path:
        """Rotating log files."""
        return self.data / "logs"

    @property
    def cache(self) -> Path:
        """What can be fetched again."""
        return self.data / "cache"

    @property
    def slots(self) -> Path:
        """Saved slots."""
        return self.data / "slots"

    @property
    def kill_file(self) -> Path:
        """Its appearance ends the server at once."""
        return self.root / "wingman.die"

    @property
    def exit_file(self) -> Path:
        """Its appearance ends the server gracefully."""
        return self.root / "wingman.exit"

    @property
    def runtime_file(self) -> Path:
        """Where the running server tells its addresses."""
        return self.data / "wingman.json"

    def create(self) -> None:
        """Make the folders, readable by their owner only when new. Blocks; raises ConfigurationError."""
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in (self.models, self.data, self.logs, self.cache):
                folder.mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"can't use {self.root} (--home): {error.strerror}") from error

    def model_file(self, repo: str, file_path: str) -> Path:
        """Where a model's file lies or will lie; no two names mean one file. Raises InvalidRequest for a name
        that is none."""
        if repo != LOCAL:
            return self.models / stored_name(repo, file_path)
        parts = file_path.split("/")
        is_odd = any(part in ("", ".", "..") or "\\" in part or not part.isprintable() for part in parts)
        if is_odd or not file_path.lower().endswith(".gguf") or parse_stored_name(file_path) is not None:
            raise InvalidRequest("filePath must be the path of a .gguf file in the models folder", "filePath")
        return self.models.joinpath(*parts)


class Lock:
    """Says that one process owns the home folder; the system drops it however that process ends."""

    def __init__(self, home: Home) -> None:
        self._path = home.data / "wingman.lock"
        self._file: IO[bytes] | None = None

    def acquire(self) -> bool:
        """Take it; False when another process has it. Blocks for the disk only; raises ConfigurationError
        where nothing can be written, or locked."""
        try:
            file = self._path.open("ab")
        except OSError as error:
            raise ConfigurationError(f"can't write {self._path}: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        except OSError as error:  # a network file system without locks
            file.close()
            raise ConfigurationError(f"can't lock {self._path}: {error.strerror}") from error
        os.set_inheritable(file.fileno(), False)
        self._file = file
        return True

    def release(self) -> None:
        """Give it back; nothing happens when it is not held."""
        if self._file is not None:
            self._file.close()
            self._file = None
