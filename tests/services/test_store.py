"""The database: what is put is there, also after kill -9; an original's is taken over; none is ever lost."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wingman.errors import ConfigurationError, InsufficientRoom, Unavailable
from wingman.services.items import DownloadItem, DownloadStatus, WingmanItem, WingmanStatus
from wingman.services.store import VERSION, Store, StoreFailure

DOWNLOAD = DownloadItem(
    model_repo="owner/repo-GGUF",
    file_path="a.Q4_0.gguf",
    status="downloading",
    total_bytes=2**40,
    downloaded_bytes=2**39,
    download_speed="1.5 MB/s",
    progress=0.5,
    metadata='{"etag":"x"}',
    error="an 'error' \u2603",
    created=7,
    updated=8,
)
ITEM = WingmanItem(
    alias="smol",
    status="inferring",
    model_repo="owner/repo-GGUF",
    file_path="a.Q4_0.gguf",
    address="localhost",
    port=6567,
    context_size=2048,
    gpu_layers=12,
    chat_template="{{ x }}",
    force=True,
    error="",
    created=7,
    updated=9,
)
ORIGINAL = """
CREATE TABLE downloads (
  isa TEXT NOT NULL, modelRepo TEXT, filePath TEXT, status TEXT, totalBytes INTEGER, downloadedBytes INTEGER,
  downloadSpeed TEXT, progress INTEGER, metadata TEXT, error TEXT, created INTEGER, updated INTEGER,
  ofTheFuture TEXT DEFAULT 'kept', PRIMARY KEY (modelRepo, filePath));
CREATE TABLE wingman (
  alias TEXT PRIMARY KEY, status TEXT, modelRepo TEXT, filePath TEXT, address TEXT, port INTEGER,
  contextSize INTEGER, gpuLayers INTEGER, force INTEGER, error TEXT, created INTEGER, updated INTEGER);
CREATE TABLE app (
  name TEXT, key TEXT, value TEXT, enabled INTEGER, created INTEGER, updated INTEGER, PRIMARY KEY (name, key));
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "wingman.db"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[Store]:
    store = await Store.open(path)
    yield store
    await store.close()


def query(path: Path, sql: str, values: Sequence[Any] = ()) -> list[Any]:
    with closing(sqlite3.connect(path)) as connection, connection:
        return connection.execute(sql, values).fetchall()


def contents(path: Path) -> bytes:
    return path.read_bytes()


def fill(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def make_original(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(ORIGINAL)
        for index, status in enumerate(get_args(DownloadStatus)):
            row = (
                "DownloadItem",
                "o/r",
                f"{status}.gguf",
                status,
                200,
                100,
                "1 MB/s",
                37,
                None,
                None,
                index,
                index,
            )
            connection.execute(f"INSERT INTO downloads VALUES ({', '.join('?' * 12)}, 'kept')", row)
        for index, status in enumerate(get_args(WingmanStatus)):
            row = (status, status, "o/r", "f.gguf", "localhost", 6567, 0, -1, index % 2, None, index, index)
            connection.execute(f"INSERT INTO wingman VALUES ({', '.join('?' * 12)})", row)
        connection.execute(
            "INSERT INTO app VALUES ('app', 'theme', 'dark', 1, 1, 1), ('app', 'off', 'x', 0, 1, 1)"
        )


async def test_what_is_put_is_read_back_by_the_next(path: Path) -> None:
    store = await Store.open(path)
    await store.put_download(DOWNLOAD)
    await store.put_item(ITEM)
    await store.put_setting("app", "theme", "dark")
    await store.close()
    await store.close()
    again = await Store.open(path)
    assert await again.downloads() == [DOWNLOAD]
    assert await again.items() == [ITEM]
    assert await again.setting("app", "theme") == "dark"
    assert await again.setting("app", "none") is None
    await again.close()
    assert query(path, "PRAGMA user_version") == [(VERSION,)]
    assert query(path, "PRAGMA journal_mode") == [("wal",)]
    assert sorted(file.name for file in path.parent.iterdir()) == ["wingman.db"]


async def test_the_last_put_wins_and_deleting_is_idempotent(store: Store) -> None:
    done = msgspec.structs.replace(DOWNLOAD, status="complete", progress=1.0)
    other = msgspec.structs.replace(DOWNLOAD, file_path="b.gguf", created=1)
    for item in (DOWNLOAD, done, other):
        await store.put_download(item)
    assert await store.downloads() == [other, done]
    for _ in range(2):
        await store.delete_download(*DOWNLOAD.key)
        await store.delete_item("none")
    assert await store.downloads() == [other]
    await store.put_setting("a", "k", "1")
    await store.put_setting("a", "k", "2")
    assert await store.setting("a", "k") == "2"


async def test_many_at_once(store: Store) -> None:
    items = [msgspec.structs.replace(ITEM, alias=f"model {index:03}", created=index) for index in range(300)]
    await asyncio.gather(*(store.put_item(item) for item in items))
    assert await store.items() == items
    await asyncio.gather(*(store.delete_item(item.alias) for item in items[::2]))
    assert await store.items() == items[1::2]


async def test_a_full_disk_is_told_and_passes(store: Store) -> None:
    async def allow(n_pages: int) -> None:
        await store._write(lambda connection: connection.execute(f"PRAGMA max_page_count={n_pages}"))

    big = msgspec.structs.replace(DOWNLOAD, metadata="x" * 10**6)
    await allow(1)  # as many as there are
    with pytest.raises(InsufficientRoom, match="the disk is full"):
        await store.put_download(big)
    assert await store.downloads() == []
    await allow(10**6)
    await store.put_download(big)
    assert await store.downloads() == [big]


async def test_one_bad_change_fails_alone(store: Store) -> None:
    bad = msgspec.structs.replace(DOWNLOAD, file_path="bad.gguf", total_bytes=2**63)
    odd = msgspec.structs.replace(DOWNLOAD, file_path="\ud800.gguf")
    good = msgspec.structs.replace(DOWNLOAD, file_path="good.gguf")
    outcomes = await asyncio.gather(
        *(store.put_download(item) for item in (DOWNLOAD, bad, odd, good)), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes] == [type(None), StoreFailure, StoreFailure, type(None)]
    assert await store.downloads() == [DOWNLOAD, good]


async def test_closing_waits_for_what_is_queued(path: Path) -> None:
    store = await Store.open(path)
    puts = [
        asyncio.create_task(store.put_item(msgspec.structs.replace(ITEM, alias=str(index))))
        for index in range(20)
    ]
    await asyncio.sleep(0)
    puts[0].cancel()
    await store.close()
    await asyncio.gather(*puts, return_exceptions=True)
    assert query(path, "SELECT count(*) FROM wingman") == [(20,)]
    with pytest.raises(Unavailable):
        await store.items()
    with pytest.raises(Unavailable):
        await store.put_item(ITEM)


async def test_an_original_database_is_taken_over(path: Path) -> None:
    make_original(path)
    store = await Store.open(path)
    downloads = {item.status: item for item in await store.downloads()}
    items = {item.status: item for item in await store.items()}
    assert set(downloads) == set(get_args(DownloadStatus))
    assert set(items) == set(get_args(WingmanStatus))
    assert {(item.progress, item.metadata, item.error) for item in downloads.values()} == {(0.5, "{}", "")}
    assert [item.force for item in items.values()] == [False, True, False, True, False, True, False]
    assert items["queued"].chat_template == ""
    assert await store.setting("app", "theme") == "dark"
    assert await store.setting("app", "off") is None
    await store.put_download(msgspec.structs.replace(downloads["queued"], status="complete"))
    await store.put_download(DOWNLOAD)
    await store.close()
    kept = query(path, "SELECT isa, ofTheFuture FROM downloads")
    assert kept == [("DownloadItem", "kept")] * (len(downloads) + 1)
    assert query(path.with_name("wingman.db.v0.bak"), "SELECT progress FROM downloads") == [(37,)] * len(
        downloads
    )
    again = await Store.open(path)
    assert {item.progress for item in await again.downloads()} == {0.5}
    await again.close()
    assert len(list(path.parent.iterdir())) == 2


async def test_progress_of_an_original(path: Path) -> None:
    make_original(path)
    odd = [
        (None, None, 50, 0.5),
        (0, 0, 100, 1.0),
        (100, 300, 1, 1.0),
        (100, None, None, 0.0),
        (-5, 1, "x", 0.0),
    ]
    query(path, "DELETE FROM downloads")
    for index, (total, done, percent, _) in enumerate(odd):
        values = (str(index), total, done, percent)
        query(
            path,
            "INSERT INTO downloads (isa, modelRepo, filePath, totalBytes, downloadedBytes, progress)"
            " VALUES ('', 'o/r', ?, ?, ?, ?)",
            values,
        )
    store = await Store.open(path)
    progress = {item.file_path: item.progress for item in await store.downloads()}
    assert progress == {str(index): row[3] for index, row in enumerate(odd)}
    await store.close()


async def test_tables_that_lack_columns_and_keys(path: Path) -> None:
    query(path, "CREATE TABLE downloads (modelRepo, filePath, progress)")
    query(path, "INSERT INTO downloads VALUES ('o/r', 'a.gguf', 25)")
    store = await Store.open(path)
    expected = DownloadItem(model_repo="o/r", file_path="a.gguf", progress=0.25)
    assert await store.downloads() == [expected]
    changed = msgspec.structs.replace(expected, status="complete")
    await store.put_download(changed)
    assert await store.downloads() == [changed]
    await store.close()


async def test_rows_that_cannot_be_read_are_left_alone(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = await Store.open(path)
    await store.put_download(DOWNLOAD)
    await store.close()
    bad = [("o/r", "a", "dancing", 0), ("o/r", "b", "idle", "many"), ("o/r", b"\xff\xfe", "idle", 0)]
    for row in bad:
        query(
            path, "INSERT INTO downloads (modelRepo, filePath, status, totalBytes) VALUES (?, ?, ?, ?)", row
        )
    query(path, "UPDATE downloads SET error = CAST(x'ff' AS TEXT) WHERE filePath = 'a'")
    again = await Store.open(path)
    assert await again.downloads() == [DOWNLOAD]
    await again.close()
    assert len(caplog.records) == len(bad)
    assert query(path, "SELECT count(*) FROM downloads") == [(4,)]


async def test_a_newer_database_is_not_touched(path: Path) -> None:
    query(path, "CREATE TABLE downloads (new)")
    query(path, f"PRAGMA user_version={VERSION + 1}")
    before = contents(path)
    with pytest.raises(ConfigurationError, match="newer"):
        await Store.open(path)
    assert contents(path) == before
    assert [file.name for file in path.parent.iterdir()] == ["wingman.db"]


@pytest.mark.parametrize("content", [b"this is no database" * 100, b"SQLite format 3\0" + b"\xff" * 4096])
async def test_a_damaged_database_is_kept_aside(path: Path, content: bytes) -> None:
    for number in (1, 2):
        fill(path, content)
        store = await Store.open(path)
        assert await store.downloads() == []
        await store.put_item(ITEM)
        await store.close()
        assert contents(path.with_name(f"wingman.db.damaged-{number}")) == content


async def test_damage_within_a_table_is_found(path: Path) -> None:
    store = await Store.open(path)
    items = [msgspec.structs.replace(ITEM, alias=str(index), error="x" * 500) for index in range(100)]
    await asyncio.gather(*(store.put_item(item) for item in items))
    await store.close()
    content = bytearray(contents(path))
    content[8192:] = os.urandom(len(content) - 8192)
    fill(path, content)
    again = await Store.open(path)
    assert await again.items() == []
    await again.close()
    assert contents(path.with_name("wingman.db.damaged-1")) == content


async def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="can't open"):
        await Store.open(tmp_path)


WRITER = """
import asyncio, sys
from pathlib import Path
from wingman.services.items import WingmanItem
from wingman.services.store import Store

async def write():
    store = await Store.open(Path(sys.argv[1]))
    for index in range(1_000_000):
        await store.put_item(WingmanItem(alias=str(index), created=index))
        print(index, flush=True)

asyncio.run(write())
"""


def write_until_killed(path: Path) -> int:
    """How many puts were answered."""
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(200):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        return 200 + len(process.stdout.read().splitlines())


async def test_what_was_answered_survives_a_kill(path: Path) -> None:
    answered = await asyncio.to_thread(write_until_killed, path)
    store = await Store.open(path)
    aliases = [item.alias for item in await store.items()]
    await store.close()
    assert aliases[:answered] == [str(index) for index in range(answered)]
    assert len(aliases) - answered in (0, 1)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
COUNTS = st.integers(-(2**63), 2**63 - 1)


@given(
    st.builds(
        WingmanItem,
        alias=TEXTS, status=st.sampled_from(get_args(WingmanStatus)), model_repo=TEXTS, file_path=TEXTS,
        address=TEXTS, port=COUNTS, context_size=COUNTS, gpu_layers=COUNTS, chat_template=TEXTS,
        force=st.booleans(), error=TEXTS, created=COUNTS, updated=COUNTS,
    )
)  # fmt: skip
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_item_is_read_back(tmp_path_factory: pytest.TempPathFactory, item: WingmanItem) -> None:
    async def check() -> None:
        store = await Store.open(tmp_path_factory.mktemp("store") / "wingman.db")
        await store.put_item(item)
        assert await store.items() == [item]
        await store.close()

    asyncio.run(check())
