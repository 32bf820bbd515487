"""Log set-up: records go through a bounded queue to one writer thread, so the loop never waits for
a terminal or a disk. When the queue is full, records are dropped and counted.
"""

from __future__ import annotations

import logging
import queue
import sys
import time
from logging.handlers import QueueHandler, QueueListener, RotatingFileHandler
from pathlib import Path
from typing import Any

import orjson

from wingman.errors import ConfigurationError

MAX_QUEUED_RECORDS = 10_000
N_OLD_FILES = 3
_QUIET = ("httpx2", "httpcore2")
"""Libraries that log the address of every request: the Hub's are signed, so whoever reads one may use it."""
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class _DroppingQueueHandler(QueueHandler):
    n_dropped = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        record.msg, record.args = record.getMessage(), None
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.n_dropped += 1


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and what was passed as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without a line break."""
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_text or record.exc_info:
            entry["exception"] = record.exc_text or self.formatException(record.exc_info)  # type: ignore[arg-type]
        return orjson.dumps(entry, default=str).decode()


class TextFormatter(logging.Formatter):
    """A line for people. Control characters are escaped: a request can't forge log lines."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%Y-%m-%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The line with control characters of the message escaped."""
        record.message = "".join(c if c.isprintable() else repr(c)[1:-1] for c in record.message)
        return super().formatMessage(record)


def configure_logging(level: str, form: str, file: Path | None = None, n_bytes: int = 0) -> QueueListener:
    """Send all records of `level` and above to standard error as "text" or "json", and to a file that is
    rotated at `n_bytes`; the caller stops the returned listener at exit, which writes what is queued. Raises
    ConfigurationError when the file can't be written."""
    writers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if file is not None:
        writers.append(_file_writer(file, n_bytes))
    for writer in writers:
        writer.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    records: queue.Queue[logging.LogRecord] = queue.Queue(MAX_QUEUED_RECORDS)
    root = logging.getLogger()
    for handler in root.handlers[:]:
        root.removeHandler(handler)
    root.addHandler(_DroppingQueueHandler(records))
    root.setLevel(level.upper())
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.raiseExceptions = False  # a full disk must not bury standard error under tracebacks
    listener = QueueListener(records, *writers)
    listener.start()
    return listener


def _file_writer(file: Path, n_bytes: int) -> logging.Handler:
    try:
        return RotatingFileHandler(file, maxBytes=n_bytes, backupCount=N_OLD_FILES, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(
            f"can't write {file}: {error.strerror}; --log-file-size 0 does without a log file"
        ) from error
