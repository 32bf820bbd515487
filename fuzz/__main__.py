"""`python -m fuzz TARGET --seconds N [--seed N]`: atheris when it is installed, else plain mutation.

Prints how many inputs were tried and exits 0; on a failure saves the input and exits 1.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fuzz.mutate import Mutator, Target, corpus_dir, read_corpus, run

TARGETS = (
    "bodies", "control", "gguf", "grammars", "http1", "names", "slotfiles", "sse", "templates", "toolcalls",
    "websocket",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one target; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="plain mutation even if atheris is installed")
    options = parser.parse_args(argv)
    if not options.plain and importlib.util.find_spec("atheris") is not None:
        _run_atheris(options.target, options.seconds, options.seed)
    return _run_plain(options.target, options.seconds, options.seed)


def _run_plain(name: str, seconds: float, seed: int) -> int:
    module = importlib.import_module(f"fuzz.{name}")
    target: Target = module.one
    outcome = run(target, iter(Mutator(read_corpus(name), module.TOKENS, seed)), seconds=seconds)
    print(f"{name}: {outcome.n_executions} executions, seed {seed}")
    if outcome.failure is None:
        return 0
    traceback.print_exception(outcome.failure.error)
    digest = hashlib.sha256(outcome.failure.data).hexdigest()[:16]
    path = Path(f"crash-{name}-{digest}")
    path.write_bytes(outcome.failure.data)
    print(f"{name}: failed; the input is in {path}")
    return 1


def _run_atheris(name: str, seconds: float, seed: int) -> NoReturn:
    """libFuzzer ends the process itself: 0 when time is up, else after saving the input."""
    import atheris  # an optional tool, heavy to load

    with atheris.instrument_imports(include=["protocol", "wingman", "h11"]):
        module = importlib.import_module(f"fuzz.{name}")
    with tempfile.TemporaryDirectory() as found:  # libFuzzer writes what it finds to the first corpus
        flags = [f"-max_total_time={max(1, round(seconds))}", f"-seed={seed or 1}"]
        atheris.Setup(
            ["fuzz", *flags, f"-artifact_prefix=crash-{name}-", found, str(corpus_dir(name))], module.one
        )
        atheris.Fuzz()
    sys.exit(0)


if __name__ == "__main__":
    sys.exit(main())
