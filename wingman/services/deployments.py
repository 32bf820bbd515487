"""From the name of a model to how it is to be loaded: its files, configuration and need of memory.

Runs on the loop; files are read elsewhere.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

from msgspec import Struct, field

from wingman.config import Config
from wingman.errors import InvalidRequest, ModelLoadFailure, NotFound
from wingman.services.gguf import BadGguf, GgufHeader, read_parts
from wingman.services.home import LOCAL, Home, file_name, split_parts
from wingman.services.items import DownloadItem
from wingman.services.memory import estimate_bytes
from wingman.services.modelfile import read_model
from wingman.services.served import without_draft

log = logging.getLogger("wingman.residency")

MAX_ALIAS_CHARS: Final = 256
"""As much as the path of a file in a repository, which may be one."""


class Deployment(Struct, frozen=True):
    """A model that may be loaded under a name, and how."""

    name: str
    config: Config
    aliases: tuple[str, ...] = ()
    """What it is called in answers; () for its file name."""
    need_bytes: int = 0
    is_forced: bool = False
    needs_draft: bool = False
    """Whether a draft model that does not fit it is an error."""
    n_layers: int = 0
    """Layers that could go to a GPU; 0 where there is none."""
    tensor_types: Mapping[str, int] = field(default_factory=dict)
    """How many tensors there are of each type."""


class Start(Struct, frozen=True):
    """What a model is to be started as."""

    alias: str
    model_repo: str
    file_path: str
    address: str = ""
    port: int = 0
    context_size: int = 0
    gpu_layers: int = -1
    chat_template: str = ""
    force: bool = False


class Deployer:
    """Makes Deployments."""

    def __init__(
        self,
        config: Config,
        home: Home,
        downloads: Callable[[], Iterable[DownloadItem]],
        *,
        has_gpu: Callable[[], bool] = lambda: False,
        refresh: Callable[[], Awaitable[object]] | None = None,
        read: Callable[[Path], GgufHeader] = read_model,
    ) -> None:
        """`refresh` looks again at how much memory there is, before a model is started; `read` is given the
        file of `--model`."""
        self._config = config
        self._home = home
        self._downloads = downloads
        self._has_gpu = has_gpu
        self._refresh = refresh
        self._read = read

    async def deploy_file(self) -> Deployment:
        """The model of `--model`, loaded whatever memory there is. Raises ModelLoadFailure."""
        config = self._config
        assert config.model.model is not None
        header = await asyncio.to_thread(self._read, config.model.model.expanduser())
        name = sorted(config.model.alias)[0] if config.model.alias else file_name(str(config.model.model))
        return Deployment(
            name=name,
            config=config,
            aliases=config.model.alias,
            need_bytes=estimate_need(header, config) + await self._draft_need(config),
            is_forced=True,
            needs_draft=True,
            n_layers=header.n_layer + 1 if self._has_gpu() else 0,
            tensor_types=header.tensor_types,
        )

    async def deploy(self, request: Start) -> Deployment:
        """A downloaded model as it is to be loaded. Raises NotFound or InvalidRequest."""
        paths = self._files(request.model_repo, request.file_path)
        try:
            header = await asyncio.to_thread(read_parts, paths)
        except BadGguf as error:
            if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
                raise NotFound(f"{request.file_path} is not in the models folder") from None
            raise InvalidRequest(f"{request.file_path} is not a usable model: {error.message}") from None
        config = self._config_of(request, paths[0])
        if self._refresh is not None:
            await self._refresh()
        need = estimate_need(header, config)
        try:
            need += await self._draft_need(config)
        except ModelLoadFailure as error:
            log.warning("%s is loaded without a draft model: %s", request.alias, error)
            config = without_draft(config)
        n_layers = header.n_layer + 1 if self._has_gpu() else 0
        return Deployment(
            name=request.alias,
            config=config,
            aliases=(request.alias,),
            need_bytes=need,
            is_forced=request.force,
            n_layers=n_layers,
            tensor_types=header.tensor_types,
        )

    async def _draft_need(self, config: Config) -> int:
        """Bytes of memory that the draft model takes beside the other. Raises ModelLoadFailure."""
        if config.context.model_draft is None:
            return 0
        header = await asyncio.to_thread(read_model, config.context.model_draft.expanduser())
        whole = dataclasses.replace(config.context, swa_full=True)
        return estimate_need(header, dataclasses.replace(config, context=whole))

    def _files(self, repo: str, file_path: str) -> list[Path]:
        """The files of a model that is complete; raises NotFound."""
        paths = [self._home.model_file(repo, part) for part in split_parts(file_path)]
        is_here = repo == LOCAL or any(
            item.key == (repo, file_path) and item.status == "complete" for item in self._downloads()
        )
        if not is_here:
            raise NotFound(f"{repo}/{file_path} is not downloaded completely")
        return paths

    def _config_of(self, request: Start, path: Path) -> Config:
        base = self._config
        model = dataclasses.replace(
            base.model,
            model=path,
            alias=(request.alias,),
            n_gpu_layers=request.gpu_layers,
            chat_template=request.chat_template or base.model.chat_template,
        )
        context = base.context
        if request.context_size:  # it is what one conversation gets
            context = dataclasses.replace(context, ctx_size=request.context_size * context.parallel)
        return dataclasses.replace(base, model=model, context=context)


def estimate_need(header: GgufHeader, config: Config) -> int:
    """Bytes of memory that a model takes with this configuration."""
    return estimate_bytes(
        header,
        n_ctx=config.context.ctx_size or header.context_length,
        n_parallel=config.context.parallel,
        n_ubatch=config.context.ubatch_size,
        type_k=config.context.cache_type_k,
        type_v=config.context.cache_type_v,
        is_unified=config.context.kv_unified,
        has_flash_attention=config.context.flash_attn != "off",
        has_full_windows=config.context.swa_full,
    )


def check_alias(alias: str) -> None:
    """Raise InvalidRequest for what can't be an alias."""
    if not 0 < len(alias) <= MAX_ALIAS_CHARS or not alias.isprintable() or alias != alias.strip():
        raise InvalidRequest(f"alias must have 1 to {MAX_ALIAS_CHARS} printable characters", "alias")
