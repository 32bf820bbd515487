"""The Hub's files: facts, ranges, redirects, tokens, and every refusal in words."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.support.hub import HubServer
from wingman.errors import Forbidden, NotFound, UpstreamFailure
from wingman.services.remote import Interrupted, RangeRefused, Remote, RemoteFile

REPO, PATH = "o/Tiny-GGUF", "sub dir/m+1.gguf"
CONTENT = bytes(range(256)) * 400


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.add_repo(REPO, {PATH: CONTENT, "small.txt": b"hello"})
        yield server


@pytest.fixture
async def remote(hub: HubServer) -> AsyncIterator[Remote]:
    remote = Remote(hub.url, "hf_secret", stall_s=5)
    yield remote
    await remote.aclose()


async def read(remote: Remote, file: RemoteFile, start: int = 0, etag: str = "") -> tuple[int, bytes, str]:
    async with remote.open(file, start, etag) as body:
        return body.start, b"".join([chunk async for chunk in body.chunks]), body.etag


async def test_facts_pin_the_commit_and_the_content(hub: HubServer, remote: Remote) -> None:
    file = await remote.locate(REPO, PATH)
    assert file.commit == hub.repos[REPO].revisions["main"]
    assert (file.size, file.sha256) == (len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    hub.add_repo(REPO, {PATH: b"newer"})
    assert (await read(remote, file))[1] == CONTENT


async def test_a_small_file_has_no_sha256_but_an_id(remote: Remote) -> None:
    file = await remote.locate(REPO, "small.txt")
    assert (file.size, file.sha256, len(file.etag)) == (5, "", 40)
    assert (await read(remote, file))[1] == b"hello"


async def test_a_range_is_asked_for_with_if_range(hub: HubServer, remote: Remote) -> None:
    file = await remote.locate(REPO, PATH)
    etag = (await read(remote, file))[2]
    assert await read(remote, file, 1000, etag) == (1000, CONTENT[1000:], etag)
    last = hub.file_requests(PATH)[-1]
    assert (last.range, last.headers["if-range"], last.status) == ("bytes=1000-", etag, 206)
    assert await read(remote, file, 1000, '"another"') == (0, CONTENT, etag)


async def test_the_token_stays_at_the_hub(hub: HubServer, remote: Remote) -> None:
    file = await remote.locate(REPO, PATH)
    await read(remote, file)
    assert hub.tokens_seen("hub") == {"hf_secret"}
    assert hub.tokens_seen("cdn") == set()


async def test_a_renamed_repository_is_followed(hub: HubServer, remote: Remote) -> None:
    hub.renamed["old/Name-GGUF"] = REPO
    file = await remote.locate("old/Name-GGUF", PATH)
    assert (await read(remote, file))[1] == CONTENT


async def test_redirects_end(hub: HubServer, remote: Remote) -> None:
    file = await remote.locate(REPO, PATH)
    hub.misbehave(REPO, PATH, redirect=f"{hub.url}/{REPO}/resolve/main/{PATH}", method="GET")
    with pytest.raises(UpstreamFailure, match="circles"):
        await read(remote, file)


@pytest.mark.parametrize("target", ["ftp://127.0.0.1/x", "http://[::1", "file:///etc/passwd"])
async def test_odd_redirects_are_refused(hub: HubServer, remote: Remote, target: str) -> None:
    file = await remote.locate(REPO, PATH)
    hub.misbehave(REPO, PATH, redirect=target, method="GET")
    with pytest.raises(UpstreamFailure):
        await read(remote, file)


def test_tls_is_never_left() -> None:
    from wingman.services.remote import _next_url

    assert _next_url("https://a/x", "//b/y") == "https://b/y"
    with pytest.raises(UpstreamFailure, match="safe"):
        _next_url("https://a/x", "http://a/x")


async def test_a_range_beyond_the_end(remote: Remote) -> None:
    file = await remote.locate(REPO, PATH)
    with pytest.raises(RangeRefused):
        await read(remote, file, len(CONTENT) + 5)


async def test_gated_says_what_to_do(hub: HubServer, remote: Remote) -> None:
    hub.add_repo("o/Gated-GGUF", {PATH: CONTENT}, gated=True, token="other")
    with pytest.raises(Forbidden, match=r"accept its terms at .*/o/Gated-GGUF.*HF_TOKEN"):
        await remote.locate("o/Gated-GGUF", PATH)


@pytest.mark.parametrize(
    ("repo", "path", "revision", "words"),
    [
        ("o/None-GGUF", PATH, "main", "no repository o/None-GGUF"),
        ("o/Bad.git", PATH, "main", "no repository o/Bad.git"),
        (REPO, "none.gguf", "main", "no file none.gguf"),
        (REPO, PATH, "v9", "no revision v9"),
    ],
)
async def test_what_is_not_there_is_named(
    remote: Remote, repo: str, path: str, revision: str, words: str
) -> None:
    with pytest.raises(NotFound, match=words):
        await remote.locate(repo, path, revision)


async def test_a_bad_token_is_told(hub: HubServer, remote: Remote) -> None:
    hub.rejected_tokens.add("hf_secret")
    with pytest.raises(Forbidden, match="refuses the token"):
        await remote.locate(REPO, PATH)


async def test_busy_servers_may_be_asked_again(hub: HubServer, remote: Remote) -> None:
    hub.misbehave(REPO, PATH, status=429, headers={"Retry-After": "7"}, times=1)
    with pytest.raises(Interrupted) as caught:
        await remote.locate(REPO, PATH)
    assert caught.value.retry_after_s == 7
    file = await remote.locate(REPO, PATH)
    hub.misbehave(REPO, PATH, status=403, where="cdn", times=1)  # a signed link that ran out
    with pytest.raises(Interrupted, match="file server answered with status 403"):
        await read(remote, file)


async def test_a_strange_status_is_final(hub: HubServer, remote: Remote) -> None:
    hub.misbehave(REPO, PATH, status=418)
    with pytest.raises(UpstreamFailure, match="418"):
        await remote.locate(REPO, PATH)


async def test_a_lying_length_is_no_answer(hub: HubServer, remote: Remote) -> None:
    file = await remote.locate(REPO, PATH)
    hub.misbehave(REPO, PATH, lie_length=5)
    with pytest.raises(Interrupted, match="promised"):
        await read(remote, file)


async def test_a_cut_body_and_silence_are_interruptions(hub: HubServer) -> None:
    remote = Remote(hub.url, "t", stall_s=0.2)
    try:
        file = await remote.locate(REPO, PATH)
        hub.misbehave(REPO, PATH, cut_after=70_000, times=1)
        with pytest.raises(Interrupted, match="cut"):
            await read(remote, file)
        hub.misbehave(REPO, PATH, stall_after=10, times=1)
        with pytest.raises(Interrupted, match="stopped sending"):
            await read(remote, file)
    finally:
        await remote.aclose()


async def test_nobody_there() -> None:
    remote = Remote("http://127.0.0.1:1", "t")
    with pytest.raises(Interrupted, match="could not be reached"):
        await remote.locate(REPO, PATH)
    await remote.aclose()


async def test_not_a_hub(hub: HubServer) -> None:
    remote = Remote(hub.cdn_url, "t")
    with pytest.raises(NotFound):
        await remote.locate(REPO, PATH)
    await remote.aclose()


async def test_offline_mode_is_named(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UpstreamFailure, match="HF_HUB_OFFLINE"):
        await remote.locate(REPO, PATH)


async def test_offline_asks_nothing(hub: HubServer) -> None:
    remote = Remote(hub.url, "t", is_offline=True)
    with pytest.raises(UpstreamFailure, match="--offline"):
        await remote.locate(REPO, PATH)
    assert hub.requests == []


async def test_a_token_that_no_header_can_hold(hub: HubServer) -> None:
    remote = Remote(hub.url, "a\nb")
    with pytest.raises(UpstreamFailure, match="token"):
        await remote.locate(REPO, PATH)
    await remote.aclose()


async def test_what_could_not_be_opened_is_closed_all_the_same(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise FileNotFoundError("certificates")

    monkeypatch.setattr("wingman.services.remote._open_client", fail)
    remote = Remote(hub.url, "t")
    with pytest.raises(Interrupted):
        await remote.locate(REPO, PATH)
    await remote.aclose()
