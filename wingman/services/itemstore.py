"""What is asked of the place where WingmanItems are kept. `Store` keeps them in the database."""

from __future__ import annotations

from typing import Protocol

from wingman.services.items import WingmanItem


class ItemStore(Protocol):
    """Where items are kept."""

    async def items(self) -> list[WingmanItem]:
        """All of them."""

    async def put_item(self, item: WingmanItem) -> None:
        """Insert or replace one."""

    async def delete_item(self, alias: str) -> None:
        """Remove one."""

    async def setting(self, name: str, key: str) -> str | None:
        """A value that was put."""

    async def put_setting(self, name: str, key: str, value: str) -> None:
        """Keep a value."""


class NoStore:
    """Keeps nothing: of a server that serves one file only."""

    async def items(self) -> list[WingmanItem]:
        """None."""
        return []

    async def put_item(self, item: WingmanItem) -> None:
        """Nothing happens."""

    async def delete_item(self, alias: str) -> None:
        """Nothing happens."""

    async def setting(self, name: str, key: str) -> str | None:
        """None."""

    async def put_setting(self, name: str, key: str, value: str) -> None:
        """Nothing happens."""
