"""The prefix index against a plain list of sequences, and the shape of its tree."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from wingman.engine import prefixes
from wingman.engine.prefixes import PrefixIndex, Tokens, _Node

LONG = tuple(range(1000, 6000))
SEQUENCES = st.lists(st.integers(0, 2), max_size=7).map(tuple)
"""Few tokens, so that beginnings collide."""
FILLED = SEQUENCES.filter(bool)


def n_shared(one: Tokens, other: Tokens) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def nodes_below(parent: _Node, path: Tokens = ()) -> list[tuple[Tokens, _Node]]:
    """All nodes but the root, each with the tokens on the way to it."""
    found = []
    for first, child in parent.children.items():
        label = child.shortest.tokens[parent.end : child.end]
        assert label, "an edge is never empty"
        assert label[0] == first, "a child goes by its first token"
        found += [(path + label, child), *nodes_below(child, path + label)]
    return found


class Index(RuleBasedStateMachine):
    """Entries come and go in any order; every question is answered as a list would answer it."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.held: dict[int, Tokens] = {}
        self.n_added = 0

    @rule(tokens=FILLED)
    def adds(self, tokens: Tokens) -> None:
        self.index.add(self.n_added, tokens)
        self.held[self.n_added] = tokens
        self.n_added += 1

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def removes(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.held)))
        self.index.remove(key)
        del self.held[key]

    @rule(prompt=SEQUENCES)
    def asks_for_the_longest(self, prompt: Tokens) -> None:
        n_common, key = self.index.longest(prompt)
        assert n_common == max((n_shared(held, prompt) for held in self.held.values()), default=0)
        if n_common == 0:
            assert key == -1
        else:
            sharing = [held for held in self.held.values() if n_shared(held, prompt) == n_common]
            assert self.held[key] in sharing
            assert len(self.held[key]) == min(map(len, sharing))

    @rule(prompt=SEQUENCES)
    def asks_for_prefixes(self, prompt: Tokens) -> None:
        covered = [key for key, held in self.held.items() if held == prompt[: len(held)]]
        answer = self.index.covered(prompt)
        assert sorted(answer) == covered
        lengths = [len(self.held[key]) for key in answer]
        assert lengths == sorted(lengths)
        n_common, key = self.index.whole(prompt)
        assert n_common == max(lengths, default=0)
        assert self.held[key] == prompt[:n_common] if covered else key == -1

    @invariant()
    def tree_is_compact(self) -> None:
        assert len(self.index) == len(self.held)
        ends: dict[int, Tokens] = {}
        for path, node in nodes_below(self.index._root):
            assert node.end == len(path)
            assert node.entries or len(node.children) > 1, "a node without entries parts ways"
            below = [entry for _, child in nodes_below(node, path) for entry in child.entries] + node.entries
            assert node.shortest in below, "labels are lent by the living"
            assert node.shortest.n_tokens == min(entry.n_tokens for entry in below)
            ends |= {entry.key: path for entry in node.entries}
        assert ends == self.held


TestIndex = Index.TestCase


@given(st.integers(0, len(LONG)), st.integers(1, len(LONG)), st.integers(0, 3000))
def test_blocks_find_the_exact_place(n_common: int, n_held: int, extra: int) -> None:
    index = PrefixIndex()
    index.add(0, LONG[:n_held])
    prompt = LONG[:n_common] + (7,) * extra
    n_found = min(n_common, n_held)
    assert index.longest(prompt) == ((n_found, 0) if n_found else (0, -1))


@given(
    st.lists(st.integers(1, len(LONG) - 1), min_size=1, max_size=20, unique=True), st.integers(1, len(LONG))
)
def test_branches_beyond_a_block(cuts: list[int], n_prompt: int) -> None:
    index = PrefixIndex()
    for cut in cuts:
        index.add(cut, (*LONG[:cut], 0))
    n_common, key = index.longest(LONG[:n_prompt])
    assert n_common == min(n_prompt, max(cuts))
    assert key == min((cut for cut in cuts if cut >= n_common), default=max(cuts))


def test_a_lookup_slices_blocks_not_tokens() -> None:
    sliced = []

    class Counting(tuple[int, ...]):
        __slots__ = ()

        def __getitem__(self, where: Any) -> Any:
            sliced.append(where)
            return super().__getitem__(where)

    index = PrefixIndex()
    index.add(0, LONG)
    assert index.longest(Counting(LONG)) == (len(LONG), 0)
    assert len(sliced) < 2 * len(LONG) / prefixes._BLOCK + 5


def test_refuses_no_tokens_and_a_taken_key() -> None:
    index = PrefixIndex()
    index.add(3, (1, 2))
    for key, tokens in ((4, ()), (3, (5,))):
        with pytest.raises(ValueError):
            index.add(key, tokens)
    with pytest.raises(KeyError):
        index.remove(4)
    assert index.covered((1, 2, 5)) == [3]


def test_a_deep_tree_needs_no_deep_stack() -> None:
    index = PrefixIndex()
    n_entries = 1500
    for n_tokens in range(1, n_entries + 1):
        index.add(n_tokens, LONG[:n_tokens])
    assert index.whole(LONG) == (n_entries, n_entries)
    for n_tokens in range(1, n_entries):
        index.remove(n_tokens)
    assert index.longest(LONG) == (n_entries, n_entries)
