"""The fake Hub speaks as the real one does, judged by huggingface_hub itself and by RFC 9110."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.support.hub import HubServer

REPO, FILE = "owner/Model-GGUF", "model-Q4_K_M.gguf"
BYTES = bytes(range(256)) * 1000


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as hub:
        hub.add_repo(REPO, {FILE: BYTES, "README.md": b"# Model"})
        yield hub


@pytest.fixture
def web() -> Iterator[httpx2.Client]:
    with httpx2.Client(trust_env=False, timeout=20) as web:
        yield web


def file_url(hub: HubServer, path: str = FILE, revision: str | None = None) -> str:
    return hf_hub_url(REPO, path, revision=revision, endpoint=hub.url)


def test_lists_models_by_downloads_over_pages(hub: HubServer) -> None:
    for index in range(5):
        hub.add_repo(f"owner/m{index}", {FILE: b"x"}, downloads=index)
    hub.page_size = 2
    found = HfApi(hub.url, token=False).list_models(
        filter="gguf", sort="downloads", limit=5, expand=["siblings"]
    )
    models = list(found)
    assert [model.id for model in models] == ["owner/m4", "owner/m3", "owner/m2", "owner/m1", REPO]
    assert [sibling.rfilename for sibling in models[0].siblings or ()] == [FILE]
    assert models[0].downloads is None
    assert len(hub.requests) == 3


def test_describes_a_repository(hub: HubServer) -> None:
    info = HfApi(hub.url, token=False).model_info(REPO, files_metadata=True)
    assert info.siblings is not None
    model, readme = info.siblings
    assert model.lfs is not None
    assert (model.size, model.lfs.sha256) == (len(BYTES), hashlib.sha256(BYTES).hexdigest())
    assert readme.lfs is None
    assert info.sha == hub.repos[REPO].revisions["main"]
    tree = list(HfApi(hub.url, token=False).list_repo_tree(REPO, recursive=True))
    assert [entry.path for entry in tree] == [FILE, "README.md"]


def test_head_gives_commit_size_hash_and_place(hub: HubServer) -> None:
    facts = get_hf_file_metadata(file_url(hub), token=False)
    assert facts.commit_hash == hub.repos[REPO].revisions["main"]
    assert (facts.size, facts.etag) == (len(BYTES), hashlib.sha256(BYTES).hexdigest())
    assert facts.location.startswith(hub.cdn_url)
    small = get_hf_file_metadata(file_url(hub, "README.md"), token=False)
    assert (small.size, small.location) == (7, file_url(hub, "README.md"))


def test_old_commits_stay_readable(hub: HubServer, web: httpx2.Client) -> None:
    old = hub.repos[REPO].revisions["main"]
    new = hub.add_repo(REPO, {FILE: b"new"})
    assert old != new
    assert web.get(file_url(hub, revision=old), follow_redirects=True).content == BYTES
    assert web.get(file_url(hub), follow_redirects=True).content == b"new"


def test_errors_are_those_of_the_library(hub: HubServer) -> None:
    hub.add_repo("owner/gated", {FILE: b"x"}, gated=True, token="good")
    hub.add_repo("owner/secret", {FILE: b"x"}, private=True, token="good")
    gated = hf_hub_url("owner/gated", FILE, endpoint=hub.url)
    api = HfApi(hub.url, token=False)
    for token in (False, "other"):
        with pytest.raises(GatedRepoError):
            get_hf_file_metadata(gated, token=token)
    assert get_hf_file_metadata(gated, token="good").size == 1
    assert api.model_info("owner/gated").gated == "auto"
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("owner/secret")
    assert api.model_info("owner/secret", token="good").private
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("owner/none")
    with pytest.raises(RemoteEntryNotFoundError):
        get_hf_file_metadata(file_url(hub, "none.gguf"), token=False)
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="none")


def test_a_renamed_repository_redirects(hub: HubServer) -> None:
    hub.renamed["owner/old"] = REPO
    assert HfApi(hub.url, token=False).model_info("owner/old").id == REPO


def test_the_library_keeps_the_token_from_the_cdn(hub: HubServer, web: httpx2.Client) -> None:
    answer = web.get(file_url(hub), headers={"Authorization": "Bearer secret"}, follow_redirects=True)
    assert answer.content == BYTES
    assert hub.tokens_seen("hub") == {"secret"}
    assert hub.tokens_seen("cdn") == set()
    assert hub.bytes_sent(FILE) == len(BYTES)


@pytest.mark.parametrize(
    ("headers", "status", "body", "content_range"),
    [
        ({"Range": "bytes=255990-"}, 206, BYTES[255990:], "bytes 255990-255999/256000"),
        ({"Range": "bytes=2-4"}, 206, BYTES[2:5], "bytes 2-4/256000"),
        ({"Range": "bytes=256000-"}, 416, b"", "bytes */256000"),
        ({"Range": "bytes=2-", "If-Range": '"other"'}, 200, BYTES, None),
    ],
)
def test_ranges(
    hub: HubServer,
    web: httpx2.Client,
    headers: dict[str, str],
    status: int,
    body: bytes,
    content_range: str | None,
) -> None:
    answer = web.get(file_url(hub), headers=headers, follow_redirects=True)
    assert (answer.status_code, answer.content) == (status, body)
    assert answer.headers.get("content-range") == content_range


def test_if_range_holds_for_the_same_bytes(hub: HubServer, web: httpx2.Client) -> None:
    etag = web.get(file_url(hub), follow_redirects=True).headers["etag"]
    headers = {"Range": "bytes=1-", "If-Range": etag}
    assert web.get(file_url(hub), headers=headers, follow_redirects=True).status_code == 206
    hub.misbehave(REPO, FILE, change_etag=True)
    assert web.get(file_url(hub), headers=headers, follow_redirects=True).status_code == 200


def test_a_file_on_disk_is_served_in_chunks(hub: HubServer, web: httpx2.Client, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(BYTES)
    hub.add_repo(REPO, {FILE: path})
    assert web.get(file_url(hub), follow_redirects=True).content == BYTES


def test_faults_hit_as_often_as_ordered(hub: HubServer, web: httpx2.Client) -> None:
    url = file_url(hub)
    hub.misbehave(REPO, FILE, status=429, headers={"Retry-After": "3"}, times=1)
    refused = web.get(url, follow_redirects=True)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "3")
    hub.misbehave(REPO, FILE, status=503, where="cdn", times=1)
    assert web.get(url, follow_redirects=True).status_code == 503
    hub.misbehave(REPO, FILE, wrong_hash=True, times=1)
    assert web.get(url, follow_redirects=True).content == BYTES[:-1] + bytes([BYTES[-1] ^ 1])
    hub.misbehave(REPO, FILE, cut_after=1000, times=1)
    with pytest.raises(httpx2.RemoteProtocolError):
        web.get(url, follow_redirects=True)
    hub.misbehave(REPO, FILE, lie_length=len(BYTES) + 1, times=1)
    with pytest.raises(httpx2.RemoteProtocolError):
        web.get(url, follow_redirects=True)
    hub.misbehave(REPO, FILE, lie_length=10, times=1)
    assert web.get(url, follow_redirects=True).content == BYTES[:10]
    hub.misbehave(REPO, FILE, no_range=True, times=1)
    assert web.get(url, headers={"Range": "bytes=5-"}, follow_redirects=True).status_code == 200
    hub.misbehave(REPO, FILE, drip=(100_000, 0.001), times=1)
    assert web.get(url, follow_redirects=True).content == BYTES
    assert web.get(url, follow_redirects=True).content == BYTES
    assert [one.bytes_sent for one in hub.file_requests(FILE) if one.listener == "cdn"][2] == 1000


def test_a_stalled_body_ends_with_the_server(web: httpx2.Client) -> None:
    with HubServer() as hub:
        hub.add_repo(REPO, {FILE: BYTES})
        hub.misbehave(REPO, FILE, stall_after=10)
        with web.stream("GET", file_url(hub), follow_redirects=True) as answer:
            chunks = answer.iter_raw()
            assert next(chunks) == BYTES[:10]
            hub.close()
            with pytest.raises(httpx2.RemoteProtocolError):
                next(chunks)
