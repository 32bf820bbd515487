"""Reads the header of the model that `--model` names, before anything else is known of it."""

from __future__ import annotations

from pathlib import Path

from wingman.errors import ModelLoadFailure
from wingman.services.gguf import BadGguf, GgufHeader, read_parts
from wingman.services.home import split_parts


def read_model(path: Path) -> GgufHeader:
    """The header of a model, given any part of it. Blocks; raises ModelLoadFailure."""
    if not path.name:
        raise ModelLoadFailure(f"{path} is not a file")
    paths = [path.with_name(part) for part in split_parts(path.name)]
    missing = next((part for part in paths if not part.is_file()), None)
    if missing is not None:
        raise ModelLoadFailure(f"{missing} is not a file")
    try:
        return read_parts(paths)
    except BadGguf as error:
        raise ModelLoadFailure(f"can't load {path}: {error.message}") from None
    except OSError as error:
        raise ModelLoadFailure(f"can't read {path}: {error.strerror}") from None
