"""Slots: the sequences of the KV cache and what each holds.

Pure; used by `cache` and the scheduler on the engine thread. `Slot.tokens` mirrors the cache exactly:
it grows when tokens are planned into a batch and shrinks with each KvRemove.
"""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wingman.engine.sequence import Sequence


class Slot:
    """One sequence id of the cache. `last_used` is a time of the engine's clock; 0 = never."""

    __slots__ = ("id", "is_reserved", "last_sequence", "last_used", "lora", "sequence", "tokens")

    def __init__(self, slot_id: int) -> None:
        self.id = slot_id
        self.tokens: list[int] = []
        self.sequence: Sequence | None = None
        self.last_sequence: Sequence | None = None
        self.last_used = 0.0
        self.lora: tuple[float, ...] = ()
        """The adapter scales its tokens were computed with."""
        self.is_reserved = False
        """Whether somebody waits to save, restore or erase it; no job enters it then."""

    @property
    def is_idle(self) -> bool:
        """Whether no job uses the slot; what it holds stays reusable."""
        return self.sequence is None

    @property
    def is_free(self) -> bool:
        """Whether a job may enter."""
        return self.sequence is None and not self.is_reserved

    @property
    def is_spare(self) -> bool:
        """Whether no job needs what it holds: it is free, or its job has not settled there yet."""
        return self.is_free or (self.sequence is not None and not self.sequence.is_settled)

    def __repr__(self) -> str:
        owner = "idle" if self.sequence is None else f"job {self.sequence.job.id}"
        return f"<Slot {self.id} {owner} holds {len(self.tokens)}>"


def common_prefix(held: Tokens[int], prompt: Tokens[int]) -> int:
    """Length of the longest common prefix; compares slices, so it runs at memcmp-like speed."""
    low, high = 0, min(len(held), len(prompt))
    if not high or held[0] != prompt[0]:
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        if list(held[low:middle]) == list(prompt[low:middle]):
            low = middle
        else:
            high = middle - 1
    return low
