"""The whole application on a scripted model, in process: requests in, answers out, no sockets.

One event loop is kept for the life of the process and runs only while a request is answered. Two models are
served side by side, so that every route has one that can do it: one that embeds and speaks ChatML, one that
ranks, thinks and calls tools. Engine threads are daemons; they end with the process.
"""

from __future__ import annotations

import asyncio
import functools
import random
import tempfile
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from msgspec.structs import replace

from protocol import Headers, parse_target
from tests.support.runner import EOS, ScriptedRunner
from wingman.app import App, open_gates
from wingman.config import Config, ContextConfig, ServerConfig
from wingman.engine.client import Engine
from wingman.engine.runner import Batch, Samples
from wingman.engine.types import FimTokens, LoraInfo, PoolingType, SlotJob, SlotMove
from wingman.http.messages import EventStream, Request, Response
from wingman.services.deployments import Deployer, Deployment
from wingman.services.home import Home
from wingman.services.inference import Inference
from wingman.services.itemstore import NoStore
from wingman.services.residency import Residency

T = TypeVar("T")
N_SLOTS = 2
GUARD_S = 60.0
"""Ends a request that hangs; nothing is measured with it."""

_TOOL_TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for m in messages %}[{{ m.role }}]"
    "{% if m.content %}{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}<tool_call>"
    "{{ c.function | tojson }}</tool_call>{% endfor %}{% endfor %}{% if add_generation_prompt %}[assistant]"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
ANSWERS = (
    b"", b"Paris.", b"<think>Hm", b"<think>a</think>Paris", b"{\"a\": 1}", b"\xff\xc3\xa9\xf0\x9f", b"a\n  b\nc",
    b'<tool_call>\n{"name": "f", "arguments": {"s": "a"}}\n</tool_call>', b'<tool_call>{"name": "f", "arg',
    b'<think>a</think>x<tool_call>{"name": "f", "arguments": {}}</tool_call><tool_call>{"name": "g"}</tool_call>',
)  # fmt: skip
"""What the model says; then it ends, unless it is made to go on with noise."""


class Speaker(ScriptedRunner):
    """Says `text`, then ends or, if it `rambles`, goes on with noise."""

    def __init__(self, *, ranks: bool) -> None:
        super().__init__(N_SLOTS, n_ctx_slot=1024, n_batch=512)
        self.text = b""
        self.rambles = False
        self._n_said: dict[int, int] = {}
        self.info = replace(
            self.info,
            embedding=replace(self.info.embedding, pooling=PoolingType.RANK if ranks else PoolingType.MEAN),
            chat_template=_TOOL_TEMPLATE if ranks else None,
            fim=None if ranks else FimTokens(0, 1, 2),
            loras=() if ranks else (LoraInfo("a", 1.0), LoraInfo("b", 0.0)),
            bos_id=1,
            eos_id=EOS,
        )

    def run(self, batch: Batch) -> Samples:
        """A step; a slot with a new sampler begins to speak anew."""
        self._n_said |= {start.slot_id: 0 for start in batch.samplers}
        return super().run(batch)

    def choose(self, slot_id: int, held: Sequence[int]) -> int:
        """The next byte of the text, then noise or the end."""
        n_said = self._n_said[slot_id]
        self._n_said[slot_id] += 1
        if n_said < len(self.text):
            return 3 + self.text[n_said]
        return super().choose(slot_id, held) if self.rambles else EOS


class Served:
    """An application with its model."""

    def __init__(self, *, ranks: bool) -> None:
        self._speaker = Speaker(ranks=ranks)
        self._folder = tempfile.TemporaryDirectory(prefix="slots-")
        self._config = config = Config(
            context=ContextConfig(parallel=N_SLOTS, n_predict=24, max_embed_inputs=32),
            server=ServerConfig(
                slot_save_path=Path(self._folder.name), props=True, metrics=True, verbose=ranks
            ),
        )
        self._residency = Residency(make_runner=lambda *_: self._speaker)
        deployer = Deployer(config, Home(Path(self._folder.name)), list)
        self._inference = Inference(
            config,
            deployer,
            NoStore(),
            self._residency,
            downloads=list,
            announce=lambda *_: None,
        )
        self._app = App(config, open_gates(), self._inference)

    async def load(self) -> None:
        """Start the engine."""
        await self._inference.start_up()
        deployment = Deployment("fuzz", self._config, is_forced=True)
        self._inference.serve(deployment)
        self._residency.want(deployment)
        (await self._residency.join("fuzz")).release()

    @property
    def engine(self) -> Engine:
        """The loaded model's engine."""
        return self._residency.peek("fuzz").engine

    async def answer(
        self, target: str, body: bytes, seed: int, *, keeps: bool = False
    ) -> tuple[int, str, bytes]:
        """Status, content type and whole body of the answer to a POST. Raises AssertionError when a job is
        left. Slots and saved files are gone afterwards, unless it `keeps` them."""
        rng = random.Random(seed)
        self._speaker.text, self._speaker.rambles = rng.choice(ANSWERS), rng.random() < 0.3
        request = Request("POST", parse_target(target.encode()), Headers(()), "id", "fuzz", body)
        async with asyncio.timeout(GUARD_S):
            answer = self._app.screen(request) or await self._app.handle(request)
            if isinstance(answer, Response):
                result = answer.status, answer.content_type, answer.body
            else:
                assert isinstance(answer, EventStream), answer  # no route here is a WebSocket
                result = 200, "text/event-stream", await _drain(answer)
            await self._check_idle()
            if not keeps:
                await self._forget()
        return result

    async def _check_idle(self) -> None:
        engine = self.engine
        assert (engine.n_running, engine.n_waiting) == (0, 0), "a job is left"
        for slot_id in range(N_SLOTS):  # waits for ever for a slot that is not idle
            await engine.change_slot(SlotJob(engine.new_job_id(), slot_id, SlotMove.SAVE))

    async def _forget(self) -> None:
        engine = self.engine
        for slot_id in range(N_SLOTS):
            await engine.change_slot(SlotJob(engine.new_job_id(), slot_id, SlotMove.ERASE))
        for path in Path(self._folder.name).iterdir():  # noqa: ASYNC240 - nobody else is on this loop
            path.unlink()
        engine.lora_scales = tuple(lora.scale for lora in engine.info.loras)


async def _drain(stream: EventStream) -> bytes:
    try:
        return b"".join([block async for block in stream.events])
    finally:
        stream.close()


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run something on the loop."""
    return _loop().run_until_complete(work)


@functools.cache
def served(*, ranks: bool) -> Served:
    """The application whose model ranks, or the one whose model embeds; made once."""

    async def make() -> Served:
        made = Served(ranks=ranks)
        await made.load()
        return made

    return run(make())
