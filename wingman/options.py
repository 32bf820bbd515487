"""How a setting is declared and its text is read: the vocabulary that `wingman.config` is written in.

Pure, but for the parsers that read a file named on the command line.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar, cast

T = TypeVar("T")

RANDOM_SEED: Final = 0xFFFFFFFF
"""The seed that stands for "choose one" (LLAMA_DEFAULT_SEED)."""
SAMPLER_NAMES: Final = {
    "penalties": "e",
    "dry": "d",
    "top_n_sigma": "s",
    "top_k": "k",
    "typ_p": "y",
    "top_p": "p",
    "min_p": "m",
    "xtc": "x",
    "temperature": "t",
    "infill": "i",
    "adaptive_p": "a",
}
"""Canonical sampler names and their letters (common_sampler_type_to_chr)."""
_SAMPLER_ALIASES: Final = {
    "typical": "typ_p", "typicalp": "typ_p", "typp": "typ_p", "typ": "typ_p", "nucleus": "top_p", "temp": "temperature",
}  # fmt: skip
MAX_OVERRIDE_BYTES: Final = 127
"""Longest key and longest text of a metadata override, as the native structure holds them."""
KV_TYPES: Final = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")


@dataclass(frozen=True, slots=True)
class Option:
    """How one field is set from outside; `parse` turns text into the field's value."""

    flags: tuple[str, ...]
    env: tuple[str, ...]
    help: str
    parse: Callable[[str], Any]
    metavar: str
    choices: tuple[str, ...] | None
    is_switch: bool
    is_repeatable: bool
    off_flags: tuple[str, ...]
    """Short spellings that turn a switch off; `--no-...` always does."""


def option(
    default: T,
    *flags: str,
    help: str,
    env: str | Sequence[str] = (),
    parse: Callable[[str], Any] | None = None,
    metavar: str = "",
    choices: tuple[str, ...] | None = None,
    repeatable: bool = False,
    off_flags: tuple[str, ...] = (),
    switch: bool = False,
) -> T:
    """Declare a field with its flag spellings; `env` names other variables that also set it. `switch` makes
    one of a field that may be unset."""
    is_switch = switch or isinstance(default, bool)
    names = (env,) if isinstance(env, str) else tuple(env)
    chosen = parse or (str if default is None or is_switch else type(default))
    record = Option(flags, names, help, chosen, metavar, choices, is_switch, repeatable, off_flags)
    declared: Any = field(default=default, metadata={"option": record})
    return cast("T", declared)


def parse_list(text: str) -> tuple[str, ...]:
    """Comma-separated items, blanks dropped."""
    return tuple(item.strip() for item in text.split(",") if item.strip())


def parse_samplers(text: str) -> tuple[str, ...]:
    """Sampler names separated by `;` or `,`; see `canonical_samplers`."""
    return canonical_samplers(text.replace(",", ";").split(";"))


def canonical_samplers(names: Sequence[str]) -> tuple[str, ...]:
    """Canonical names for any llama.cpp spelling (case, dashes, aliases); unknown ones are dropped."""
    bare = {name.replace("_", ""): name for name in SAMPLER_NAMES} | _SAMPLER_ALIASES
    keys = (name.strip().lower().replace("-", "").replace("_", "") for name in names)
    return tuple(bare[key] for key in keys if key in bare)


def samplers_from_letters(letters: str) -> tuple[str, ...]:
    """The string form of a sampler list, one letter each; unknown letters are dropped."""
    by_letter = {letter: name for name, letter in SAMPLER_NAMES.items()}
    return tuple(by_letter[letter] for letter in letters if letter in by_letter)


def parse_seed(text: str) -> int:
    """A 32-bit seed; -1 stands for a random one."""
    return int(text) & RANDOM_SEED


def parse_gpu_layers(text: str) -> int:
    """A count, or `auto`/`all` for every layer that fits (-1)."""
    return -1 if text in ("auto", "all") else int(text)


def parse_logit_bias(text: str) -> tuple[tuple[int, float], ...]:
    """`TOKEN_ID(+/-)BIAS`, e.g. 15043+1 or 15043-inf, as in llama.cpp."""
    for sign in "+-":
        token, found, bias = text.partition(sign)
        if found and token.strip().isdigit():
            return ((int(token), float(sign + bias)),)
    raise ValueError(f"{text!r} is not TOKEN_ID(+/-)BIAS")


def parse_threads(text: str) -> int:
    """A count; `auto` or -1, as in llama.cpp, leaves it to the engine (0)."""
    return 0 if text in ("auto", "-1") else int(text)


@dataclass(frozen=True, slots=True)
class KvOverride:
    """A metadata entry to be used instead of the file's."""

    key: str
    value: int | float | bool | str


def parse_overrides(text: str) -> tuple[KvOverride, ...]:
    """Comma-separated `KEY=TYPE:VALUE`, TYPE being int, float, bool or str, as in llama.cpp."""
    return tuple(_parse_override(item) for item in parse_list(text))


def _parse_override(text: str) -> KvOverride:
    key, _, typed = text.partition("=")
    kind, separator, value = typed.partition(":")
    if not separator or not key or max(len(key.encode()), len(value.encode())) > MAX_OVERRIDE_BYTES:
        raise ValueError(f"{text!r} is not KEY=TYPE:VALUE")
    if kind == "bool" and value not in ("true", "false"):
        raise ValueError("a bool is true or false")
    kinds: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str, "bool": "true".__eq__}
    if kind not in kinds:
        raise ValueError(f"no type is called {kind!r}")
    return KvOverride(key, kinds[kind](value))


def read_text(path: str) -> str:
    """The text of a file; raises ValueError when it can't be read."""
    try:
        return Path(path).expanduser().read_text("utf-8")
    except OSError as error:
        raise ValueError(f"can't read {path}") from error


def parse_object(text: str) -> tuple[tuple[str, Any], ...]:
    """The items of a JSON object."""
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("not an object")  # noqa: TRY004 - a bad value of a flag
    return tuple(found.items())


def parse_loras(text: str) -> tuple[tuple[Path, float], ...]:
    """Comma-separated adapter files, each at scale 1."""
    return tuple((Path(item), 1.0) for item in parse_list(text))


def parse_scaled_loras(text: str) -> tuple[tuple[Path, float], ...]:
    """Comma-separated `FILE:SCALE`."""
    pairs = (item.rpartition(":") for item in parse_list(text))
    return tuple((Path(path), float(scale)) for path, _, scale in pairs)


def option_of(record: dataclasses.Field[Any]) -> Option:
    """The Option a field was declared with."""
    return cast("Option", record.metadata["option"])
