"""The objects of `/api`, the WebSocket and the database, in the original Wingman's words.

Frozen values: a service replaces its item, stores the new one, then announces it. JSON keys are
the fields in camel case; times are Unix seconds. Built and read on the loop.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

DownloadStatus = Literal["idle", "queued", "downloading", "complete", "error", "cancelled", "unknown"]
WingmanStatus = Literal["queued", "preparing", "inferring", "complete", "error", "cancelling", "unknown"]

ACTIVE_DOWNLOADS: Final = frozenset({"queued", "downloading"})
"""Statuses of downloads that will move by themselves."""
ACTIVE_INFERENCE: Final = frozenset({"queued", "preparing", "inferring", "cancelling"})
"""Statuses of items that hold or will hold a model."""


class Item(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Base of the objects below."""


class DownloadItem(Item, frozen=True, kw_only=True, rename="camel"):
    """One model file, or one set of split files, on its way into the models folder or there."""

    isa: Literal["DownloadItem"] = "DownloadItem"
    model_repo: str
    file_path: str
    status: DownloadStatus = "idle"
    total_bytes: int = 0
    downloaded_bytes: int = 0
    download_speed: str = ""
    progress: float = 0.0
    """0.0 to 1.0."""
    metadata: str = "{}"
    """A JSON text: etag, sha256, commit, quantization, architecture, ... once known."""
    error: str = ""
    created: int = 0
    updated: int = 0

    @property
    def key(self) -> tuple[str, str]:
        """What names it."""
        return self.model_repo, self.file_path


class WingmanItem(Item, frozen=True, kw_only=True, rename="camel"):
    """One model that runs, ran or is to run, under an alias."""

    isa: Literal["WingmanItem"] = "WingmanItem"
    alias: str
    status: WingmanStatus = "unknown"
    model_repo: str = ""
    file_path: str = ""
    address: str = ""
    port: int = 0
    """Of its own listener, else of the shared one; 0 while nothing listens."""
    context_size: int = 0
    """Tokens; 0: from the model."""
    gpu_layers: int = -1
    """-1: all that fit."""
    chat_template: str = ""
    force: bool = False
    error: str = ""
    created: int = 0
    updated: int = 0

    @property
    def key(self) -> tuple[str, str]:
        """What names its file."""
        return self.model_repo, self.file_path


class DownloadableItem(Item, frozen=True, kw_only=True, rename="camel"):
    """One file, or one set of split files, that a repository offers."""

    isa: Literal["DownloadableItem"] = "DownloadableItem"
    model_repo: str
    model_repo_name: str
    file_path: str
    quantization: str = ""
    quantization_name: str = ""
    is_downloaded: bool = False
    available: bool = True
    has_error: bool = False
    location: str = ""
    is_inferable: bool = False
    normalized_quantized_mem_required: int = 0
    """MB."""
    size_bytes: int = 0
    """Of all its files; 0 while unknown."""


class AIModel(Item, frozen=True, kw_only=True, rename="camel"):
    """One repository of GGUF files, or the local files without one."""

    isa: Literal["AIModel"] = "AIModel"
    id: str
    name: str
    max_length: int = 4096
    token_limit: int = 65536
    vendor: str = "meta"
    location: str = ""
    items: tuple[DownloadableItem, ...] = ()
    downloads: int = 0
    likes: int = 0
    created: str = ""
    updated: str = ""
    size: str = ""
    """Parameter count as its name tells it, such as 7B; "" when it doesn't."""
    iq_score: float = msgspec.field(default=-1.0, name="iQScore")
    eq_score: float = msgspec.field(default=-1.0, name="eQScore")
    is_inferable: bool = False
    total_memory: int = 0
    """MB."""
    available_memory: int = 0
    """MB."""
    normalized_quantized_mem_required: int = 0
    """MB, of the smallest item."""
