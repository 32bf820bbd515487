"""The catalog: what the Hub offers, what is downloaded and what lies in the models folder, as one list.

On the loop, but everything that takes time happens in a thread: the scan of the folder, headers, building and
encoding; the finished body is kept until something that it shows has changed. Building is pure.
"""

from __future__ import annotations

import asyncio
import time
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from wingman.errors import Forbidden, NotFound, UpstreamFailure
from wingman.services.gguf import GgufHeader
from wingman.services.home import LOCAL, Home, split_parts
from wingman.services.hub import Hub, RepoFacts, RepoSummary
from wingman.services.items import AIModel, DownloadableItem, DownloadItem, DownloadStatus
from wingman.services.localmodels import Key, LocalModels, ModelFile
from wingman.services.quantization import (
    bits_per_weight,
    is_model_file,
    parameter_count,
    parameter_text,
    quantization_name,
    quantization_of,
)

_MB: Final = 2**20
_SUFFIX: Final = "-gguf"
_FACTS_TTL_S: Final = 300.0
_STEP_MB: Final = 64
"""Changes of free memory below this are not shown."""
_MAX_FACTS: Final = 128
"""Repositories whose sizes are remembered."""


class Room(Struct, frozen=True):
    """Memory that models can take, in MB: the GPU's where there is one, else the machine's."""

    total: int = 0
    available: int = 0


class Sources(Struct, frozen=True):
    """All that the catalog shows, at one moment."""

    repos: tuple[RepoSummary, ...]
    sizes: Mapping[Key, int]
    """Of files on the Hub, where known."""
    statuses: Mapping[Key, DownloadStatus]
    local: Mapping[Key, ModelFile]
    room: Room
    endpoint: str


class _Asked(Struct, frozen=True):
    """What the Hub said of one repository, and when."""

    at: float
    repo: RepoSummary
    sizes: dict[Key, int]


class Catalog:
    """Answers what models there are.

    `downloads` gives all rows and `room` the memory; both are called on the loop and must not wait.
    `need_bytes` says what a model takes with the server's settings; it is called in a thread.
    """

    def __init__(
        self,
        home: Home,
        hub: Hub,
        *,
        downloads: Callable[[], Iterable[DownloadItem]],
        room: Callable[[], Room],
        need_bytes: Callable[[GgufHeader], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hub, self._downloads, self._room, self._clock = hub, downloads, room, clock
        self._local = LocalModels(home, need_bytes)
        self._facts: dict[str, _Asked] = {}
        self._showing = asyncio.Lock()
        self._shown: tuple[Sources, bool, tuple[AIModel, ...], bytes] | None = None

    async def models(self) -> tuple[tuple[AIModel, ...], bool]:
        """Every model, and whether the Hub could not be asked: then it is what was known before."""
        models, is_stale, _ = await self._show()
        return models, is_stale

    async def body(self) -> bytes:
        """The same as JSON."""
        return (await self._show())[2]

    async def repo_body(self, repo_id: str) -> bytes:
        """One repository as JSON, with the sizes of its files.

        Raises NotFound, Forbidden and UpstreamFailure when nothing is known of it.
        """
        repo, sizes, is_stale = await self._find_repo(repo_id)
        models = await asyncio.to_thread(build_models, await self._sources((repo,) if repo else (), sizes))
        named = tuple(model for model in models if model.id == (repo.id if repo else repo_id))
        if not named:
            raise NotFound(f"no model of {repo_id} is here")
        return await asyncio.to_thread(_encode, named, is_stale)

    async def _show(self) -> tuple[tuple[AIModel, ...], bool, bytes]:
        """From what was built last, or built anew by one of those who ask."""
        async with self._showing:
            listing, is_stale = await self._hub.list_repos()
            sources = await self._sources(listing.repos, self._known_sizes())
            if self._shown is None or self._shown[:2] != (sources, is_stale):
                models, body = await asyncio.to_thread(_build, sources, is_stale)
                self._shown = (sources, is_stale, models, body)
            return self._shown[2], is_stale, self._shown[3]

    async def _sources(self, repos: tuple[RepoSummary, ...], sizes: Mapping[Key, int]) -> Sources:
        local = await asyncio.to_thread(self._local.scan)
        endpoint, room = await self._hub.endpoint(), self._room()
        statuses = {_first(item.model_repo, item.file_path): item.status for item in self._downloads()}
        steady = replace(room, available=room.available - room.available % _STEP_MB)
        return Sources(repos, sizes, statuses, local, steady, endpoint)

    async def _find_repo(self, repo_id: str) -> tuple[RepoSummary | None, Mapping[Key, int], bool]:
        """A repository, the sizes of its files, and whether that is out of date; None: only what is here."""
        if repo_id == LOCAL:
            return None, {}, False
        try:
            facts = await self._fresh_facts(repo_id)
        except UpstreamFailure:
            if (known := await self._known_repo(repo_id)) is None and not self._is_here(repo_id):
                raise
            return known, self._known_sizes(), True
        except (NotFound, Forbidden):
            if not self._is_here(repo_id):
                raise
            return None, {}, False
        return facts.repo, facts.sizes, False

    async def _fresh_facts(self, repo_id: str) -> _Asked:
        asked = self._facts.get(repo_id)
        if asked is None or self._clock() - asked.at > _FACTS_TTL_S:
            facts = await self._hub.repo(repo_id)
            asked = _Asked(self._clock(), facts.summary, _sizes(facts))
            self._facts.pop(repo_id, None)
            self._facts[repo_id] = asked
            while len(self._facts) > _MAX_FACTS:
                del self._facts[next(iter(self._facts))]
        return asked

    async def _known_repo(self, repo_id: str) -> RepoSummary | None:
        """As it was heard of before."""
        if repo_id in self._facts:
            return self._facts[repo_id].repo
        listing, _ = await self._hub.list_repos()
        return next((repo for repo in listing.repos if repo.id == repo_id), None)

    def _known_sizes(self) -> dict[Key, int]:
        return dict(ChainMap(*(asked.sizes for asked in self._facts.values())))

    def _is_here(self, repo_id: str) -> bool:
        return any(item.model_repo == repo_id for item in self._downloads())


def build_models(sources: Sources) -> tuple[AIModel, ...]:
    """The list: as the Hub ordered it, then what it doesn't tell of, by name."""
    listed = {repo.id for repo in sources.repos}
    here: dict[str, list[str]] = {}
    own = (file.key for file in sources.local.values() if file.repo == LOCAL and file.kind != "other")
    rows = (key for key in sources.statuses if is_model_file(key[1]))
    for repo, path in sorted({*rows, *own}):
        here.setdefault(repo, []).append(path)
    unlisted = (RepoSummary(repo, ()) for repo in here if repo not in listed)
    return tuple(
        model
        for repo in (*sources.repos, *unlisted)
        if (model := _model(repo, here.get(repo.id, ()), sources))
    )


def _model(repo: RepoSummary, here: Iterable[str], sources: Sources) -> AIModel | None:
    """None for a repository without a whole model."""
    time.sleep(0)  # hands over to the loop's thread, which else waits for the interpreter's switch interval
    offered = set(_first_parts(repo.files))
    n_params = parameter_count(parameter_text(repo.id)) or repo.n_params
    items = tuple(
        _item(repo, path, sources, path in offered, n_params) for path in sorted(offered.union(here))
    )
    if not items:
        return None
    contexts = [file.context_length for path in here if (file := sources.local.get((repo.id, path)))]
    context = max(contexts, default=0) or repo.context_length
    needs = [item.normalized_quantized_mem_required for item in items]
    return AIModel(
        id=repo.id,
        name=_name(repo.id),
        max_length=context or 4096,
        token_limit=context or 65536,
        location="" if repo.id == LOCAL else f"{sources.endpoint}/{repo.id}",
        items=items,
        downloads=repo.downloads,
        likes=repo.likes,
        created=repo.created,
        updated=repo.updated,
        size=parameter_text(repo.id),
        is_inferable=any(item.is_inferable for item in items),
        total_memory=sources.room.total,
        available_memory=sources.room.available,
        normalized_quantized_mem_required=min((need for need in needs if need), default=0),
    )


def _item(
    repo: RepoSummary, path: str, sources: Sources, is_offered: bool, n_params: int
) -> DownloadableItem:
    key = repo.id, path
    status, file = sources.statuses.get(key), sources.local.get(key)
    is_model = file is not None and file.kind == "model"
    is_here = is_model and (repo.id == LOCAL or status == "complete")
    size = file.size if file and is_here else sources.sizes.get(key, 0)
    quant = quantization_of(path)
    need = -(-(file.need_bytes if file and is_here else _guess_bytes(size, n_params, quant)) // _MB)
    return DownloadableItem(
        model_repo=repo.id,
        model_repo_name=_name(repo.id),
        file_path=path,
        quantization=quant,
        quantization_name=quantization_name(quant),
        is_downloaded=is_here,
        available=is_here or is_offered,
        has_error=status == "error" or (file is not None and not is_model),
        location=file.location if file and is_here else "",
        is_inferable=0 < need <= sources.room.available,
        normalized_quantized_mem_required=need,
        size_bytes=size,
    )


def _name(repo_id: str) -> str:
    """The id without the suffix that all of them have."""
    return repo_id[: -len(_SUFFIX)] if repo_id.lower().endswith(_SUFFIX) else repo_id


def _first(repo: str, path: str) -> Key:
    return repo, split_parts(path)[0]


def _first_parts(files: Sequence[str]) -> Iterator[str]:
    """Single files and the first parts of whole sets; what is no language model is left out."""
    names = set(files)
    return (
        path
        for path in files
        if is_model_file(path) and (parts := split_parts(path))[0] == path and names.issuperset(parts)
    )


def _sizes(facts: RepoFacts) -> dict[Key, int]:
    """Bytes of each file or set, by its first part."""
    sizes: dict[Key, int] = {}
    for file in facts.files:
        key = _first(facts.id, file.path)
        sizes[key] = sizes.get(key, 0) + file.size
    return sizes


def _guess_bytes(size: int, n_params: int, quant: str) -> int:
    """Memory for a model that is not here: its weights; 0 while neither sizes nor names tell."""
    return size or round(n_params * bits_per_weight(quant) / 8)


def _build(sources: Sources, is_stale: bool) -> tuple[tuple[AIModel, ...], bytes]:
    models = build_models(sources)
    return models, _encode(models, is_stale)


def _encode(models: Iterable[AIModel], is_stale: bool) -> bytes:
    """One model at a time, as encoding holds the interpreter."""
    texts = b",".join(msgspec.json.encode(model) for model in models)
    return b'{"models":[' + texts + (b'],"stale":true}' if is_stale else b"]}")
