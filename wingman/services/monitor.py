"""Tells the watchers how things are: what each message holds and when it is sent.

`run` looks four times a second. While a model works its `metrics` are sent each time, and once when it
has stopped; `status` when something has changed, and every five seconds. Changes of items are sent when
they are announced; mere progress is held back to four a second. What nobody would get is not composed,
but item events always go out, for those who come back. On the loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, TypeVar

import msgspec
import orjson
from msgspec import Struct

from wingman.errors import Unavailable
from wingman.services.broadcast import Broadcast, Subscriber
from wingman.services.items import DownloadItem, Item, WingmanItem
from wingman.services.readings import MAX_CONTENT_TOKENS, MonitoredModel, Reading

log = logging.getLogger("wingman.monitor")

INTERVAL_S: Final = 0.25
STATUS_INTERVAL_S: Final = 5.0
Phase = Literal["starting", "ready", "stopping"]

_SERVICE_STATUS: Final = {
    "preparing": "preparing",
    "inferring": "inferring",
    "cancelling": "stopping",
    "queued": "starting",
}
"""An item's status -> the service's, the most telling first."""
_DOWNLOAD_STATUS: Final = {"downloading": "downloading", "queued": "preparing"}
ItemT = TypeVar("ItemT", WingmanItem, DownloadItem)


class WingmanServiceAppItem(Item, frozen=True, kw_only=True, rename="camel"):
    """The inference service as the original's desktop client reads it: the item that tells most about it."""

    isa: Literal["WingmanServiceAppItem"] = "WingmanServiceAppItem"
    status: str
    alias: str = ""
    model_repo: str = ""
    file_path: str = ""
    force: bool = False
    error: str = ""
    created: int = 0
    updated: int = 0


class DownloadServiceAppItem(Item, frozen=True, kw_only=True, rename="camel"):
    """The download service likewise."""

    isa: Literal["DownloadServiceAppItem"] = "DownloadServiceAppItem"
    status: str
    current_download: DownloadItem | None = None
    error: str = ""
    created: int = 0
    updated: int = 0


class _Announced(Struct):
    """The last message about an item, and a newer one that is held back."""

    status: str
    at: float
    held: Mapping[str, Any] | None = None


class Monitor:
    """Composes and times the messages of a Broadcast."""

    def __init__(
        self,
        broadcast: Broadcast,
        *,
        models: Callable[[], Sequence[MonitoredModel]],
        items: Callable[[], Sequence[WingmanItem]],
        downloads: Callable[[], Sequence[DownloadItem]],
        hardware: Callable[[], Any],
        shows_content: bool = False,
        clock: Callable[[], float] = time.monotonic,
        time_of_day: Callable[[], float] = time.time,
    ) -> None:
        """The callables say what is so now, without waiting; `models` names only models that can be used.
        `hardware` is anything msgspec encodes. Without `shows_content` no prompt appears anywhere."""
        self._broadcast = broadcast
        self._models = models
        self._items = items
        self._downloads = downloads
        self._hardware = hardware
        self._shows_content = shows_content
        self._clock = clock
        self._time_of_day = time_of_day
        self._readings: dict[str, Reading] = {}
        self._announced: dict[tuple[str, object], _Announced] = {}
        self._phase: Phase = "ready"
        self._created = int(time_of_day())
        self._is_changed = True
        self._status_at = 0.0

    # -- what is told to it ---------------------------------------------------------------------

    def on_download(self, item: DownloadItem) -> None:
        """A download has changed."""
        self._announce("download_status", item.key, item.status, msgspec.to_builtins(item))

    def on_inference(self, item: WingmanItem, progress: float | None = None) -> None:
        """An item has changed, or got on with its loading: `progress` is 0.0 to 1.0."""
        body = msgspec.to_builtins(item)
        if item.status == "preparing" and progress is not None:
            body["progress"] = progress
        self._announce("inference_status", item.alias, item.status, body)

    def note_phase(self, phase: Phase) -> None:
        """The server starts, serves or stops; watchers hear it at once."""
        self._phase = phase
        self._publish_status()

    def greet(self, subscriber: Subscriber) -> None:
        """Tell one subscriber how everything is that it wants to know of."""
        if subscriber.filter.takes("status"):
            self._broadcast.send_to(subscriber, "status", self._status(), latest="status")
        for reading in self._current_readings():
            alias = reading.model.alias
            if subscriber.filter.takes("metrics", alias):
                body = reading.body(self._time_of_day())
                self._broadcast.send_to(subscriber, "metrics", body, latest=alias)

    # -- time -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Tell what there is to tell; for ever."""
        while True:
            delay_s = INTERVAL_S
            try:
                if self._shows_content and self._broadcast.has_audience("metrics"):
                    await self._read_prompts()
                self.tick()
            except Exception:
                log.exception("a look at the models failed")
                delay_s = STATUS_INTERVAL_S
            await asyncio.sleep(delay_s)

    def tick(self) -> None:
        """One look."""
        now = self._clock()
        self._send_held(now)
        if self._broadcast.has_audience("metrics"):
            self._publish_metrics(now)
        is_due = self._is_changed or now - self._status_at >= STATUS_INTERVAL_S
        if is_due and self._broadcast.has_audience("status"):
            self._publish_status()

    def _publish_metrics(self, now: float) -> None:
        for reading in self._current_readings():
            alias = reading.model.alias
            if reading.sample(now) and self._broadcast.has_audience("metrics", alias):
                self._broadcast.publish("metrics", reading.body(self._time_of_day()), latest=alias)

    def _current_readings(self) -> list[Reading]:
        """One for each loaded model; a model that was loaded anew has a new one."""
        known = self._readings
        self._readings = {}
        for model in self._models():
            reading = known.get(model.alias)
            is_same = reading is not None and reading.model.engine is model.engine
            self._readings[model.alias] = reading if reading is not None and is_same else Reading(model)
        return list(self._readings.values())

    async def _read_prompts(self) -> None:
        for reading in self._current_readings():
            engine = reading.model.engine
            for slot_id, job in reading.unread_prompts():
                try:
                    text = await engine.work(
                        0, engine.tokenizer.detokenize, job.prompt[-MAX_CONTENT_TOKENS:], True
                    )
                except Unavailable:  # it is being unloaded
                    break
                reading.prompts[slot_id] = (job.id, text)

    def _announce(self, event: str, key: object, status: str, body: Mapping[str, Any]) -> None:
        self._is_changed = True
        last = self._announced.get((event, key))
        now = self._clock()
        if last is not None and last.status == status and now - last.at < INTERVAL_S:
            last.held = body
            return
        self._announced[event, key] = _Announced(status, now)
        self._broadcast.publish(event, body)

    def _send_held(self, now: float) -> None:
        for (event, key), last in tuple(self._announced.items()):
            if now - last.at < INTERVAL_S:
                continue
            if last.held is None:
                del self._announced[event, key]
            else:
                self._announced[event, key] = _Announced(last.status, now)
                self._broadcast.publish(event, last.held)

    # -- status ---------------------------------------------------------------------------------

    def _publish_status(self) -> None:
        self._is_changed = False
        self._status_at = self._clock()
        self._broadcast.publish("status", self._status(), latest="status")

    def _status(self) -> dict[str, Any]:
        items, downloads = self._items(), self._downloads()
        current = _current(items, _SERVICE_STATUS)
        return {
            "WingmanService": _json(self._wingman_service(current)),
            "DownloadService": _json(self._download_service(_current(downloads, _DOWNLOAD_STATUS))),
            "WingmanItems": _json(items),
            "DownloadItems": _json(downloads),
            "currentWingmanInferenceItem": _json({} if current is None else current),
            "hardware": _json(self._hardware()),
        }

    def _wingman_service(self, current: WingmanItem | None) -> WingmanServiceAppItem:
        if current is None:
            return WingmanServiceAppItem(status=self._phase, created=self._created, updated=self._created)
        return WingmanServiceAppItem(
            status=_SERVICE_STATUS[current.status] if self._phase == "ready" else self._phase,
            alias=current.alias,
            model_repo=current.model_repo,
            file_path=current.file_path,
            force=current.force,
            error=current.error,
            created=self._created,
            updated=current.updated,
        )

    def _download_service(self, current: DownloadItem | None) -> DownloadServiceAppItem:
        status = self._phase if current is None else _DOWNLOAD_STATUS[current.status]
        return DownloadServiceAppItem(
            status=status if self._phase == "ready" else self._phase,
            current_download=current,
            error="" if current is None else current.error,
            created=self._created,
            updated=self._created if current is None else current.updated,
        )


def _current(items: Sequence[ItemT], statuses: Mapping[str, str]) -> ItemT | None:
    """The item that was changed last among those with the first status that any has."""
    for status in statuses:
        found = [item for item in items if item.status == status]
        if found:
            return max(found, key=lambda item: item.updated)
    return None


def _json(value: Any) -> orjson.Fragment:
    return orjson.Fragment(msgspec.json.encode(value))
