"""Names of model files, and the lock of a home."""

from __future__ import annotations

from pathlib import Path

import pytest

from wingman.errors import ConfigurationError
from wingman.services.home import Home, Lock, file_name, stored_name


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/models/tiny.gguf", "tiny.gguf"),
        (r"C:\models\tiny.gguf", "tiny.gguf"),
        ("/models/" + stored_name("o/r", "tiny.gguf"), "tiny.gguf"),
        ("/models/" + stored_name("o/r", "Q4_0/tiny.gguf"), "tiny.gguf"),
        ("/models/of[-]mine.gguf", "of[-]mine.gguf"),
        ("tiny.gguf", "tiny.gguf"),
    ],
)
def test_a_file_is_called_as_in_its_repository(path: str, name: str) -> None:
    assert file_name(path) == name


def test_one_process_has_a_home(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.create()
    first, second = Lock(home), Lock(home)
    assert first.acquire()
    assert not second.acquire()
    first.release()
    assert second.acquire()
    second.release()


def test_a_home_that_can_not_be_written_says_so(tmp_path: Path) -> None:
    home = Home(tmp_path)
    (home.data / "wingman.lock").mkdir(parents=True)
    with pytest.raises(ConfigurationError, match="can't write"):
        Lock(home).acquire()
