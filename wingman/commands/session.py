"""What one command has at hand: its arguments, where to print, and an API that opens when first asked for."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from wingman.commands.api import Api, CommandFailed
from wingman.commands.output import Output
from wingman.config import Config
from wingman.services.home import Home

ServeWith = Callable[[Config, Mapping[str, str]], int]
"""Become a server in the foreground that starts this item: the query of /api/inference/start."""


def plain_config(home: Path | None) -> Config:
    """Defaults, in the home of --home or WINGMAN_HOME."""
    config = Config()
    chosen = home or os.environ.get("WINGMAN_HOME")
    if not chosen:
        return config
    return dataclasses.replace(config, server=dataclasses.replace(config.server, home=Path(chosen)))


def _find_daemon(arguments: argparse.Namespace, home: Home) -> Api | None:
    from wingman.commands.daemon import find_daemon

    return find_daemon(arguments, home)


def _open_local(config: Config) -> Api:
    from wingman.commands.local import LocalApi

    return LocalApi(config)


@dataclass(frozen=True, slots=True)
class Hooks:
    """What commands get from outside; `wingman.cli` knows flags and serving, tests have fakes."""

    load_config: Callable[[Path | None], Config] = plain_config
    serve_with: ServeWith | None = None
    find_daemon: Callable[[argparse.Namespace, Home], Api | None] = _find_daemon
    open_local: Callable[[Config], Api] = _open_local


class Session:
    """One command's run. Close it in the end."""

    def __init__(self, arguments: argparse.Namespace, hooks: Hooks) -> None:
        self.arguments = arguments
        self.hooks = hooks
        self.output = Output(is_json=arguments.json)
        self._api: Api | None = None

    @cached_property
    def config(self) -> Config:
        """Of this home."""
        return self.hooks.load_config(self.arguments.home)

    @cached_property
    def home(self) -> Home:
        """The home folder."""
        return Home(self.config.server.home.expanduser())

    def daemon(self) -> Api:
        """The running server. Raises CommandFailed when there is none."""
        self._api = self._api or self.hooks.find_daemon(self.arguments, self.home)
        if self._api is None or not self._api.is_daemon:
            raise CommandFailed("no server is running: start one with wingman serve, or name it with --url")
        return self._api

    def api(self) -> Api:
        """The running server, or else the application in this process."""
        self._api = self._api or self.hooks.find_daemon(self.arguments, self.home)
        self._api = self._api or self.hooks.open_local(self.config)
        return self._api

    def close(self) -> None:
        """Let go of the API."""
        api, self._api = self._api, None
        if api is not None:
            api.close()
