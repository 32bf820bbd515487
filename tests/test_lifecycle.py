"""What is left behind by servers that end early, and by commands."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from wingman import Wingman, configure
from wingman.errors import ConfigurationError
from wingman.services.home import Home
from wingman.services.items import WingmanItem
from wingman.services.store import Store

RUNNING = ("inference", "running")


async def remember(root: Path) -> None:
    Home(root).create()
    store = await Store.open(Home(root).database)
    await store.put_setting(*RUNNING, '["a"]')
    await store.close()


async def remembered(root: Path) -> str | None:
    store = await Store.open(Home(root).database)
    try:
        return await store.setting(*RUNNING)
    finally:
        await store.close()


async def test_a_server_that_never_got_up_leaves_what_is_to_be_restored(tmp_path: Path) -> None:
    await remember(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match="can't listen"):
            async with Wingman(configure(home=str(tmp_path), port=port, restore=True)):
                pass
    assert await remembered(tmp_path) == '["a"]'


async def test_a_command_leaves_what_is_to_be_restored(tmp_path: Path) -> None:
    await remember(tmp_path)
    async with Wingman(configure(home=str(tmp_path)), listen=False) as wingman:
        await wingman.close()
    assert await remembered(tmp_path) == '["a"]'


async def test_a_command_after_a_crash_leaves_what_is_to_be_restored(tmp_path: Path) -> None:
    Home(tmp_path).create()
    store = await Store.open(Home(tmp_path).database)
    for alias, status in (("a", "inferring"), ("b", "complete"), ("c", "preparing")):
        await store.put_item(WingmanItem(alias=alias, status=status))  # type: ignore[arg-type]
    await store.close()
    for _ in range(2):
        async with Wingman(configure(home=str(tmp_path)), listen=False) as wingman:
            assert [item.status for item in wingman.inference.items()] == ["error", "complete", "error"]
    assert await remembered(tmp_path) == '["a","c"]'


async def test_a_server_tells_what_ran_when_it_ended(tmp_path: Path) -> None:
    await remember(tmp_path)
    async with Wingman(configure(home=str(tmp_path), port=0, control_port=0)):
        pass
    assert await remembered(tmp_path) == "[]"


async def test_the_exit_file_ends_a_server(tmp_path: Path) -> None:
    async with Wingman(configure(home=str(tmp_path)), listen=False) as wingman:
        Home(tmp_path).exit_file.touch()
        await wingman.run()
        assert not Home(tmp_path).exit_file.exists()
