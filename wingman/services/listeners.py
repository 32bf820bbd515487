"""Listeners of single models: an alias has at most one. On the loop."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, Protocol

from wingman.errors import ConfigurationError, Conflict

_GRACE_S: Final = 1.0


class Listener(Protocol):
    """Something that listens at an address and port."""

    async def aclose(self, grace_s: float) -> None:
        """Stop listening."""


Listen = Callable[[str, str, int], Awaitable[Listener]]
"""Opens a listener for an alias at an address and port; raises ConfigurationError."""


class Listeners:
    """All of them, by alias."""

    def __init__(self, listen: Listen | None) -> None:
        self._listen = listen
        self._open: dict[str, Listener] = {}

    def get(self, alias: str) -> Listener | None:
        """The one of an alias."""
        return self._open.get(alias)

    async def open(self, alias: str, address: str, port: int) -> None:
        """Listen for an alias that has no listener. Raises Conflict when the port can't be had."""
        if self._listen is None:
            return
        try:
            self._open[alias] = await self._listen(alias, address, port)
        except ConfigurationError as error:
            raise Conflict(error.message) from None

    async def close(self, alias: str, listener: Listener | None) -> None:
        """Close a listener of an alias, unless it has another one by now."""
        if listener is not None and self._open.get(alias) is listener:
            del self._open[alias]
            await listener.aclose(_GRACE_S)

    async def aclose(self) -> None:
        """Close all."""
        for alias, listener in tuple(self._open.items()):
            await self.close(alias, listener)
