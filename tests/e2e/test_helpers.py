"""Routes around generation: templates, token counts, properties, models, the description of the API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.server import ServerProcess

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <|im_end|> there 🙂"},
]
TOOL = {"type": "function", "function": {"name": "go", "parameters": {"type": "object", "properties": {}}}}


def prompt_of(server: ServerProcess, **fields: Any) -> str:
    response = server.post("/apply-template", {"messages": MESSAGES} | fields)
    assert response.status_code == 200, response.text
    assert set(response.json()) == {"prompt"}
    return str(response.json()["prompt"])


def test_apply_template(server: ServerProcess) -> None:
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <|im_end|> there 🙂<|im_end|>\n"
    assert prompt_of(server) == expected + "<|im_start|>assistant\n"
    assert prompt_of(server, add_generation_prompt=False) == expected
    prefilled = [*MESSAGES, {"role": "assistant", "content": "Well,"}]
    assert prompt_of(server, messages=prefilled).endswith("<|im_start|>assistant\nWell,")
    assert '"go"' in prompt_of(server, tools=[TOOL])


def test_the_template_makes_what_chat_evaluates(server: ServerProcess) -> None:
    for fields in ({}, {"tools": [TOOL]}, {"messages": [*MESSAGES, {"role": "assistant", "content": "We"}]}):
        body = {"messages": MESSAGES, "max_tokens": 1, "verbose": True} | fields
        answer = server.post("/v1/chat/completions", body).json()
        assert answer["__verbose"]["prompt"] == prompt_of(server, **fields)
        for path in ("/chat/completions/input_tokens", "/v1/chat/completions/input_tokens"):
            counted = server.post(path, body).json()
            assert counted["input_tokens"] == answer["usage"]["prompt_tokens"]


@pytest.mark.parametrize("path", ["/apply-template", "/v1/chat/completions/input_tokens"])
@pytest.mark.parametrize(
    "fields",
    [
        {"messages": None},
        {"messages": "hi"},
        {"messages": [5]},
        {"messages": [{"content": "no role"}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"add_generation_prompt": True, "continue_final_message": True},
        {"tools": "all"},
        {"chat_template_kwargs": "none"},
    ],
)
def test_bad_conversations(server: ServerProcess, path: str, fields: dict[str, Any]) -> None:
    response = server.post(path, {"messages": MESSAGES} | fields)
    assert response.status_code == 400, response.text
    assert next(iter(fields)) in response.json()["error"]["message"]


def test_props(server: ServerProcess) -> None:
    props = server.get("/props").json()
    assert props["model_alias"] == "smol"
    assert props["chat_template_caps"]["supports_tools"] is False
    assert (props["bos_token"], props["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert (props["endpoint_slots"], props["endpoint_metrics"], props["endpoint_props"]) == (
        True,
        True,
        False,
    )
    settings = props["default_generation_settings"]
    assert settings["params"]["samplers"] == settings["samplers"]
    assert settings["params"]["temperature"] == 0.8
    assert server.post("/props", {}).status_code == 501


def test_props_can_be_posted_with_the_flag(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("-np", "1", "-c", "256", "--props", "--temp", "0.3", "--alias", "b,a")
    assert server.post("/props", {}).json() == {"success": True}
    props = server.get("/props").json()
    assert props["endpoint_props"] is True
    assert props["default_generation_settings"]["params"]["temperature"] == 0.3
    (model,) = server.get("/models").json()["data"]
    assert (model["id"], sorted(model["aliases"])) == ("a", ["a", "b"])
    assert server.get("/v1/models/b").json()["id"] == "a"


def test_models(server: ServerProcess) -> None:
    body = server.get("/v1/models").json()
    assert body == server.get("/models").json()
    (model,), (other,) = body["data"], body["models"]
    assert (model["id"], model["object"]) == ("smol", "model")
    meta = model["meta"]
    assert (meta["n_vocab"], meta["n_ctx"], meta["n_ctx_train"], meta["n_embd"]) == (49152, 1024, 8192, 576)
    assert other["name"] == "smol"
    assert "completion" in other["capabilities"]
    assert server.get("/v1/models/smol").json() == model
    missing = server.get("/v1/models/none")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found_error")


def test_openapi_names_every_route(server: ServerProcess) -> None:
    document = server.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    routes = {(method, path) for path, item in document["paths"].items() for method in item}
    for method, path in (
        ("post", "/completion"), ("post", "/v1/completions"), ("post", "/v1/chat/completions"), ("post", "/infill"),
        ("post", "/v1/embeddings"), ("post", "/rerank"), ("post", "/tokenize"), ("post", "/slots/{id}"),
        ("get", "/slots"), ("get", "/health"), ("get", "/lora-adapters"), ("post", "/apply-template"),
    ):  # fmt: skip
        assert (method, path) in routes
    for method, path in routes:
        if method == "get" and "{" not in path:
            assert server.get(path).status_code == 200, path
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert {"200", "400", "401", "429", "503"} <= set(chat["responses"])
    assert "text/event-stream" in chat["responses"]["200"]["content"]
    names = document["components"]["schemas"]
    assert "ChatRequest" in names
    operations = [
        operation["operationId"] for item in document["paths"].values() for operation in item.values()
    ]
    assert len(set(operations)) == len(operations)
