"""Drafts from the text itself: what followed the last time these tokens came up (prompt lookup).

One `NgramDrafter` per generating sequence, on the engine thread; pure. Each pair of tokens leads to the
place after its last occurrence, each such place to the one before (the hash chains of LZ77), so a draft
looks at a few places and takes the one with the longest common past. Nothing is indexed before the first
draft, and never more than `MAX_TOKENS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from msgspec import Struct

MAX_TOKENS: Final = 8192
"""Tokens looked back on at most; some 150 bytes of index for each."""
_KEPT_TOKENS: Final = 6144
"""What is left when the oldest go; dropping many at once keeps the mean cost of a token low."""
_MAX_PLACES: Final = 8
"""Places compared for one draft."""
MAX_MATCH: Final = 8
"""Length of a common past that ends the search, in tokens."""
_PAIR: Final = 2


class Draft(Struct, frozen=True):
    """Proposed tokens. `n_match` is how many tokens before them, 2 to MAX_MATCH, stood before their source
    too: the more, the likelier they are right. 0 with no tokens."""

    tokens: list[int]
    n_match: int


NO_DRAFT: Final = Draft([], 0)


class DraftRequest(Struct, frozen=True):
    """Wants a draft model's guess of up to `n_max` tokens after `tokens`, the whole text of a slot: fewer where
    it gives its best guess less than `p_min`, none while it has not caught up with the text."""

    slot_id: int
    tokens: Sequence[int]
    n_max: int
    p_min: float = 0.0


class NgramDrafter:
    """Looks up what a sequence will say next in what it holds."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._latest: dict[tuple[int, int], int] = {}
        self._earlier: list[int] = []  # of each place the one before with the same pair, 0 for none

    def extend(self, tokens: Iterable[int]) -> None:
        """Add tokens of the prompt or the output."""
        self._tokens.extend(tokens)
        if len(self._tokens) > MAX_TOKENS:
            del self._tokens[:-_KEPT_TOKENS]
            self._latest.clear()
            self._earlier.clear()

    def draft(self, n_max: int) -> Draft:
        """What comes next, `n_max` tokens, or NO_DRAFT when the last two tokens are new."""
        tokens = self._tokens
        self._index()
        place = self._latest.get((tokens[-2], tokens[-1]), 0) if len(tokens) > _PAIR else 0
        if not place or n_max <= 0:
            return NO_DRAFT
        n_match, place = self._longest_match(place)
        found = tokens[place : place + n_max]
        while len(found) < n_max:  # it ran into the end: a loop, which goes on
            found += tokens[place : place + n_max - len(found)]
        return Draft(found, n_match)

    def _index(self) -> None:
        """Index all pairs that something follows."""
        tokens, latest, earlier = self._tokens, self._latest, self._earlier
        if not earlier:
            earlier += [0] * _PAIR
        start = len(earlier)
        for place, pair in enumerate(zip(tokens[start - 2 : -2], tokens[start - 1 : -1], strict=True), start):
            earlier.append(latest.get(pair, 0))
            latest[pair] = place

    def _longest_match(self, place: int) -> tuple[int, int]:
        """The longest past that a place shares with the end, and the place: the latest of equals."""
        tokens, earlier = self._tokens, self._earlier
        past = tokens[: -MAX_MATCH - 1 : -1]
        best, best_place = 0, place
        for _ in range(_MAX_PLACES):
            n_match = _PAIR
            n_most = min(len(past), place)
            while n_match < n_most and tokens[place - 1 - n_match] == past[n_match]:
                n_match += 1
            if n_match > best:
                best, best_place = n_match, place
            place = earlier[place]
            if best == MAX_MATCH or not place:
                break
        return best, best_place
