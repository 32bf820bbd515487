"""A loaded model with everything a request needs of it, and how one is made ready.

`open_model` loads weights, chat template and the constraint of the flags; with layers on a GPU it tries again
with half of them when they don't fit. Runs on the loop; what takes long runs elsewhere.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import time
from collections.abc import Callable
from typing import Final

import orjson
from msgspec import Struct

from wingman.chat.constraint import schema_grammar
from wingman.chat.grammar import check_grammar
from wingman.chat.template import CHATML, ChatTemplate, FamilyTemplate, Template
from wingman.config import Config, ContextConfig, ModelConfig
from wingman.engine.client import Engine, MakeRunner
from wingman.engine.types import Constraint, DraftKind, ModelInfo
from wingman.errors import ConfigurationError, DraftMisfit, InvalidRequest, ModelLoadFailure
from wingman.services.hardware import host_memory
from wingman.services.home import file_name

log = logging.getLogger("wingman.residency")

MAX_CACHE_RAM_MIB: Final = 8192
"""The default takes no more however much there is; llama-server's whole default."""
_CACHE_RAM_SHARE: Final = 8


class ServedModel(Struct, frozen=True):
    """A loaded model with everything a request needs of it."""

    name: str
    aliases: tuple[str, ...]
    engine: Engine
    template: Template
    config: Config
    loaded_at: float
    constraint: Constraint | None = None
    """Of requests that bring none."""
    load_s: float = 0.0
    """How long loading took."""
    n_gpu_layers: int = 0
    """Layers that were asked for in the load that succeeded; -1: all."""

    @property
    def info(self) -> ModelInfo:
        """Facts of the model."""
        return self.engine.info


class Loader:
    """One attempt to make a model ready; `abandon` makes it fail soon."""

    def __init__(
        self,
        config: Config,
        names: tuple[str, ...],
        on_progress: Callable[[float], None],
        make_runner: MakeRunner | None = None,
        n_layers: int = 0,
        *,
        needs_draft: bool = False,
    ) -> None:
        """`names` are the model's aliases, () for its file name; `n_layers` are the layers that could go to a
        GPU, 0 where there is none. With `needs_draft` a draft model that does not fit is an error."""
        self._config = config
        self._names = names
        self._on_progress = on_progress
        self._make_runner = make_runner
        self._n_layers = n_layers
        self._needs_draft = needs_draft
        self._engine: Engine | None = None
        self._is_abandoned = False

    def abandon(self) -> None:
        """Nobody wants the model any more."""
        self._is_abandoned = True
        if self._engine is not None:
            self._engine.abandon_load()

    async def load(self) -> ServedModel:
        """The model, ready. Raises ModelLoadFailure or, for a broken template or constraint,
        ConfigurationError; nothing stays in memory then."""
        started = time.monotonic()
        engine, n_gpu_layers = await self._open_engine()
        try:
            template = await asyncio.to_thread(choose_template, self._config.model, engine.info)
            constraint = await asyncio.to_thread(self._default_constraint, engine)
        except BaseException:
            await engine.close()
            raise
        names = self._names or (file_name(engine.info.path),)
        return ServedModel(
            name=sorted(names)[0],
            aliases=tuple(sorted(names)),
            engine=engine,
            template=template,
            config=with_known_biases(self._config, engine.info.n_vocab),
            loaded_at=time.time(),
            constraint=constraint,
            load_s=time.monotonic() - started,
            n_gpu_layers=n_gpu_layers,
        )

    async def _open_engine(self) -> tuple[Engine, int]:
        """An engine with as many layers on the GPU as fit, and their number; with the draft model if it fits."""
        n_gpu_layers = self._config.model.n_gpu_layers
        while True:
            context = await asyncio.to_thread(with_cache_ram, self._config.context)
            model = dataclasses.replace(self._config.model, n_gpu_layers=n_gpu_layers)
            engine = self._engine = Engine(model, context, self._make_runner)
            if self._is_abandoned:
                raise ModelLoadFailure("the load was cancelled")
            try:
                await engine.load(self._on_progress)
            except asyncio.CancelledError:
                engine.abandon_load()
                await engine.close()
                raise
            except DraftMisfit as error:
                await engine.close()
                if self._needs_draft or self._is_abandoned:
                    raise
                log.warning("%s; going on without it", error)
                self._config = without_draft(self._config)
            except ModelLoadFailure as error:
                await engine.close()
                n_tried = self._n_layers if n_gpu_layers < 0 else min(n_gpu_layers, self._n_layers)
                if not n_tried or self._is_abandoned:
                    raise
                n_gpu_layers = n_tried // 2
                log.warning("%s; trying again with %d layers on the GPU", error, n_gpu_layers)
            else:
                return engine, n_gpu_layers

    def _default_constraint(self, engine: Engine) -> Constraint | None:
        """The constraint of the flags, compiled; raises ConfigurationError when it is broken."""
        try:
            constraint = read_default_constraint(self._config.context)
            engine.parts.prepare(self._config.sampling, constraint)
        except InvalidRequest as error:
            raise ConfigurationError(f"--grammar or --json-schema: {error.message}") from None
        return constraint


def with_cache_ram(config: ContextConfig) -> ContextConfig:
    """The config with a number for `cache_ram`: by default a share of the memory that is free now, within the
    limits of the container."""
    if config.cache_ram is not None:
        return config
    _, n_free = host_memory()
    return dataclasses.replace(config, cache_ram=min(n_free // _CACHE_RAM_SHARE >> 20, MAX_CACHE_RAM_MIB))


def without_draft(config: Config) -> Config:
    """The config of a model that nothing but its own text drafts for."""
    context = config.context
    spec_type = DraftKind.AUTO.value if context.spec_type == DraftKind.MODEL.value else context.spec_type
    context = dataclasses.replace(context, model_draft=None, spec_type=spec_type)
    return dataclasses.replace(config, context=context)


def with_known_biases(config: Config, n_vocab: int) -> Config:
    """The config without biases that the model can't apply: of tokens that it does not have, or not a number."""
    biases = config.sampling.logit_bias
    known = tuple(pair for pair in biases if pair[0] in range(n_vocab) and not math.isnan(pair[1]))
    if known == biases:
        return config
    ignored = ", ".join(f"{token}{bias:+g}" for token, bias in biases if (token, bias) not in known)
    log.warning("--logit-bias: ignoring %s; the model has tokens 0 to %d", ignored, n_vocab - 1)
    return dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, logit_bias=known))


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
            f"no chat template is called {source[:80]!r}; there are {', '.join(family_names())}"
        )
    return ChatTemplate(source)
