"""A terminal on a fake API."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands.fakes import FakeApi, Terminal


@pytest.fixture
def api() -> FakeApi:
    """A running server."""
    return FakeApi()


@pytest.fixture
def terminal(api: FakeApi, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Terminal:
    """Commands that talk to it."""
    return Terminal(api, capsys, tmp_path)
