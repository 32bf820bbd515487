"""Answers -> JSON bytes: short ones on the loop, long ones in the engine's executor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import orjson

from wingman.engine.types import Finished
from wingman.services.served import ServedModel

INLINE_CHARS: Final = 4096
"""Output of this length is parsed and encoded in well under a millisecond."""
_PROB_CHARS: Final = 64
"""What an alternative of a token counts for."""


async def encode_answers(served: ServedModel, results: Sequence[Finished], make: Callable[[], Any]) -> bytes:
    """The JSON of what `make` builds from results; `make` may run on another thread."""
    n_chars = sum(len(one.text) + _PROB_CHARS * sum(len(prob.top) for prob in one.probs) for one in results)
    if n_chars <= INLINE_CHARS:
        return orjson.dumps(make())
    return await served.engine.work(n_chars, lambda: orjson.dumps(make()))
