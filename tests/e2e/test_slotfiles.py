"""Slots saved to files and restored from them, on the real model."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.events import read_events
from tests.support.server import ServerProcess

PROMPT = "The old lighthouse keeper counted the ships that passed in the night, and"
HEAD = 12
"""Bytes before the tokens: magic, version, number of words."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slots")


@pytest.fixture(scope="module")
def saver(starter_model: Path, folder: Path) -> Iterator[ServerProcess]:
    arguments = ["--model", str(starter_model), "-np", "3", "-c", "1536", "--slot-save-path", str(folder)]
    with ServerProcess(arguments) as process:
        yield process


def change(server: ServerProcess, slot: int | str, action: str, name: Any = None) -> dict[str, Any]:
    response = server.post(f"/slots/{slot}?action={action}", {"filename": name})
    assert response.status_code == 200, response.text
    return dict(response.json())


def refusal(server: ServerProcess, slot: int | str, query: str, body: Any, status: int = 400) -> str:
    response = server.post(f"/slots/{slot}{query}", body)
    assert response.status_code == status, response.text
    return str(response.json()["error"]["message"])


@pytest.fixture
def saved(saver: ServerProcess, folder: Path) -> dict[str, Any]:
    """A conversation in slot 0, saved as `talk`; all other slots are empty."""
    for slot in range(3):
        change(saver, slot, "erase")
    body = saver.complete(PROMPT, n_predict=24, id_slot=0, ignore_eos=True)
    assert body["id_slot"] == 0
    return body | change(saver, 0, "save", "talk")


def test_what_is_saved(saved: dict[str, Any], folder: Path) -> None:
    assert saved["n_saved"] == saved["tokens_evaluated"] + 24 - 1
    assert saved["n_written"] == (folder / "talk").stat().st_size
    assert (saved["id_slot"], saved["filename"]) == (0, "talk")
    assert saved["timings"]["save_ms"] >= 0


def test_another_slot_goes_on_as_the_first_would(saver: ServerProcess, saved: dict[str, Any]) -> None:
    longer = PROMPT + saved["content"] + " then"
    expected = saver.complete(longer, n_predict=16, id_slot=0)
    assert expected["timings"]["cache_n"] >= saved["n_saved"] - 1
    change(saver, 0, "erase")
    restored = change(saver, 2, "restore", "talk")
    assert (restored["id_slot"], restored["n_restored"]) == (2, saved["n_saved"])
    assert restored["n_read"] == saved["n_written"]
    found = saver.complete(longer, n_predict=16, id_slot=2)
    assert found["timings"]["cache_n"] == expected["timings"]["cache_n"]
    assert found["content"] == expected["content"]


def test_a_slot_that_no_one_names_is_found_by_its_prefix(saver: ServerProcess, saved: dict[str, Any]) -> None:
    change(saver, 0, "erase")
    change(saver, 1, "restore", "talk")
    found = saver.complete(PROMPT + saved["content"] + " then", n_predict=1)
    assert found["id_slot"] == 1
    assert found["timings"]["cache_n"] >= saved["n_saved"] - 1


def test_erase(saver: ServerProcess, saved: dict[str, Any]) -> None:
    assert change(saver, 0, "erase") == {"id_slot": 0, "n_erased": saved["n_saved"]}
    assert change(saver, 0, "erase") == {"id_slot": 0, "n_erased": 0}
    assert saver.complete(PROMPT, n_predict=1, id_slot=0)["timings"]["cache_n"] == 0


def test_an_empty_slot_can_be_saved(saver: ServerProcess, saved: dict[str, Any]) -> None:
    assert change(saver, 1, "save", "empty")["n_saved"] == 0
    assert change(saver, 0, "restore", "empty")["n_restored"] == 0
    assert change(saver, 0, "erase")["n_erased"] == 0


def words_of(data: bytes) -> tuple[int, ...]:
    (count,) = struct.unpack_from("<I", data, 8)
    return struct.unpack_from(f"<{count}i", data, HEAD)


def test_layout(saved: dict[str, Any], folder: Path, saver: ServerProcess) -> None:
    data = (folder / "talk").read_bytes()
    assert struct.unpack_from("<II", data) == (0x67677371, 3)
    mark, version, count, *tokens, end = words_of(data)
    assert (mark, version, count, end) == (-1, 1, saved["n_saved"], 0)
    text = saver.post("/detokenize", {"tokens": tokens}).json()["content"]
    assert (PROMPT + saved["content"]).startswith(text)


@pytest.mark.parametrize("has_trailer", [True, False])
def test_the_older_form_with_plain_tokens(
    saver: ServerProcess, saved: dict[str, Any], folder: Path, has_trailer: bool
) -> None:
    data = (folder / "talk").read_bytes()
    words = words_of(data)
    tokens, state = words[3:-1], data[HEAD + 4 * len(words) :]
    if not has_trailer:
        state = state[: state.rindex(b"wingman1")]
    plain = struct.pack(f"<III{len(tokens)}i", 0x67677371, 3, len(tokens), *tokens) + state
    (folder / "plain").write_bytes(plain)
    assert change(saver, 1, "restore", "plain")["n_restored"] == len(tokens)
    longer = PROMPT + saved["content"] + " then"
    assert saver.complete(longer, n_predict=1, id_slot=1)["timings"]["cache_n"] >= len(tokens) - 1


def damaged(data: bytes, how: str) -> bytes:
    n_words = len(words_of(data))
    middle = HEAD + 4 * n_words + (len(data) - HEAD - 4 * n_words) // 2
    flip = {
        "state": middle,
        "token": HEAD + 16,
        "magic": 0,
        "version": 4,
        "trailer": len(data) - 40,
        "end": -1,
    }
    if how in flip:
        changed = bytearray(data)
        changed[flip[how]] ^= 4
        return bytes(changed)
    ends = {"empty": 0, "head": 7, "tokens": HEAD + 9, "half": middle, "short": len(data) - 1}
    if how in ends:
        return data[: ends[how]]
    count = {"count": 2**32 - 1, "count+1": n_words + 1}[how]
    return data[:8] + struct.pack("<I", count) + data[12:]


@pytest.mark.parametrize(
    "how",
    ["state", "token", "magic", "version", "trailer", "end", "empty", "head", "tokens", "half", "short",
     "count", "count+1"],
)  # fmt: skip
def test_damage(saver: ServerProcess, saved: dict[str, Any], folder: Path, how: str) -> None:
    (folder / "bad").write_bytes(damaged((folder / "talk").read_bytes(), how))
    change(saver, 1, "restore", "talk")
    assert refusal(saver, 1, "?action=restore", {"filename": "bad"})
    assert change(saver, 1, "erase")["n_erased"] == 0
    assert saver.complete(PROMPT, n_predict=24, id_slot=1, ignore_eos=True)["content"] == saved["content"]


@pytest.mark.parametrize("how", ["state", "half", "nothing", "noise"])
def test_damage_in_files_without_a_digest(
    saver: ServerProcess, saved: dict[str, Any], folder: Path, how: str
) -> None:
    data = (folder / "talk").read_bytes()
    bare = data[: data.rindex(b"wingman1")]
    start = HEAD + 4 * len(words_of(bare))
    if how == "nothing":
        bad = bare[:start]
    elif how == "noise":
        bad = bare[:start] + bytes(index * 37 % 251 for index in range(len(bare) - start))
    else:
        bad = damaged(bare, how)
    (folder / "bare").write_bytes(bad)
    response = saver.post("/slots/1?action=restore", {"filename": "bare"})
    assert response.status_code == (200 if how == "state" else 400), response.text  # values can't be checked
    assert saver.complete(PROMPT, n_predict=24, id_slot=0, ignore_eos=True)["content"] == saved["content"]
    change(saver, 1, "erase")


def test_a_file_of_another_model(
    start_server: Callable[..., ServerProcess], saver: ServerProcess, saved: dict[str, Any], folder: Path,
    tiny_model: Path,
) -> None:  # fmt: skip
    tiny = start_server("-np", "1", "--slot-save-path", str(folder), model=tiny_model)
    expected = tiny.complete("the", n_predict=8)["content"]
    assert refusal(tiny, 0, "?action=restore", {"filename": "talk"})
    assert tiny.complete("the", n_predict=8)["content"] == expected
    change(tiny, 0, "save", "tiny")
    assert "model" in refusal(saver, 1, "?action=restore", {"filename": "tiny"})
    assert change(saver, 1, "erase")["n_erased"] == 0


@pytest.mark.parametrize(
    "name",
    ["", None, 5, "a/b", "..", "../talk", "/etc/passwd", "a\\b", "a:b", "a*", "a?", 'a"', "<a", "a>", "a|b",
     "a\nb", "a\x00b", "a\x7f", " a", "a ", "a.", "x" * 256, "ü" * 128, "."],
)  # fmt: skip
@pytest.mark.parametrize("action", ["save", "restore"])
def test_names(saver: ServerProcess, action: str, name: Any, folder: Path) -> None:
    before = sorted(folder.iterdir())
    assert "filename" in refusal(saver, 0, f"?action={action}", {"filename": name})
    assert sorted(folder.iterdir()) == before


def test_odd_but_good_names(saver: ServerProcess, saved: dict[str, Any], folder: Path) -> None:
    for name in ("a b", "ünïcode-漢字.bin", "x" * 255, "-rf"):
        assert change(saver, 0, "save", name)["filename"] == name
        assert change(saver, 0, "restore", name)["n_restored"] == saved["n_saved"]
        (folder / name).unlink()


def test_what_is_no_plain_file(saver: ServerProcess, saved: dict[str, Any], folder: Path) -> None:
    (folder / "folder").mkdir()
    (folder / "link").symlink_to("/etc/hostname")
    for name in ("missing", "folder", "link"):
        change(saver, 1, "restore", "talk")
        refusal(saver, 1, "?action=restore", {"filename": name})
        assert change(saver, 1, "erase")["n_erased"] == 0
    refused = saver.post("/slots/0?action=save", {"filename": "folder"})
    assert refused.status_code in (400, 500)
    assert str(folder) not in refused.text
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_bad_requests(saver: ServerProcess) -> None:
    good = {"filename": "talk"}
    for slot in ("3", "-1", "x", "1.5", "99999999999", "%31x", "²"):
        refusal(saver, slot, "?action=save", good)
    for query in ("", "?action=", "?action=copy", "?action=SAVE", "?other=save"):
        assert "action" in refusal(saver, 0, query, good)
    assert saver.client.post("/slots/0?action=save", content=b"{").status_code == 400
    assert saver.client.post("/slots/0?action=save").status_code == 400
    assert saver.client.post("/slots/0?action=erase").status_code == 200
    assert saver.get("/slots/0?action=erase").status_code == 404


def test_without_a_folder_nothing_is_saved(server: ServerProcess) -> None:
    for action in ("save", "restore"):
        refusal(server, 0, f"?action={action}", {"filename": "a"}, 501)
    assert change(server, 7, "erase")["id_slot"] == 7


def test_a_busy_slot_is_waited_for(saver: ServerProcess, saved: dict[str, Any]) -> None:
    body = {"prompt": PROMPT, "n_predict": 60, "temperature": 0, "ignore_eos": True, "id_slot": 0}
    events: list[dict[str, Any]] = []
    listener = threading.Thread(target=lambda: events.extend(read_events(saver, "/completion", body)))
    listener.start()
    while not saver.get("/slots").json()[0]["is_processing"] and listener.is_alive():
        pass
    result = change(saver, 0, "save", "busy")
    listener.join()
    assert events[-1]["tokens_predicted"] == 60
    assert result["n_saved"] == events[-1]["tokens_evaluated"] + 60 - 1
