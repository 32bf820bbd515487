"""kill -9 at any moment: what is on disk is true, nothing is lost, and little is fetched twice."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.downloads import names
from tests.support.hub import HubServer
from tools.tinymodel import write_llama
from wingman.services.home import Home, stored_name
from wingman.services.items import ACTIVE_DOWNLOADS
from wingman.services.partial import held_bytes
from wingman.services.store import Store

REPO, PATH = "o/Tiny-GGUF", "m.Q8_0.gguf"
N_KILLS = 4
BLOCK_BYTES = 2**20


async def stored(home: Home) -> tuple[str, int]:
    """Status and bytes of the only row."""
    store = await Store.open(home.database)
    row = (await store.downloads())[0]
    await store.close()
    return row.status, row.downloaded_bytes


def run(home: Home, hub: HubServer, kill_at: int | None) -> list[list[object]]:
    """One process, killed once so many bytes more were sent to it; the statuses that it told."""
    command = [sys.executable, "-m", "tests.support.downloader", str(home.root), hub.url, REPO, PATH]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(json.loads(line))
            if kill_at is not None and hub.bytes_sent(PATH) >= kill_at:
                process.kill()
                break
        process.stdout.read()
    return lines


async def test_killed_again_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = write_llama(tmp_path / "m.gguf").read_bytes() + os.urandom(8 * 2**20)
    home, chance = Home(tmp_path / "home"), random.Random(7)
    target = home.models / stored_name(REPO, PATH)
    with HubServer() as hub:
        hub.add_repo(REPO, {PATH: content})
        hub.throttle = 4_000_000
        for index in range(N_KILLS):
            sent = hub.bytes_sent(PATH)
            run(home, hub, sent + chance.randrange(1, len(content) // (N_KILLS + 1)))
            status, n_bytes = await stored(home)
            assert status in ACTIVE_DOWNLOADS
            assert n_bytes <= held_bytes(target) <= len(content)
            assert not target.exists(), f"after kill {index}"
        hub.throttle = None
        told = run(home, hub, None)
        assert told[-1] == ["complete", len(content), ""]
        assert await stored(home) == ("complete", len(content))
        assert target.read_bytes() == content
        assert names(home.models) == [target.name]
        again = hub.bytes_sent(PATH) - len(content)
    with capsys.disabled():
        print(f" [{N_KILLS} kills: {again} of {len(content)} bytes fetched again]", end="")
    assert again <= N_KILLS * 3 * BLOCK_BYTES  # what was on the way at each kill
