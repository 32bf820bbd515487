"""Which model is loaded, as a state table; owner of its Engine.

Runs on the loop. Requests ask `served`, which refuses with the reason while there is nothing to
serve; readiness asks `readiness`.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import orjson

from wingman.chat.constraint import schema_grammar
from wingman.chat.grammar import check_grammar
from wingman.chat.template import CHATML, ChatTemplate, FamilyTemplate, Template
from wingman.config import Config, ContextConfig, ModelConfig
from wingman.engine.client import Engine
from wingman.engine.runner import Runner
from wingman.engine.types import Constraint, ModelInfo
from wingman.errors import ConfigurationError, InvalidRequest, ModelLoadFailure, Unavailable

log = logging.getLogger("wingman.residency")


class ModelState(enum.Enum):
    """Where a model is."""

    LOADING = enum.auto()
    READY = enum.auto()
    DRAINING = enum.auto()
    FAILED = enum.auto()
    UNLOADED = enum.auto()


class ModelMove(enum.Enum):
    """What can happen to it."""

    LOAD = enum.auto()
    DRAIN = enum.auto()
    FAIL = enum.auto()
    UNLOAD = enum.auto()


TRANSITIONS: Final = {
    (ModelState.LOADING, ModelMove.LOAD): ModelState.READY,
    (ModelState.LOADING, ModelMove.FAIL): ModelState.FAILED,
    (ModelState.LOADING, ModelMove.DRAIN): ModelState.DRAINING,
    (ModelState.READY, ModelMove.DRAIN): ModelState.DRAINING,
    (ModelState.READY, ModelMove.FAIL): ModelState.FAILED,
    (ModelState.DRAINING, ModelMove.LOAD): ModelState.DRAINING,
    (ModelState.DRAINING, ModelMove.DRAIN): ModelState.DRAINING,
    (ModelState.DRAINING, ModelMove.FAIL): ModelState.FAILED,
    (ModelState.DRAINING, ModelMove.UNLOAD): ModelState.UNLOADED,
    (ModelState.FAILED, ModelMove.FAIL): ModelState.FAILED,
    (ModelState.FAILED, ModelMove.DRAIN): ModelState.FAILED,
    (ModelState.FAILED, ModelMove.UNLOAD): ModelState.UNLOADED,
}
_REASONS: Final = {
    ModelState.LOADING: "Loading model",
    ModelState.DRAINING: "the server is shutting down",
    ModelState.FAILED: "the model failed; see the log",
    ModelState.UNLOADED: "no model is loaded",
}

MakeRunner = Callable[[ModelConfig, ContextConfig], Runner]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A loaded model with everything a request needs of it."""

    name: str
    aliases: tuple[str, ...]
    engine: Engine
    template: Template
    config: Config
    loaded_at: float
    constraint: Constraint | None = None
    """Of requests that bring none."""

    @property
    def info(self) -> ModelInfo:
        """Facts of the model."""
        return self.engine.info


class Residency:
    """The one model of this server."""

    def __init__(self, config: Config, make_runner: MakeRunner | None = None) -> None:
        self._config = config
        self._state = ModelState.LOADING
        self._engine = Engine(config.model, config.context, make_runner)
        self._served: ServedModel | None = None

    @property
    def state(self) -> ModelState:
        """The model's state."""
        return self._state

    def _move(self, what: ModelMove) -> None:
        self._state = TRANSITIONS[self._state, what]

    async def load(self) -> ServedModel:
        """Load the model. Raises ModelLoadFailure or, for a broken chat template, ConfigurationError."""
        try:
            await self._engine.load()
            template = choose_template(self._config.model, self._engine.info)
            constraint = await asyncio.to_thread(self._default_constraint)
        except (ModelLoadFailure, ConfigurationError):
            self._move(ModelMove.FAIL)
            raise
        names = self._config.model.alias or (_file_name(self._engine.info.path),)
        self._served = ServedModel(
            name=sorted(names)[0],
            aliases=tuple(sorted(names)),
            engine=self._engine,
            template=template,
            config=self._config,
            loaded_at=time.time(),
            constraint=constraint,
        )
        self._move(ModelMove.LOAD)
        return self._served

    def _default_constraint(self) -> Constraint | None:
        """The constraint of the flags, compiled; raises ConfigurationError when it is broken."""
        try:
            constraint = read_default_constraint(self._config.context)
            self._engine.parts.prepare(self._config.sampling, constraint)
        except InvalidRequest as error:
            raise ConfigurationError(f"--grammar or --json-schema: {error.message}") from None
        return constraint

    def served(self) -> ServedModel:
        """The loaded model, also while it drains; raises Unavailable while there is none."""
        if self._served is None or self._state in (ModelState.FAILED, ModelState.UNLOADED):
            raise Unavailable(_REASONS[self._state], retry_after_s=2)
        return self._served

    def readiness(self) -> str | None:
        """None when requests will be served; else why not."""
        if self._state is not ModelState.READY:
            return _REASONS[self._state]
        age_s = self._engine.step_age_s
        if age_s > self._config.context.step_timeout:
            return f"a step has been running for {age_s:.0f} s (--step-timeout)"
        return None

    async def watch(self) -> None:
        """Wait until the engine has died by itself; returns when it was asked to stop."""
        error = await self._engine.wait_stopped()
        if error is not None:
            self._move(ModelMove.FAIL)
            log.error("the engine died: %s", error)

    async def drain(self, timeout_s: float) -> None:
        """Refuse new work; let what runs finish or end it."""
        self._move(ModelMove.DRAIN)
        await self._engine.drain(timeout_s)

    async def unload(self) -> bool:
        """Free the model; False when it hangs and stays."""
        is_free = await self._engine.close()
        self._move(ModelMove.UNLOAD)
        self._served = None
        return is_free


def _file_name(path: str) -> str:
    return path.replace("\\", "/").rsplit("/", 1)[-1].rsplit("[=]", 1)[-1]


def read_default_constraint(config: ContextConfig) -> Constraint | None:
    """The constraint of the flags. Raises InvalidRequest when it is broken."""
    grammar = config.grammar or config.grammar_file
    schema = config.json_schema or config.json_schema_file
    if grammar:
        check_grammar(grammar)
        return Constraint(grammar)
    if not schema:
        return None
    try:
        return Constraint(schema_grammar(orjson.loads(schema)))
    except orjson.JSONDecodeError:
        raise InvalidRequest("the schema is not valid JSON") from None


def choose_template(config: ModelConfig, info: ModelInfo) -> Template:
    """The template of the flags, else the model's, else ChatML. Raises ConfigurationError."""
    if config.chat_template_file is not None:
        try:
            return _compile(config.chat_template_file.expanduser().read_text("utf-8"), config)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"can't read --chat-template-file: {error}") from error
    if config.chat_template is not None:
        return _compile(config.chat_template, config)
    try:
        return _compile(info.chat_template or CHATML, config)
    except ConfigurationError as error:
        log.warning("%s; using ChatML", error)
        return ChatTemplate(CHATML)


def _compile(source: str, config: ModelConfig) -> Template:
    """A template from jinja2 text, or a built-in family by name or, without jinja2, by its text."""
    from wingman.engine.llama.families import apply_family, family_names  # the library is heavy

    if source in family_names() or not config.jinja:
        return FamilyTemplate(source, apply_family)
    if "{" not in source:
        raise ConfigurationError(
            f"no chat template is called {source!r}; there are {', '.join(family_names())}"
        )
    return ChatTemplate(source)
