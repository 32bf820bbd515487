"""Names of repositories, files, revisions and models, as strangers and file systems write them.

The input is lines of text; every line is tried as each kind of name. Invariant: nothing but InvalidRequest is
raised; what is accepted names a file below the models folder, and no two models, nor their partial files,
share one; a stored name tells the model that it was made for, and no other name does; what a model is called
finds it again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeVar

from wingman.commands.api import CommandFailed
from wingman.commands.pull import parse_target
from wingman.errors import InvalidRequest
from wingman.services.downloadstates import key_of, parse_repo
from wingman.services.home import (
    LOCAL,
    Home,
    check_file_path,
    check_repo,
    parse_stored_name,
    split_parts,
    stored_name,
)
from wingman.services.items import DownloadItem
from wingman.services.modelnames import find_download, model_name
from wingman.services.partial import partial_path, sidecar_path
from wingman.services.quantization import (
    Candidate,
    bits_per_weight,
    choose_file,
    is_repacked,
    parameter_count,
    parameter_text,
    quantization_name,
    quantization_of,
    speed_rank,
)

T = TypeVar("T")
Key = tuple[str, str]
_HOME: Final = Home(Path("/nowhere/wingman"))
_MAX_LINES: Final = 6
TOKENS = (
    b"owner/repo-GGUF\n", b"model.Q4_K_M.gguf\n", b"o/r", b"local", b"[-]", b"[=]", b"o[-]r[=]f.gguf", b"/", b"..",
    b"../", b"/../", b"//", b"\\", b".gguf", b".GGUF", b".gguf.gguf", b"-00001-of-00003.gguf", b"-00002-of-00003",
    b"-00001-of-99999.gguf", b"hf://", b"hf://o/r@main", b"@", b"@refs/pr/1", b":", b":Q8_0", b"Q4_0", b"IQ2_XXS",
    b"-8x7B-", b"135M", b"9999.999T", b"\n", b"\0", b"\r", b" ", b"~/", b"C:", b"%2e%2e", b"a" * 96, b"b" * 200,
    b"\xd9\xa0", b"\xef\xbc\x8f", b"\xe2\x80\xae", b"\xc5\xbf", b"\xe2\x84\xaa", b"\xff", b"\xed\xa0\x80",
)  # fmt: skip


def one(data: bytes) -> None:
    """Check the invariant for `data`."""
    texts = data.decode("utf-8", "surrogateescape").split("\n")[:_MAX_LINES]  # as names of files are read
    for text in texts:
        _check_stored(text)
        _check_quantization(text)
        _check_parts(text)
    for first, second in itertools.product(texts, repeat=2):
        _check_hub_names(first, second)
    keys = _accepted(texts)
    _check_files(keys)
    _check_model_names(keys)


def _tried(function: Callable[..., T], *arguments: str | None) -> T | None:
    """The result; None when it is refused."""
    try:
        return function(*arguments)
    except InvalidRequest:
        return None


def _check_stored(name: str) -> None:
    key = parse_stored_name(name)
    if key is not None:
        assert stored_name(*key) == name
        assert key_of(*key)[0] == key[0]
        assert _tried(_HOME.model_file, LOCAL, name) is None, "a file has two keys"


def _check_parts(path: str) -> None:
    parts = split_parts(path)
    assert path in parts
    assert len(set(parts)) == len(parts) <= 512
    assert all(split_parts(part) == parts for part in (parts[0], parts[-1]))


def _check_hub_names(first: str, second: str) -> None:
    asked = _tried(parse_repo, first, second)
    if asked is not None and _tried(check_repo, asked[0]) is not None:
        assert asked[1] == "" or (asked[1].isascii() and asked[1].isprintable() and ".." not in asked[1])
        assert _tried(parse_repo, f"hf://{asked[0]}@{asked[1]}", None) == asked
    with suppress(CommandFailed):
        target = parse_target(first, second)
        with suppress(InvalidRequest):
            assert parse_repo(target.pinned, None) == (target.repo, target.revision)


def _accepted(texts: Sequence[str]) -> list[Key]:
    """All different keys of models that can be made of the texts."""
    repos = [text for text in texts if _tried(check_repo, text)]
    paths = [text for text in texts if _tried(check_file_path, text)]
    names = [name for repo in repos for path in paths if (name := _tried(stored_name, repo, path))]
    keys = itertools.product({*repos, LOCAL}, {*texts, *names})
    return [key for key in sorted(keys) if _tried(_HOME.model_file, *key)]


def _check_files(keys: Sequence[Key]) -> None:
    root = _HOME.models.resolve()
    owners: dict[Path, Key] = {}
    for repo, path in keys:
        file = _HOME.model_file(repo, path)
        assert file.resolve() == root.joinpath(file.relative_to(_HOME.models)), "a name leaves the folder"
        assert file != _HOME.models
        assert file.name.lower().endswith(".gguf")
        if repo != LOCAL:
            assert len(file.name.encode()) < 256
            assert parse_stored_name(file.name) == (repo, path)
        for taken in (file, partial_path(file), sidecar_path(file)):
            assert owners.setdefault(taken, (repo, path)) == (repo, path), "two models share a file"


def _check_model_names(keys: Sequence[Key]) -> None:
    wholes = sorted({(repo, split_parts(path)[0]) for repo, path in keys if repo != LOCAL})
    items = [DownloadItem(model_repo=repo, file_path=path, status="complete") for repo, path in wholes]
    for item in items:
        name = model_name(item, items)
        assert find_download(name, items) == item
        assert find_download(f"{item.model_repo}/{item.file_path}", items) == item


def _check_quantization(text: str) -> None:
    quant = quantization_of(text)
    assert bool(quantization_name(quant)) == bool(quant)
    for known in (quant, text):
        assert 0.0 <= bits_per_weight(known) <= 32.0
        assert speed_rank(known, on_gpu=True) in (0, 1, 2)
        assert speed_rank(known, on_gpu=False) in (0, 1, 2)
        assert isinstance(is_repacked(known), bool)
    quantization_name(text)
    size = parameter_text(text)
    assert size == "" or size in text.upper() or "x" in size
    assert 0 <= parameter_count(size) < 10**19
    parameter_count(text)
    choice = choose_file([Candidate(text, quant, len(text)), Candidate("a.gguf", "", 0)], 40, on_gpu=False)
    assert choice is not None
    assert choice.reason
