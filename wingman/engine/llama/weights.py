"""The weights of one GGUF model: the first thing a server needs, and what takes longest.

Loaded on the engine thread, or on one of its own while the rest of the program is imported: this module imports
little.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct

from wingman.config import ModelConfig
from wingman.engine.llama import binding
from wingman.engine.llama.binding import lib
from wingman.errors import ModelLoadFailure
from wingman.options import KvOverride

if TYPE_CHECKING:
    from wingman.engine.runner import OnProgress
_SPLIT_NAME: Final = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")
_SPLIT_MODES: Final = {"none": 0, "layer": 1, "row": 2}
_LOAD_MODES: Final = {  # (mmap, mlock)
    (False, False): lib.LLAMA_LOAD_MODE_NONE,
    (True, False): lib.LLAMA_LOAD_MODE_MMAP,
    (False, True): lib.LLAMA_LOAD_MODE_MLOCK,
    (True, True): lib.LLAMA_LOAD_MODE_MMAP_MLOCK,
}
_OVERRIDE_TAGS: Final = {  # Python type -> (llama_model_kv_override_type, member of its union)
    int: (0, "val_i64"),
    float: (1, "val_f64"),
    bool: (2, "val_bool"),
    str: (3, "val_str"),
}
_ALL_LAYERS: Final = 0x7FFFFFFF


def first_split(path: Path) -> Path:
    """The first part of a split model, given any part; other paths unchanged (llama_split_path)."""
    match = _SPLIT_NAME.search(path.name)
    if match is None:
        return path
    return path.with_name(path.name[: match.start()] + f"-00001-of-{match.group(1)}.gguf")


class _Watch:
    """Tells how far a load is. C holds a pointer to `callback` while it loads, so its owner keeps this."""

    def __init__(self, on_progress: OnProgress | None) -> None:
        self.gave_up = False
        self._on_progress = on_progress
        self._percent = -1
        self.callback = lib.llama_progress_callback(self._note)

    def _note(self, fraction: float, _: object) -> bool:
        percent = int(fraction * 100)
        if percent != self._percent and self._on_progress is not None:
            self._percent = percent
            self.gave_up = self.gave_up or not self._on_progress(min(1.0, fraction))
        return not self.gave_up


class Weights(Struct, frozen=True):
    """A loaded llama_model; whoever has it frees it."""

    path: Path
    handle: Any


def load_weights(config: ModelConfig, on_progress: OnProgress | None = None) -> Weights:
    """Load a model. Blocks; raises ModelLoadFailure with what the library said, or when `on_progress` said to give
    up."""
    assert config.model is not None
    binding.initialize()
    path = first_split(config.model.expanduser())
    if not path.is_file():
        raise ModelLoadFailure(f"{path} is not a file")
    params = lib.llama_model_default_params()
    params.n_gpu_layers = _ALL_LAYERS if config.n_gpu_layers < 0 else config.n_gpu_layers
    params.main_gpu = config.main_gpu
    params.split_mode = _SPLIT_MODES[config.split_mode]
    params.load_mode = _LOAD_MODES[config.mmap, config.mlock]
    overrides = _overrides(config.override_kv)  # read during the load only
    if config.override_kv:
        params.kv_overrides = overrides
    watch = _Watch(on_progress)
    if on_progress is not None:
        params.progress_callback = watch.callback
    binding.take_errors()
    handle = binding.quietly(
        lambda: None if watch.gave_up else lib.llama_model_load_from_file(str(path).encode(), params)
    )
    if watch.gave_up:
        if handle:
            lib.llama_model_free(handle)
        raise ModelLoadFailure("the load was cancelled")
    if not handle:
        reason = binding.take_errors() or "the library gave no reason"
        raise ModelLoadFailure(f"can't load {path}: {reason}")
    return Weights(path, handle)


def _overrides(pairs: tuple[KvOverride, ...]) -> Any:
    """A native array of metadata overrides, ended by an empty key."""
    array = (lib.llama_model_kv_override * (len(pairs) + 1))()
    for native, pair in zip(array, pairs, strict=False):
        tag, field = _OVERRIDE_TAGS[type(pair.value)]
        native.tag = tag
        native.key = pair.key.encode()
        setattr(native.value, field, pair.value.encode() if isinstance(pair.value, str) else pair.value)
    return array
