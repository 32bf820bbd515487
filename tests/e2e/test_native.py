"""llama-server's native API on the real model."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.server import ServerProcess


def stream(server: ServerProcess, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with server.client.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["x-accel-buffering"] == "no"
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert "data: [DONE]" not in lines
    return [json.loads(line[6:]) for line in lines]


def test_final_object(server: ServerProcess) -> None:
    body = server.complete("The capital of France is", n_predict=8, return_tokens=True)
    assert body["content"].strip().startswith("Paris")
    assert len(body["tokens"]) == body["tokens_predicted"] == 8
    assert (body["stop"], body["stop_type"], body["stopped_limit"]) == (True, "limit", True)
    assert body["model"] == "smol"
    assert body["prompt"] == "The capital of France is"
    assert body["tokens_cached"] == body["tokens_evaluated"] + 7
    assert body["generation_settings"]["temperature"] == 0
    assert body["generation_settings"]["samplers"][0] == "penalties"


def test_stream_equals_the_answer(server: ServerProcess) -> None:
    request = {"prompt": "Once upon a time", "seed": 7, "n_predict": 40, "stop": ["\n", " he "]}
    whole = server.complete(**request)
    *partial, final = stream(server, "/completion", request | {"temperature": 0})
    assert "".join(event["content"] for event in partial) == whole["content"]
    assert final["content"] == ""
    assert final["tokens"] == []
    assert final["stop_type"] == whole["stop_type"]
    assert final["stopping_word"] == whole["stopping_word"]
    assert [event["tokens_predicted"] for event in partial] == list(range(1, len(partial) + 1))
    assert all(event["id_slot"] >= 0 and event["stop"] is False for event in partial)


@pytest.mark.parametrize(
    "sampling", [{"seed": 42}, {"seed": 42, "temperature": 1.5, "top_k": 0}, {"mirostat": 2, "seed": 1}]
)
def test_a_seed_repeats_the_text(server: ServerProcess, sampling: dict[str, Any]) -> None:
    request = {"prompt": "A list of colours:", "n_predict": 24} | sampling
    first = server.post("/completion", request).json()["content"]
    assert server.post("/completion", request).json()["content"] == first
    assert server.post("/completion", request | {"seed": 43}).json()["content"] != first


def test_stop_words(server: ServerProcess) -> None:
    body = server.complete("Count: 1, 2, 3,", n_predict=30, stop=[" 6", "", None])
    assert body["stop_type"] == "word"
    assert body["stopping_word"] == " 6"
    assert body["content"] == " 4, 5,"
    assert server.complete("Count: 1, 2,", n_predict=3, stop="")["tokens_predicted"] == 3


def test_text_held_back_for_a_stop_is_not_lost_at_a_limit(server: ServerProcess) -> None:
    request = {"prompt": "Once upon", "n_predict": 2, "temperature": 0}
    text = server.complete(**request)["content"]
    events = stream(server, "/completion", request | {"stop": [text + "zzz"]})
    assert "".join(event["content"] for event in events) == text


def test_ignore_eos_and_logit_bias(server: ServerProcess) -> None:
    body = server.complete("Hi<|im_end|>", n_predict=30, ignore_eos=True)
    assert body["tokens_predicted"] == 30
    biases = {entry["token"]: entry["bias"] for entry in body["generation_settings"]["logit_bias"]}
    assert set(biases.values()) == {None}
    tokens = server.post("/tokenize", {"content": " Paris"}).json()["tokens"]
    banned = server.complete(
        "The capital of France is", n_predict=6, logit_bias=[[" Paris", False]], return_tokens=True
    )
    assert tokens[0] not in banned["tokens"]
    forced = server.complete("The capital of France is", n_predict=3, logit_bias={str(tokens[0]): 100})
    assert forced["content"] == " Paris Paris Paris"


def test_n_predict_in_all_spellings(server: ServerProcess) -> None:
    for fields in (
        {"n_predict": 3},
        {"max_tokens": 3},
        {"max_completion_tokens": 3},
        {"n_predict": 3, "max_tokens": 9},
    ):
        assert server.complete("Hello", **fields)["tokens_predicted"] == 3
    assert server.complete("Hello", n_predict=3.9)["tokens_predicted"] == 3
    none = server.complete("Hello there", n_predict=0)
    assert (none["tokens_predicted"], none["content"], none["stop_type"]) == (0, "", "limit")
    assert server.complete("Hello there", n_predict=1, id_slot=none["id_slot"])["timings"]["prompt_n"] == 1


def test_timings_add_up(server: ServerProcess) -> None:
    timings = server.complete("Some text to be completed", n_predict=12)["timings"]
    assert timings["predicted_n"] == 12
    assert timings["prompt_per_second"] == pytest.approx(1e3 / timings["prompt_ms"] * timings["prompt_n"])
    assert timings["predicted_per_second"] == pytest.approx(1e3 / timings["predicted_ms"] * 11, abs=1e-6)
    one = server.complete("Some other text", n_predict=1)["timings"]
    assert one["predicted_per_token_ms"] == 0.0


def test_prompt_cache(server: ServerProcess) -> None:
    prompt = "An unusual beginning that no other test has: " + "zebra " * 20
    first = server.complete(prompt, n_predict=4)
    assert first["timings"]["cache_n"] + first["timings"]["prompt_n"] == first["tokens_evaluated"]
    again = server.complete(prompt + "and more", n_predict=4)
    assert again["id_slot"] == first["id_slot"]
    assert again["timings"]["cache_n"] >= first["tokens_evaluated"] - 1
    assert server.complete(prompt, n_predict=4)["content"] == first["content"]
    assert server.complete(prompt, n_predict=1, cache_prompt=False)["timings"]["cache_n"] == 0


def test_prompt_forms(server: ServerProcess) -> None:
    tokens = server.post("/tokenize", {"content": "The sky is"}).json()["tokens"]
    expected = server.complete("The sky is", n_predict=5)["content"]
    for prompt in (tokens, [tokens[0], " sky is"], ["The sky is"], [tokens], {"prompt_string": "The sky is"}):
        assert server.complete(prompt, n_predict=5)["content"] == expected


def test_context_overflow_is_refused_and_a_full_context_ends_with_length(
    start_server: Callable[..., ServerProcess],
) -> None:
    server = start_server("-np", "1", "-c", "256")
    refused = server.post("/completion", {"prompt": "word " * 300, "stream": True})
    error = refused.json()["error"]
    assert refused.status_code == 400
    assert error["type"] == "exceed_context_size_error"
    assert (error["n_prompt_tokens"], error["n_ctx"]) == (301, 256)
    full = server.complete("word " * 100, ignore_eos=True)
    assert full["tokens_evaluated"] + full["tokens_predicted"] == 256
    assert (full["truncated"], full["stop_type"]) == (True, "limit")


def test_context_shift(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("-np", "1", "-c", "256", "--context-shift")
    body = server.complete("word " * 100, ignore_eos=True, n_predict=300, n_keep=10)
    assert body["tokens_predicted"] == 300
    assert (body["truncated"], body["stop_type"]) == (True, "limit")
    assert server.complete("The capital of France is", n_predict=3)["content"].strip().startswith("Paris")


def test_return_progress_and_timings_per_token(server: ServerProcess) -> None:
    request = {"prompt": "many words " * 300, "n_predict": 3, "cache_prompt": False, "temperature": 0}
    events = stream(server, "/completion", request | {"return_progress": True, "timings_per_token": True})
    progress = [event["prompt_progress"] for event in events if "prompt_progress" in event]
    assert progress[0]["processed"] == progress[0]["cache"] == 0
    assert progress[-1]["processed"] == progress[-1]["total"] == events[-1]["tokens_evaluated"]
    assert [event["timings"]["predicted_n"] for event in events if event["tokens"]] == [1, 2, 3]


def test_response_fields(server: ServerProcess) -> None:
    body = server.complete(
        "Hi", n_predict=1, response_fields=["content", "generation_settings/n_predict", "nope"]
    )
    assert set(body) == {"content", "generation_settings/n_predict"}


def test_indent_and_time_limits(server: ServerProcess) -> None:
    prompt = "def add(a, b):\n    c = a + b\n"
    body = server.complete(prompt, n_predict=120, n_indent=4)
    assert body["stop_type"] == "limit" or body["tokens_predicted"] < 120
    lines = [line for line in body["content"].split("\n")[1:-1] if line.strip()]
    assert all(line.startswith("    ") for line in lines)
    timed = server.complete("A poem in short lines:\n", n_predict=400, t_max_predict_ms=1, ignore_eos=True)
    assert timed["tokens_predicted"] < 400
    assert timed["stop_type"] == "limit"


def test_tokenize_and_detokenize(server: ServerProcess) -> None:
    text = "Grüße, 世界! 🦜<|im_end|>"
    tokens = server.post("/tokenize", {"content": text}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": tokens}).json()["content"] == text
    pieces = server.post("/tokenize", {"content": "🦜", "with_pieces": True}).json()["tokens"]
    data = b"".join(
        bytes(p["piece"]) if isinstance(p["piece"], list) else p["piece"].encode() for p in pieces
    )
    assert data.decode() == "🦜"
    assert any(isinstance(piece["piece"], list) for piece in pieces)
    plain = server.post("/tokenize", {"content": "<|im_end|>", "parse_special": False}).json()["tokens"]
    assert len(plain) > 1
    assert server.post("/tokenize", {"content": ["a", tokens[0]]}).json()["tokens"][1] == tokens[0]
    assert server.post("/tokenize", {}).json() == {"tokens": []}
    assert server.post("/detokenize", {}).json() == {"content": ""}


def test_monitoring(server: ServerProcess) -> None:
    server.complete("A word", n_predict=2)
    health = server.get("/health?include_slots").json()
    assert (health["status"], health["slots_idle"], health["slots_processing"]) == ("ok", 8, 0)
    assert len(health["slots"]) == 8
    assert server.get("/v1/health").json()["status"] == "ok"
    used = next(slot for slot in server.get("/slots").json() if "params" in slot)
    assert used["next_token"][0]["n_remain"] == -1
    assert used["next_token"][0]["n_decoded"] == 0
    assert used["is_processing"] is False
    props = server.get("/props").json()
    assert props["total_slots"] == 8
    assert props["default_generation_settings"]["n_ctx"] == 1024
    assert props["default_generation_settings"]["params"]["seed"] == 4294967295
    assert "<|im_start|>" in props["chat_template"]
    assert server.get("/live").status_code == server.get("/ready").status_code == 200


def test_metrics_count_what_was_done(server: ServerProcess) -> None:
    def counters() -> dict[str, float]:
        text = server.get("/metrics").text
        lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in lines}

    before = counters()
    bodies = [server.complete(f"Number {index} is", n_predict=5) for index in range(3)]
    after = counters()
    for name, key in (
        ("llamacpp:prompt_tokens_total", "prompt_n"),
        ("llamacpp:prompt_tokens_cached_total", "cache_n"),
        ("llamacpp:tokens_predicted_total", "predicted_n"),
    ):
        assert after[name] - before[name] == sum(body["timings"][key] for body in bodies)
    assert (
        after["wingman:time_to_first_token_seconds_count"]
        - before["wingman:time_to_first_token_seconds_count"]
        == 3
    )
    types = {
        line.split()[2]: line.split()[3]
        for line in server.get("/metrics").text.splitlines()
        if "# TYPE" in line
    }
    assert types["llamacpp:n_tokens_max"] == types["llamacpp:n_decode_total"] == "counter"
    assert types["wingman:inter_token_gap_seconds"] == "histogram"
