"""What the name of a GGUF file or repository tells, and which file suits a machine.

Quantizations by llama.cpp's names, their size and their speed; the parameter count in a repository's name;
the choice of `wingman pull REPO`. Nothing is read from disk and nothing is guessed: what a name doesn't
tell is "" or 0. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from msgspec import Struct

_BITS: Final = {
    # bits per weight of a whole 8B model, from the tables of llama.cpp's tools/quantize/README.md; those that
    # it lacks from the usage text of quantize.cpp
    "F32": 32.0,
    "F16": 16.0,
    "BF16": 16.0,
    "Q8_0": 8.5,
    "Q6_K": 6.56,
    "Q5_1": 6.0,
    "Q5_K_M": 5.7,
    "Q5_K_S": 5.57,
    "Q5_0": 5.5,
    "Q4_1": 5.0,
    "Q4_K_M": 4.89,
    "IQ4_NL": 4.68,
    "Q4_K_S": 4.67,
    "Q4_0": 4.5,
    "IQ4_XS": 4.46,
    "NVFP4": 4.5,
    "MXFP4": 4.25,
    "Q3_K_L": 4.3,
    "Q3_K_M": 4.0,
    "IQ3_M": 3.76,
    "IQ3_S": 3.66,
    "Q3_K_S": 3.64,
    "IQ3_XS": 3.5,
    "IQ3_XXS": 3.25,
    "Q2_K": 3.16,
    "Q2_K_S": 2.97,
    "IQ2_M": 2.93,
    "IQ2_S": 2.74,
    "IQ2_XS": 2.59,
    "IQ2_XXS": 2.38,
    "Q2_0": 2.25,
    "IQ1_M": 2.15,
    "TQ2_0": 2.06,
    "IQ1_S": 2.0,
    "TQ1_0": 1.69,
    "Q1_0": 1.13,
}
_PREFERENCE: Final = (
    # quality for its size, as the field recommends it: 4-bit K mixes, then more bits, then fewer
    *(
        "Q4_K_M",
        "Q4_K_L",
        "Q4_K_XL",
        "Q4_K",
        "Q4_K_S",
        "MXFP4",
        "Q5_K_M",
        "Q5_K_S",
        "IQ4_NL",
        "Q4_0",
        "IQ4_XS",
    ),
    *("Q6_K", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q3_K_L", "Q3_K_M", "IQ3_M", "IQ3_S", "Q3_K_S", "IQ3_XS"),
    *("IQ3_XXS", "Q2_K", "IQ2_M", "IQ2_S", "Q2_K_S", "IQ2_XS", "IQ2_XXS", "BF16", "F16", "F32"),
)
_REPACKED: Final = frozenset({"Q4_0", "Q4_K", "IQ4_NL", "Q8_0", "MXFP4"})
"""Base types that llama.cpp rearranges for the CPU's vector units when it loads them. Measured with SmolLM2-135M
and 8 sequences on 2 cores: Q4_0 reads 1888 and writes 510 tokens/s where Q4_1 does 495 and 267."""
_SMALL_BYTES: Final = 2 * 2**30
"""Below this much memory, 8 bits cost little and keep the quality that small models lack."""

_QUANTIZATION: Final = re.compile(
    r"(?<![A-Za-z0-9])(I?Q[1-8]_(?:K(?:_(?:XXS|XS|S|M|L|XL))?|NL|XXS|XS|S|M|L|XL|[01](?:_[48]_[48])?)|TQ[12]_0"
    r"|MXFP4|NVFP4|BF16|FP?16|FP?32)(?![A-Za-z0-9])",
    re.IGNORECASE | re.ASCII,
)
_SPLIT_SUFFIX: Final = re.compile(r"-\d{5}-of-\d{5}$")
_PARAMETERS: Final = re.compile(
    r"(?<![A-Za-z0-9.])(?:(\d{1,3})x)?(\d{1,4}(?:\.\d{1,3})?)([MBT])(?![A-Za-z0-9])", re.IGNORECASE | re.ASCII
)
_UNITS: Final = {"M": 10**6, "B": 10**9, "T": 10**12}
_WORDS: Final = {
    "XXS": "Extra Extra Small",
    "XS": "Extra Small",
    "S": "Small",
    "M": "Medium",
    "L": "Large",
    "XL": "Extra Large",
    "NL": "Non-linear",
}
_PLAIN_NAMES: Final = {
    "F32": "32-bit float",
    "F16": "16-bit float",
    "BF16": "16-bit brain float",
    "MXFP4": "4-bit microscaling float",
    "NVFP4": "4-bit NVIDIA float",
    "TQ1_0": "1-bit ternary",
    "TQ2_0": "2-bit ternary",
}
_NO_MODEL: Final = ("mmproj", "imatrix")


def is_model_file(file_path: str) -> bool:
    """Whether a GGUF file holds a language model: no projector for images, no importance matrix."""
    name = file_path.rsplit("/", 1)[-1].lower()
    return name.endswith(".gguf") and not any(word in name for word in _NO_MODEL)


def quantization_of(file_path: str) -> str:
    """The quantization that a file's name tells, or its folder's, as llama.cpp writes it; "" when none does."""
    stem = file_path[: -len(".gguf")] if file_path.lower().endswith(".gguf") else file_path
    for part in reversed(_SPLIT_SUFFIX.sub("", stem).split("/")):
        found = _QUANTIZATION.findall(part)
        if found:
            return str(found[-1]).upper().replace("FP16", "F16").replace("FP32", "F32")
    return ""


def quantization_name(quant: str) -> str:
    """A quantization for people, such as `4-bit K Medium`; "" for none."""
    if not quant or quant in _PLAIN_NAMES:
        return _PLAIN_NAMES.get(quant, "")
    family, *rest = quant.split("_")
    kind = "I " if family.startswith("I") else ""
    return f"{family[-1:]}-bit {kind}{' '.join(_WORDS.get(word, word) for word in rest)}"


def bits_per_weight(quant: str) -> float:
    """Bits that a weight takes on the average of a model; 0.0 for an unknown quantization."""
    base = _base_type(quant)
    return next((_BITS[name] for name in (quant, f"{base}_M", base) if name in _BITS), 0.0)


def parameter_text(repo: str) -> str:
    """The parameter count in a repository's name, such as `7B`, `8x7B`, `135M`; "" when there is none."""
    match = _PARAMETERS.search(repo.rsplit("/", 1)[-1])
    if match is None:
        return ""
    return f"{match[1]}x{match[2]}{match[3].upper()}" if match[1] else f"{match[2]}{match[3].upper()}"


def parameter_count(text: str) -> int:
    """The number that such a text means; 0 for "". Experts count whole: `8x7B` is 56 billion."""
    match = _PARAMETERS.fullmatch(text)
    if match is None:
        return 0
    return round(int(match[1] or 1) * float(match[2]) * _UNITS[match[3].upper()])


def is_repacked(quant: str) -> bool:
    """Whether llama.cpp has its fast CPU kernels for most tensors of such a file."""
    return _base_type(quant) in _REPACKED


def speed_rank(quant: str, on_gpu: bool) -> int:
    """0: fast, 1: slower, 2: slow. A GPU waits for memory, so there only floats, being large, are slower."""
    if quant in {"F32", "F16", "BF16"} or not quant:
        return 2
    if on_gpu or is_repacked(quant):
        return 0
    return 2 if quant.startswith(("IQ1", "IQ2", "IQ3", "TQ")) else 1


def _base_type(quant: str) -> str:
    """The tensor type that most of a file has: `Q4_K_M` is mostly Q4_K."""
    match = re.match(r"Q[2-8]_K", quant)
    return (match[0] if match else quant).replace("Q8_K", "Q8_0")


class Candidate(Struct, frozen=True):
    """A file, or set of split files, that could be downloaded."""

    file_path: str
    quantization: str
    memory_bytes: int
    """It needs to run; 0: unknown."""


class Choice(Struct, frozen=True):
    """A candidate, and the reason for it in words."""

    file: Candidate
    reason: str
    fits: bool


def choose_file(files: Sequence[Candidate], memory_available: int, on_gpu: bool) -> Choice | None:
    """The file to download for a machine: what fits in memory (bytes), then speed, then quality.

    None when no file holds a model. When nothing fits it is the smallest, and `fits` is False.
    """
    models = [file for file in files if is_model_file(file.file_path)]
    if not models:
        return None
    place = "on the GPU" if on_gpu else "in memory"
    fitting = [file for file in models if 0 < file.memory_bytes <= memory_available]
    if fitting:
        best = min(fitting, key=lambda file: _rank(file, on_gpu))
        room = f"needs {_megabytes(best.memory_bytes)} of the {_megabytes(memory_available)} free {place}"
        merit = _merit(best, fitting, on_gpu) if len(models) > 1 else ""
        return Choice(best, f"{_label(best)} {room}{merit}", True)
    known = [file for file in models if file.memory_bytes > 0]
    if not known:
        best = min(models, key=lambda file: _rank(file, on_gpu))
        return Choice(best, f"{_label(best)} is the usual choice; what it needs of memory is unknown", False)
    best = min(known, key=lambda file: file.memory_bytes)
    need = f"it needs {_megabytes(best.memory_bytes)} and {_megabytes(memory_available)} are free {place}"
    return Choice(best, f"nothing fits, so the smallest, {_label(best)}: {need}", False)


def _rank(file: Candidate, on_gpu: bool) -> tuple[int, int, int, str]:
    """Less is better: speed, quality for its size, size, name."""
    quant = file.quantization
    known = _PREFERENCE.index(quant) if quant in _PREFERENCE else len(_PREFERENCE)
    is_small = quant == "Q8_0" and 0 < file.memory_bytes <= _SMALL_BYTES
    return speed_rank(quant, on_gpu), -1 if is_small else known, file.memory_bytes, file.file_path


def _merit(best: Candidate, fitting: Sequence[Candidate], on_gpu: bool) -> str:
    """What speaks for the best one besides that it fits."""
    quant = best.quantization
    if len(fitting) == 1:
        return "; nothing else fits" if quant else ""
    if quant == "Q8_0" and best.memory_bytes <= _SMALL_BYTES:
        return ", and so small a model is worth 8 bits"
    if not on_gpu and is_repacked(quant):
        return ", and it is of a type that llama.cpp runs fast on a CPU"
    return ", and it keeps the most quality for its size" if quant in _PREFERENCE else ""


def _label(file: Candidate) -> str:
    return file.quantization or file.file_path


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.0f} MB"
