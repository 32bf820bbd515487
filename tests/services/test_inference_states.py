"""What becomes of models under aliases: each status is stored, then told, and is true after a crash."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest

from tests.support.fleet import endless
from tests.support.shop import PATH, REPO, Shop, a_shop
from wingman.errors import Conflict, InsufficientRoom, InvalidRequest, ModelLoadFailure, NotFound
from wingman.services.items import WingmanItem

OTHER = "other.Q4_0.gguf"


@pytest.fixture
async def shop(tmp_path: Path, tiny_model: Path) -> AsyncIterator[Shop]:
    async with a_shop(tmp_path / "home", tiny_model) as shop:
        shop.add()
        shop.add(file_path=OTHER)
        yield shop


# -- statuses -------------------------------------------------------------------------------------


async def test_from_start_to_stop(shop: Shop) -> None:
    item, is_new = await shop.start("chat", context_size=100, gpu_layers=3, chat_template="chatml")
    assert is_new
    assert (item.status, item.model_repo, item.file_path) == ("queued", REPO, PATH)
    assert (item.context_size, item.gpu_layers, item.chat_template) == (100, 3, "chatml")
    assert item.created == item.updated > 0
    await shop.loaded("chat")
    assert (await shop.inference.stop("chat")).status == "complete"
    told = [(item.status, progress) for item, progress in shop.told]
    assert told == [
        ("queued", None), ("preparing", 0.0), ("inferring", None), ("cancelling", None), ("complete", None),
    ]  # fmt: skip
    assert shop.store.rows["chat"] == shop.inference.item("chat") == shop.told[-1][0]


async def test_progress_is_told_and_not_stored(shop: Shop) -> None:
    gate = shop.fleet.hold(shop.stem())
    await shop.start("chat")
    while not any(progress for _, progress in shop.told):  # noqa: ASYNC110 - another thread loads
        await asyncio.sleep(0)
    n_puts = shop.store.n_puts
    n_told = len(shop.told)
    while len(shop.told) == n_told:  # noqa: ASYNC110 - another thread loads
        await asyncio.sleep(0)
    assert shop.store.n_puts == n_puts
    gate.set()


async def test_a_start_of_what_is_active_changes_nothing(shop: Shop) -> None:
    await shop.start("chat")
    item, is_new = await shop.start("chat", file_path=OTHER)
    assert (item.file_path, is_new) == (PATH, False)
    lease = await shop.loaded("chat")
    assert (await shop.start("chat"))[1] is False
    assert shop.inference.peek("chat") is lease


async def test_a_failed_load_says_why_and_may_be_tried_again(shop: Shop) -> None:
    shop.fleet.failures[shop.stem()] = ModelLoadFailure("no such weights")
    await shop.start("chat")
    with pytest.raises(ModelLoadFailure):
        await shop.inference.lease("chat")
    await shop.inference.settle()
    item = shop.inference.item("chat")
    assert (item.status, item.error) == ("error", "no such weights")
    shop.fleet.failures.clear()
    again, is_new = await shop.start("chat")
    assert (again.status, again.error, again.created, is_new) == ("queued", "", item.created, True)
    await shop.loaded("chat")
    assert shop.statuses("chat")[-3:] == ["queued", "preparing", "inferring"]


async def test_an_engine_that_dies_is_an_error_once(shop: Shop) -> None:
    await shop.start("chat")
    served = await shop.loaded("chat")
    shop.fleet.loaded[-1].is_dying = True
    async with served.engine.submit(endless(served)) as stream:
        with pytest.raises(Exception, match="the model runtime failed"):
            await stream.results()
    while shop.inference.item("chat").status != "error":  # noqa: ASYNC110 - an engine's end has no event for this
        await asyncio.sleep(0)
    assert "engine stopped" in shop.inference.item("chat").error
    assert shop.statuses("chat")[-2:] == ["inferring", "error"]
    assert (await shop.start("chat"))[1]
    await shop.loaded("chat")


async def test_a_stop_of_what_does_not_run_leaves_its_status(shop: Shop) -> None:
    shop.fleet.failures[shop.stem()] = ModelLoadFailure("no such weights")
    await shop.start("chat")
    with pytest.raises(ModelLoadFailure):
        await shop.inference.lease("chat")
    assert (await shop.inference.stop("chat")).status == "error"
    with pytest.raises(NotFound, match="'nobody'"):
        await shop.inference.stop("nobody")


async def test_a_stop_while_it_loads_is_no_error(shop: Shop) -> None:
    shop.fleet.hold(shop.stem())
    await shop.start("chat")
    item = await shop.inference.stop("chat")
    assert (item.status, item.error) == ("complete", "")


async def test_the_model_that_makes_room_is_complete(shop: Shop) -> None:
    async with a_shop(shop.home.root.parent / "second", shop.model, n_max=1) as small:
        small.add()
        small.add(file_path=OTHER)
        await small.start("first")
        await small.loaded("first")
        await small.start("second", file_path=OTHER)
        await small.loaded("second")
        await small.inference.settle()
        statuses = {item.alias: item.status for item in small.inference.items()}
        assert statuses == {"first": "complete", "second": "inferring"}


async def test_a_reset_forgets(shop: Shop) -> None:
    await shop.start("chat")
    item = await shop.inference.reset("chat")
    assert item.status == "complete"
    assert shop.told[-1][0] == item
    assert (shop.inference.items(), shop.store.rows) == ([], {})
    with pytest.raises(NotFound):
        await shop.inference.reset("chat")


async def test_items_are_listed_oldest_first(shop: Shop) -> None:
    shop.store.rows = {
        alias: WingmanItem(alias=alias, status="complete", created=created)
        for alias, created in (("b", 5), ("c", 3), ("a", 5))
    }
    async with shop.restarted() as again:
        assert [item.alias for item in again.inference.items()] == ["c", "a", "b"]


# -- what can't be started ------------------------------------------------------------------------


@pytest.mark.parametrize("alias", ["", " a", "a ", "a\nb", "a\u202eb", "x" * 1000])
async def test_an_alias_is_short_and_printable(shop: Shop, alias: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        await shop.start(alias)
    assert error.value.field == "alias"
    assert shop.store.rows == {}


def lose(shop: Shop) -> None:
    shop.path().unlink()


def damage(shop: Shop) -> None:
    shop.path().unlink()
    shop.path().write_bytes(b"GGUF" + bytes(100))


def leave_incomplete(shop: Shop) -> None:
    shop.downloads[0] = msgspec.structs.replace(shop.downloads[0], status="downloading")


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lose, NotFound, "not in the models folder"),
        (damage, InvalidRequest, "not a usable model"),
        (leave_incomplete, NotFound, "not downloaded completely"),
        (lambda shop: shop.downloads.clear(), NotFound, "not downloaded completely"),
    ],
)
async def test_a_model_has_to_be_here_and_whole(
    shop: Shop, spoil: Callable[[Shop], None], error: type[Exception], message: str
) -> None:
    spoil(shop)
    with pytest.raises(error, match=message):
        await shop.start("chat")
    assert (shop.inference.items(), shop.told) == ([], [])


async def test_what_does_not_fit_needs_force(shop: Shop) -> None:
    shop.capacity = 1000
    with pytest.raises(InsufficientRoom, match="force=true"):
        await shop.start("chat")
    assert shop.inference.items() == []
    item, _ = await shop.start("chat", force=True)
    assert item.force
    await shop.loaded("chat")


async def test_what_fits_once_another_has_left_is_started(shop: Shop) -> None:
    await shop.start("first")
    await shop.loaded("first")
    (first,) = shop.inference.monitored()
    shop.capacity = int(first.placement.required_mb * 1.5e6)
    await shop.start("second", file_path=OTHER)
    await shop.loaded("second")
    assert len(shop.fleet.in_memory) == 1


async def test_a_port_that_is_taken_is_a_conflict(shop: Shop) -> None:
    shop.taken.add(7001)
    with pytest.raises(Conflict, match="can't listen"):
        await shop.start("chat", port=7001)
    assert (shop.inference.items(), shop.fleet.loads) == ([], [])


async def test_an_item_shows_where_it_is_reached(shop: Shop) -> None:
    shop.inference.note_address("127.0.0.1", 6567)
    shared, _ = await shop.start("shared")
    assert (shared.address, shared.port, shop.listening) == ("127.0.0.1", 6567, {})
    own, _ = await shop.start("own", file_path=OTHER, port=7001, address="::1")
    assert (own.address, own.port) == ("::1", 7001)
    assert shop.listening == {"own": ("::1", 7001)}
    await shop.inference.stop("own")
    assert shop.listening == {}


async def test_a_file_is_in_use_while_an_item_of_it_is_active(shop: Shop) -> None:
    assert not shop.inference.in_use(REPO, PATH)
    await shop.start("chat")
    assert shop.inference.in_use(REPO, PATH)
    assert not shop.inference.in_use(REPO, OTHER)
    await shop.inference.stop("chat")
    assert not shop.inference.in_use(REPO, PATH)


# -- after a crash, and after an end ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "error"),
    [
        ("queued", "failed to load"),
        ("preparing", "failed to load"),
        ("inferring", "stopped unexpectedly"),
        ("cancelling", "stopped unexpectedly"),
        ("complete", None),
        ("error", None),
        ("unknown", None),
    ],
)
async def test_a_crash_leaves_the_truth(shop: Shop, before: str, error: str | None) -> None:
    item = WingmanItem(alias="chat", status=before, model_repo=REPO, file_path=PATH, error="was", created=7)  # type: ignore[arg-type]
    shop.store.rows = {"chat": item}
    async with shop.restarted() as again:
        found = again.inference.item("chat")
        if error is None:
            assert (found, again.told) == (item, [])
        else:
            assert (found.status, found.error, found.created) == ("error", error, 7)
            assert again.told == [(found, None)]
            assert again.store.rows["chat"] == found
        started, is_new = await again.start("chat")
        assert (started.created, started.error, is_new) == (7, "", True)
        await again.loaded("chat")


async def test_what_crashed_is_started_again_as_it_was(shop: Shop) -> None:
    fields = {"model_repo": REPO, "file_path": PATH, "context_size": 64, "gpu_layers": 2, "force": True}
    shop.store.rows = {"chat": WingmanItem(alias="chat", status="inferring", **fields)}  # type: ignore[arg-type]
    async with shop.restarted() as again:
        await again.inference.restore()
        assert again.inference.in_use(REPO, PATH)
        served = await again.loaded("chat")
        assert served.config.context.ctx_size == 64 * served.config.context.parallel
        assert again.fleet.loaded[0].name == shop.stem()
        item = again.inference.item("chat")
        assert (item.context_size, item.gpu_layers, item.force) == (64, 2, True)


async def test_what_ran_at_the_end_is_started_again_and_nothing_else(shop: Shop) -> None:
    await shop.start("runs")
    await shop.start("stopped", file_path=OTHER)
    await shop.inference.stop("stopped")
    await shop.inference.remember()
    await shop.close()
    assert {row.status for row in shop.store.rows.values()} == {"complete"}
    async with shop.restarted() as again:
        await again.inference.restore()
        assert again.inference.in_use(REPO, PATH)
        await again.loaded("runs")
        assert again.fleet.loads == [shop.stem()]
        assert again.inference.item("stopped").status == "complete"


async def test_what_can_not_be_started_again_stops_no_other(shop: Shop) -> None:
    for alias, path in (("gone", "none.gguf"), ("here", PATH)):
        shop.store.rows[alias] = WingmanItem(alias=alias, status="inferring", model_repo=REPO, file_path=path)
    async with shop.restarted() as again:
        await again.inference.restore()
        assert again.inference.in_use(REPO, PATH)
        assert again.inference.item("gone").status == "error"


async def test_a_store_that_fails_stops_no_model(shop: Shop) -> None:
    shop.store.fails = True
    await shop.start("chat")
    await shop.loaded("chat")
    assert (await shop.inference.stop("chat")).status == "complete"


# -- the model of --model ---------------------------------------------------------------------------


async def test_the_model_of_the_flag_is_not_stored_and_not_forgotten(
    tmp_path: Path, tiny_model: Path
) -> None:
    async with a_shop(tmp_path, tiny_model, file=tiny_model) as shop:
        shop.inference.note_address("127.0.0.1", 6567)
        deployment = await shop.inference.serve_file()
        assert (deployment.name, deployment.is_forced) == ("tiny.gguf", True)
        lease = await shop.residency.acquire(deployment)
        await shop.inference.settle()
        item = shop.inference.item("tiny.gguf")
        assert (item.status, item.port) == ("inferring", 6567)
        assert shop.store.rows == {}
        with pytest.raises(Conflict, match="--model"):
            await shop.inference.reset("tiny.gguf")
        lease.release()
        await shop.inference.remember()
        assert (await shop.inference.stop("tiny.gguf")).status == "complete"
        assert shop.store.settings == {("inference", "running"): "[]"}


async def test_a_model_that_is_none_is_named(tmp_path: Path, tiny_model: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    for path, message in ((broken, "can't load"), (tmp_path / "none.gguf", "is not a file")):
        async with a_shop(tmp_path / "home", tiny_model, file=path) as shop:
            with pytest.raises(ModelLoadFailure, match=message):
                await shop.inference.serve_file()
