"""What a download may become, and what is known of it: pure functions over DownloadItem.

The table is the only place that knows which status follows which. `Metadata` is the JSON text of an item; it
carries the facts of all its files, so that after a restart the download goes on at the pinned commit
without asking the Hub again.
"""

from __future__ import annotations

import enum
import re
from typing import Any, Final

import msgspec

from wingman.errors import Conflict, InvalidRequest
from wingman.services.gguf import GgufHeader
from wingman.services.home import check_file_path, check_repo, split_parts, stored_name
from wingman.services.items import DownloadItem, DownloadStatus
from wingman.services.quantization import quantization_of
from wingman.services.remote import RemoteFile

_SCHEME: Final = "hf://"
_REVISION: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,199}", re.ASCII)


class DownloadMove(enum.Enum):
    """What can happen to a download."""

    ENQUEUE = enum.auto()
    START = enum.auto()
    FINISH = enum.auto()
    FAIL = enum.auto()
    CANCEL = enum.auto()
    RECOVER = enum.auto()
    """The process that had it is gone."""
    LOSE = enum.auto()
    """Its file is gone."""
    ADOPT = enum.auto()
    """Its file lies there, put by someone."""


_IDLE: Final[tuple[DownloadStatus, ...]] = ("idle", "error", "cancelled", "unknown")
_ACTIVE: Final[tuple[DownloadStatus, ...]] = ("queued", "downloading")

TRANSITIONS: Final[dict[tuple[DownloadStatus, DownloadMove], DownloadStatus]] = {
    ("queued", DownloadMove.START): "downloading",
    ("downloading", DownloadMove.FINISH): "complete",
    ("complete", DownloadMove.LOSE): "error",
    **{(status, DownloadMove.ENQUEUE): "queued" for status in _IDLE},
    **{(status, DownloadMove.ADOPT): "complete" for status in _IDLE},
    **{(status, DownloadMove.CANCEL): "cancelled" for status in _IDLE + _ACTIVE},
    **{(status, DownloadMove.RECOVER): "queued" for status in _ACTIVE},
    **{(status, DownloadMove.FAIL): "error" for status in _ACTIVE},
}


class Metadata(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    """The `metadata` of a DownloadItem; what isn't known is left out."""

    etag: str = ""
    """Of the first file, as all that concern one file."""
    sha256: str = ""
    commit: str = ""
    revision: str = ""
    """As it was asked for."""
    quantization: str = ""
    architecture: str = ""
    parameter_count: int = 0
    context_length: int = 0
    files: tuple[RemoteFile, ...] = ()


def advance(item: DownloadItem, move: DownloadMove, **changes: Any) -> DownloadItem:
    """The item after a move; raises KeyError for one that its status does not allow."""
    changes = {"download_speed": "", "error": ""} | changes
    return msgspec.structs.replace(item, status=TRANSITIONS[item.status, move], **changes)


def at_bytes(item: DownloadItem, n_bytes: int, speed: str) -> DownloadItem:
    """The item with so many of its bytes here."""
    n_bytes = min(n_bytes, item.total_bytes)
    progress = round(n_bytes / item.total_bytes, 6) if item.total_bytes else 0.0
    return msgspec.structs.replace(item, downloaded_bytes=n_bytes, progress=progress, download_speed=speed)


def read_metadata(item: DownloadItem) -> Metadata:
    """What the item's text says; an unreadable one says nothing."""
    try:
        return msgspec.json.decode(item.metadata, type=Metadata)
    except (msgspec.MsgspecError, UnicodeEncodeError):
        return Metadata()


def located(files: tuple[RemoteFile, ...], revision: str) -> Metadata:
    """What is known once the Hub told where the files are."""
    first = files[0]
    return Metadata(
        etag=first.etag,
        sha256=first.sha256,
        commit=first.commit,
        revision=revision,
        quantization=quantization_of(first.path),
        files=files,
    )


def described(metadata: Metadata, header: GgufHeader) -> Metadata:
    """With what the file itself says."""
    return msgspec.structs.replace(
        metadata,
        architecture=header.architecture,
        parameter_count=header.n_params,
        context_length=header.context_length,
    )


def files_of(item: DownloadItem) -> tuple[RemoteFile, ...]:
    """The files that its metadata pins; () when they aren't known or aren't the item's."""
    files = read_metadata(item).files
    is_its = all(file.repo == item.model_repo for file in files)
    return files if is_its and tuple(file.path for file in files) == split_parts(item.file_path) else ()


def text_of(metadata: Metadata) -> str:
    """As an item holds it."""
    return msgspec.json.encode(metadata).decode()


def key_of(repo: str, file_path: str) -> tuple[str, str]:
    """What names a download, given any file of a set. Raises InvalidRequest."""
    path = split_parts(check_file_path(file_path))[0]
    stored_name(check_repo(repo), path)
    return repo, path


def parse_repo(text: str, revision: str | None) -> tuple[str, str]:
    """Repository and revision ("" when none is named) of `owner/name` or `hf://owner/name@revision`.

    Raises InvalidRequest.
    """
    named = ""
    if text.startswith(_SCHEME):
        text, _, named = text.removeprefix(_SCHEME).partition("@")
    if revision and named and revision != named:
        raise InvalidRequest("revision is given twice, and differs", "revision")
    revision = revision or named
    if revision and (_REVISION.fullmatch(revision) is None or ".." in revision):
        raise InvalidRequest("revision must be a branch, tag or commit", "revision")
    return text, revision


def check_revision(item: DownloadItem, revision: str) -> None:
    """Raises Conflict when another revision is asked for than the item has."""
    known = read_metadata(item)
    if revision and revision not in (known.revision, known.commit):
        at = known.commit or "an unknown commit"
        raise Conflict(f"{item.file_path} is here, or on its way, at {at}; reset it first")
