"""What downloaded models are called in requests. Pure.

The shortest name is the file's without `.gguf`; `owner/repo`, `owner/repo:QUANT` and `owner/repo/file`
work too, as far as they mean one file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from wingman.services.home import split_parts
from wingman.services.items import DownloadItem
from wingman.services.quantization import quantization_of


def names_of(item: DownloadItem) -> tuple[str, ...]:
    """All names of a downloaded model, the shortest first; of two models some may be the same."""
    base = split_parts(item.file_path)[0].rsplit("/", 1)[-1]
    path = f"{item.model_repo}/{item.file_path}"
    quant = quantization_of(item.file_path)
    tagged = (f"{item.model_repo}:{quant}",) if quant else ()
    return (base[: -len(".gguf")], base, *tagged, item.model_repo, path)


def find_download(name: str, items: Iterable[DownloadItem]) -> DownloadItem | None:
    """The one complete download that a name means, as it is written or else in any case; None when there is
    none or more than one."""
    here = [item for item in items if item.status == "complete"]
    found = [item for item in here if name in names_of(item)] or [
        item for item in here if name.lower() in (known.lower() for known in names_of(item))
    ]
    return found[0] if len(found) == 1 else None


def model_name(item: DownloadItem, items: Iterable[DownloadItem]) -> str:
    """The shortest name of a downloaded model that no other has."""
    others = [other for other in items if other.status == "complete" and other.key != item.key]
    taken = {known.lower() for other in others for known in names_of(other)}
    return next((name for name in names_of(item) if name.lower() not in taken), names_of(item)[-1])


def model_names(items: Iterable[DownloadItem]) -> dict[tuple[str, str], str]:
    """`model_name` of every complete model, by key: in one go, as each looks at the names of all others."""
    names = {item.key: names_of(item) for item in items if item.status == "complete"}
    n_users = Counter(name for some in names.values() for name in {name.lower() for name in some})
    return {
        key: next((name for name in some if n_users[name.lower()] == 1), some[-1])
        for key, some in names.items()
    }
