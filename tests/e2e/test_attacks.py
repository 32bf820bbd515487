"""What an attack on the inference API found; none of it may harm anybody else."""

from __future__ import annotations

import pytest

from tests.support.server import ServerProcess


@pytest.mark.parametrize("slot", ["0000000009", "000000000", "99999999999999999999", "8", "-1", "\u0661"])
def test_a_slot_id_is_what_it_says(server: ServerProcess, slot: str) -> None:
    response = server.post(f"/slots/{slot}?action=erase", {})
    assert response.status_code == (200 if slot == "000000000" else 400)
    assert server.complete("Still there", n_predict=1)["tokens_predicted"] == 1


def test_a_trigger_token_beyond_all_numbers_is_refused(server: ServerProcess) -> None:
    triggers = [{"type": 0, "token": 10**30}]
    body = {"prompt": "x", "grammar": 'root ::= "a"', "grammar_lazy": True, "grammar_triggers": triggers}
    response = server.post("/completion", body)
    assert response.status_code == 400


def test_candidates_that_samplers_move_are_followed(server: ServerProcess) -> None:
    fields = {"seed": 3, "temperature": 0.8, "n_predict": 8, "xtc_probability": 0.5}
    plain = server.complete("Once upon a time", **fields)["content"]
    for _ in range(3):
        probed = server.complete("Once upon a time", n_probs=2, post_sampling_probs=True, **fields)
        assert probed["content"] == plain
    bound = server.complete("Yes or no?", n_predict=8, grammar='root ::= " yes" | " no"')
    assert bound["content"] in (" yes", " no")


def test_probabilities_are_those_of_the_text_that_is_seen(server: ServerProcess) -> None:
    body = {
        "messages": [{"role": "user", "content": "Talk about the weather."}],
        "temperature": 0, "max_tokens": 40, "logprobs": True, "top_logprobs": 1, "stop": ["the", "ion"],
    }  # fmt: skip
    choice = server.post("/v1/chat/completions", body).json()["choices"][0]
    shown = b"".join(bytes(item["bytes"]) for item in choice["logprobs"]["content"])
    assert shown.decode().startswith(choice["message"]["content"])


def test_more_prompts_than_may_ever_wait_are_refused_unread(server: ServerProcess) -> None:
    response = server.post("/completion", {"prompt": ["x"] * 100_000, "n_predict": 1})
    assert response.status_code == 400
    assert "--max-queue" in response.json()["error"]["message"]
