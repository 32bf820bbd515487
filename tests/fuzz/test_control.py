"""The fuzz target of the control API notices what it is there for, and its seeds reach the answers there are."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from fuzz import control
from fuzz.application import run
from fuzz.mutate import read_corpus
from wingman.http.messages import Response


def test_the_seeds_reach_every_kind_of_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = defaultdict(set)
    check = control._check_answer

    def note(method: str, path: str, answer: Response) -> None:
        seen[path].add(answer.status)
        check(method, path, answer)

    monkeypatch.setattr(control, "_check_answer", note)
    for data in read_corpus("control"):
        run(control._house().play(data.split(b"\n")))
    assert control.STATUSES.keys() <= seen.keys()
    assert seen["/api/models"] >= {200, 400, 502}
    assert seen["/api/downloads/enqueue"] >= {202, 208, 400, 404, 409, 429}
    assert seen["/api/downloads/cancel"] >= {200, 409}
    assert seen["/api/downloads/reset"] >= {200, 404, 409}
    assert seen["/api/inference/start"] >= {202, 208, 400, 404, 422, 507}
    assert seen["/api/inference/stop"] >= {200, 400}


def call_in_thread(function: Callable[[], object]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def test_what_is_written_elsewhere_is_noticed(tmp_path: Path) -> None:
    control._house()
    inside, beside = tmp_path / "home", tmp_path / "homes"
    inside.mkdir()
    beside.mkdir()
    with control._writes_stay_in(inside):
        (inside / "a").write_bytes(b"")
        (inside / "a").rename(inside / "b")
    for change in (
        lambda: (beside / "a").write_bytes(b""),
        lambda: (inside / "b").rename(beside / "b"),
        (beside / "b").unlink,
    ):
        with pytest.raises(AssertionError), control._writes_stay_in(inside):
            call_in_thread(change)


def test_an_unforeseen_exception_is_noticed_in_the_log() -> None:
    logger = logging.getLogger("wingman.somewhere")
    with control._nothing_unforeseen():
        logger.warning("foreseen")
    with pytest.raises(AssertionError, match="ZeroDivisionError"), control._nothing_unforeseen():
        logger.error("failed", exc_info=ZeroDivisionError())


@pytest.mark.parametrize(
    "answer",
    [
        Response(500, b'{"error":{"code":500,"message":"m","type":"server_error"}}'),
        Response(404, b'{"error":{"code":400,"message":"m","type":"not_found_error"}}'),
        Response(404, b'{"error":{"code":404,"message":"","type":"not_found_error"}}'),
        Response(200, b"{"),
        Response(200, b"{}", "text/plain"),
        Response(422, b'{"error":{"code":422,"message":"m","type":"invalid_request_error"}}'),
    ],
)
def test_a_wrong_answer_is_noticed(answer: Response) -> None:
    with pytest.raises((AssertionError, ValueError)):
        control._check_answer("GET", "/api/downloads", answer)
