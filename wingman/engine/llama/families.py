"""The chat template families built into llama.cpp, for `--chat-template NAME` and `--no-jinja`.

Needs no model; callable from any thread.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from wingman.engine.llama.binding import lib


def family_names() -> tuple[str, ...]:
    """Names of the built-in families."""
    count = lib.llama_chat_builtin_templates(None, 0)
    names = (ctypes.c_char_p * count)()
    lib.llama_chat_builtin_templates(names, count)
    return tuple(name.decode() for name in names if name)


def apply_family(source: str, messages: Sequence[tuple[str, str]], add_generation_prompt: bool) -> str | None:
    """The prompt for (role, content) pairs in the family that `source` names or looks like; None when
    there is no such family (llama_chat_apply_template)."""
    encoded = [(role.encode("utf-8", "replace"), text.encode("utf-8", "replace")) for role, text in messages]
    array = (lib.llama_chat_message * max(len(encoded), 1))(*encoded)
    size = 2 * sum(len(role) + len(text) for role, text in encoded) + 1024
    while True:
        buffer = ctypes.create_string_buffer(size)
        needed = lib.llama_chat_apply_template(
            source.encode(), array, len(encoded), add_generation_prompt, buffer, size
        )
        if needed < 0:
            return None
        if needed <= size:
            return buffer.raw[:needed].decode("utf-8", "replace")
        size = needed
