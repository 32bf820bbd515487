"""Numbers of requests and their ranges, by one table.

A number outside its range is clamped or refused as the table says, before anything native sees it.
"""

from __future__ import annotations

import math
from typing import Any, Final

from msgspec import Struct

from wingman.errors import InvalidRequest

INT32_MAX: Final = 2**31 - 1
INT64_MAX: Final = 2**63 - 1
FLOAT32_MAX: Final = 3.4028234663852886e38


class Range(Struct, frozen=True):
    """A number's kind and range; outside of it, `clamps` or refuse."""

    kind: type[int] | type[float]
    low: float = -FLOAT32_MAX
    high: float = FLOAT32_MAX
    clamps: bool = False


_INT: Final = Range(int, -INT32_MAX - 1, INT32_MAX, clamps=True)
_FLOAT: Final = Range(float, clamps=True)
_UNIT: Final = Range(float, 0.0, 1.0, clamps=True)
COUNT: Final = Range(int, 0, INT32_MAX)
COUNT_OR_ALL: Final = Range(int, -1, INT32_MAX)

SAMPLING: Final[dict[str, Range]] = {
    "temperature": Range(float, 0.0, clamps=True),
    "dynatemp_range": _FLOAT,
    "dynatemp_exponent": _FLOAT,
    "top_k": Range(int, 0, INT32_MAX, clamps=True),
    "top_p": _UNIT,
    "min_p": _UNIT,
    "top_n_sigma": _FLOAT,
    "typical_p": _FLOAT,
    "xtc_probability": _UNIT,
    "xtc_threshold": _UNIT,
    "repeat_last_n": COUNT_OR_ALL,
    "repeat_penalty": Range(float, 1e-30),
    "frequency_penalty": Range(float),
    "presence_penalty": Range(float),
    "dry_multiplier": _FLOAT,
    "dry_base": _FLOAT,
    "dry_allowed_length": COUNT,
    "dry_penalty_last_n": COUNT_OR_ALL,
    "mirostat": Range(int, 0, 2, clamps=True),
    "mirostat_tau": _FLOAT,
    "mirostat_eta": _FLOAT,
    "adaptive_target": Range(float, high=1.0, clamps=True),
    "adaptive_decay": Range(float, 0.0, 0.99),
    "min_keep": COUNT,
}
LIMITS: Final[dict[str, Range]] = {
    "n_keep": COUNT_OR_ALL,
    "n_discard": COUNT,
    "n_indent": COUNT,
    "t_max_predict_ms": Range(int, -1, INT64_MAX),
}

DRAFTING: Final[dict[str, Range]] = {
    "n_max": COUNT,
    "n_min": COUNT,
    "p_min": Range(float, 0.0, 1.0),
}
"""Fields `speculative.*`."""


def read_number(value: Any, field: str, bounds: Range) -> Any:
    """A request's number within its range; raises InvalidRequest naming the field."""
    try:
        is_finite = math.isfinite(value)
    except OverflowError:  # an integer beyond the range of float
        is_finite = False
    if not is_finite:
        raise InvalidRequest(f"Field '{field}': must be finite", field)
    number = bounds.kind(value)
    if bounds.low <= number <= bounds.high:
        return number
    if not bounds.clamps:
        limit = f"at least {bounds.low:g}" if number < bounds.low else f"at most {bounds.high:g}"
        raise InvalidRequest(f"Field '{field}': must be {limit}", field)
    return bounds.kind(min(max(number, bounds.low), bounds.high))
