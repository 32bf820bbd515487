"""Wingman inside another asyncio program: `from wingman import Wingman, configure`."""

from __future__ import annotations

import asyncio
import shutil
import threading
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
import openai
import orjson
import pytest
from websockets.asyncio.client import ClientConnection, connect

from tests.support.hub import HubServer
from wingman import RequestFailed, Wingman, configure
from wingman.config import Config
from wingman.errors import ConfigurationError, InvalidRequest, ModelLoadFailure, NotFound
from wingman.http.messages import EventStream, Response
from wingman.services.home import Home

REPO, PATH = "tests/Tiny-GGUF", "tiny.F32.gguf"
HELLO = [{"role": "user", "content": "Say hello."}]
BRIEF = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}


def settings(home: Path, **more: Any) -> Config:
    return configure(home=str(home), threads=1, port=0, control_port=0, offline=True, **more)


@pytest.fixture
def home(tmp_path: Path, tiny_model: Path) -> Path:
    """A home where someone has put a model."""
    home = Home(tmp_path / "home")
    home.create()
    shutil.copy(tiny_model, home.model_file(REPO, PATH))
    return home.root


def content(completion: dict[str, Any]) -> str:
    return str(completion["choices"][0]["message"]["content"])


async def test_a_program_chats_without_any_socket(home: Path) -> None:
    async with Wingman(settings(home), listen=False) as wingman:
        assert (wingman.addresses, wingman.control_addresses) == ([], [])
        item = await wingman.start_model("tiny", REPO, PATH, context_size=256)
        assert (item.alias, item.status, item.context_size) == ("tiny", "inferring", 256)
        whole = await wingman.chat(HELLO, model="tiny", **BRIEF)
        assert whole["model"] == "tiny"
        assert whole["usage"]["completion_tokens"] == 6
        async with aclosing(wingman.stream_chat(HELLO, **BRIEF)) as chunks:
            pieces = [chunk["choices"][0]["delta"].get("content") or "" async for chunk in chunks]
        assert len(pieces) > 2
        assert "".join(pieces) == content(whole)
        stopped = await wingman.stop_model("tiny")
        assert stopped.status == "complete"
        assert content(await wingman.chat(HELLO, model="tiny", **BRIEF)) == content(whole)  # loaded on demand
    async with Wingman(settings(home), listen=False) as again:
        assert again.inference.item("tiny").status == "complete"
        assert (await again.chat(HELLO, model="tiny", **BRIEF))["usage"]["completion_tokens"] == 6


async def test_a_listening_one_serves_the_program_and_others_alike(home: Path) -> None:
    async with Wingman(settings(home)) as wingman:
        await wingman.start_model("tiny", REPO, PATH)
        own = await wingman.chat(HELLO, **BRIEF)
        base = f"http://{wingman.addresses[0]}/v1"
        async with openai.AsyncOpenAI(base_url=base, api_key="none", max_retries=0) as client:
            theirs = await client.chat.completions.create(
                model="tiny", messages=HELLO, max_tokens=6, temperature=0, extra_body={"ignore_eos": True}
            )
        assert theirs.choices[0].message.content == content(own)
        async with httpx.AsyncClient(base_url=f"http://{wingman.control_addresses[0]}") as control:
            items = (await control.get("/api/inference")).json()["WingmanItems"]
        assert [item["alias"] for item in items] == ["tiny"]
        assert Home(home).runtime_file.exists()
    assert not Home(home).runtime_file.exists()


async def test_one_file_is_served_without_a_home(tiny_model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path / "none", model=str(tiny_model))
    async with Wingman(config, listen=False) as wingman:
        assert (await wingman.chat(HELLO, **BRIEF))["usage"]["completion_tokens"] == 6
        with pytest.raises(ConfigurationError, match="control=True"):
            wingman.broadcast("greeting", 1)
    assert not (tmp_path / "none").exists()


async def test_leaving_a_stream_ends_its_generation(home: Path) -> None:
    async with Wingman(settings(home), listen=False) as wingman:
        await wingman.start_model("tiny", REPO, PATH)
        for _ in range(12):  # more than there are slots
            stream = wingman.stream_chat(HELLO, max_tokens=200, ignore_eos=True)
            async with aclosing(stream):
                await anext(stream)
        health: dict[str, int] = {}
        async with asyncio.timeout(60):
            while health.get("slots_idle") != 4:
                answer = await wingman.dispatch("GET", "/health")
                assert isinstance(answer, Response)
                health = orjson.loads(answer.body)


async def test_a_refused_request_says_what_http_would(home: Path) -> None:
    async with Wingman(settings(home), listen=False) as wingman:
        with pytest.raises(RequestFailed, match="no model is called 'gpt-4'; none is loaded") as unknown:
            await wingman.chat(HELLO, model="gpt-4")
        assert unknown.value.status == 404
        assert unknown.value.body["error"]["type"] == "not_found_error"
        await wingman.start_model("tiny", REPO, PATH)
        with pytest.raises(RequestFailed) as bad:
            await wingman.chat(HELLO, temperature="hot")
        assert (bad.value.status, bad.value.body["error"]["param"]) == (400, "temperature")
        with pytest.raises(RequestFailed) as streamed:
            await anext(wingman.stream_chat(HELLO, temperature="hot"))
        assert (streamed.value.status, streamed.value.body) == (400, bad.value.body)
        with pytest.raises(NotFound):
            await wingman.start_model("x", REPO, "other.gguf")
        with pytest.raises(NotFound):
            await wingman.stop_model("x")


async def test_dispatch_is_http_without_a_socket(home: Path) -> None:
    async with Wingman(settings(home, api_key="secret"), listen=False) as wingman:
        answer = await wingman.dispatch("GET", "/api/downloads?modelRepo=tests%2FTiny-GGUF")
        assert isinstance(answer, Response)  # the program itself needs no key
        (item,) = orjson.loads(answer.body)["DownloadItems"]
        assert (item["filePath"], item["status"]) == (PATH, "complete")
        missing = await wingman.dispatch("GET", "/api/nothing")
        assert isinstance(missing, Response)
        assert missing.status == 404
        started = {"alias": "tiny", "modelRepo": REPO, "filePath": PATH}
        posted = await wingman.dispatch("POST", "/api/inference/start", orjson.dumps(started))
        assert isinstance(posted, Response)
        assert posted.status == 202
        body = orjson.dumps({"prompt": "a", "n_predict": 3, "stream": True, "ignore_eos": True})
        streamed = await wingman.dispatch("POST", "/completion", body)
        assert isinstance(streamed, EventStream)
        blocks = b"".join([block async for block in streamed.events])
        streamed.close()
        assert b'"tokens_predicted":3' in blocks


async def test_a_download_is_followed(tmp_path: Path, tiny_model: Path) -> None:
    with HubServer() as hub:
        hub.add_repo(REPO, {PATH: tiny_model})
        config = configure(home=str(tmp_path), threads=1, hf_endpoint=hub.url)
        async with Wingman(config, listen=False) as wingman:
            seen: list[str] = []
            is_here = asyncio.Event()

            def note(message: dict[str, Any]) -> None:
                seen.append(message["status"])
                if message["status"] == "complete":
                    is_here.set()

            wingman.subscribe(note, ["download_status"])
            item = await wingman.download(REPO, PATH)
            assert item.status == "queued"
            async with asyncio.timeout(60):
                await is_here.wait()
            assert seen[0] == "queued"
            assert (await wingman.start_model("tiny", REPO, PATH)).status == "inferring"
            with pytest.raises(NotFound):
                await wingman.download("no/such-GGUF", "x.gguf")


# -- messages -------------------------------------------------------------------------------------


async def until(socket: ClientConnection, event: str) -> dict[str, Any]:
    """The next message of an event."""
    async with asyncio.timeout(60):
        while True:
            message: dict[str, Any] = orjson.loads(await socket.recv())
            if message["event"] == event:
                return message


async def test_programs_and_web_socket_clients_send_each_other_messages(home: Path) -> None:
    async with Wingman(settings(home)) as wingman:
        address = f"ws://{wingman.control_addresses[0]}"
        heard: asyncio.Queue[tuple[Any, str]] = asyncio.Queue()
        unhear = wingman.on("question", lambda data, sender: heard.put_nowait((data, sender)))
        async with connect(address, proxy=None) as first, connect(address, proxy=None) as second:
            welcome = await until(first, "welcome")
            await until(second, "welcome")
            await first.send('{"event": "question", "data": {"text": "who?", "n": [1, 2.5, null]}}')
            data, sender = await asyncio.wait_for(heard.get(), 60)
            assert data == {"text": "who?", "n": [1, 2.5, None]}
            assert sender == welcome["id"]
            relayed = await until(second, "question")
            assert (relayed["data"], relayed["sender"]) == (data, sender)
            wingman.broadcast("answer", {"text": "me"})
            for socket in (first, second):
                assert (await until(socket, "answer"))["data"] == {"text": "me"}
            unhear()
            await first.send('{"event": "question", "data": 2}')
            await first.send('{"event": "ping"}')
            await until(first, "pong")
            assert heard.empty()
            for name in ("status", "metrics", "no spaces"):
                with pytest.raises(InvalidRequest):
                    wingman.broadcast(name, 1)
                with pytest.raises(InvalidRequest):
                    wingman.on(name, lambda data, sender: None)


async def test_a_handler_that_fails_harms_nobody(home: Path) -> None:
    async with Wingman(settings(home)) as wingman:
        heard: asyncio.Queue[Any] = asyncio.Queue()
        wingman.on("x", lambda data, sender: 1 // 0)
        wingman.on("x", lambda data, sender: heard.put_nowait(data))
        async with connect(f"ws://{wingman.control_addresses[0]}", proxy=None) as socket:
            await socket.send('{"event": "x", "data": "still here"}')
            assert await asyncio.wait_for(heard.get(), 60) == "still here"


async def test_a_subscriber_hears_how_things_are_and_become(home: Path) -> None:
    async with Wingman(settings(home), listen=False) as wingman:
        everything: list[dict[str, Any]] = []
        items: list[dict[str, Any]] = []
        unsubscribe = wingman.subscribe(everything.append)
        wingman.subscribe(items.append, ["inference_status"])
        await asyncio.sleep(0)
        await wingman.start_model("tiny", REPO, PATH)
        assert everything[0]["event"] == "status"
        assert [message["status"] for message in items if "progress" not in message] == [
            "queued",
            "inferring",
        ]
        unsubscribe()
        n_heard = len(everything)
        await wingman.stop_model("tiny")
        assert len(everything) == n_heard
        assert [message["status"] for message in items][-2:] == ["cancelling", "complete"]


# -- homes and other programs -----------------------------------------------------------------------


async def test_a_home_has_one_wingman(home: Path) -> None:
    async with Wingman(settings(home), listen=False) as first:
        with pytest.raises(ConfigurationError, match="another Wingman uses"):
            async with Wingman(settings(home), listen=False):
                raise AssertionError
        await first.start_model("tiny", REPO, PATH)  # the first one is not harmed
        assert Home(home).database.exists()
    async with Wingman(settings(home), listen=False):
        pass


async def test_two_homes_do_not_meet(home: Path, tmp_path: Path) -> None:
    async with Wingman(settings(home)) as one, Wingman(settings(tmp_path / "other")) as other:
        await one.start_model("tiny", REPO, PATH)
        with pytest.raises(NotFound):
            await other.start_model("tiny", REPO, PATH)
        assert set(one.addresses).isdisjoint(other.addresses)


async def test_what_can_not_start_leaves_nothing_behind(tmp_path: Path, home: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(ModelLoadFailure):
        async with Wingman(settings(home, model=str(broken), control=True), listen=False):
            raise AssertionError
    with pytest.raises(ConfigurationError, match="can be reached by others"):
        Wingman(settings(home, host="0.0.0.0"))
    async with Wingman(settings(home, host="0.0.0.0"), listen=False):  # nobody is let in
        pass
    for thread in threading.enumerate():
        if thread.name.startswith(("wingman", "downloads")):
            thread.join(60)
            assert not thread.is_alive(), thread.name


def test_settings_are_checked_by_name_and_range() -> None:
    assert configure(parallel=2, home="x", api_key="a,b").server.api_key == ("a", "b")
    for wrong, message in (
        ({"paralel": 2}, "'paralel'"),
        ({"parallel": 0}, "--parallel must be from 1"),
        ({"ctx_size": "many"}, "'many'"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            configure(**wrong)
