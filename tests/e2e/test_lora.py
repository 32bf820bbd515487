"""LoRA adapters on a tiny model: scales for all, for one request, and at the start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import ServerProcess
from tools.tinymodel import write_lora

Start = Callable[..., ServerProcess]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("lora")
    return [str(write_lora(folder / f"{seed}.gguf", seed=seed)) for seed in range(2)]


@pytest.fixture(scope="module")
def adapted(tiny_model: Path, adapters: list[str]) -> Iterator[ServerProcess]:
    arguments = ["--model", str(tiny_model), "-np", "4", "-c", "1024"]
    with ServerProcess([*arguments, "--lora", adapters[0], "--lora", adapters[1]]) as process:
        yield process


@pytest.fixture
def plain(start_server: Start, tiny_model: Path) -> str:
    """What the model says without adapters."""
    return say(start_server("-np", "2", model=tiny_model))


def say(server: ServerProcess, **fields: Any) -> str:
    body = server.complete("the people", n_predict=16, ignore_eos=True, cache_prompt=False, **fields)
    return str(body["content"])


def scaled(*scales: float) -> list[dict[str, float]]:
    return [{"id": index, "scale": scale} for index, scale in enumerate(scales)]


def set_scales(server: ServerProcess, *scales: float) -> None:
    response = server.post("/lora-adapters", scaled(*scales))
    assert response.json() == {"success": True}


def scales_of(server: ServerProcess) -> list[float]:
    return [one["scale"] for one in server.get("/lora-adapters").json()]


def test_list(adapted: ServerProcess, adapters: list[str]) -> None:
    set_scales(adapted, 1, 1)
    body = adapted.get("/lora-adapters").json()
    assert [one["id"] for one in body] == [0, 1]
    assert [one["path"] for one in body] == adapters
    assert [one["task_name"] for one in body] == ["noise 0", "noise 1"]
    assert [one["scale"] for one in body] == [1.0, 1.0]


def test_scale_0_is_the_model_itself(adapted: ServerProcess, plain: str) -> None:
    set_scales(adapted, 0, 0)
    assert say(adapted) == plain
    set_scales(adapted, 1, 0)
    assert say(adapted) != plain
    adapted.post("/lora-adapters", [{"id": 1, "scale": 1}])  # those not named are off
    assert scales_of(adapted) == [0, 1]
    adapted.post("/lora-adapters", [])
    assert scales_of(adapted) == [0, 0]
    assert say(adapted) == plain


def test_scales_of_a_request(adapted: ServerProcess, plain: str) -> None:
    set_scales(adapted, 0, 0)
    texts = [say(adapted, lora=scaled(*pair)) for pair in ((1, 0), (0, 1), (1, 1), (0.5, 0), (-1, 0))]
    assert len({*texts, plain}) == 6
    assert say(adapted) == plain
    assert scales_of(adapted) == [0, 0]
    assert say(adapted, lora=[]) == plain
    set_scales(adapted, 1, 0)
    assert say(adapted) == texts[0]
    assert say(adapted, lora=scaled(0, 1)) == texts[1]
    settings = adapted.complete("a", n_predict=1, lora=scaled(0, 0.5))["generation_settings"]
    assert settings["lora"] == scaled(0, 0.5)


def test_requests_with_different_scales_at_once(adapted: ServerProcess) -> None:
    set_scales(adapted, 0, 0)
    wanted = [(1, 0), (0, 0), (0, 1), (0.5, 0.5)] * 3
    expected = [say(adapted, lora=scaled(*pair)) for pair in wanted[:4]] * 3
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda pair: say(adapted, lora=scaled(*pair)), wanted))
    assert found == expected


def test_what_was_computed_with_other_scales_is_not_reused(adapted: ServerProcess) -> None:
    set_scales(adapted, 0, 0)
    prompt = "the people who know what time will make " * 3
    off = adapted.complete(prompt, n_predict=8, ignore_eos=True, id_slot=1, cache_prompt=False)
    on = adapted.complete(prompt, n_predict=8, ignore_eos=True, id_slot=1, lora=scaled(1, 0))
    fresh = adapted.complete(prompt, n_predict=8, ignore_eos=True, cache_prompt=False, lora=scaled(1, 0))
    assert on["timings"]["cache_n"] == 0
    assert on["content"] == fresh["content"] != off["content"]
    again = adapted.complete(prompt, n_predict=8, ignore_eos=True, id_slot=1, lora=scaled(1, 0))
    assert again["timings"]["cache_n"] > 0
    assert again["content"] == on["content"]


def test_answers_share_the_scales_of_their_request(adapted: ServerProcess) -> None:
    set_scales(adapted, 0, 0)
    response = adapted.post(
        "/completion",
        {
            "prompt": "the people",
            "n": 3,
            "n_predict": 16,
            "temperature": 0,
            "ignore_eos": True,
            "lora": scaled(1, 0),
        },
    )
    assert {body["content"] for body in response.json()} == {say(adapted, lora=scaled(1, 0))}


def test_chat_takes_scales_too(adapted: ServerProcess) -> None:
    set_scales(adapted, 0, 0)

    def chat(**fields: Any) -> str:
        body = {
            "messages": [{"role": "user", "content": "hello"}],
            "temperature": 0,
            "max_tokens": 12,
        } | fields
        return str(adapted.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"])

    assert chat(lora=scaled(1, 0)) != chat()


@pytest.mark.parametrize(
    "bad",
    [5, {}, "all", [5], [{}], [{"id": "0", "scale": 1}], [{"id": 2, "scale": 1}], [{"id": -1, "scale": 1}],
     [{"id": 0, "scale": "1"}], [{"id": 0, "scale": True}], [{"id": 0, "scale": 1e300}], [{"id": True}],
     [{"id": 0, "scale": [1]}]],
)  # fmt: skip
def test_refusals(adapted: ServerProcess, bad: Any) -> None:
    set_scales(adapted, 0.5, 0)
    assert adapted.post("/lora-adapters", bad).status_code == 400
    response = adapted.post("/completion", {"prompt": "a", "n_predict": 1, "lora": bad})
    assert response.status_code == 400
    assert "lora" in response.json()["error"]["message"]
    assert scales_of(adapted) == [0.5, 0]


def test_scales_by_flag(
    start_server: Start, tiny_model: Path, adapters: list[str], adapted: ServerProcess
) -> None:
    server = start_server("-np", "2", "--lora-scaled", f"{adapters[0]}:0.5", model=tiny_model)
    assert scales_of(server) == [0.5]
    assert say(server) == say(adapted, lora=scaled(0.5, 0))


def test_not_applied_at_the_start(
    start_server: Start, tiny_model: Path, adapters: list[str], plain: str, adapted: ServerProcess
) -> None:
    flags = ("--lora", adapters[0], "--lora-init-without-apply")
    server = start_server("-np", "2", *flags, model=tiny_model)
    assert scales_of(server) == [0]
    assert say(server) == plain
    set_scales(server, 1)
    assert say(server) == say(adapted, lora=scaled(1, 0))


def test_without_adapters(server: ServerProcess) -> None:
    assert server.get("/lora-adapters").json() == []
    expected = server.complete("Hello", n_predict=3)["content"]
    assert server.complete("Hello", n_predict=3, lora=scaled(1, 2))["content"] == expected


def test_an_adapter_of_another_model_is_refused(starter_model: Path, adapters: list[str]) -> None:
    with (
        pytest.raises(AssertionError, match="LoRA adapter"),
        ServerProcess(["--model", str(starter_model), "--lora", adapters[0]]),
    ):
        pass
