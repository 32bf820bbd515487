"""The models folder as it is found: names, sets, damaged files, changes, what is no model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tools.tinymodel import write_llama, write_lora
from wingman.services.gguf import GgufHeader
from wingman.services.home import LOCAL, Home
from wingman.services.localmodels import LocalModels

STORED = "owner[-]Tiny-GGUF[=]tiny-F32.gguf"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path)
    home.create()
    return home


class Need:
    """Counts the headers read."""

    n_read = 0

    def __call__(self, header: GgufHeader) -> int:
        self.n_read += 1
        return header.file_size * 2


def test_finds_models_by_repository_or_by_path(home: Home) -> None:
    write_llama(home.models / STORED)
    write_llama(home.models / "my model.gguf", n_ctx_train=256)
    (home.models / "sub/deep").mkdir(parents=True)
    write_llama(home.models / "sub/deep" / STORED)
    found = LocalModels(home, Need()).scan()
    stored = found["owner/Tiny-GGUF", "tiny-F32.gguf"]
    own = found[LOCAL, "my model.gguf"]
    assert set(found) == {stored.key, own.key, (LOCAL, f"sub/deep/{STORED}")}
    assert (stored.kind, stored.context_length, stored.location) == ("model", 512, str(home.models / STORED))
    assert own.context_length == 256
    assert stored.need_bytes == 2 * stored.size == 2 * (home.models / STORED).stat().st_size


def test_headers_are_read_again_only_after_a_change(home: Home) -> None:
    path = write_llama(home.models / "one.gguf")
    write_llama(home.models / "two.gguf")
    need = Need()
    models = LocalModels(home, need)
    first = models.scan()
    assert models.scan() == first
    assert need.n_read == 2
    os.utime(path, ns=(1, 1))
    assert models.scan() != first
    assert need.n_read == 3
    path.unlink()
    assert set(models.scan()) == {(LOCAL, "two.gguf")}


def test_a_set_is_there_when_all_its_parts_are(home: Home) -> None:
    path = write_llama(home.models / "tiny.gguf", n_splits=3)
    models = LocalModels(home, Need())
    (file,) = models.scan().values()
    assert file.key == (LOCAL, "tiny-00001-of-00003.gguf")
    assert file.kind == "model"
    assert file.size == sum(part.stat().st_size for part in home.models.iterdir())
    path.with_name("tiny-00002-of-00003.gguf").unlink()
    assert models.scan() == {}


def test_what_is_no_model_is_told_apart(home: Home) -> None:
    write_lora(home.models / "adapter.gguf")
    (home.models / "damaged.gguf").write_bytes(b"GGUF\3\0\0\0" + b"\xff" * 100)
    (home.models / "empty.gguf").touch()
    (home.models / "mmproj-x.gguf").touch()
    (home.models / "new.gguf.partial").touch()
    (home.models / "odd\nname.gguf").touch()
    (home.models / "gone.gguf").symlink_to(home.models / "nothing")
    (home.models / "folder.gguf").mkdir()
    (home.models / "loop").symlink_to(home.models)
    os.mkfifo(home.models / "pipe.gguf")
    found = LocalModels(home, Need()).scan()
    kinds = {path: file.kind for (_, path), file in found.items()}
    assert kinds == {"adapter.gguf": "other", "damaged.gguf": "damaged", "empty.gguf": "damaged"}


def test_no_folder_is_an_empty_one(tmp_path: Path) -> None:
    assert LocalModels(Home(tmp_path / "none"), Need()).scan() == {}


def test_hidden_depths_and_crowds_are_left_out(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = home.models / "1/2/3/4/5"
    deep.mkdir(parents=True)
    (deep / "m.gguf").touch()
    for index in range(9):
        (home.models / f"{index}.gguf").touch()
    monkeypatch.setattr("wingman.services.localmodels._MAX_FILES", 5)
    assert [path for _, path in LocalModels(home, Need()).scan()] == [f"{index}.gguf" for index in range(5)]
