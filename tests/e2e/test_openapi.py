"""The served OpenAPI document against the server itself, by schemathesis as a stranger."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.server import ServerProcess
from tools.tinymodel import write_bert, write_llama
from wingman.api.routes import MODEL_ROUTES

ALIASES = "rerank|^/completions|^/embedding$|^/v1/embeddings|^/v1/chat|^/models|^/v1/health|^/responses"
"""Ranking needs another model; of paths with the same endpoint one is enough."""
CHECKS = "not_a_server_error,response_schema_conformance,status_code_conformance,content_type_conformance"


def run_schemathesis(url: str, folder: Path, *options: str) -> None:
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--checks", CHECKS]
    command += ["--phases", "coverage,fuzzing", "--max-examples", "10", "--seed", "1", "--no-color", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=folder)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "generated, " in done.stdout
    assert "0 passed" not in done.stdout


def test_every_route_is_described(server: ServerProcess) -> None:
    document = server.get("/openapi.json").json()
    assert document["openapi"] == "3.1.0"
    for method, paths, *_ in MODEL_ROUTES:
        for path in paths:
            operation = document["paths"][path][method.lower()]
            assert operation["summary"]
            assert "200" in operation["responses"]


@pytest.mark.parametrize("kind", ["generating", "ranking"])
def test_no_server_error_and_no_answer_beside_the_document(
    kind: str, tmp_path: Path, start_server: Callable[..., ServerProcess]
) -> None:
    flags = [
        "-c",
        "512",
        "-np",
        "2",
        "-n",
        "8",
        "--metrics",
        "--props",
        "--slot-save-path",
        str(tmp_path / "slots"),
    ]
    if kind == "generating":
        server = start_server(*flags, model=write_llama(tmp_path / "tiny.gguf"))
        run_schemathesis(server.url, tmp_path, "--exclude-path-regex", ALIASES)
    else:
        server = start_server(*flags, model=write_bert(tmp_path / "rank.gguf", pooling="rank"))
        run_schemathesis(
            server.url, tmp_path, "--include-path-regex", "rerank|tokenize|models|slots$|health|live"
        )
    assert server.get("/health").json()["slots_processing"] == 0
