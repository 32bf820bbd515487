"""Many clients at once on the real model: same texts, freed slots, bounded queues."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.logits import Logits
from tests.support.server import ServerProcess

TOPICS = ("the sea", "a clock", "bread", "winter", "a violin", "Mars", "an old bridge", "bees")


def body(topic: str, **fields: Any) -> dict[str, Any]:
    prompt = f"Write one sentence about {topic}, then another one about its history:"
    return {
        "prompt": prompt,
        "temperature": 0,
        "n_predict": 96,
        "ignore_eos": True,
        "cache_prompt": False,
    } | fields


async def stream_tokens(
    client: httpx.AsyncClient, request: dict[str, Any]
) -> tuple[str, list[int], dict[str, Any]]:
    text, tokens, last = "", [], {}
    async with client.stream("POST", "/completion", json=request | {"stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                event = json.loads(line[6:])
                text += event["content"]
                tokens += event["tokens"]
                last = event
    return text, tokens, last


def tie_at(
    logits: Logits, server: ServerProcess, prompt: str, tokens: list[int], alone: list[int]
) -> tuple[int, float, float] | None:
    """None when the tokens are equal; else where they part, proven to be a rounding tie."""
    assert len(tokens) == len(alone)
    if tokens == alone:
        return None
    at = next(i for i, pair in enumerate(zip(tokens, alone, strict=True)) if pair[0] != pair[1])
    before = server.post("/tokenize", {"content": prompt, "add_special": True}).json()["tokens"]
    gap, rounding = logits.tie([*before, *tokens[:at]])
    assert gap <= 2 * rounding, f"token {at} of {prompt!r} differs, but the top logits are {gap} apart"
    return at, gap, rounding


async def test_eight_streams_give_the_texts_of_eight_solo_runs(
    server: ServerProcess, starter_model: Path
) -> None:
    solo = [server.post("/completion", body(topic, return_tokens=True)).json() for topic in TOPICS]
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        together = await asyncio.gather(*(stream_tokens(client, body(topic)) for topic in TOPICS))
    logits = Logits(starter_model)
    ties = []
    for topic, alone, (text, tokens, last) in zip(TOPICS, solo, together, strict=True):
        assert last["stop"] is True
        assert last["tokens_predicted"] == len(tokens) == 96
        tie = tie_at(logits, server, body(topic)["prompt"], tokens, alone["tokens"])
        if tie is None:
            assert text == alone["content"]
        else:
            ties.append((topic, tie))
    logits.close()
    print(f"rounding ties: {len(ties)} of {len(TOPICS)}: {ties}")
    assert len(ties) < len(TOPICS), "some of eight texts must be equal to the last token"


async def test_clients_that_vanish_at_random_moments_leave_every_slot_idle(server: ServerProcess) -> None:
    chooser = random.Random(4)

    async def vanish(index: int) -> None:
        host, _, port = server.url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        request = json.dumps(
            body(TOPICS[index % 8], stream=bool(index % 2), n_predict=400, prompt="word " * 300)
        )
        head = f"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: {len(request)}\r\n\r\n"
        writer.write((head + request).encode())
        await asyncio.sleep(chooser.random() * 1.5)
        if index % 3:
            writer.transport.abort()
        else:
            writer.close()
        del reader

    results = await asyncio.gather(*(vanish(index) for index in range(100)), return_exceptions=True)
    assert not [result for result in results if isinstance(result, BaseException)]
    server.wait_idle()
    assert server.get("/slots").json()[0]["is_processing"] is False
    assert server.complete("The capital of France is", n_predict=4)["content"].strip().startswith("Paris")


async def test_neighbours_that_leave_change_nothing(server: ServerProcess, starter_model: Path) -> None:
    request = body("a lighthouse", n_predict=64)
    alone = server.post("/completion", request | {"return_tokens": True}).json()
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        kept = asyncio.create_task(stream_tokens(client, request))
        for _ in range(6):
            with pytest.raises(httpx.ReadTimeout):
                await client.post(
                    "/completion", json=body("noise", prompt="la " * 40, n_predict=500), timeout=0.05
                )
        text, tokens, _ = await kept
    assert text
    logits = Logits(starter_model)
    print(f"rounding tie: {tie_at(logits, server, request['prompt'], tokens, alone['tokens'])}")
    logits.close()
    server.wait_idle()


def test_a_disconnect_frees_the_slot_of_a_stream(server: ServerProcess) -> None:
    request = body("time", stream=True, n_predict=900)
    with httpx.stream("POST", f"{server.url}/completion", json=request, timeout=30) as response:
        next(response.iter_lines())
        assert server.get("/health").json()["slots_processing"] == 1
    assert server.wait_idle() < 5


def test_a_disconnect_frees_the_slot_of_a_plain_request(server: ServerProcess) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/completion", json=body("time", n_predict=900), timeout=0.3)
    assert server.wait_idle() < 5


def test_a_full_queue_answers_429_while_the_model_is_hot(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("-np", "1", "-c", "2048", "--max-queue", "2")

    async def flood() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            first = asyncio.create_task(client.post("/completion", json=body("rain", n_predict=60)))
            await asyncio.sleep(0.3)
            rest = [client.post("/completion", json=body("snow", n_predict=4)) for _ in range(8)]
            return [*await asyncio.gather(*rest), await first]

    responses = asyncio.run(flood())
    codes = sorted(response.status_code for response in responses)
    assert codes == [200] * 3 + [429] * 6
    refused = next(response for response in responses if response.status_code == 429)
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert int(refused.headers["retry-after"]) >= 1
    assert server.complete("again", n_predict=1)["tokens_predicted"] == 1


def test_queued_tokens_are_bounded_too(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("-np", "1", "-c", "2048", "--max-queue-tokens", "100")

    async def flood() -> list[int]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            first = asyncio.create_task(client.post("/completion", json=body("rain", n_predict=60)))
            await asyncio.sleep(0.3)
            long = await client.post("/completion", json=body("x", prompt="word " * 150, n_predict=1))
            short = client.post("/completion", json=body("x", prompt="word " * 20, n_predict=1))
            return [long.status_code, (await short).status_code, (await first).status_code]

    assert asyncio.run(flood()) == [429, 200, 200]


def test_a_slow_reader_harms_only_itself(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("-np", "2", "-c", "4096", "--write-timeout", "1", "--max-unread", "4096")

    async def read_nothing() -> dict[str, Any]:
        host, _, port = server.url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
        sock = writer.get_extra_info("socket")
        sock.setsockopt(1, 8, 2048)  # SOL_SOCKET, SO_RCVBUF
        request = json.dumps(body("rivers", stream=True, n_predict=1900, timings_per_token=True))
        writer.write(
            f"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: {len(request)}\r\n\r\n{request}".encode()
        )
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            _, tokens, last = await stream_tokens(client, body("lakes"))
        assert len(tokens) == 96
        writer.close()
        del reader
        return last

    assert asyncio.run(read_nothing())["stop"] is True
    server.wait_idle()


async def test_streams_go_on_while_a_long_prompt_is_evaluated(
    server: ServerProcess, starter_model: Path
) -> None:
    words = random.Random(5).choices(
        "bread sea clock winter violin bridge bees old new far near".split(), k=780
    )
    long = body("x", prompt=" ".join(words), n_predict=8, return_tokens=True)
    alone = server.post("/completion", long).json()
    n_seen, n_meanwhile = 0, 0
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        request = body("rivers", n_predict=700, stream=True)
        async with client.stream("POST", "/completion", json=request) as response:
            answer: asyncio.Task[httpx.Response] | None = None
            async for line in response.aiter_lines():
                n_seen += line.startswith("data: ")
                if n_seen == 10 and answer is None:
                    answer = asyncio.create_task(client.post("/completion", json=long))
                n_meanwhile += answer is not None
                if answer is not None and answer.done():
                    break
    assert answer is not None
    assert answer.done(), "the stream ended before the long prompt was answered"
    beside = answer.result().json()
    assert beside["timings"]["prompt_n"] > 700
    assert n_meanwhile > 8, "the prompt held up the stream"
    logits = Logits(starter_model)
    tie_at(logits, server, long["prompt"], beside["tokens"], alone["tokens"])
    logits.close()
