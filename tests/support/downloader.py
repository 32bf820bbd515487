"""A process that downloads one model and can be killed: `python -m tests.support.downloader HOME URL REPO FILE`.

Prints each status it announces, as JSON lines, and ends when the download has ended.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from wingman.services.downloads import Downloads
from wingman.services.home import Home
from wingman.services.items import ACTIVE_DOWNLOADS, DownloadItem
from wingman.services.remote import Remote
from wingman.services.store import Store


async def download(home: Home, url: str, repo: str, file_path: str) -> None:
    """Take up or begin the download, and wait for its end."""
    ended = asyncio.Event()

    def announce(item: DownloadItem) -> None:
        print(json.dumps([item.status, item.downloaded_bytes, item.error]), flush=True)
        if item.status not in ACTIVE_DOWNLOADS:
            ended.set()

    home.create()
    store, remote = await Store.open(home.database), Remote(url, "t")
    downloads = Downloads(home, store, remote, announce)
    await downloads.start()
    await downloads.enqueue(repo, file_path)
    await ended.wait()
    await downloads.close()
    await remote.aclose()
    await store.close()


if __name__ == "__main__":
    asyncio.run(download(Home(Path(sys.argv[1])), *sys.argv[2:5]))
