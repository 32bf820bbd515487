"""Which model a request gets: by alias, by the names of downloads, by listener, or without any name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.fleet import endless
from tests.support.shop import PATH, REPO, Shop, a_shop
from wingman.errors import NotFound, Unavailable
from wingman.services.deployments import Start
from wingman.services.home import LOCAL

OTHER = "other.Q4_0.gguf"
STEM = PATH.removesuffix(".gguf")


@pytest.fixture
async def shop(tmp_path: Path, tiny_model: Path) -> AsyncIterator[Shop]:
    async with a_shop(tmp_path / "home", tiny_model) as shop:
        shop.add()
        shop.add(file_path=OTHER)
        yield shop


@pytest.mark.parametrize("name", [STEM, PATH, STEM.upper(), f"{REPO}:Q8_0", f"{REPO}:q8_0", f"{REPO}/{PATH}"])
async def test_a_downloaded_model_is_loaded_by_any_of_its_names(shop: Shop, name: str) -> None:
    assert await shop.use(name) == STEM
    assert await shop.use(name) == STEM
    await shop.inference.settle()
    item = shop.inference.item(STEM)
    assert (item.status, item.model_repo, item.file_path) == ("inferring", REPO, PATH)
    assert shop.statuses(STEM) == ["complete", "queued", "preparing", "inferring"]
    assert len(shop.fleet.loads) == 1


async def test_requests_for_one_model_by_many_names_share_a_load(shop: Shop) -> None:
    names = [STEM, PATH, f"{REPO}:Q8_0", STEM]
    assert set(await asyncio.gather(*map(shop.use, names))) == {STEM}
    assert shop.fleet.loads == [shop.stem()]


async def test_a_repository_with_one_file_goes_by_its_name(shop: Shop) -> None:
    shop.add("p/One-GGUF", "one.Q4_0.gguf")
    assert await shop.use("p/One-GGUF") == "one.Q4_0"
    with pytest.raises(NotFound):
        await shop.use(REPO)  # two files


async def test_an_alias_wins_over_the_name_of_a_download(shop: Shop) -> None:
    await shop.start(STEM, file_path=OTHER)
    assert await shop.use(STEM) == STEM
    assert shop.fleet.loads == [shop.stem(file_path=OTHER)]


async def test_a_file_that_runs_under_an_alias_is_not_loaded_twice(shop: Shop) -> None:
    await shop.start("chat")
    await shop.loaded("chat")
    assert await shop.use(STEM) == await shop.use(f"{REPO}:Q8_0") == "chat"
    assert shop.fleet.loads == [shop.stem()]


async def test_a_name_of_nothing_is_answered_with_what_is_loaded(shop: Shop) -> None:
    with pytest.raises(NotFound) as error:
        await shop.use("gpt-9")
    assert error.value.message == "no model is called 'gpt-9'; none is loaded"
    await shop.start("chat")
    await shop.start("code", file_path=OTHER)
    await shop.loaded("chat")
    await shop.loaded("code")
    for ask in (shop.use("gpt-9"), asyncio.to_thread(shop.inference.peek, "gpt-9")):
        with pytest.raises(NotFound) as error:
            await ask
        assert error.value.message == "no model is called 'gpt-9'; loaded: chat, code"
    await shop.inference.stop("code")
    with pytest.raises(NotFound, match=r"loaded: chat$"):
        await shop.use("gpt-9")


@pytest.mark.parametrize("name", [None, ""])
async def test_without_a_name_there_has_to_be_a_model(shop: Shop, name: str | None) -> None:
    with pytest.raises(NotFound, match="no model is loaded"):
        await shop.use(name)
    await shop.start("chat")
    assert await shop.use(name) == "chat"
    assert shop.inference.peek(name).name == "chat"


async def test_a_model_that_is_being_stopped_is_not_meant_without_a_name(shop: Shop) -> None:
    await shop.start("chat")
    await shop.loaded("chat")
    await shop.start("code", file_path=OTHER)
    code = await shop.loaded("code")
    assert await shop.use(None) == "code"  # the one started last
    shop.fleet.steps.clear()
    async with code.engine.submit(endless(code)):
        stop = asyncio.create_task(shop.inference.stop("code"))
        while shop.inference.item("code").status != "cancelling":  # noqa: ASYNC110 - a few turns of the loop
            await asyncio.sleep(0)
        assert await shop.use(None) == "chat"
        shop.fleet.steps.set()
        await stop
    assert shop.inference.item("code").status == "complete"


async def test_a_listener_has_a_model_of_its_own(shop: Shop) -> None:
    await shop.start("chat")
    await shop.start("code", file_path=OTHER, port=7001)
    assert await shop.use(None, "code") == "code"
    assert await shop.use("gpt-9", "code") == "code"
    assert await shop.use("chat", "code") == "chat"
    await shop.inference.stop("code")
    assert await shop.use(None, "code") == "code"  # as any model, it is loaded when it is wanted
    await shop.inference.reset("code")
    with pytest.raises(NotFound):
        await shop.use(None, "code")


async def test_a_stopped_model_is_loaded_when_a_request_names_it(shop: Shop) -> None:
    await shop.start("chat", context_size=64)
    await shop.loaded("chat")
    await shop.inference.stop("chat")
    served = await shop.loaded("chat")
    assert served.config.context.ctx_size == 128
    async with shop.restarted() as again:
        assert (await again.loaded("chat")).config.context.ctx_size == 128


async def test_a_model_that_nobody_uses_goes_and_comes_back(tmp_path: Path, tiny_model: Path) -> None:
    async with a_shop(tmp_path, tiny_model, idle_unload_s=0.01) as shop:
        shop.add()
        await shop.use(STEM)
        while shop.inference.item(STEM).status != "complete":  # noqa: ASYNC110 - a timer does that
            await asyncio.sleep(0)
        assert await shop.use(STEM) == STEM
        assert len(shop.fleet.loads) == 2


async def test_without_autoload_only_what_was_started_is_there(tmp_path: Path, tiny_model: Path) -> None:
    async with a_shop(tmp_path, tiny_model, models_autoload=False) as shop:
        shop.add()
        assert shop.inference.startable() == []
        for name in (STEM, PATH, f"{REPO}:Q8_0"):
            with pytest.raises(NotFound, match="none is loaded"):
                await shop.use(name)
        await shop.start("chat")
        assert await shop.use("chat") == "chat"
        assert shop.fleet.loads == [shop.stem()]
        store, downloads = shop.store, shop.downloads
    async with a_shop(tmp_path, tiny_model, store, downloads, models_autoload=False) as again:
        with pytest.raises(NotFound):
            await again.use("chat")
        assert again.inference.item("chat").status == "complete"


async def test_the_only_model_needs_no_name(tmp_path: Path, tiny_model: Path) -> None:
    async with a_shop(tmp_path / "home", tiny_model) as shop:
        with pytest.raises(NotFound, match="the request names none"):
            await shop.use(None)
        shop.add()
        assert await shop.use(None) == await shop.use("") == STEM
        await shop.inference.stop(STEM)
        shop.add(file_path=OTHER)
        with pytest.raises(NotFound, match="the request names none"):
            await shop.use(None)


async def test_without_autoload_what_was_stopped_stays_away(tmp_path: Path, tiny_model: Path) -> None:
    async with a_shop(tmp_path / "home", tiny_model, models_autoload=False) as shop:
        shop.add()
        await shop.start("chat")
        await shop.loaded("chat")
        await shop.inference.stop("chat")
        with pytest.raises(NotFound):
            await shop.use("chat")


async def test_what_may_be_named_and_is_not_active_is_listed(shop: Shop) -> None:
    shop.add("p/Coming-GGUF", "coming.gguf", "downloading")
    assert shop.inference.startable() == [STEM, "other.Q4_0"]
    await shop.start("chat")
    assert shop.inference.startable() == ["other.Q4_0"]
    await shop.inference.stop("chat")
    assert shop.inference.startable() == [STEM, "other.Q4_0"]


async def test_local_files_are_started_by_their_path(shop: Shop) -> None:
    (shop.home.models / "mine.gguf").hardlink_to(shop.model)
    await shop.inference.start(Start("mine", LOCAL, "mine.gguf"))
    assert await shop.use("mine") == "mine"


async def test_to_look_at_a_model_loads_nothing(shop: Shop) -> None:
    with pytest.raises(NotFound):
        shop.inference.peek(STEM)
    shop.fleet.hold(shop.stem())
    await shop.start("chat")
    with pytest.raises(Unavailable, match="Loading model"):
        shop.inference.peek("chat")
    assert shop.inference.loaded == []


async def test_the_monitor_sees_what_is_loaded(shop: Shop) -> None:
    await shop.start("chat")
    await shop.loaded("chat")
    (seen,) = shop.inference.monitored()
    assert (seen.alias, seen.placement.n_gpu_layers) == ("chat", 0)
    assert sum(seen.tensor_types.values()) > 0


async def test_it_is_ready_when_all_that_is_loaded_answers(shop: Shop) -> None:
    assert shop.inference.readiness() is None
    await shop.start("chat")
    await shop.loaded("chat")
    assert shop.inference.readiness() is None


async def test_the_model_of_the_flag_is_meant_by_every_other_name(tmp_path: Path, tiny_model: Path) -> None:
    async with a_shop(tmp_path, tiny_model, file=tiny_model) as shop:
        shop.add()
        deployment = await shop.inference.serve_file()
        gate = shop.fleet.hold("tiny")
        shop.residency.want(deployment)
        for name in ("tiny.gguf", "gpt-9", None):
            with pytest.raises(Unavailable, match="Loading model"):  # nobody waits for it
                await shop.inference.lease(name)
        with pytest.raises(Unavailable, match="Loading model"):
            shop.inference.check_loading()
        assert shop.inference.readiness() == "Loading model"
        gate.set()
        await shop.residency.join("tiny.gguf")
        assert {await shop.use(name) for name in ("tiny.gguf", "gpt-9", STEM, None)} == {"tiny.gguf"}
        shop.inference.check_loading()
        assert shop.inference.readiness() is None
        await shop.start("chat", port=7001)
        assert await shop.use(None, "chat") == "chat"  # by its listener
