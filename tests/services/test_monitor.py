"""Monitor: every key that clients read, numbers that can be trusted, and messages at the right time only."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.sinks import FakeSocket, settle
from tests.support.watched import WatchedEngine, scripted_info, watched
from wingman.engine.types import HistogramView, SlotView, Snapshot
from wingman.services import monitor as monitor_module
from wingman.services.broadcast import Broadcast, Filter
from wingman.services.items import DownloadItem, WingmanItem
from wingman.services.monitor import Monitor
from wingman.services.readings import MonitoredModel, Placement, meta_of, system_of, timings_of

TIMINGS = set(
    """timestamp load_time sample_time sample_count sample_per_token_ms sample_per_second total_time
    prompt_count prompt_ms prompt_per_token_ms prompt_per_second
    predicted_count predicted_ms predicted_per_token_ms predicted_per_second""".split()
)
SYSTEM = set(
    """ctx_size cuda_str gpu_name mem_required offloaded offloaded_total offloading_repeating
    offloading_nonrepeating vram_used vram_per_layer_avg model_path model_file_name model_name model_alias
    quantization has_next_token""".split()
)
META = set("arch n_vocab n_ctx_train n_embd n_head n_head_kv n_layer n_rot n_ff freq_base".split())
STATUS = set(
    """event seq WingmanService DownloadService WingmanItems DownloadItems currentWingmanInferenceItem
    hardware""".split()
)


class House:
    """A monitor, what it looks at, a clock, and one watcher."""

    def __init__(self, what: Filter | None = None, *, shows_content: bool = False) -> None:
        self.now = 100.0
        self.engine = WatchedEngine()
        self.models = [watched(self.engine)]
        self.items: list[WingmanItem] = []
        self.downloads: list[DownloadItem] = []
        self.n_looks = 0
        self.broadcast = Broadcast()
        self.monitor = Monitor(
            self.broadcast,
            models=lambda: self.models,
            items=self._items,
            downloads=lambda: self.downloads,
            hardware=lambda: {"gpu": {"totalMemoryMB": 0}},
            shows_content=shows_content,
            clock=lambda: self.now,
            time_of_day=lambda: 1000.0 + self.now,
        )
        self.socket = FakeSocket()
        if what is not None:
            self.broadcast.subscribe(self.socket, what)

    def _items(self) -> list[WingmanItem]:
        self.n_looks += 1
        return self.items

    def tick(self, seconds: float = 0.25) -> list[dict[str, Any]]:
        """What is sent by a look after that time."""
        self.now += seconds
        n_before = len(self.socket.frames)
        self.monitor.tick()
        return self.socket.messages[n_before:]


METRICS = Filter(frozenset({"metrics"}))
STATUSES = Filter(frozenset({"status"}))
ITEMS = Filter(frozenset({"download_status", "inference_status"}))


# -- what metrics hold ----------------------------------------------------------------------------


async def test_metrics_have_every_key_that_the_original_client_reads() -> None:
    house = House(METRICS)
    (message,) = house.tick()
    assert message["event"] == "metrics"
    assert message["alias"] == "tiny"
    assert set(message["timings"]) == TIMINGS
    assert set(message["system"]) == SYSTEM
    assert set(message["meta"]) >= META
    assert all(isinstance(value, str) for value in message["meta"].values())
    assert message["tensors"] == {"Q4_1": 210, "F32": 61}
    assert "secret" not in json.dumps(message)


async def test_metrics_of_a_generation() -> None:
    house = House(METRICS)
    house.engine.begin()
    house.engine.show(n_tokens=11)
    house.engine.n_waiting = 3
    (message,) = house.tick()
    timings = message["timings"]
    assert timings["predicted_count"] == timings["sample_count"] == 11
    assert timings["predicted_ms"] == pytest.approx(100)
    assert timings["predicted_per_token_ms"] == pytest.approx(10)
    assert timings["predicted_per_second"] == pytest.approx(100)
    assert timings["load_time"] == 250
    assert timings["total_time"] == pytest.approx((100.25 + 0.25) * 1000)
    assert timings["sample_time"] == pytest.approx(22)
    assert timings["sample_per_token_ms"] == pytest.approx(2)
    assert timings["sample_per_second"] == pytest.approx(500)
    assert (message["requests_running"], message["requests_waiting"]) == (1, 3)
    assert message["kv_cache_tokens"] == 16
    assert message["kv_cache_usage_ratio"] == 16 / 1024
    assert message["slots"][0] == {
        "id": 0, "id_task": 7, "state": 1, "is_processing": True, "n_ctx": 512, "n_prompt_tokens": 5,
        "n_prompt_tokens_processed": 5, "n_prompt_tokens_cache": 0, "n_decoded": 11, "n_held": 16,
    }  # fmt: skip
    assert message["slots"][1]["id_task"] == -1
    assert message["system"]["has_next_token"] is True
    house.engine.end(n_tokens=12)
    (message,) = house.tick()
    assert message["system"]["has_next_token"] is False
    assert message["timings"]["prompt_count"] == 5
    assert message["timings"]["prompt_per_second"] == 10


async def test_speed_is_that_of_the_last_second() -> None:
    house = House(METRICS)
    house.engine.begin()
    speeds = []
    for n_tokens in (0, 10, 20, 30, 40, 140, 240, 340, 440):
        house.engine.show(n_tokens)
        speeds.append(house.tick()[0]["tokens_per_second"])
    assert speeds == [0, 40, 40, 40, 40, 130, 220, 310, 400]
    house.engine.end(440)
    assert house.tick()[0]["tokens_per_second"] == 0
    house.now += 60
    house.engine.begin()
    house.engine.show(450)
    assert house.tick()[0]["tokens_per_second"] == 0
    house.engine.show(460)
    assert house.tick()[0]["tokens_per_second"] == 40


HISTOGRAMS = st.none() | st.builds(
    HistogramView, st.lists(st.integers(0, 10**9), max_size=4).map(tuple), st.floats(0, 1e9)
)


@given(
    st.builds(
        Snapshot,
        slots=st.just(()),
        prompt_tokens_total=st.integers(0, 10**12),
        prompt_seconds_total=st.floats(0, 1e9),
        first_token=HISTOGRAMS,
        token_gap=HISTOGRAMS,
    ),
    st.floats(0, 4e9),
)
def test_timings_are_always_numbers(snapshot: Snapshot, unix_s: float) -> None:
    timings = timings_of(watched(WatchedEngine(snapshot=snapshot)), unix_s)
    assert set(timings) == TIMINGS
    assert all(math.isfinite(value) and (value >= 0 or value == -1) for value in timings.values())


@pytest.mark.parametrize(
    ("n_gpu_layers", "expected"),
    [
        (0, (0, 31, 0, 0, 0, -1)),
        (1, (1, 31, 0, 1, 310, 310)),
        (11, (11, 31, 10, 1, 310, 310 / 11)),
        (-1, (31, 31, 30, 1, 310, 10)),
        (99, (31, 31, 30, 1, 310, 10)),
    ],
)
def test_layers_on_the_gpu(n_gpu_layers: int, expected: tuple[float, ...]) -> None:
    placement = Placement(n_gpu_layers, vram_mb=310)
    system = system_of(MonitoredModel("a", WatchedEngine(), 0, 0, placement=placement))
    keys = (
        "offloaded offloaded_total offloading_repeating offloading_nonrepeating vram_used vram_per_layer_avg"
    )
    assert tuple(system[key] for key in keys.split()) == expected


def test_what_a_gguf_does_not_say_is_unknown_and_never_missing() -> None:
    engine = WatchedEngine()
    engine.info = type(engine.info)(**{
        name: getattr(engine.info, name) for name in engine.info.__slots__ if name not in ("metadata", "path")
    }, path="/m/\udcff.gguf", metadata={})  # fmt: skip
    meta = meta_of(engine.info)
    assert set(meta) >= META
    assert meta["n_head"] == meta["arch"] == ""
    system = system_of(MonitoredModel("a", engine, 0, 0, placement=Placement(-1)))
    assert system["offloaded"] == system["offloading_repeating"] == system["vram_per_layer_avg"] == -1
    assert system["model_file_name"] == "?.gguf"


def test_names_of_the_model() -> None:
    system = system_of(watched(WatchedEngine()))
    assert system["model_path"] == scripted_info().path
    assert system["model_file_name"] == "tiny.Q4_1.gguf"
    assert (system["model_name"], system["model_alias"]) == ("Tiny \u00e9", "tiny")
    assert system["quantization"] == "Q4_1"
    assert system["ctx_size"] == 1024


# -- when metrics are sent ------------------------------------------------------------------------


async def test_metrics_flow_while_a_model_works_and_once_after() -> None:
    house = House(METRICS)
    assert len(house.tick()) == 1  # a model that is new to the watchers
    assert house.tick() == []
    house.engine.begin()
    assert [len(house.tick()) for _ in range(3)] == [1, 1, 1]
    house.engine.end(3)
    assert [len(house.tick()) for _ in range(3)] == [1, 0, 0]


async def test_a_generation_between_two_looks_is_shown() -> None:
    house = House(METRICS)
    house.tick()
    house.engine.begin()
    house.engine.end(3)
    assert [message["timings"]["predicted_count"] for message in house.tick()] == [3]


async def test_metrics_of_each_model_go_to_who_watches_it() -> None:
    house = House(Filter(alias="b"))
    house.models.append(watched(WatchedEngine(), "b"))
    assert [message["alias"] for message in house.tick() if message["event"] == "metrics"] == ["b"]


async def test_a_model_loaded_anew_has_new_instruments() -> None:
    house = House(METRICS)
    house.tick()
    house.models = []
    assert house.tick() == []
    house.engine = WatchedEngine()
    house.engine.info = scripted_info()
    house.models = [MonitoredModel("tiny", house.engine, 0, 0, {"F16": 1})]
    (message,) = house.tick()
    assert message["tensors"] == {"F16": 1}


async def test_nothing_is_composed_for_nobody() -> None:
    house = House()
    house.engine.begin()
    for _ in range(30):
        house.tick()
    assert house.n_looks == 0
    house = House(ITEMS)
    for _ in range(30):
        assert house.tick() == []
    assert house.n_looks == 0


# -- status ---------------------------------------------------------------------------------------


async def test_status_is_sent_on_changes_and_every_five_seconds() -> None:
    house = House(STATUSES)
    assert [set(message) for message in house.tick()] == [STATUS]
    assert house.tick() == []
    house.monitor.on_download(download("queued", 0))
    house.monitor.on_download(download("downloading", 0))
    assert [len(house.tick()) for _ in range(2)] == [1, 0]
    assert [len(house.tick(1.0)) for _ in range(11)] == [0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0]


async def test_status_of_nothing() -> None:
    (message,) = House(STATUSES).tick()
    assert message["WingmanItems"] == message["DownloadItems"] == []
    assert message["currentWingmanInferenceItem"] == {}
    assert message["hardware"] == {"gpu": {"totalMemoryMB": 0}}
    assert message["WingmanService"] == {
        "isa": "WingmanServiceAppItem", "status": "ready", "alias": "", "modelRepo": "", "filePath": "",
        "force": False, "error": "", "created": 1100, "updated": 1100,
    }  # fmt: skip
    assert message["DownloadService"] == {
        "isa": "DownloadServiceAppItem", "status": "ready", "currentDownload": None, "error": "",
        "created": 1100, "updated": 1100,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("statuses", "service", "current"),
    [
        (["complete", "error"], "ready", None),
        (["queued"], "starting", 0),
        (["inferring", "preparing"], "preparing", 1),
        (["queued", "inferring", "inferring"], "inferring", 2),
        (["cancelling", "complete"], "stopping", 0),
    ],
)
async def test_the_item_that_tells_most_stands_for_the_service(
    statuses: list[Any], service: str, current: int | None
) -> None:
    house = House(STATUSES)
    house.items = [
        WingmanItem(alias=str(n), status=status, model_repo="r", updated=n)
        for n, status in enumerate(statuses)
    ]
    (message,) = house.tick()
    assert message["WingmanService"]["status"] == service
    assert message["WingmanService"]["alias"] == ("" if current is None else str(current))
    assert message["currentWingmanInferenceItem"].get("alias") == (None if current is None else str(current))
    assert [item["alias"] for item in message["WingmanItems"]] == [item.alias for item in house.items]


async def test_the_running_download_stands_for_its_service() -> None:
    house = House(STATUSES)
    house.downloads = [
        DownloadItem(model_repo="a/b", file_path="1", status="queued"),
        DownloadItem(model_repo="a/b", file_path="2", status="downloading"),
    ]
    (message,) = house.tick()
    assert message["DownloadService"]["status"] == "downloading"
    assert message["DownloadService"]["currentDownload"]["filePath"] == "2"


async def test_the_end_is_told_at_once() -> None:
    house = House(STATUSES)
    house.items = [WingmanItem(alias="a", status="inferring")]
    house.monitor.note_phase("stopping")
    assert [message["WingmanService"]["status"] for message in house.socket.messages] == ["stopping"]


# -- item events ----------------------------------------------------------------------------------


def download(status: Any, n_bytes: int) -> DownloadItem:
    return DownloadItem(model_repo="a/b", file_path="c.gguf", status=status, downloaded_bytes=n_bytes)


async def test_items_are_sent_with_their_own_keys() -> None:
    house = House(ITEMS)
    item = download("queued", 5)
    house.monitor.on_download(item)
    house.monitor.on_inference(WingmanItem(alias="x", status="preparing"), 0.5)
    first, second = house.socket.messages
    assert (first["event"], first["modelRepo"], first["downloadedBytes"]) == ("download_status", "a/b", 5)
    assert (second["event"], second["alias"], second["progress"]) == ("inference_status", "x", 0.5)
    house.monitor.on_inference(WingmanItem(alias="x", status="inferring"), 1.0)
    assert "progress" not in house.socket.messages[-1]


async def test_progress_is_sent_four_times_a_second_and_never_lost() -> None:
    house = House(ITEMS)
    for n_bytes in range(1000):
        house.now += 0.01
        house.monitor.on_download(download("downloading", n_bytes))
        if n_bytes % 25 == 24:
            house.monitor.tick()
    assert len(house.socket.frames) <= 42
    house.tick()
    assert house.socket.messages[-1]["downloadedBytes"] == 999
    assert house.tick() == house.tick() == []


async def test_a_change_of_status_never_waits_and_nothing_older_follows_it() -> None:
    house = House(ITEMS)
    for status, n_bytes in [("queued", 0), ("downloading", 0), ("downloading", 1), ("complete", 2)]:
        house.monitor.on_download(download(status, n_bytes))
    seen = [message["status"] for message in house.socket.messages]
    assert seen == ["queued", "downloading", "complete"]
    assert [message["event"] for message in house.tick(1.0)] == []


async def test_item_events_are_kept_for_those_who_come_back() -> None:
    house = House()
    house.monitor.on_download(download("queued", 0))
    house.monitor.on_inference(WingmanItem(alias="x", status="queued"))
    house.broadcast.replay(house.broadcast.subscribe(house.socket, ITEMS, since=0))
    await settle()
    assert house.socket.events == ["download_status", "inference_status"]


async def test_item_events_make_a_new_status() -> None:
    house = House(STATUSES)
    house.tick()
    house.monitor.on_download(download("queued", 0))
    assert len(house.tick()) == 1


# -- greeting, content, the task ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        (Filter(), ["status", "metrics", "metrics"]),
        (Filter(alias="b"), ["status", "metrics"]),
        (METRICS, ["metrics", "metrics"]),
        (ITEMS, []),
    ],
)
async def test_who_comes_is_told_how_things_are_and_nobody_else(what: Filter, expected: list[str]) -> None:
    house, other = House(), FakeSocket()
    house.models.append(watched(WatchedEngine(), "b"))
    house.broadcast.subscribe(other, Filter())
    house.monitor.greet(house.broadcast.subscribe(house.socket, what))
    assert house.socket.events == expected
    assert other.frames == []


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "INTERVAL_S", 0)
    monkeypatch.setattr(monitor_module, "STATUS_INTERVAL_S", 0)


async def run_for_a_while(house: House) -> None:
    task = asyncio.create_task(house.monitor.run())
    await settle()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.usefixtures("quick")
async def test_prompts_are_shown_only_where_they_may_be() -> None:
    for shows_content in (False, True):
        house = House(METRICS, shows_content=shows_content)
        house.engine.begin("x" * 300 + "sesame")
        await run_for_a_while(house)
        slot = house.socket.messages[-1]["slots"][0]
        assert slot.get("content") == ({"prompt": "x" * 250 + "sesame"} if shows_content else None)
        assert (b"sesame" in b"".join(house.socket.frames)) is shows_content
        house.engine.snapshot = Snapshot(slots=(SlotView(0, 8, is_busy=True),))
        assert "content" not in house.tick()[0]["slots"][0]


@pytest.mark.usefixtures("quick")
async def test_a_model_on_its_way_out_shows_no_prompt() -> None:
    house = House(METRICS, shows_content=True)
    house.engine.begin()
    house.engine.is_closing = True
    await run_for_a_while(house)
    assert "content" not in house.socket.messages[-1]["slots"][0]


@pytest.mark.usefixtures("quick")
async def test_a_failing_look_is_not_the_last(caplog: pytest.LogCaptureFixture) -> None:
    house = House(METRICS)
    house.models = None  # type: ignore[assignment]
    task = asyncio.create_task(house.monitor.run())
    await settle(20)
    house.models = [watched(house.engine)]
    await settle(20)
    task.cancel()
    assert house.socket.events == ["metrics"]
    assert "a look at the models failed" in caplog.text
