"""The KV cache of all slots, and what left it for host memory: who holds which prefix, who gets it.

A prompt takes the longest prefix that anybody holds: its own slot, another slot, busy or idle, or a
sequence parked in host memory. What a slot is about to lose is parked first, so a conversation that
comes back costs a copy instead of a prefill; the least recently used parked sequences go when their
byte budget is full. A cache that can't be cut (recurrent, sliding window) is shared as a whole only.

Pure: it changes the mirror (`Slot.tokens`) and notes operations, which the runner carries out in order
before the next step. Engine thread only. Call `reuse` and `make_room` only while the mirror shows
what is really computed: before a plan adds tokens to it.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Tokens

from msgspec import Struct

from wingman.engine.parked import ParkedSequences
from wingman.engine.runner import TO_END, KvCopy, KvDrop, KvOp, KvPark, KvRemove, KvRestore, KvShift
from wingman.engine.slots import Slot, common_prefix


class CacheLimits(Struct, frozen=True):
    """Sizes in tokens; `n_total` bounds all slots together when they share one pool (`is_unified`)."""

    n_slots: int
    n_total: int
    is_unified: bool = False
    can_cut: bool = True
    """Whether a sequence can forget its last tokens."""
    n_window: int = 0
    """A sequence up to this long can forget its last tokens even so."""
    similarity: float = 0.1
    """Share of a prompt that an idle slot must hold to be chosen for it."""
    parked_bytes: int = 0
    """Budget of what is parked in host memory."""
    min_shared: int = 16
    """Fewer tokens are computed again rather than copied or parked."""


class Reuse(Struct, frozen=True):
    """How many prompt tokens need no evaluation, and where they came from or why there are none."""

    n_tokens: int
    reason: str


class KvCache:
    """Mirror of the cache. `size_of` gives the bytes that a slot would take in host memory."""

    def __init__(self, limits: CacheLimits, size_of: Callable[[int], int]) -> None:
        self.slots = tuple(Slot(index) for index in range(limits.n_slots))
        self.parked = ParkedSequences(limits.parked_bytes)
        self._limits = limits
        self._size_of = size_of
        self._ops: list[KvOp] = []

    # -- operations -----------------------------------------------------------------------------

    @property
    def has_ops(self) -> bool:
        """Whether the real cache is not yet as the mirror says."""
        return bool(self._ops)

    def take_ops(self) -> tuple[KvOp, ...]:
        """The operations to carry out, in order."""
        ops = tuple(self._ops)
        self._ops.clear()
        return ops

    def forget(self, slot: Slot, n_kept: int) -> None:
        """Drop all but the first tokens of a slot."""
        if n_kept < len(slot.tokens):
            self._ops.append(KvRemove(slot.id, n_kept, TO_END))
            del slot.tokens[n_kept:]

    def empty(self, slot: Slot) -> None:
        """Drop all that a slot holds, be it what the mirror says or not."""
        self._ops.append(KvRemove(slot.id, 0, TO_END))
        slot.tokens.clear()

    def shift(self, slot: Slot, start: int, end: int) -> None:
        """Drop the tokens at positions [start, end) and close the gap."""
        self._ops.append(KvRemove(slot.id, start, end))
        self._ops.append(KvShift(slot.id, end, len(slot.tokens), start - end))
        del slot.tokens[start:end]

    def clear(self) -> None:
        """The real cache was rebuilt and holds nothing, nor is anything parked."""
        self._ops.clear()
        self.parked.clear()
        for slot in self.slots:
            slot.tokens.clear()

    # -- which slot -----------------------------------------------------------------------------

    def choose(self, prompt: Tokens[int], id_slot: int, n_forks: int = 0) -> list[Slot] | None:
        """The slot for a prompt and slots for its forks; None while they have to wait.

        The slot asked for; else one beside those that are busy, since split streams are computed together
        only where their numbers follow each other. Among equals the one that holds the longest common
        prefix, if that is more than the similarity share of the prompt (get_available_slot of llama-server)
        and nothing worth keeping would be lost or no slot is empty; else the least recently used.
        """
        free = [slot for slot in self.slots if slot.is_free]
        if len(free) <= n_forks or (id_slot >= 0 and not self.slots[id_slot].is_free):
            return None
        chosen: list[Slot] = []
        while len(chosen) <= n_forks:
            near = self._nearest(free, chosen, prompt)
            wanted = self._holder(near, prompt) if not chosen else None
            if not chosen and id_slot >= 0:
                wanted = self.slots[id_slot]
            chosen.append(wanted or near[0])
            free.remove(chosen[-1])
        return chosen

    def _nearest(self, free: list[Slot], chosen: list[Slot], prompt: Tokens[int]) -> list[Slot]:
        """The free slots with most neighbours that are busy or chosen, the least recently used first, without
        those that would lose what they hold; all of them where places make no difference."""
        ranked = sorted(free, key=lambda slot: (bool(slot.tokens), slot.last_used))
        safe = [] if self._limits.is_unified else [slot for slot in ranked if self._keeps(slot, prompt)]
        if not safe:
            return ranked
        busy = {slot.id for slot in self.slots if slot.sequence is not None} | {slot.id for slot in chosen}
        n_beside = {slot.id: (slot.id - 1 in busy) + (slot.id + 1 in busy) for slot in safe}
        most = max(n_beside.values())
        return [slot for slot in safe if n_beside[slot.id] == most]

    def _keeps(self, slot: Slot, prompt: Tokens[int]) -> bool:
        """Whether a prompt may enter a slot without losing more than a little of what that holds: the prompt has
        it too, or there is room to park it."""
        n_lost = len(slot.tokens) - common_prefix(slot.tokens, prompt)
        return n_lost < self._limits.min_shared or self.parked.room_for(self._size_of(slot.id)) is not None

    def _holder(self, free: list[Slot], prompt: Tokens[int]) -> Slot | None:
        """The slot that holds enough of a prompt to be preferred."""
        if self._limits.similarity <= 0:
            return None
        best = max(free, key=lambda slot: common_prefix(slot.tokens, prompt))
        n_common = common_prefix(best.tokens, prompt)
        is_mere_extension = len(best.tokens) - n_common < self._limits.min_shared
        is_like_it = n_common > self._limits.similarity * len(prompt)
        return best if is_like_it and (is_mere_extension or free[0].tokens) else None

    # -- what it need not compute -----------------------------------------------------------------

    def reuse(self, slot: Slot, prompt: tuple[int, ...], lora: tuple[float, ...]) -> Reuse:
        """Make a slot hold as long a prefix of the prompt as anybody has, all but its last token at most;
        what the slot held before is parked."""
        n_own = self._n_usable(slot, prompt, lora)
        if len(slot.tokens) - n_own >= self._limits.min_shared:
            self._park(slot)
        reuse = self._take_over(slot, prompt, lora, n_own)
        if reuse is None:
            reuse = Reuse(n_own, "its slot had it" if n_own else self._why_not(prompt, lora))
            self.forget(slot, n_own)
        slot.lora = lora
        return reuse

    def n_obtainable(self, prompt: tuple[int, ...], lora: tuple[float, ...]) -> int:
        """Prompt tokens that somebody holds now."""
        n_in_slot = max(self._n_usable(slot, prompt, lora) for slot in self.slots)
        return max(n_in_slot, self.parked.find(prompt[:-1], lora, self._limits.can_cut)[0])

    def release(self, slot: Slot) -> None:
        """Empty a slot, parking what it held."""
        if len(slot.tokens) >= self._limits.min_shared:
            self._park(slot)
        self.forget(slot, 0)

    def _n_usable(self, slot: Slot, prompt: tuple[int, ...], lora: tuple[float, ...]) -> int:
        if slot.lora != lora:
            return 0
        n_common = min(common_prefix(slot.tokens, prompt), len(prompt) - 1)
        return n_common if n_common == len(slot.tokens) or self._can_cut(len(slot.tokens)) else 0

    def _can_cut(self, n_held: int) -> bool:
        return self._limits.can_cut or n_held <= self._limits.n_window

    def _take_over(
        self, slot: Slot, prompt: tuple[int, ...], lora: tuple[float, ...], n_own: int
    ) -> Reuse | None:
        """Copy from another slot or from host memory when that is worth it and there is room."""
        source = max(self.slots, key=lambda each: self._n_usable(each, prompt, lora))
        n_copied = self._n_usable(source, prompt, lora)
        n_restored, parked = self.parked.find(prompt[:-1], lora, self._limits.can_cut)
        n_needed = n_own + self._limits.min_shared
        if n_copied >= max(n_needed, n_restored) and self._fits(slot, n_copied):
            self._ops.append(KvCopy(source.id, slot.id, n_copied))
            slot.tokens[:] = source.tokens[:n_copied]
            return Reuse(n_copied, f"copied from slot {source.id}")
        # restored as a whole, then cut
        if parked is not None and n_restored >= n_needed and self._fits(slot, len(parked.tokens)):
            self.parked.touch(parked.key)
            self._ops.append(KvRestore(parked.key, slot.id, n_restored))
            slot.tokens[:] = parked.tokens[:n_restored]
            return Reuse(n_restored, "restored from host memory")
        return None

    def _fits(self, slot: Slot, n_tokens: int) -> bool:
        """Whether a slot can hold so many tokens without taking room from anybody."""
        n_held = self.n_held - len(slot.tokens) + n_tokens
        return not self._limits.is_unified or n_held <= self._limits.n_total

    def _why_not(self, prompt: Tokens[int], lora: tuple[float, ...]) -> str:
        """What kept a prompt from finding a prefix."""
        longest = max(self.slots, key=lambda each: common_prefix(each.tokens, prompt))
        n_common = common_prefix(longest.tokens, prompt)
        if n_common < self._limits.min_shared:
            return "nobody has it"
        if longest.lora != lora:
            return f"slot {longest.id} computed it with other adapters"
        if not self._can_cut(len(longest.tokens)):
            return f"slot {longest.id} holds more than it and can't be cut"
        return "there is no room for a copy"

    # -- room -------------------------------------------------------------------------------------

    def _park(self, slot: Slot) -> None:
        """Keep a copy of an idle slot in host memory, if it is not there already and there is room."""
        tokens = tuple(slot.tokens)
        n_parked, _ = self.parked.find(tokens, slot.lora, self._limits.can_cut)
        if n_parked == len(tokens) or self._is_held_elsewhere(slot):
            return
        n_bytes = self._size_of(slot.id)
        if self.parked.room_for(n_bytes) is None:
            return
        entry, dropped = self.parked.add(tokens, slot.lora, n_bytes, can_cut=self._limits.can_cut)
        self._ops += map(KvDrop, dropped)
        self._ops.append(KvPark(slot.id, entry.key))

    def _is_held_elsewhere(self, slot: Slot) -> bool:
        n_held = len(slot.tokens)
        return self._can_cut(n_held) and any(
            other is not slot and other.lora == slot.lora and other.tokens[:n_held] == slot.tokens
            for other in self.slots
        )

    def make_room(self, n_tokens: int) -> bool:
        """Release slots whose tokens no job needs, least recently used first, until `n_tokens` more fit;
        whether they do."""
        if not self._limits.is_unified:
            return True
        while self.n_held + n_tokens > self._limits.n_total:
            holding = [slot for slot in self.slots if slot.is_spare and slot.tokens]
            if not holding:
                return False
            self.release(min(holding, key=lambda slot: slot.last_used))
        return True

    @property
    def n_held(self) -> int:
        """Tokens held by all slots; one that several slots share counts for each."""
        return sum(len(slot.tokens) for slot in self.slots)
