"""Loads llama_cpp once, checks that it is the library this code was written against, and sends its
log lines to ours.

The log callback is a ctypes object that C keeps a pointer to: it lives in this module for ever.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import logging
import os
import re
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from wingman.errors import ModelLoadFailure

# libgomp reads this when it is loaded. Its threads spin at each barrier; unbounded spinning makes
# two busy models on the same cores take 30 times longer, while 10 000 turns cost an idle machine nothing.
# A wait policy that somebody chose counts for more; libgomp itself would prefer the number.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _load() -> Any:
    """llama_cpp.llama_cpp without what the package loads beside it: a high-level API, for which it takes longer
    than for the library, and a disk cache that must not be used (CVE-2025-69872)."""
    if "llama_cpp" in sys.modules:
        return importlib.import_module("llama_cpp.llama_cpp")
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None:
        raise ModelLoadFailure("llama-cpp-python is not installed")
    sys.modules["llama_cpp"] = importlib.util.module_from_spec(spec)
    try:
        return importlib.import_module("llama_cpp.llama_cpp")
    finally:
        del sys.modules["llama_cpp"]  # others who import it get all of it


lib: Final[Any] = _load()


class _Quick:
    """The functions of `lib`, called without giving up the interpreter: for those that take microseconds. To get it
    back takes up to a switch interval while another thread is busy, and a step makes dozens of such calls."""

    def __init__(self) -> None:
        self._library = ctypes.PyDLL(lib._lib._name)

    def __getattr__(self, name: str) -> Any:
        usual = getattr(lib, name)
        function = self._library[name]
        function.argtypes, function.restype = usual.argtypes, usual.restype
        setattr(self, name, function)
        return function


quick: Final[Any] = _Quick()

__all__ = [
    "build_info",
    "can_offload",
    "check_signatures",
    "initialize",
    "lib",
    "quick",
    "quietly",
    "system_info",
    "take_errors",
    "version",
]

log = logging.getLogger("wingman.llama")

_EXPECTED: Final = {
    "llama_sampler_init_penalties": 5,
    "llama_sampler_init_dry": 7,
    "llama_sampler_init_xtc": 4,
    "llama_sampler_init_adaptive_p": 3,
    "llama_sampler_sample": 3,
    "llama_memory_seq_rm": 4,
    "llama_memory_seq_add": 5,
    "llama_model_load_from_file": 2,
    "llama_init_from_model": 2,
    "llama_tokenize": 7,
    "llama_token_to_piece": 6,
    "llama_get_logits_ith": 2,
    "llama_decode": 2,
    "llama_n_ctx_seq": 1,
}
"""Parameter counts of the functions whose signatures moved between versions."""


def check_signatures() -> None:
    """Raise ModelLoadFailure when the installed llama-cpp-python differs from the supported one."""
    for name, n_expected in _EXPECTED.items():
        function = getattr(lib, name, None)
        n_found = len(function.argtypes) if function is not None else -1
        if n_found != n_expected:
            raise ModelLoadFailure(
                f"llama-cpp-python {version()} does not have the {name} this Wingman needs; "
                "install the version range that Wingman asks for"
            )


def version() -> str:
    """The installed llama-cpp-python version, "" if it does not say."""
    head = (
        Path(lib.__file__).with_name("__init__.py").read_text(encoding="utf-8")
    )  # importlib.metadata takes long
    found = re.search(r'^__version__ = "([^"]+)"', head, re.MULTILINE)
    return found[1] if found else ""


def build_info() -> str:
    """What system_fingerprint and /props show; llama-server's begins with "b" too."""
    return f"b-llama-cpp-python-{version()}"


def system_info() -> str:
    """What the processor offers that the library uses."""
    text: bytes = lib.llama_print_system_info()
    return text.decode("utf-8", "replace").strip()


def can_offload() -> bool:
    """Whether the library was built to use a GPU."""
    return bool(lib.llama_supports_gpu_offload())


_ERROR: Final = 4  # GGML_LOG_LEVEL_ERROR of ggml.h; llama_cpp says 3, which are warnings
_recent_errors: Final[deque[str]] = deque(maxlen=4)


def _on_log(level: int, text: bytes, _: Any) -> None:
    line = text.decode("utf-8", "replace").rstrip()
    if level == _ERROR:
        _recent_errors.append(line)
    if line:  # the library's warnings concern people who debug it
        log.debug("%s", line)


_log_callback = lib.llama_log_callback(_on_log)
_deaf_callback = ctypes.cast(ctypes.CDLL(None).labs, lib.llama_log_callback)
"""A C function that does nothing with what it is told."""
_deaf_lock = threading.Lock()
_n_deaf = 0
_initialized = False


def initialize() -> None:
    """Prepare the library; harmless when called again."""
    global _initialized  # noqa: PLW0603 - one library per process
    if not _initialized:
        check_signatures()
        lib.llama_log_set(_log_callback, ctypes.c_void_p(0))
        lib.llama_backend_init()
        _initialized = True


def quietly(make: Callable[[], Any]) -> Any:
    """What `make` gives, its log lines unheard: more than a thousand, each of which would wait for the interpreter
    while other threads use it. What gives nothing is tried again and listened to. Other models of the process are
    not heard either meanwhile."""
    made = None
    if not log.isEnabledFor(logging.DEBUG):
        _listen(1)
        try:
            made = make()
        finally:
            _listen(-1)
    return made or make()


def _listen(n_deaf: int) -> None:
    """So many more want the library not to be heard."""
    global _n_deaf  # noqa: PLW0603 - one library per process
    with _deaf_lock:
        _n_deaf += n_deaf
        lib.llama_log_set(_deaf_callback if _n_deaf else _log_callback, ctypes.c_void_p(0))


def take_errors() -> str:
    """The last error lines the library logged, oldest first, then forgotten; "" when none."""
    text = "; ".join(_recent_errors)
    _recent_errors.clear()
    return text
