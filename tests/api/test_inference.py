"""/api/inference: status codes, parameters and shapes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from protocol import Headers, Target
from tests.support.shop import PATH, REPO, Shop, a_shop
from wingman.api import inference as api
from wingman.api.errors import error_response
from wingman.api.inference import MAX_CONTEXT, MAX_TEMPLATE_CHARS, read_start
from wingman.errors import InvalidRequest, MissingParameter, WingmanError
from wingman.http.messages import Request, Response
from wingman.services.deployments import Start

KEYS = set(
    "isa alias status modelRepo filePath address port contextSize gpuLayers chatTemplate force error created "
    "updated".split()
)
FILE = {"modelRepo": REPO, "filePath": PATH}
CHAT = {"alias": "chat", **FILE}


@pytest.fixture
async def shop(tmp_path: Path, tiny_model: Path) -> AsyncIterator[Shop]:
    async with a_shop(tmp_path, tiny_model) as shop:
        shop.add()
        yield shop


def request(query: dict[str, str]) -> Request:
    return Request("GET", Target("/", tuple(query.items())), Headers(()), "1", "peer")


async def call(shop: Shop, endpoint: Callable[..., Any], **query: str) -> tuple[int, Any]:
    """Status and body, as the application answers."""
    try:
        answer = endpoint(shop.inference, request(query))
        if not isinstance(answer, Response):
            answer = await answer
    except WingmanError as error:
        answer = error_response(error)
    return answer.status, json.loads(answer.body)


async def test_the_life_of_an_item(shop: Shop) -> None:
    status, item = await call(shop, api.start, **CHAT)
    assert (status, item["status"], set(item)) == (202, "queued", KEYS)
    assert (item["isa"], item["force"], item["contextSize"], item["gpuLayers"]) == (
        "WingmanItem",
        False,
        0,
        -1,
    )
    await shop.loaded("chat")
    status, item = await call(shop, api.start, **CHAT)
    assert (status, item["status"]) == (208, "inferring")
    status, item = await call(shop, api.stop, alias="chat")
    assert (status, item["status"]) == (200, "complete")
    status, item = await call(shop, api.reset, alias="chat")
    assert (status, item["alias"]) == (200, "chat")
    assert await call(shop, api.get_status) == (200, [])


async def test_items_are_listed_in_two_shapes(shop: Shop) -> None:
    await call(shop, api.start, **CHAT)
    await call(shop, api.start, **CHAT | {"alias": "code"})
    for query, aliases in (({}, ["chat", "code"]), ({"alias": "code"}, ["code"]), ({"alias": "none"}, [])):
        status, body = await call(shop, api.list_items, **query)
        assert (status, list(body)) == (200, ["WingmanItems"])
        assert [item["alias"] for item in body["WingmanItems"]] == aliases
        assert await call(shop, api.get_status, **query) == (200, body["WingmanItems"])


@pytest.mark.parametrize(
    ("endpoint", "query", "status", "message"),
    [
        (api.start, FILE, 422, "missing parameter: alias"),
        (api.start, {"alias": "a", "filePath": PATH}, 422, "missing parameter: modelRepo"),
        (api.start, {"alias": "a", "modelRepo": REPO}, 422, "missing parameter: filePath"),
        (api.start, CHAT | {"filePath": "none.gguf"}, 404, "not downloaded completely"),
        (api.start, CHAT | {"modelRepo": "../.."}, 400, "modelRepo"),
        (api.start, CHAT | {"filePath": "../../etc/passwd"}, 400, "filePath"),
        (api.start, CHAT | {"port": "70000"}, 400, "port must be"),
        (api.start, CHAT | {"alias": "a\tb"}, 400, "alias must have"),
        (api.stop, {}, 422, "missing parameter: alias"),
        (api.stop, {"alias": "nobody"}, 404, "'nobody'"),
        (api.reset, {}, 422, "missing parameter: alias"),
        (api.reset, {"alias": "nobody"}, 404, "'nobody'"),
    ],
)
async def test_what_can_not_be_done_says_why(
    shop: Shop, endpoint: Callable[..., Any], query: dict[str, str], status: int, message: str
) -> None:
    got, body = await call(shop, endpoint, **query)
    assert got == status
    assert message in body["error"]["message"]
    assert shop.inference.items() == []


async def test_a_port_in_use_and_too_little_memory_have_codes_of_their_own(shop: Shop) -> None:
    shop.taken.add(7001)
    assert (await call(shop, api.start, **CHAT, port="7001"))[0] == 409
    shop.capacity = 1
    status, body = await call(shop, api.start, **CHAT)
    assert (status, "force=true" in body["error"]["message"]) == (507, True)
    assert (await call(shop, api.start, **CHAT, force="true"))[0] == 202


def test_all_parameters_of_a_start() -> None:
    query = CHAT | {
        "address": "::1", "port": "7001", "contextSize": "4096", "gpuLayers": "12", "chatTemplate": "chatml",
        "force": "1",
    }  # fmt: skip
    assert read_start(query) == Start("chat", REPO, PATH, "::1", 7001, 4096, 12, "chatml", force=True)
    assert read_start(CHAT) == Start("chat", REPO, PATH)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("port", "-1"),
        ("port", "65536"),
        ("port", "http"),
        ("contextSize", "-1"),
        ("contextSize", str(MAX_CONTEXT + 1)),
        ("contextSize", "4k"),
        ("gpuLayers", "-2"),
        ("gpuLayers", "all"),
        ("force", "perhaps"),
        ("chatTemplate", "x" * (MAX_TEMPLATE_CHARS + 1)),
        ("address", "a b"),
        ("address", "-a"),
        ("address", "http://a"),
        ("address", "/run/a.sock"),
        ("address", "a.sock"),
        ("address", "x" * 255),
        ("address", "1.2.3.4:80"),
        ("address", "[::1]"),
    ],
)
def test_what_is_out_of_bounds_is_named(field: str, text: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        read_start(CHAT | {field: text})
    assert error.value.field == field


@pytest.mark.parametrize("address", ["", "127.0.0.1", "0.0.0.0", "::", "fe80::1", "localhost", "box-1.lan"])
def test_an_address_is_one_to_listen_on(address: str) -> None:
    assert read_start(CHAT | {"address": address}).address == address


@pytest.mark.parametrize("missing", ["alias", "modelRepo", "filePath"])
def test_what_is_missing_is_named(missing: str) -> None:
    with pytest.raises(MissingParameter) as error:
        read_start({name: value for name, value in CHAT.items() if name != missing})
    assert error.value.field == missing
