"""Log lines, and where they can't go."""

from __future__ import annotations

import logging
from pathlib import Path

import orjson
import pytest

from wingman.errors import ConfigurationError
from wingman.logs import JsonFormatter, TextFormatter, configure_logging


def test_a_request_can_not_forge_lines() -> None:
    record = logging.makeLogRecord({"name": "wingman", "msg": "a\n2026 INFO b\x1b[2J", "levelname": "INFO"})
    assert TextFormatter().format(record).endswith(r"wingman: a\n2026 INFO b\x1b[2J")
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert orjson.loads(line)["message"] == "a\n2026 INFO b\x1b[2J"


def test_a_log_file_that_can_not_be_written_says_so(tmp_path: Path) -> None:
    root = logging.getLogger()
    before = root.handlers[:]
    with pytest.raises(ConfigurationError, match="--log-file-size"):
        configure_logging("info", "text", tmp_path, 1000)
    assert root.handlers == before
