"""Parked sequences: what finished conversations left in host memory, within a budget of bytes.

Pure; used by the scheduler on the engine thread. It keeps the books only: the saved states themselves
lie with the runner under the same keys, so whoever is told of a dropped key frees that state. The
order of use is the order of a dict, without a clock. States computed with different adapter scales
never match each other, so each tuple of scales has its own index.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from itertools import count

from msgspec import Struct

from wingman.engine.prefixes import PrefixIndex


class Parked(Struct, frozen=True):
    """The saved state of one sequence: its tokens, their adapter scales and its size in bytes."""

    key: int
    tokens: tuple[int, ...]
    lora: tuple[float, ...]
    n_bytes: int


class ParkedSequences:
    """Parked sequences, least recently used first out; together never more than `budget_bytes`.

    `can_cut` says of a model whether its cache can be cut back to any prefix; where it can't (a
    recurrent state), a parked sequence serves only prompts that begin with all of it.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.n_bytes = 0
        self.n_hits = 0
        """How often an entry was used."""
        self.n_evictions = 0
        """Entries dropped for want of room."""
        self._entries: OrderedDict[int, Parked] = OrderedDict()
        self._indexes: defaultdict[tuple[float, ...], PrefixIndex] = defaultdict(PrefixIndex)
        self._keys = count()

    @property
    def n_entries(self) -> int:
        """Parked sequences held."""
        return len(self._entries)

    def room_for(self, n_bytes: int) -> list[int] | None:
        """Keys of the least recently used entries that must go so that `n_bytes` fit; None if they
        never do, as with a budget of 0."""
        if not 0 < n_bytes <= self.budget_bytes:
            return None
        excess = self.n_bytes + n_bytes - self.budget_bytes
        keys = []
        for entry in self._entries.values():
            if excess <= 0:
                break
            keys.append(entry.key)
            excess -= entry.n_bytes
        return keys

    def add(
        self, tokens: tuple[int, ...], lora: tuple[float, ...], n_bytes: int, can_cut: bool
    ) -> tuple[Parked, list[int]]:
        """Park a sequence; the new entry, and the keys dropped for it.

        Dropped are first what it makes useless: an equal entry and, with `can_cut`, those that are a
        prefix of it; then the least recently used until it fits. ValueError where `room_for` gives
        None, and for no tokens.
        """
        if not tokens or self.room_for(n_bytes) is None:
            raise ValueError(f"no room for {len(tokens)} tokens in {n_bytes} bytes")
        dropped = self._replaced(tokens, lora, can_cut)
        for key in dropped:
            self.drop(key)
        evicted = self.room_for(n_bytes) or []
        for key in evicted:
            self.drop(key)
        self.n_evictions += len(evicted)
        return self._insert(Parked(next(self._keys), tokens, lora, n_bytes)), dropped + evicted

    def find(
        self, prompt: tuple[int, ...], lora: tuple[float, ...], can_cut: bool
    ) -> tuple[int, Parked | None]:
        """How many first tokens of `prompt` an entry can serve, and that entry; (0, None) without any.

        Leave out the tokens that must be computed anyway, such as a prompt's last. Counts nothing and
        moves nothing: `touch` the entry that is used. Where all of a sequence is found, parking it would
        add nothing.
        """
        if lora not in self._indexes:
            return 0, None
        index = self._indexes[lora]
        n_common, key = index.longest(prompt) if can_cut else index.whole(prompt)
        return n_common, self._entries.get(key)

    def touch(self, key: int) -> None:
        """An entry is used: it is the last to go now. KeyError when it is not there."""
        self._entries.move_to_end(key)
        self.n_hits += 1

    def drop(self, key: int) -> None:
        """Forget an entry; KeyError when it is not there."""
        entry = self._entries.pop(key)
        self.n_bytes -= entry.n_bytes
        index = self._indexes[entry.lora]
        index.remove(key)
        if not index:
            del self._indexes[entry.lora]

    def clear(self) -> None:
        """Forget all entries; the counters stay."""
        self._entries.clear()
        self._indexes.clear()
        self.n_bytes = 0

    def _replaced(self, tokens: tuple[int, ...], lora: tuple[float, ...], can_cut: bool) -> list[int]:
        if lora not in self._indexes:
            return []
        keys = self._indexes[lora].covered(tokens)
        return keys if can_cut else [key for key in keys if self._entries[key].tokens == tokens]

    def _insert(self, entry: Parked) -> Parked:
        self._entries[entry.key] = entry
        self._indexes[entry.lora].add(entry.key, entry.tokens)
        self.n_bytes += entry.n_bytes
        return entry
