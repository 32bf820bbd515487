"""A model that loads while the server's own modules still do.

The library reads weights and clears caches without the interpreter's lock, so `wingman serve --model` has that
begin on a thread as soon as it can, and imports the rest meanwhile. The first engine that asks for the same runner
takes it, with what made it fail; any other load is not touched. Made and closed by the command line.
"""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Final

from wingman.config import ContextConfig, ModelConfig
from wingman.services.modelfile import read_model

if TYPE_CHECKING:
    from wingman.engine.runner import OnProgress, Runner
    from wingman.services.gguf import GgufHeader

_QUICK_BYTES: Final = 1 << 30
"""Smaller files are not followed: a load that tells how far it is waits each time for the interpreter, which is busy
importing, and took twice as long."""
_END_GRACE_S: Final = 5.0
"""How long a load that nobody wants gets to end."""


class Preload:
    """One load."""

    def __init__(self, model: ModelConfig, context: ContextConfig) -> None:
        """Look at the file, load the library, and begin. Blocks; raises ModelLoadFailure."""
        assert model.model is not None
        self._model, self._context = model, context
        self._path = model.model.expanduser()
        self._header = read_model(self._path)  # the library sees no file that this refuses
        from wingman.engine.llama.weights import load_weights

        self._load_weights = load_weights
        self._runner: Future[Runner] | None = Future()
        """None once it was taken: its taker closes it."""
        self._on_progress: OnProgress = lambda _: True
        self._thread = threading.Thread(target=self._load, args=(self._runner,), name="preload", daemon=True)
        self._thread.start()
        from wingman.engine.llama.runner import LlamaRunner  # with numpy, while the weights load

        self._make = LlamaRunner

    def _load(self, runner: Future[Runner]) -> None:
        try:
            is_long = self._header.split_count > 1 or self._path.stat().st_size > _QUICK_BYTES
            weights = self._load_weights(self._model, self._note_progress if is_long else None)
            from wingman.engine.llama.runner import LlamaRunner

            runner.set_result(LlamaRunner(self._model, self._context, weights=weights, is_alone=True))
        except BaseException as error:  # noqa: BLE001 - it is raised where the runner is asked for
            runner.set_exception(error)

    def _note_progress(self, part: float) -> bool:
        return self._on_progress(part)  # of whoever has it now

    def read_model(self, path: Path) -> GgufHeader:
        """The header of a model, this one's without reading it again. Blocks; raises ModelLoadFailure."""
        return self._header if path == self._path else read_model(path)

    def make_runner(self, model: ModelConfig, context: ContextConfig, on_progress: OnProgress) -> Runner:
        """This load's runner for the first who asks for just that, else a new one. On the engine's thread;
        raises ModelLoadFailure."""
        same = dataclasses.replace(self._context, cache_ram=context.cache_ram)  # which no runner reads
        if self._runner is None or (model, context) != (self._model, same):
            return self._make(model, context, on_progress)
        runner, self._runner, self._on_progress = self._runner, None, on_progress
        return runner.result()

    def close(self) -> None:
        """End the load and free what it made, unless somebody has taken it."""
        if self._runner is None:
            return
        self._on_progress = lambda _: False
        self._thread.join(_END_GRACE_S)
        if self._runner.done() and self._runner.exception() is None:
            self._runner.result().close()
