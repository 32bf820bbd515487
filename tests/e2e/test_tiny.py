"""A generated model whose output is noise: split files, invalid UTF-8, no chat template, BOS."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.support.server import ServerProcess
from tools.tinymodel import write_llama


def test_a_split_model_is_served_from_any_part(
    start_server: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    write_llama(tmp_path / "tiny.gguf", n_splits=2)
    last = sorted(tmp_path.glob("*-of-*.gguf"))[-1]
    server = start_server("-np", "2", model=last)
    assert server.complete("the", n_predict=3)["tokens_predicted"] == 3


def test_noise_streams_as_it_answers(start_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    model = write_llama(tmp_path / "tiny.gguf")
    server = start_server("-np", "2", model=model)
    for seed in range(12):
        request = {
            "prompt": "the",
            "n_predict": 60,
            "seed": seed,
            "temperature": 3,
            "top_k": 0,
            "top_p": 1,
            "min_p": 0,
        }
        whole = server.post("/completion", request).json()
        with server.client.stream("POST", "/completion", json=request | {"stream": True}) as response:
            events = [json.loads(line[6:]) for line in response.iter_lines() if line]
        assert "".join(event["content"] for event in events) == whole["content"]
        assert sum(len(event["tokens"]) for event in events) == whole["tokens_predicted"]
    assert whole["prompt"].startswith("<s>")
    assert server.complete("", n_predict=1)["tokens_evaluated"] == 1


def test_without_a_template_chat_is_chatml(
    start_server: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    server = start_server("-np", "2", model=write_llama(tmp_path / "tiny.gguf", chat_template=None))
    assert "<|im_start|>" in server.get("/props").json()["chat_template"]
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "verbose": True}
    answer = server.post("/v1/chat/completions", body).json()
    assert answer["__verbose"]["prompt"].endswith("<|im_start|>assistant\n")
