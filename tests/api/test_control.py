"""The control API through a whole Wingman without listeners: what is in no resource's own tests."""

from __future__ import annotations

import logging
from pathlib import Path

import orjson
import pytest

from tools.tinymodel import write_llama
from wingman import Wingman, configure
from wingman.api.errors import error_body
from wingman.api.queries import MAX_POSTED_BYTES
from wingman.errors import ModelLoadFailure
from wingman.http.messages import Response


def quiet(home: Path) -> Wingman:
    return Wingman(configure(home=str(home), offline=True), listen=False)


async def answer(wingman: Wingman, method: str, target: str, body: object = None) -> tuple[int, object]:
    found = await wingman.dispatch(method, target, b"" if body is None else orjson.dumps(body))
    assert isinstance(found, Response)
    return found.status, orjson.loads(found.body)


async def test_head_changes_nothing(tmp_path: Path) -> None:
    async with quiet(tmp_path) as wingman:
        for path in ("shutdown", "downloads/enqueue", "inference/stop?alias=x", "INFERENCE/RESET/?alias=x"):
            assert (await answer(wingman, "HEAD", f"/api/{path}"))[0] == 404
        assert not wingman.is_stopping
        assert (await answer(wingman, "HEAD", "/api/Downloads/"))[0] == 200


async def test_post_takes_its_parameters_from_the_body(tmp_path: Path) -> None:
    async with quiet(tmp_path) as wingman:
        status, body = await answer(wingman, "POST", "/api/inference/stop", {"alias": "x"})
        assert (status, body) == (
            404,
            {"error": {"code": 404, "message": "no model was started as 'x'", "type": "not_found_error"}},
        )
        status, body = await answer(wingman, "POST", "/api/inference/stop", {"alias": ["x"]})
        assert status == 400
        assert (await answer(wingman, "POST", "/api/inference/stop", {}))[0] == 422


@pytest.mark.parametrize(
    ("level", "shown"),
    [("debug", 10), ("info", 20), ("WARN", 30), ("error", 40), ("loud", 20), (7, 20), (None, 20)],
)
async def test_a_log_line_of_a_client(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, level: object, shown: int
) -> None:
    caplog.set_level(logging.DEBUG, "wingman.client")
    async with quiet(tmp_path) as wingman:
        item = {"isa": "WingmanLogItem", "level": level, "message": "x" * 10_000, "timestamp": 1}
        assert (await answer(wingman, "POST", "/api/utils/log", item))[0] == 200
        assert (await answer(wingman, "POST", "/api/utils/log", {"level": "info"}))[0] == 400
    (record,) = (record for record in caplog.records if record.name == "wingman.client")
    assert record.levelno == shown
    assert record.getMessage() == "x" * 8192


async def test_shutdown_answers_first(tmp_path: Path) -> None:
    async with quiet(tmp_path) as wingman:
        assert await answer(wingman, "GET", "/api/shutdown") == (200, {"status": "shutting down"})
        assert wingman.is_stopping


async def test_no_body_is_read_that_holds_up_the_loop(tmp_path: Path) -> None:
    async with quiet(tmp_path) as wingman:
        for path in ("utils/log", "downloads/enqueue"):
            status, _ = await answer(wingman, "POST", f"/api/{path}", {"message": "x" * MAX_POSTED_BYTES})
            assert status == 400


def test_where_a_model_lies_is_not_told_to_who_asks_it() -> None:
    status, body = error_body(ModelLoadFailure("can't load /secret/place/model.gguf: no memory"))
    assert status == 500
    assert body["error"]["message"] == (
        "the model could not be loaded; see its error in /api/inference or the log"
    )


async def test_what_keeps_a_model_from_loading_is_in_its_item(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir(parents=True)
    async with quiet(tmp_path) as wingman:
        write_llama(tmp_path / "models" / "fine.gguf")
        query = "alias=x&modelRepo=local&filePath=fine.gguf&chatTemplate=nosuch"
        status, _ = await answer(wingman, "POST", f"/api/inference/start?{query}")
        assert status == 202
        ask = {"model": "x", "messages": [{"role": "user", "content": "Hi"}]}
        assert (await answer(wingman, "POST", "/v1/chat/completions", ask))[0] == 500
        await wingman.inference.settle()
        item = wingman.inference.item("x")
        assert (item.status, "nosuch" in item.error) == ("error", True)
