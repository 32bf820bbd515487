"""What the Hub of tests is made of: repositories and files, faults, and what was asked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

Listener = Literal["hub", "cdn"]
_CHUNK = 64 * 1024


@dataclass(slots=True)
class Exchange:
    """A request and what it got."""

    listener: Listener
    method: str
    path: str
    """Decoded, without the query."""
    query: dict[str, list[str]]
    headers: dict[str, str]
    """Names in lower case."""
    status: int = 0
    bytes_sent: int = 0
    """Of the body."""

    @property
    def range(self) -> str | None:
        """Its Range header."""
        return self.headers.get("range")

    @property
    def token(self) -> str | None:
        """The token it carries."""
        return self.headers.get("authorization", "").removeprefix("Bearer ") or None


@dataclass(slots=True)
class Fault:
    """How one file misbehaves; each None or False means: as it should."""

    status: int | None = None
    """Answered instead of the file, by `where`."""
    where: Listener = "hub"
    headers: Mapping[str, str] = field(default_factory=dict)
    """Sent with `status`, such as Retry-After."""
    method: str | None = None
    """Only requests of this method; None: HEAD and GET."""
    cut_after: int | None = None
    """The connection ends after so many bytes of the body."""
    drip: tuple[int, float] | None = None
    """So many bytes at a time, with so many seconds between them."""
    stall_after: int | None = None
    """Nothing comes after so many bytes, until the server closes."""
    wrong_hash: bool = False
    """The last byte of the file is another than its sha256 says."""
    lie_length: int | None = None
    """Content-Length of a whole body; fewer bytes end it early, more break it."""
    lie_size: int | None = None
    """X-Linked-Size."""
    change_etag: bool = False
    """Every answer of the bytes has a new ETag, so If-Range never holds."""
    no_range: bool = False
    """Ranges are ignored: always 200 and everything."""
    redirect: str | None = None
    """Where the bytes are said to be, instead of the CDN."""
    times: int | None = None
    """Requests that it hits; None: all."""

    def hits(self, listener: Listener, method: str, serves_bytes: bool) -> bool:
        """Whether it concerns a request. A fault of bytes counts where the bytes are."""
        if self.method is not None and method != self.method:
            return False
        if self.status is not None:
            return listener == self.where
        if self.redirect is not None or self.lie_size is not None:
            return listener == "hub"
        return serves_bytes and method == "GET"


NO_FAULT = Fault()


@dataclass(frozen=True, slots=True)
class File:
    """One version of a file."""

    content: bytes | Path
    size: int
    sha256: str
    blob_id: str
    is_lfs: bool

    @classmethod
    def of(cls, path: str, content: bytes | Path) -> Self:
        """Hash it; a Path is read in chunks and must not change afterwards."""
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        sha256, sha1 = hashlib.sha256(), hashlib.sha1(f"blob {size}\0".encode())
        for chunk in chunks(content, 0, size):
            sha256.update(chunk)
            sha1.update(chunk)
        is_lfs = path.lower().endswith(".gguf") or size > 10 * 2**20
        return cls(content, size, sha256.hexdigest(), sha1.hexdigest(), is_lfs)

    @property
    def lfs(self) -> dict[str, Any] | None:
        """As the model's info has it."""
        return {"sha256": self.sha256, "size": self.size, "pointerSize": 134} if self.is_lfs else None


@dataclass(slots=True)
class Repo:
    """A repository with all its commits."""

    id: str
    commits: dict[str, dict[str, File]]
    revisions: dict[str, str]
    """Branch or tag -> commit."""
    gated: bool
    private: bool
    token: str | None
    """The only one that may read it, when gated or private."""
    downloads: int
    likes: int

    def commit(self, revision: str) -> str | None:
        """The commit that a branch, tag or commit names."""
        commit = self.revisions.get(revision, revision)
        return commit if commit in self.commits else None


def chunks(content: bytes | Path, start: int, length: int) -> Iterator[bytes]:
    """A part of a file, at most 64 KiB at a time."""
    if isinstance(content, bytes):
        for position in range(start, start + length, _CHUNK):
            yield content[position : min(position + _CHUNK, start + length)]
        return
    with content.open("rb") as file:
        file.seek(start)
        while length > 0 and (chunk := file.read(min(_CHUNK, length))):
            length -= len(chunk)
            yield chunk
