"""The Hub's API against a Hub on loopback: listings, facts, refusals in words, the cache, hostile answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.hub import HubServer
from wingman.errors import Forbidden, InvalidRequest, NotFound, UpstreamFailure
from wingman.services.hub import Hub, Listing, _read_listing

FILES = {"m-Q4_0.gguf": b"gguf", "README.md": b"text"}


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def connect(server: HubServer, tmp_path: Path, clock: Clock) -> Callable[..., Hub]:
    def build(token: str = "", **options: object) -> Hub:
        return Hub(server.url, token, tmp_path, clock=clock, **options)  # type: ignore[arg-type]

    return build


async def ids(hub: Hub) -> tuple[list[str], bool]:
    listing, is_stale = await hub.list_repos()
    return [repo.id for repo in listing.repos], is_stale


async def test_lists_what_is_named_so_and_holds_models(
    server: HubServer, connect: Callable[..., Hub]
) -> None:
    server.add_repo("a/one-GGUF", FILES, downloads=1, likes=7, gated=True)
    server.add_repo("a/two-gguf", FILES, downloads=2)
    server.add_repo("a/gguf-models", FILES, downloads=3)
    server.add_repo("a/empty-GGUF", {"README.md": b""}, downloads=4)
    listing, is_stale = await connect().list_repos()
    assert [repo.id for repo in listing.repos] == ["a/two-gguf", "a/one-GGUF"]
    assert not is_stale
    one = listing.repos[1]
    assert (one.files, one.downloads, one.likes, one.gated) == (("m-Q4_0.gguf",), 1, 7, True)
    assert one.created == "2026-01-02T03:04:05.000Z"
    assert len(server.requests) == 1


async def test_reads_pages_until_there_are_enough(server: HubServer, connect: Callable[..., Hub]) -> None:
    for index in range(9):
        server.add_repo(f"a/m{index}-GGUF", FILES, downloads=index)
    server.page_size = 2
    found, _ = await ids(connect(limit=5))
    assert found == [f"a/m{index}-GGUF" for index in (8, 7, 6, 5, 4)]
    assert len(server.requests) == 3


async def test_a_listing_is_kept_until_its_time_is_over(
    server: HubServer, connect: Callable[..., Hub], clock: Clock
) -> None:
    server.add_repo("a/one-GGUF", FILES)
    hub = connect()
    first, _ = await hub.list_repos()
    assert (await hub.list_repos())[0] is first
    assert await ids(connect()) == (["a/one-GGUF"], False)
    assert len(server.requests) == 1
    clock.now += 3601
    await ids(connect())
    assert len(server.requests) == 2


async def test_without_the_hub_the_old_listing_serves(
    server: HubServer, connect: Callable[..., Hub], clock: Clock
) -> None:
    server.add_repo("a/one-GGUF", FILES)
    await ids(connect())
    server.down = 500
    clock.now += 4000
    hub = connect()
    assert await ids(hub) == (["a/one-GGUF"], True)
    assert await ids(hub) == (["a/one-GGUF"], True)
    assert len(server.requests) == 2  # it is left alone for a while
    server.down = None
    clock.now += 61
    assert await ids(hub) == (["a/one-GGUF"], False)


async def test_nothing_cached_and_no_hub_is_an_empty_listing(
    server: HubServer, connect: Callable[..., Hub]
) -> None:
    hub = connect()
    server.close()
    assert await ids(hub) == ([], True)
    with pytest.raises(UpstreamFailure, match="can't be reached"):
        await hub.repo("a/one-GGUF")


@pytest.mark.parametrize("text", [b"", b"{", b'{"repos": 1}', b"\xff", b"[" * 100_000, b"{}"])
async def test_a_broken_cache_is_ignored(
    server: HubServer, connect: Callable[..., Hub], tmp_path: Path, text: bytes
) -> None:
    server.add_repo("a/one-GGUF", FILES)
    (tmp_path / "hub-listing.json").write_bytes(text)
    assert await ids(connect()) == (["a/one-GGUF"], False)
    assert json.loads((tmp_path / "hub-listing.json").read_bytes())["endpoint"] == server.url


async def test_a_folder_that_cannot_be_written_costs_only_the_cache(
    server: HubServer, tmp_path: Path
) -> None:
    server.add_repo("a/one-GGUF", FILES)
    assert await ids(Hub(server.url, "", tmp_path / "none")) == (["a/one-GGUF"], False)


async def test_facts_of_a_repository(server: HubServer, connect: Callable[..., Hub]) -> None:
    commit = server.add_repo("a/one-GGUF", FILES)
    server.add_repo("a/one-GGUF", {"new-Q4_0.gguf": b"newer"})
    server.renamed["a/old-GGUF"] = "a/one-GGUF"
    facts = await connect().repo("a/old-GGUF")
    assert facts.id == "a/one-GGUF"
    assert [(file.path, file.size, len(file.sha256)) for file in facts.files] == [("new-Q4_0.gguf", 5, 64)]
    old = await connect().repo("a/one-GGUF", commit)
    assert (old.commit, [file.path for file in old.files]) == (commit, ["m-Q4_0.gguf"])


async def test_refusals_say_what_to_do(server: HubServer, connect: Callable[..., Hub]) -> None:
    server.add_repo("a/secret-GGUF", FILES, private=True, token="good")
    server.add_repo("a/one-GGUF", FILES)
    with pytest.raises(NotFound, match="if it is private, set HF_TOKEN"):
        await connect().repo("a/secret-GGUF")
    assert (await connect("good").repo("a/secret-GGUF")).id == "a/secret-GGUF"
    with pytest.raises(NotFound, match="no such revision"):
        await connect().repo("a/one-GGUF", "v9")
    server.rejected_tokens.add("bad")
    with pytest.raises(Forbidden, match="check HF_TOKEN"):
        await connect("bad").repo("a/one-GGUF")
    with pytest.raises(InvalidRequest):
        await connect().repo("a/one-GGUF", "../main")
    for server.down, words in [(403, "does not let you"), (429, "fewer requests"), (503, "status 503")]:
        with pytest.raises((Forbidden, UpstreamFailure), match=words):
            await connect().repo("a/one-GGUF")


async def test_the_token_comes_from_the_environment_and_stays_on_the_hub(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add_repo("a/one-GGUF", FILES)
    monkeypatch.setenv("HF_TOKEN", "from-environment")
    await Hub(server.url, None, tmp_path).repo("a/one-GGUF")
    assert server.tokens_seen("hub") == {"from-environment"}
    with HubServer() as other:
        server.renamed["a/moved-GGUF"] = "a/one-GGUF"
        server.redirect_api = other.url
        with pytest.raises(NotFound):
            await Hub(server.url, None, tmp_path).repo("a/moved-GGUF")
        assert other.requests
        assert other.tokens_seen("hub") == set()


KEYS = [
    "siblings",
    "rfilename",
    "lfs",
    "size",
    "sha256",
    "sha",
    "downloads",
    "createdAt",
    "gated",
    "gguf",
    "total",
]
GOOD = {"id": "a/good-GGUF", "siblings": [{"rfilename": "m.gguf"}]}


@pytest.mark.parametrize(
    "entry",
    [
        None,
        {},
        {"id": 5},
        {"id": "../up-GGUF", "siblings": GOOD["siblings"]},
        {"id": "a/x-GGUF", "siblings": [{"rfilename": "../../m.gguf"}]},
        {"id": "a/x-GGUF", "siblings": [{"rfilename": "/m.gguf"}, {"rfilename": "a\nb.gguf"}]},
        {"id": "a/x-GGUF", "siblings": [{"rfilename": "x" * 300 + ".gguf"}]},
        {"id": "a/x-GGUF", "siblings": 3},
        {"id": "a/x-GGUF", "siblings": GOOD["siblings"], "likes": -1},
        {"id": "a/x-GGUF", "siblings": GOOD["siblings"], "downloads": 10**40},
    ],
)
async def test_hostile_entries_are_left_out(
    server: HubServer, connect: Callable[..., Hub], entry: object
) -> None:
    server.raw_listing = json.dumps([entry, GOOD]).encode()
    assert await ids(connect()) == (["a/good-GGUF"], False)


async def test_odd_facts_become_none(server: HubServer, connect: Callable[..., Hub]) -> None:
    facts = {"likes": None, "createdAt": "<script>", "gguf": {"total": None}, "gated": "manual"}
    server.raw_listing = json.dumps([GOOD | facts]).encode()
    listing, _ = await connect().list_repos()
    repo = listing.repos[0]
    assert (repo.likes, repo.created, repo.n_params, repo.gated) == (0, "", 0, True)


@pytest.mark.parametrize("body", [b"", b"{}", b"nonsense", b"[" * 10_000, b"[1, 2"])
async def test_an_answer_that_is_no_listing_is_a_failure(
    server: HubServer, connect: Callable[..., Hub], body: bytes
) -> None:
    server.raw_listing = body
    assert await ids(connect()) == ([], True)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=6),
    max_leaves=12,
)


@given(
    st.lists(st.fixed_dictionaries({"id": st.just("a/x-GGUF") | JSON}, optional=dict.fromkeys(KEYS, JSON)))
)
def test_any_listing_reads_as_something_that_can_be_kept(entries: list[object]) -> None:
    try:
        repos = _read_listing(json.dumps(entries).encode())
    except UpstreamFailure:
        return
    listing = Listing(tuple(repos))
    assert msgspec.json.decode(msgspec.json.encode(listing), type=Listing) == listing


async def test_an_endless_answer_is_cut(
    server: HubServer, connect: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wingman.services.hub._MAX_BODY_BYTES", 100)
    server.add_repo("a/one-GGUF", {f"m{index}.gguf": b"x" for index in range(10)})
    with pytest.raises(UpstreamFailure, match="too large"):
        await connect().repo("a/one-GGUF")


async def test_a_silent_hub_is_given_up(server: HubServer, connect: Callable[..., Hub]) -> None:
    server.api_delay_s = 30.0
    with pytest.raises(UpstreamFailure, match="did not answer"):
        await connect(timeout_s=0.2).repo("a/one-GGUF")
