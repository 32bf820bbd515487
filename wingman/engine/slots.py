"""Slots: the sequences of the KV cache, what each holds, and which one a prompt gets.

Pure; used by the scheduler on the engine thread. `Slot.tokens` mirrors the cache exactly: it
grows when tokens are planned into a batch and shrinks with each KvRemove.
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

    def __repr__(self) -> str:
        owner = "idle" if self.sequence is None else f"job {self.sequence.job.id}"
        return f"<Slot {self.id} {owner} holds {len(self.tokens)}>"


class SlotPool:
    """All slots of an engine."""

    def __init__(self, n_slots: int, similarity: float) -> None:
        self.slots = tuple(Slot(index) for index in range(n_slots))
        self._similarity = similarity

    def choose(self, prompt: Tokens[int], id_slot: int) -> Slot | None:
        """The slot for a prompt, or None while it has to wait.

        The one asked for; else the idle one that holds the longest common prefix, if that is more
        than the similarity share of the prompt; else the least recently used (get_available_slot
        of llama-server).
        """
        idle = [slot for slot in self.slots if slot.is_idle and not slot.is_reserved]
        if id_slot >= 0:
            return self.slots[id_slot] if self.slots[id_slot] in idle else None
        if not idle:
            return None
        if self._similarity > 0:
            best = max(idle, key=lambda slot: common_prefix(slot.tokens, prompt))
            if common_prefix(best.tokens, prompt) > self._similarity * len(prompt):
                return best
        return min(idle, key=lambda slot: slot.last_used)

    def choose_group(self, prompt: Tokens[int], id_slot: int, n_forks: int) -> list[Slot] | None:
        """The slot for a prompt as `choose` finds it, and the least recently used ones for its forks; None
        unless all are free."""
        first = self.choose(prompt, id_slot)
        if first is None:
            return None
        others = [slot for slot in self.slots if slot.is_idle and not slot.is_reserved and slot is not first]
        if len(others) < n_forks:
            return None
        others.sort(key=lambda slot: slot.last_used)
        return [first, *others[:n_forks]]

    def idle_holding(self) -> list[Slot]:
        """Idle slots that hold tokens, least recently used first."""
        holding = [slot for slot in self.slots if slot.is_idle and slot.tokens and not slot.is_reserved]
        return sorted(holding, key=lambda slot: slot.last_used)

    @property
    def n_held(self) -> int:
        """Tokens held by all slots."""
        return sum(len(slot.tokens) for slot in self.slots)


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
