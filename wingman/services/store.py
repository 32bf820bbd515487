"""The database: downloads, inference items and settings in SQLite, laid out as the original Wingman's.

Owned by one process (the home folder's lock). `Store` lives on the loop; its connection lives on a worker
thread of its own, and what is queued meanwhile goes into one transaction. A method that returned has its
change in the write-ahead log: kill -9 loses nothing. With synchronous=NORMAL a power failure may lose the last
commits, but never damages the file. A database made by the original is copied before it is migrated;
one that is damaged is moved aside; columns and rows that we can't read are left as they are.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
from msgspec import Struct

from wingman.errors import ConfigurationError, InsufficientRoom, Unavailable, WingmanError
from wingman.services.items import DownloadItem, WingmanItem

log = logging.getLogger("wingman.store")

VERSION: Final = 1
"""`PRAGMA user_version`; the original leaves it at 0."""
_BUSY_TIMEOUT_S: Final = 5.0
_DAMAGE: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_ERRORS: Final = (sqlite3.Error, OverflowError, UnicodeEncodeError)
"""What sqlite3 raises for a disk, a number or a text that it can't use."""

Row = Mapping[str, Any]
Write = Callable[[sqlite3.Connection], None]
T = TypeVar("T", DownloadItem, WingmanItem)


class StoreFailure(WingmanError):
    """The database could not be read or written."""


class _Table(Struct, frozen=True):
    """A table of version 1: what makes a row unique, and its columns with their definitions."""

    name: str
    key: tuple[str, ...]
    columns: Mapping[str, str]


_TEXT: Final = "TEXT NOT NULL DEFAULT ''"
_NUMBER: Final = "INTEGER NOT NULL DEFAULT 0"
_TIMES: Final = {"created": _NUMBER, "updated": _NUMBER}
_DOWNLOADS: Final = _Table(
    "downloads",
    ("modelRepo", "filePath"),
    {
        "modelRepo": _TEXT,
        "filePath": _TEXT,
        "status": "TEXT NOT NULL DEFAULT 'idle'",
        "totalBytes": _NUMBER,
        "downloadedBytes": _NUMBER,
        "downloadSpeed": _TEXT,
        "progress": "REAL NOT NULL DEFAULT 0",
        "metadata": "TEXT NOT NULL DEFAULT '{}'",
        "error": _TEXT,
        **_TIMES,
    },
)
_ITEMS: Final = _Table(
    "wingman",
    ("alias",),
    {
        "alias": _TEXT,
        "status": "TEXT NOT NULL DEFAULT 'unknown'",
        "modelRepo": _TEXT,
        "filePath": _TEXT,
        "address": _TEXT,
        "port": _NUMBER,
        "contextSize": _NUMBER,
        "gpuLayers": "INTEGER NOT NULL DEFAULT -1",
        "chatTemplate": _TEXT,
        "force": _NUMBER,
        "error": _TEXT,
        **_TIMES,
    },
)
_APP: Final = _Table(
    "app",
    ("name", "key"),
    {"name": _TEXT, "key": _TEXT, "value": _TEXT, "enabled": "INTEGER NOT NULL DEFAULT 1", **_TIMES},
)
_TABLES: Final = (_DOWNLOADS, _ITEMS, _APP)


class Store:
    """The database as the loop sees it. All methods raise StoreFailure when SQLite can't do it, and
    InsufficientRoom when that is because the disk is full."""

    def __init__(self, database: _Database, executor: ThreadPoolExecutor) -> None:
        self._database = database
        self._executor = executor
        self._queued: list[tuple[Write, asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None
        self._is_closed = False

    @classmethod
    async def open(cls, path: Path) -> Store:
        """Open, create or migrate a database. Raises ConfigurationError when it can't be used."""
        executor = ThreadPoolExecutor(1, thread_name_prefix="wingman-store")
        try:
            database = await asyncio.get_running_loop().run_in_executor(executor, _open, path)
        except BaseException:
            executor.shutdown(wait=False)
            raise
        return cls(database, executor)

    async def downloads(self) -> list[DownloadItem]:
        """All downloads, oldest first."""
        return await self._read(_DOWNLOADS, DownloadItem)

    async def put_download(self, item: DownloadItem) -> None:
        """Add or replace one."""
        await self._write(partial(_put, _DOWNLOADS, msgspec.to_builtins(item)))

    async def delete_download(self, repo: str, file_path: str) -> None:
        """Forget one; nothing happens when it is not there."""
        await self._write(partial(_delete, _DOWNLOADS, (repo, file_path)))

    async def items(self) -> list[WingmanItem]:
        """All inference items, oldest first."""
        return await self._read(_ITEMS, WingmanItem)

    async def put_item(self, item: WingmanItem) -> None:
        """Add or replace one."""
        await self._write(partial(_put, _ITEMS, msgspec.to_builtins(item)))

    async def delete_item(self, alias: str) -> None:
        """Forget one; nothing happens when it is not there."""
        await self._write(partial(_delete, _ITEMS, (alias,)))

    async def setting(self, name: str, key: str) -> str | None:
        """A setting of an application; None when there is none or it is switched off."""
        for row in await self._call(partial(self._database.read, _APP)):
            if (row["name"], row["key"]) == (name, key) and row["enabled"]:
                return str(row["value"])
        return None

    async def put_setting(self, name: str, key: str, value: str) -> None:
        """Add or replace one."""
        await self._write(partial(_put_setting, name, key, value, int(time.time())))

    async def close(self) -> None:
        """Write what is queued and close the file; more calls do nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._writer is not None:
            await self._writer
        await asyncio.get_running_loop().run_in_executor(self._executor, self._database.close)
        self._executor.shutdown(wait=False)

    async def _read(self, table: _Table, kind: type[T]) -> list[T]:
        rows = await self._call(partial(self._database.read, table))
        return [item for row in rows if (item := _item(row, table, kind)) is not None]

    async def _call(self, read: Callable[[], list[Row]]) -> list[Row]:
        self._check_open()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, read)
        except sqlite3.Error as error:
            raise _failure(error) from error

    async def _write(self, write: Write) -> None:
        """Queue a change and wait until it is committed; it will be even if the caller is cancelled."""
        self._check_open()
        future = asyncio.get_running_loop().create_future()
        self._queued.append((write, future))
        if self._writer is None:
            self._writer = asyncio.create_task(self._drain(), name="store writer")
        await future

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        while self._queued:
            batch, self._queued = self._queued, []
            writes = [write for write, _ in batch]
            outcomes: Sequence[Exception | None]
            try:
                outcomes = await loop.run_in_executor(self._executor, self._database.write, writes)
            except Exception as error:  # noqa: BLE001 - nobody may wait for ever
                outcomes = [error] * len(writes)
            for (_, future), outcome in zip(batch, outcomes, strict=True):
                _settle(future, outcome)
        self._writer = None

    def _check_open(self) -> None:
        if self._is_closed:
            raise Unavailable("the database is closed")


def _settle(future: asyncio.Future[None], error: Exception | None) -> None:
    if future.cancelled():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(_failure(error))


def _failure(error: Exception) -> WingmanError:
    log.error("the database failed: %s", error)
    if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
        return InsufficientRoom("the disk is full, so this can't be stored: free some space and try again")
    return StoreFailure("the database could not be read or written; the log says why")


def _item(row: Row, table: _Table, kind: type[T]) -> T | None:
    """An object made of what its row has; None, with a log line, when that makes none."""
    values = {name: row[name] for name in table.columns if row[name] is not None}
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        key = ", ".join(repr(values.get(name)) for name in table.key)
        log.warning("row %.200s of table %s can't be read and is left alone: %s", key, table.name, error)
        return None


# -- on the worker thread ---------------------------------------------------------------------------


class _Database:
    """A connection; made, used and closed on the worker thread."""

    def __init__(self, path: Path) -> None:
        """Open and migrate. Raises ConfigurationError for a newer version, sqlite3.Error."""
        self._connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
        try:
            self._connection.text_factory = _text
            _migrate(self._connection, path)
            (mode,) = self._connection.execute("PRAGMA journal_mode=WAL").fetchone()
            level = "NORMAL" if mode == "wal" else "FULL"  # a network file system has no WAL
            self._connection.execute(f"PRAGMA synchronous={level}")
            for table in _TABLES:
                self.read(table)  # finds damage
        except BaseException:
            self._connection.close()
            raise

    def read(self, table: _Table) -> list[Row]:
        """All rows, oldest first."""
        order = ", ".join(("created", *table.key))
        cursor = self._connection.execute(f"SELECT * FROM {table.name} ORDER BY {order}")  # noqa: S608
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor]

    def write(self, writes: Sequence[Write]) -> list[Exception | None]:
        """Commit all in one transaction, or each alone when that fails; the error of each."""
        error = self._commit(writes)
        if error is None or len(writes) == 1:
            return [error] * len(writes)
        return [self._commit([write]) for write in writes]

    def _commit(self, writes: Sequence[Write]) -> Exception | None:
        try:
            with _transaction(self._connection):
                for write in writes:
                    write(self._connection)
        except _ERRORS as error:
            return error
        return None

    def close(self) -> None:
        """Close the file; the write-ahead log goes into it."""
        self._connection.close()


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All or nothing."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _text(raw: bytes) -> str | bytes:
    """A text; bytes, which no object takes, when it is none."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


def _put(table: _Table, values: Row, connection: sqlite3.Connection) -> None:
    """Update or insert; an original's table may have columns of its own, and need not be unique by its key."""
    columns = _columns(connection, table)
    names = [name for name in values if name in columns]
    settings = ", ".join(f"{name} = ?" for name in names)
    key = [values[name] for name in table.key]
    cursor = connection.execute(
        f"UPDATE {table.name} SET {settings} WHERE {_where(table)}",  # noqa: S608 - our own names
        [*(values[name] for name in names), *key],
    )
    if cursor.rowcount == 0:
        marks = ", ".join("?" * len(names))
        connection.execute(
            f"INSERT INTO {table.name} ({', '.join(names)}) VALUES ({marks})",  # noqa: S608
            [values[name] for name in names],
        )


def _put_setting(name: str, key: str, value: str, now_s: int, connection: sqlite3.Connection) -> None:
    found = connection.execute(f"SELECT created FROM app WHERE {_where(_APP)}", (name, key)).fetchone()  # noqa: S608
    created = found[0] if found else now_s
    row = {"name": name, "key": key, "value": value, "enabled": 1, "created": created, "updated": now_s}
    _put(_APP, row, connection)


def _delete(table: _Table, key: Sequence[str], connection: sqlite3.Connection) -> None:
    connection.execute(f"DELETE FROM {table.name} WHERE {_where(table)}", key)  # noqa: S608 - our own names


def _where(table: _Table) -> str:
    return " AND ".join(f"{name} = ?" for name in table.key)


def _columns(connection: sqlite3.Connection, table: _Table) -> set[str]:
    return {row[1] for row in connection.execute(f"PRAGMA table_info({table.name})")}


# -- opening ----------------------------------------------------------------------------------------


def _open(path: Path) -> _Database:
    try:
        return _Database(path)
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _DAMAGE:
            log.error("can't open %s: %s", path, error)
            raise ConfigurationError(f"can't open the database {path}; the log says why") from error
    _move_aside(path)
    return _Database(path)


def _move_aside(path: Path) -> None:
    """Keep a damaged database under another name, with its log."""
    target = _free_name(path, ".damaged-1", ".damaged-")
    log.error("%s is damaged; it is kept as %s and a new one is made", path, target.name)
    for suffix in ("", "-wal", "-shm"):
        part = path.with_name(path.name + suffix)
        if part.exists():
            part.rename(target.with_name(target.name + suffix))


def _free_name(path: Path, first: str, stem: str) -> Path:
    names = (first, *(f"{stem}{number}" for number in range(2, 1_000_000)))
    return next(free for name in names if not (free := path.with_name(path.name + name)).exists())


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Bring the layout to VERSION, after a copy of what was there; in one transaction."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == VERSION:
        return
    if not 0 <= version < VERSION:
        raise ConfigurationError(
            f"{path} was made by a newer Wingman (database version {version}; this one knows {VERSION})"
        )
    if connection.execute("SELECT 1 FROM sqlite_master").fetchone():
        _copy(connection, _free_name(path, f".v{version}.bak", f".v{version}.bak-"))
    with _transaction(connection):
        for step in _MIGRATIONS[version:]:
            step(connection)
        connection.execute(f"PRAGMA user_version={VERSION}")


def _copy(connection: sqlite3.Connection, target: Path) -> None:
    """A whole copy, or none under that name."""
    unfinished = target.with_name(f"{target.name}.tmp")
    unfinished.unlink(missing_ok=True)
    with closing(sqlite3.connect(unfinished)) as copy:
        connection.backup(copy)
    unfinished.rename(target)


def _adopt_original(connection: sqlite3.Connection) -> None:
    """Version 1: the original's tables, missing ones and missing columns added; progress from 0 to 1."""
    for table in _TABLES:
        columns = ", ".join(f"{name} {definition}" for name, definition in table.columns.items())
        key = ", ".join(table.key)
        connection.execute(f"CREATE TABLE IF NOT EXISTS {table.name} ({columns}, PRIMARY KEY ({key}))")
        for name in table.columns.keys() - _columns(connection, table):
            connection.execute(f"ALTER TABLE {table.name} ADD COLUMN {name} {table.columns[name]}")
    connection.execute(
        "UPDATE downloads SET progress = coalesce(max(0.0, min(1.0, CASE WHEN CAST(totalBytes AS REAL) > 0"
        " THEN CAST(downloadedBytes AS REAL) / CAST(totalBytes AS REAL) ELSE CAST(progress AS REAL) / 100 END"
        ")), 0.0)"
    )


_MIGRATIONS: Final[tuple[Write, ...]] = (_adopt_original,)
"""The step from each version to the next."""
