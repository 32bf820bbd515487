"""The Hugging Face Hub's API: which repositories of GGUF files there are, and what one of them holds.

On the loop. huggingface_hub gives the client, the headers and the token (HF_TOKEN, then its token file) and is
imported on first use in a thread, as it is slow. Its HfApi is not used: its listing has no time-out, sleeps
half a minute over retries when there is no network, and reads bodies of any size. The listing is kept on disk,
so that without the Hub there is still a catalog. Names from the Hub are hostile: those that
`wingman.services.home` refuses are dropped.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final
from urllib.parse import quote

import msgspec
from msgspec import Struct

from wingman import __version__
from wingman.errors import Forbidden, InvalidRequest, NotFound, UpstreamFailure, WingmanError
from wingman.services.home import LOCAL, check_repo, stored_name

if TYPE_CHECKING:
    import httpx2

log = logging.getLogger("wingman.hub")

MAX_REPOS: Final = 1000
"""That a listing may ask for; the Hub gives no more on one page."""
_MAX_BODY_BYTES: Final = 64 * 2**20
_MAX_PAGES: Final = 5
_MAX_FILES: Final = 2000
"""Of one repository; the rest is left out."""
_RETRY_AFTER_S: Final = 60
"""After a failure the cached listing serves for so long before the Hub is asked again."""
_REVISION: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./+-]{0,199}", re.ASCII)
_HASH: Final = re.compile(r"[0-9a-f]{40,64}")
_TIME: Final = re.compile(r"[0-9TZ:.+-]{1,40}")
_UNREADABLE: Final = (msgspec.MsgspecError, ValueError, RecursionError)
"""What decoding raises."""
OFFLINE: Final = "the Hub is not asked: the server was started with --offline"
_WANTED: Final = ("siblings", "downloads", "likes", "createdAt", "lastModified", "gated", "gguf")


class RepoSummary(msgspec.Struct, frozen=True):
    """A repository in a listing."""

    id: str
    files: tuple[str, ...]
    """Paths of its GGUF files."""
    downloads: int = 0
    likes: int = 0
    created: str = ""
    updated: str = ""
    gated: bool = False
    n_params: int = 0
    """As the Hub read it from a file's header; 0: unknown."""
    context_length: int = 0


class Listing(msgspec.Struct, frozen=True):
    """Repositories, most downloaded first."""

    repos: tuple[RepoSummary, ...] = ()
    endpoint: str = ""
    fetched: float = 0.0
    """Unix seconds."""


class RepoFile(Struct, frozen=True):
    """A GGUF file of a repository."""

    path: str
    size: int
    sha256: str
    """"" when it is not in LFS."""


class RepoFacts(Struct, frozen=True):
    """A repository at one commit."""

    summary: RepoSummary
    commit: str
    files: tuple[RepoFile, ...]

    @property
    def id(self) -> str:
        """Its id, also when it was asked for by an old one."""
        return self.summary.id


_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class _Lfs(msgspec.Struct):
    sha256: str
    size: _Count


class _Sibling(msgspec.Struct):
    rfilename: str
    size: _Count | None = None
    lfs: _Lfs | None = None


class _Gguf(msgspec.Struct):
    total: _Count | None = None
    context_length: _Count | None = None


class _Model(msgspec.Struct, rename="camel"):
    """What is read of huggingface_hub's ModelInfo."""

    id: str
    siblings: list[_Sibling] | None = None
    sha: str | None = None
    downloads: _Count | None = None
    likes: _Count | None = None
    created_at: str | None = None
    last_modified: str | None = None
    gated: bool | str | None = None
    gguf: _Gguf | None = None


class Hub:
    """Reads the API. Calls may overlap; a listing is fetched by one of them.

    `endpoint` None: huggingface_hub's own (HF_ENDPOINT). `token` None: huggingface_hub's own; "": none.
    """

    def __init__(
        self,
        endpoint: str | None,
        token: str | None,
        cache_folder: Path,
        ttl_s: float = 3600.0,
        *,
        limit: int = 200,
        is_offline: bool = False,
        timeout_s: float = 10.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._endpoint, self._token = endpoint, token
        self._cache_file = cache_folder / "hub-listing.json"
        self._ttl_s, self._limit, self._timeout_s, self._clock = ttl_s, limit, timeout_s, clock
        self._is_offline = is_offline
        self._listing = Listing()
        self._failed = float("-inf")
        self._fetching = asyncio.Lock()

    async def list_repos(self) -> tuple[Listing, bool]:
        """The most downloaded repositories whose id ends in -GGUF, and whether that is out of date
        because the Hub can't be reached. The same object is returned until it changes."""
        async with self._fetching:
            if not self._listing.fetched:
                self._listing = await asyncio.to_thread(self._load, await self.endpoint())
            now = self._clock()
            if now - self._listing.fetched < self._ttl_s:
                return self._listing, False
            if self._is_offline or now - self._failed < _RETRY_AFTER_S:
                return self._listing, True
            try:
                self._listing = await self._fetch_listing()
            except WingmanError as error:
                log.warning("the catalog is out of date: %s", error.message)
                self._failed = now
                return self._listing, True
            return self._listing, False

    async def repo(self, repo_id: str, revision: str | None = None) -> RepoFacts:
        """A repository's GGUF files with sizes and hashes.

        Raises InvalidRequest, NotFound, Forbidden and UpstreamFailure, which say what to do.
        """
        if check_repo(repo_id) == LOCAL:
            raise NotFound("the models folder is not on the Hub")
        if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
            raise InvalidRequest("revision must be a branch, a tag or a commit", "revision")
        suffix = "" if revision is None else f"/revision/{quote(revision, safe='')}"
        url = f"{await self.endpoint()}/api/models/{repo_id}{suffix}"
        body, _ = await self._get(url, {"blobs": "true"}, repo_id)
        facts = await asyncio.to_thread(_read_repo, body)
        if facts is None:
            raise UpstreamFailure("the Hub's answer can't be read")
        return facts

    async def endpoint(self) -> str:
        """The Hub's address, without a slash at its end."""
        if self._endpoint is None:
            self._endpoint = str((await asyncio.to_thread(_import_library)).constants.ENDPOINT)
        return self._endpoint.rstrip("/")

    async def _fetch_listing(self) -> Listing:
        """Page after page until there are enough; then kept on disk."""
        endpoint, found = await self.endpoint(), list[RepoSummary]()
        params: dict[str, Any] = {"filter": "gguf", "search": "gguf", "sort": "downloads", "expand": _WANTED}
        url, query = f"{endpoint}/api/models", params | {"limit": min(self._limit, MAX_REPOS)}
        for _ in range(_MAX_PAGES):
            body, url = await self._get(url, query, None)
            found += await asyncio.to_thread(_read_listing, body)
            if len(found) >= self._limit or not url.startswith(f"{endpoint}/"):
                break
            query = {}
        listing = Listing(tuple(found[: self._limit]), endpoint, self._clock())
        await asyncio.to_thread(self._save, listing)
        return listing

    async def _get(self, url: str, params: Mapping[str, Any], repo_id: str | None) -> tuple[bytes, str]:
        """A body, and the address of the page after it, or ""."""
        if self._is_offline:
            raise UpstreamFailure(OFFLINE)
        await asyncio.to_thread(_import_library)
        import httpx2

        try:
            async with asyncio.timeout(self._timeout_s):
                client, headers = await asyncio.to_thread(self._connect)
                async with (
                    client,
                    client.stream("GET", url, params=params or None, headers=headers) as answer,
                ):
                    if answer.status_code != 200:
                        raise _refusal(answer.status_code, answer.headers, repo_id)
                    return await _read_body(answer), answer.links.get("next", {}).get("url", "")
        except TimeoutError as error:
            raise UpstreamFailure(f"the Hub did not answer within {self._timeout_s:g} s") from error
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            raise UpstreamFailure("the Hub can't be reached; check the network and HF_ENDPOINT") from error

    def _connect(self) -> tuple[httpx2.AsyncClient, dict[str, str]]:
        """A client and the headers. Blocks: certificates and the token lie in files."""
        token = self._token if self._token is None else self._token or False
        headers = _import_library().utils.build_hf_headers(
            token=token, library_name="wingman", library_version=__version__
        )
        return _import_library().get_async_session(), headers

    def _load(self, endpoint: str) -> Listing:
        """The listing on disk; an empty one when there is none that can be used. Blocks."""
        try:
            listing = msgspec.json.decode(self._cache_file.read_bytes(), type=Listing)
        except (OSError, *_UNREADABLE):
            return Listing()
        is_ours = listing.endpoint == endpoint and listing.fetched <= self._clock()
        return listing if is_ours else Listing()

    def _save(self, listing: Listing) -> None:
        """Blocks. A disk that can't take it costs a request later, nothing else."""
        partial = self._cache_file.with_suffix(".tmp")
        try:
            partial.write_bytes(msgspec.json.encode(listing))
            partial.replace(self._cache_file)
        except OSError as error:
            log.warning("can't keep the catalog in %s: %s", self._cache_file, error.strerror)


def _refusal(status: int, headers: Mapping[str, str], repo_id: str | None) -> WingmanError:
    """The error that an answer of the Hub other than 2xx means, in words; `headers` ignore case."""
    code, message = headers.get("X-Error-Code", ""), headers.get("X-Error-Message", "")
    name = repo_id or "it"
    if message.startswith("Invalid credentials"):
        return Forbidden("the Hub refuses the token; check HF_TOKEN")
    if code == "GatedRepo":
        terms = f"https://huggingface.co/{name}"
        return Forbidden(f"{name} is gated: accept its terms at {terms} and set HF_TOKEN to your token")
    if code == "RevisionNotFound":
        return NotFound(f"{name} has no such revision")
    if code == "EntryNotFound":
        return NotFound(f"{name} has no such file")
    if status in (401, 404) or code == "RepoNotFound":
        return NotFound(
            f"the Hub knows no {name}; if it is private, set HF_TOKEN to a token that may read it"
        )
    if status == 403:
        return Forbidden(f"the Hub does not let you read {name}; check the rights of your HF_TOKEN")
    if status == 429:
        return UpstreamFailure("the Hub wants fewer requests; try again later")
    return UpstreamFailure(f"the Hub answered with status {status}; try again later")


def _import_library() -> Any:
    """huggingface_hub, which takes long to import. Blocks."""
    import huggingface_hub
    import huggingface_hub.constants
    import huggingface_hub.utils

    return huggingface_hub


async def _read_body(answer: httpx2.Response) -> bytes:
    """A body, decompressed, up to a cap."""
    body = bytearray()
    async for chunk in answer.aiter_bytes():
        body += chunk
        if len(body) > _MAX_BODY_BYTES:
            raise UpstreamFailure("the Hub's answer is too large")
    return bytes(body)


def _read_listing(body: bytes) -> list[RepoSummary]:
    """The repositories of a page that hold GGUF files and are named so; entries that can't be read are left
    out."""
    try:
        entries = msgspec.json.decode(body, type=list[msgspec.Raw])
    except _UNREADABLE as error:
        raise UpstreamFailure("the Hub's answer can't be read") from error
    facts = (_read_repo(entry) for entry in entries)
    return [fact.summary for fact in facts if fact and fact.files and fact.id.lower().endswith("-gguf")]


def _read_repo(body: bytes | msgspec.Raw) -> RepoFacts | None:
    """A repository as the API describes it, without what is no GGUF file or oddly named; None: no such thing."""
    try:
        model = msgspec.json.decode(body, type=_Model)
    except _UNREADABLE:
        return None
    siblings = (model.siblings or ())[:_MAX_FILES]
    files = tuple(_facts(file) for file in siblings if _is_named_well(model.id, file.rfilename))
    gguf = model.gguf or _Gguf()
    summary = RepoSummary(
        model.id,
        tuple(file.path for file in files),
        model.downloads or 0,
        model.likes or 0,
        _matching(_TIME, model.created_at),
        _matching(_TIME, model.last_modified),
        bool(model.gated),
        gguf.total or 0,
        gguf.context_length or 0,
    )
    return RepoFacts(summary, _matching(_HASH, model.sha), files)


def _is_named_well(repo_id: str, path: str) -> bool:
    try:
        stored_name(repo_id, path)
    except InvalidRequest:
        return False
    return True


def _facts(file: _Sibling) -> RepoFile:
    size = file.lfs.size if file.lfs else file.size or 0
    return RepoFile(file.rfilename, size, _matching(_HASH, file.lfs.sha256 if file.lfs else None))


def _matching(pattern: re.Pattern[str], text: str | None) -> str:
    """The text, or "" when it does not look as it should."""
    return text if text and pattern.fullmatch(text) else ""
