"""Files on the Hugging Face Hub: where one is, and its bytes from any position.

On the loop, with huggingface_hub's URLs, headers and async client; the library is slow to import, so it is
loaded off the loop at the first request. Redirects are followed here, one by one: a file's bytes come from
another host than the Hub, and the token must not go there. Every error of the library becomes one of ours:
`Interrupted` when trying again may help, NotFound, Forbidden or UpstreamFailure when it won't.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, Final

import msgspec

from wingman import __version__
from wingman.errors import Forbidden, NotFound, UpstreamFailure, WingmanError
from wingman.services.hub import OFFLINE

if TYPE_CHECKING:
    import httpx2

_MAX_REDIRECTS: Final = 5
_CONNECT_S: Final = 10.0
_MAX_FILE_BYTES: Final = 2**50
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_STRONG_ETAG: Final = re.compile(r'"[\x21\x23-\x7e]{1,512}"')
_CONTENT_RANGE: Final = re.compile(r"bytes (?:(\d{1,16})-\d{1,16}|\*)/(\d{1,16}|\*)")
_TRANSIENT: Final = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524})


class Interrupted(WingmanError):
    """It did not work this time; `retry_after_s` is what the server asked for, if it did."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RangeRefused(Interrupted):
    """The server says the file ends before the position asked for (416)."""


class RemoteFile(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One file at one commit."""

    repo: str
    path: str
    commit: str
    size: int
    """Bytes."""
    etag: str = ""
    """Names the content: the sha256, or for small files git's id of the blob."""
    sha256: str = ""
    """Hexadecimal; "" when the Hub doesn't tell it."""


class Body(msgspec.Struct, frozen=True):
    """An answer with bytes; `start` is 0 when the server chose to send everything."""

    start: int
    etag: str
    """A strong ETag as sent, for If-Range; "" when there is none."""
    chunks: AsyncIterator[bytes]


class Remote:
    """The Hub. `token` None: as huggingface_hub finds it, looked up anew for each request."""

    def __init__(
        self,
        endpoint: str = "https://huggingface.co",
        token: str | None = None,
        *,
        stall_s: float = 30.0,
        is_offline: bool = False,
    ) -> None:
        """`is_offline`: nothing is asked, everything raises UpstreamFailure."""
        self._is_offline = is_offline
        self._endpoint = endpoint.rstrip("/")
        self._token = token
        self._stall_s = stall_s
        self._opening: asyncio.Task[httpx2.AsyncClient] | None = None

    async def locate(self, repo: str, path: str, revision: str = "main") -> RemoteFile:
        """Facts of a file; the commit that the revision names now is pinned in them.

        Raises NotFound, Forbidden, UpstreamFailure, Interrupted.
        """
        with _translated():
            response, facts = await self._follow("HEAD", _Address(repo, path, revision), {})
            await response.aclose()
        try:
            size = int(facts.get("x-linked-size") or response.headers.get("content-length", "") or -1)
        except ValueError:
            size = -1
        commit = facts.get("x-repo-commit", "")
        if not 0 <= size <= _MAX_FILE_BYTES or not re.fullmatch(r"[0-9a-f]{7,64}", commit):
            raise UpstreamFailure(f"{self._endpoint} does not answer as the Hub does: no size or no commit")
        etag = (facts.get("x-linked-etag") or facts.get("etag", "")).removeprefix("W/").strip('"')[:256]
        sha256 = etag if _SHA256.fullmatch(etag) else ""
        return RemoteFile(repo=repo, path=path, commit=commit, size=size, etag=etag, sha256=sha256)

    @asynccontextmanager
    async def open(self, file: RemoteFile, start: int = 0, etag: str = "") -> AsyncIterator[Body]:
        """The bytes from `start`, if `etag` still names them, else all of them.

        Raises NotFound, Forbidden, UpstreamFailure, Interrupted, RangeRefused; also from the chunks.
        """
        headers = {"range": f"bytes={start}-"} if start else {}
        if start and etag:
            headers["if-range"] = etag
        with _translated():
            address = _Address(file.repo, file.path, file.commit)
            response, _ = await self._follow("GET", address, headers)
        try:
            start = _start_of(response, start, file.size)
            async with aclosing(_chunks(response)) as chunks:
                yield Body(start, _strong_etag(response), chunks)
        finally:
            with _translated():
                await response.aclose()

    async def aclose(self) -> None:
        """Close the connections, if any could be made."""
        if self._opening is not None:
            opening, self._opening = self._opening, None
            await asyncio.wait((opening,))
            if not opening.cancelled() and opening.exception() is None:
                await opening.result().aclose()

    async def _follow(
        self, method: str, address: _Address, extra: dict[str, str]
    ) -> tuple[httpx2.Response, dict[str, str]]:
        """The answer behind the redirects, and the headers that the Hub sent on the way, the first of each."""
        if self._is_offline:
            raise UpstreamFailure(OFFLINE)
        client = await self._client()
        url, headers = await asyncio.to_thread(self._first_request, address)
        facts: dict[str, str] = {}
        for _ in range(_MAX_REDIRECTS + 1):
            response = await self._send(client, method, url, headers | extra)
            if self._is_ours(url):
                facts = dict(response.headers) | facts
            if not response.has_redirect_location:
                return await self._accepted(response, address, url), facts
            await response.aclose()
            if method == "HEAD" and "x-linked-size" in facts:
                return response, facts
            url = _next_url(url, response.headers["location"])
            if not self._is_ours(url):
                headers = {name: value for name, value in headers.items() if name != "authorization"}
        raise UpstreamFailure("the Hub redirects in circles")

    async def _send(
        self, client: httpx2.AsyncClient, method: str, url: str, headers: dict[str, str]
    ) -> httpx2.Response:
        import httpx2

        timeout = httpx2.Timeout(self._stall_s, connect=_CONNECT_S, pool=None)
        request = client.build_request(method, url, headers=headers, timeout=timeout)
        async with asyncio.timeout(self._stall_s + _CONNECT_S):  # a head may drip for ever
            return await client.send(request, stream=True, follow_redirects=False)

    async def _accepted(self, response: httpx2.Response, address: _Address, url: str) -> httpx2.Response:
        """The answer if it is one of success, else it is closed and the reason raised."""
        if response.status_code in (200, 206):
            return response
        await response.aclose()
        raise self._refusal(response, address, is_ours=self._is_ours(url))

    def _refusal(self, response: httpx2.Response, address: _Address, *, is_ours: bool) -> WingmanError:
        status, code = response.status_code, response.headers.get("x-error-code", "")
        if status == 416:
            return RangeRefused("the file on the Hub is shorter than what is here")
        if status in _TRANSIENT or not is_ours:
            who = "the Hub" if is_ours else "the Hub's file server"
            return Interrupted(f"{who} answered with status {status}", _retry_after_s(response))
        if code == "GatedRepo":
            return Forbidden(
                f"{address.repo} is gated: accept its terms at {self._endpoint}/{address.repo}, "
                "then give a token with HF_TOKEN or `hf auth login`"
            )
        if code == "EntryNotFound":
            return NotFound(f"{address.repo} has no file {address.path} at {address.revision}")
        if code == "RevisionNotFound":
            return NotFound(f"{address.repo} has no revision {address.revision}")
        if code == "RepoNotFound" or status == 404:
            return NotFound(
                f"the Hub has no repository {address.repo}; if it is private, give a token with HF_TOKEN"
            )
        if status in (401, 403):
            return Forbidden("the Hub refuses the token; check HF_TOKEN or run `hf auth login`")
        return UpstreamFailure(f"the Hub answered with status {status}")

    def _is_ours(self, url: str) -> bool:
        return _origin(url) == _origin(self._endpoint)

    def _first_request(self, address: _Address) -> tuple[str, dict[str, str]]:
        """URL and headers. Blocks: the token may lie in a file."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        try:
            url = hf_hub_url(address.repo, address.path, revision=address.revision, endpoint=self._endpoint)
        except ValueError:
            raise NotFound(f"the Hub has no repository {address.repo}") from None
        headers = build_hf_headers(token=self._token, library_name="wingman", library_version=__version__)
        return url, headers | {"accept-encoding": "identity"}

    async def _client(self) -> httpx2.AsyncClient:
        if self._opening is None or (self._opening.done() and self._opening.exception()):
            self._opening = asyncio.create_task(asyncio.to_thread(_open_client))
        return await asyncio.shield(self._opening)


class _Address(msgspec.Struct, frozen=True):
    repo: str
    path: str
    revision: str


def _open_client() -> httpx2.AsyncClient:
    """Blocks: imports the library and reads certificates."""
    from huggingface_hub import get_async_session

    return get_async_session()


def _origin(url: str) -> tuple[str, str, int | None]:
    """By the parser that connects: another could be told another host. Raises httpx2.InvalidURL."""
    import httpx2

    parsed = httpx2.URL(url)
    return parsed.scheme, parsed.host, parsed.port


def _next_url(url: str, location: str) -> str:
    """Where a redirect leads; it may not leave TLS."""
    import httpx2

    target = str(httpx2.URL(url).join(location))
    schemes = {"https"} if _origin(url)[0] == "https" else {"http", "https"}
    if _origin(target)[0] not in schemes:
        raise UpstreamFailure("the Hub redirects to an address that is not safe")
    return target


def _start_of(response: httpx2.Response, start: int, size: int) -> int:
    """Position of the first byte of the body; raises Interrupted when it is not one to use."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise Interrupted("the Hub's file server sent the file compressed, which was not asked for")
    if response.status_code == 200:
        length = response.headers.get("content-length", "")
        if length and length != str(size):
            raise Interrupted(f"the Hub promised {size} bytes and its file server has {length[:20]}")
        return 0
    match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
    if not start or match is None or match[1] != str(start) or match[2] not in ("*", str(size)):
        raise Interrupted("the Hub's file server sent another part of the file than asked for")
    return start


def _strong_etag(response: httpx2.Response) -> str:
    """Only a strong one may be used in If-Range (RFC 9110, 13.1.5)."""
    etag: str = response.headers.get("etag", "")
    return etag if _STRONG_ETAG.fullmatch(etag) else ""


def _retry_after_s(response: httpx2.Response) -> float:
    text = response.headers.get("retry-after", "")
    return float(text) if re.fullmatch(r"\d{1,6}", text) else 0.0


async def _chunks(response: httpx2.Response) -> AsyncGenerator[bytes, None]:
    with _translated():
        async with aclosing(response.aiter_raw()) as chunks:
            async for chunk in chunks:
                yield chunk


@contextmanager
def _translated() -> Iterator[None]:
    """Turn the libraries' errors into ours."""
    try:
        yield
    except (WingmanError, asyncio.CancelledError):
        raise
    except Exception as error:
        raise _translate(error) from error


def _translate(error: Exception) -> Exception:
    import httpx2
    from huggingface_hub.errors import OfflineModeIsEnabled

    table: tuple[tuple[Any, WingmanError], ...] = (
        (OfflineModeIsEnabled, UpstreamFailure("HF_HUB_OFFLINE is set, so the Hub is not asked; unset it")),
        (httpx2.UnsupportedProtocol, UpstreamFailure("the address of the Hub is not an http(s) one")),
        (httpx2.InvalidURL, UpstreamFailure("the Hub redirects to something that is no address")),
        (httpx2.LocalProtocolError, UpstreamFailure("the token of the Hub holds characters it can't hold")),
        (httpx2.ConnectTimeout, Interrupted("the Hub could not be reached")),
        ((httpx2.TimeoutException, TimeoutError), Interrupted("the Hub stopped sending")),
        ((httpx2.ConnectError, httpx2.ProxyError), Interrupted("the Hub could not be reached")),
        ((httpx2.HTTPError, OSError), Interrupted("the connection to the Hub was cut")),
    )
    return next((ours for kinds, ours in table if isinstance(error, kinds)), error)
