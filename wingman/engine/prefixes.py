"""An index of token sequences by their beginnings: who shares the longest prefix with a prompt?

A compressed radix tree (Morrison, PATRICIA, 1968). Pure; used by `parked` on the engine thread.
An edge stores no tokens: the label of the edge into a node is `tokens[start:end]` of an entry below
that node, `start` being the parent's end, since positions in an entry are depths in the tree. So entries
are shared with whoever added them, splitting an edge copies nothing, and joining two edges is putting
the lower node in the place of the upper. The entry that lends a node its label is the shortest below
it, which is also the one a lookup that stops there wants: it costs least to copy.

A lookup compares slices block by block, so it runs at the speed of tuple comparison: time grows with
the prompt, and with the number of entries only by the branches on the path.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TypeAlias

from msgspec import Struct

Tokens: TypeAlias = tuple[int, ...]

_BLOCK = 1024
"""Tokens compared at a time; larger blocks gain nothing and copy more when the first token differs."""


class _Entry(Struct, frozen=True):
    key: int
    tokens: Tokens

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)


class _Node:
    """A place where entries end or part. `end` is its depth in tokens; children go by their first token."""

    __slots__ = ("children", "end", "entries", "shortest")

    def __init__(self, end: int, shortest: _Entry) -> None:
        self.end = end
        self.shortest = shortest
        self.entries: list[_Entry] = []
        self.children: dict[int, _Node] = {}


class PrefixIndex:
    """Token sequences under the integer keys (0 or more) of their owner; equal sequences may have several."""

    def __init__(self) -> None:
        self._root = _Node(0, _Entry(-1, ()))  # shorter than any entry, so it stays: the answer "none"
        self._entries: dict[int, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, key: int, tokens: Tokens) -> None:
        """Index `tokens`, which may not be empty, under a new key; ValueError otherwise."""
        if not tokens or key in self._entries:
            raise ValueError(f"key {key} is taken or its sequence is empty")
        entry = self._entries[key] = _Entry(key, tokens)
        node = self._root
        while node.end < len(tokens):
            node = _step(node, entry)
            if entry.n_tokens < node.shortest.n_tokens:
                node.shortest = entry
        node.entries.append(entry)

    def remove(self, key: int) -> None:
        """Forget an entry; KeyError when there is none."""
        entry = self._entries.pop(key)
        path = list(self._path(entry.tokens))
        path[-1].entries.remove(entry)
        for parent, node in reversed(list(pairwise(path))):
            _settle(parent, node, entry)

    def longest(self, prompt: Tokens) -> tuple[int, int]:
        """Length of the longest prefix that an entry shares with `prompt`, and the key of the shortest
        such entry; (0, -1) when none shares any."""
        *_, (n_common, node) = self._matches(prompt)
        return n_common, node.shortest.key

    def whole(self, prompt: Tokens) -> tuple[int, int]:
        """Length and key of the longest entry that is a prefix of `prompt`; (0, -1) when none is."""
        keys = self.covered(prompt)
        return (self._entries[keys[-1]].n_tokens, keys[-1]) if keys else (0, -1)

    def covered(self, tokens: Tokens) -> list[int]:
        """Keys of the entries that are prefixes of `tokens`, or equal to it, shortest first."""
        return [
            entry.key
            for n_common, node in self._matches(tokens)
            if n_common == node.end
            for entry in node.entries
        ]

    def _matches(self, prompt: Tokens) -> Iterator[tuple[int, _Node]]:
        """The nodes on the prompt's path from the root, with how many tokens the entries below share with
        it; only the last may share less than its own depth."""
        n_common, node = 0, self._root
        yield n_common, node
        while n_common == node.end < len(prompt) and prompt[n_common] in node.children:
            node = node.children[prompt[n_common]]
            n_common = _first_difference(node.shortest.tokens, prompt, n_common + 1, node.end)
            yield n_common, node

    def _path(self, tokens: Tokens) -> Iterator[_Node]:
        """The nodes from the root to the one where `tokens`, an entry's, end."""
        node = self._root
        yield node
        while node.end < len(tokens):
            node = node.children[tokens[node.end]]
            yield node


def _step(parent: _Node, entry: _Entry) -> _Node:
    """One node further down on the way of a new entry; made, or split off an edge, where none is."""
    first = entry.tokens[parent.end]
    child = parent.children.get(first)
    if child is None:
        child = parent.children[first] = _Node(entry.n_tokens, entry)
        return child
    end = _first_difference(child.shortest.tokens, entry.tokens, parent.end + 1, child.end)
    if end == child.end:
        return child
    upper = parent.children[first] = _Node(end, child.shortest)
    upper.children[child.shortest.tokens[end]] = child
    return upper


def _settle(parent: _Node, node: _Node, removed: _Entry) -> None:
    """Restore the tree's rules for a node above, or at, the place of an entry that is gone."""
    first = removed.tokens[parent.end]
    if not node.entries and not node.children:
        del parent.children[first]
    elif not node.entries and len(node.children) == 1:
        (parent.children[first],) = node.children.values()
    elif node.shortest is removed:
        below = [child.shortest for child in node.children.values()]
        node.shortest = min((*node.entries, *below), key=lambda entry: entry.n_tokens)


def _first_difference(held: Tokens, prompt: Tokens, start: int, stop: int) -> int:
    """Where two sequences first differ in [start, stop), or the end of that or of the prompt."""
    stop = min(stop, len(prompt))
    step = min(_BLOCK, stop - start)
    while step and start < stop:
        end = min(start + step, stop)
        if held[start:end] == prompt[start:end]:
            start = end
        else:
            step //= 2
    return start
