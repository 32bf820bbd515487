"""Where a running server is: --url, else what it wrote to its runtime file, else the default ports if the home
folder is the default one: a server there may be of another user, but one of another home is not meant.

A runtime file may be stale, and another program may sit on a port: only who answers as Wingman counts.
It is asked without a key first, so that a stranger is not told one.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import orjson

from wingman.commands.api import CommandFailed
from wingman.commands.remote import Address, RemoteApi
from wingman.config import ServerConfig
from wingman.services.home import Home

DEFAULT: Final = Address("http://127.0.0.1:6568", "http://127.0.0.1:6567")
DEFAULT_HOME: Final = ServerConfig().home
_PROBE_S: Final = 3.0
_MAX_RUNTIME_FILE_BYTES: Final = 65536


def find_daemon(arguments: argparse.Namespace, home: Home) -> RemoteApi | None:
    """The running server, if any. Raises CommandFailed when the one named by --url does not answer."""
    admin_key = arguments.admin_key or _first("WINGMAN_ADMIN_KEY")
    api_key = arguments.api_key or _first("WINGMAN_API_KEY")
    url = arguments.url or os.environ.get("WINGMAN_URL")
    if url and "://" not in url:
        url = f"http://{url}"
    told = read_runtime_file(home.runtime_file)
    if url:
        address = told if told is not None and told.control == url.rstrip("/") else beside(url.rstrip("/"))
        if not is_wingman(address):
            raise CommandFailed(
                f"no Wingman answers at {url}: start it with wingman serve, or leave out --url"
            )
        return RemoteApi(address, admin_key, api_key)
    fallback = DEFAULT if home.root == DEFAULT_HOME.expanduser() else None
    found = next((one for one in (told, fallback) if one is not None and is_wingman(one)), None)
    return None if found is None else RemoteApi(found, admin_key, api_key)


def _first(name: str) -> str:
    """The first key of a variable that may hold several, as the server's may."""
    return os.environ.get(name, "").partition(",")[0]


def is_wingman(address: Address) -> bool:
    """Whether a server of ours answers there, be it that it wants a key."""
    try:
        status, body = RemoteApi(address).call("/api/inference", {}, timeout_s=_PROBE_S)
    except CommandFailed:
        return False
    known = "WingmanItems" if status == 200 else "error"
    return isinstance(body, dict) and known in body


def read_runtime_file(path: Path) -> Address | None:
    """The addresses a server wrote; None when there is no such file or it is damaged. Blocks."""
    try:
        with path.open("rb") as file:
            told = orjson.loads(file.read(_MAX_RUNTIME_FILE_BYTES))
        return Address(str(told["control"]).rstrip("/"), str(told["inference"]).rstrip("/"))
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError):
        return None


def beside(control: str) -> Address:
    """The addresses of a server known by its control address: inference is one port below, as by
    default, or at the same address when that names no port (a proxy before both)."""
    split = urlsplit(control)
    try:
        port = split.port
    except ValueError:
        port = None
    if port is None:
        return Address(control, control)
    host, _, _ = split.netloc.rpartition(":")
    return Address(control, split._replace(netloc=f"{host}:{port - 1}").geturl())
