"""How many derivations does llama.cpp have to follow at once?

Owns that estimate; only `wingman.chat.grammar` calls it, on any thread. To mask a vocabulary
llama.cpp matches each token's text along every derivation by itself, so `("a" | "a")+` doubles the
work with each letter; and what it keeps from token to token are all the different stacks.

The search walks the stacks that llama.cpp will have (a stack: what is still to match, innermost last)
from the start of the grammar, over all strings, breadth first. A state is a set of stacks with the
number of derivations that lead to each. Derivations that meet again in one stack are counted for as
many characters as a token may have. States are told apart by the tops of their stacks alone, so that
walks end although recursion has no end; and steps are limited. So this is a search, not a proof: a
grammar that grows slowly, over more text than a token, is left to the engine's watch over its steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from wingman.chat.gbnf import BadGrammar, CharSet, Grammar, Sequence, Symbol

MAX_DERIVATIONS = 65_536
"""Ways to read the same text within a token; each costs llama.cpp up to some microseconds."""
MAX_STACKS = 1_000
"""Different stacks at once: each is tried against the whole vocabulary."""
MAX_BREADTH = 256
"""Ranges of all character classes at once that match much: the whole vocabulary is compared with each."""
_MUCH = 64
"""Code points that are much."""
_TOKEN_CHARS = 24
"""Longer tokens are, in general, runs of one character."""
_RUN_CHARS = 128
"""The longest of those."""
_TOP = 3
"""Entries by which stacks are told apart."""
MAX_STEPS = 600_000
"""Stacks looked at, under a microsecond each. JSON takes 250 000, a hundred optional properties too many."""
_STEPS_PER_EDGE = 12

Counts: TypeAlias = dict[int, int]
"""Stacks alive and the number of derivations that lead to each."""


def check_ambiguity(grammar: Grammar, must_finish: bool) -> None:
    """Raise BadGrammar when more derivations or stacks are found than llama.cpp can follow.

    Also when the steps don't suffice to tell, if the search `must_finish`.
    """
    try:
        search = _Search(_Machine(grammar))
        search.run()
        search.check_growth()
    except _OutOfStepsError:
        if must_finish:
            raise BadGrammar("it has too many states to be checked") from None


class _OutOfStepsError(Exception):
    """The search ends without an answer."""


class _Search:
    """A graph of states; an edge has the factor by which all derivations multiplied on the way."""

    def __init__(self, machine: _Machine) -> None:
        self._machine = machine
        self._states: list[tuple[Counts, int]] = []
        self._edges: list[list[tuple[int, int]]] = []
        self._numbers: dict[tuple[object, ...], int] = {}

    def run(self) -> None:
        """Visit every state that strings lead to."""
        start = dict.fromkeys(self._machine.expanded(self._machine.start), 1)
        self._machine.check(start)
        self._number(start, 0)
        for counts, age in self._states:  # which grows meanwhile
            edges: list[tuple[int, int]] = []
            for char, following in self._machine.steps(counts):
                self._machine.spend(_STEPS_PER_EDGE)
                self._machine.check(following)
                if max(following.values()) > 1:
                    self._check_run(following, char)
                edges.append(self._edge(following, age))
            self._edges.append(edges)

    def check_growth(self) -> None:
        """Raise BadGrammar when factors multiply too far within a token."""
        if all(factor == 1 for edges in self._edges for _, factor in edges):
            return
        even = [0 if age else 1 for _, age in self._states]  # a token may start in these
        products = even
        for _ in range(_TOKEN_CHARS):
            longer = even.copy()
            for product, edges in zip(products, self._edges, strict=True):
                if product:
                    self._machine.spend(1 + len(edges) // 8)
                    for target, factor in edges:
                        longer[target] = max(longer[target], product * factor)
            products = longer
            for product, (counts, _) in zip(products, self._states, strict=True):
                if product * sum(counts.values()) > MAX_DERIVATIONS:
                    raise BadGrammar("it is too ambiguous: one text has too many derivations")

    def _edge(self, counts: Counts, age: int) -> tuple[int, int]:
        """The edge to `counts`. When each derivation has become equally many, that is left to its factor."""
        most, least = max(counts.values()), min(counts.values())
        if most == least or age >= _TOKEN_CHARS:
            return self._number(dict.fromkeys(counts, 1), 0), most
        return self._number(counts, age + 1), 1

    def _number(self, counts: Counts, age: int) -> int:
        number = self._numbers.setdefault(self._machine.signature(counts, age), len(self._states))
        if number == len(self._states):
            self._states.append((counts, age))
        return number

    def _check_run(self, counts: Counts, char: int) -> None:
        for _ in range(_RUN_CHARS):
            counts = self._machine.step(counts, char)
            if sum(counts.values()) < 2:
                return
            self._machine.check(counts)


class _Machine:
    """Stacks as numbers: 0 is the empty one, any other has a position on top of another stack."""

    def __init__(self, grammar: Grammar) -> None:
        self._symbols: list[Symbol] = []
        self._is_last: list[bool] = []
        self._starts: list[list[int]] = []  # by rule; -1 for an empty alternative
        rules: list[list[Sequence]] = [*grammar.rules, [[grammar.root]]]
        for rule in rules:
            self._starts.append([self._add(sequence) for sequence in rule])
        self._stacks: list[tuple[int, int]] = [(-1, 0)]
        self._numbers: dict[tuple[int, int], int] = {}
        self._expanded: dict[int, tuple[int, ...]] = {}
        self._after: dict[int, tuple[int, ...]] = {}
        self._tops: list[tuple[int, ...]] = [()]
        self._n_steps = 0
        self._breadths = [_breadth(symbol) for symbol in self._symbols]
        self.start = self._push(self._starts[-1][0], 0)

    def _add(self, sequence: Sequence) -> int:
        at = len(self._symbols)
        self._symbols += sequence
        self._is_last += [i + 1 == len(sequence) for i in range(len(sequence))]
        return at if sequence else -1

    def check(self, counts: Counts) -> None:
        """Raise BadGrammar for stacks that llama.cpp takes too long to follow at once."""
        if len(counts) > MAX_STACKS or sum(counts.values()) > MAX_DERIVATIONS:
            raise BadGrammar("it is too ambiguous: one text has too many derivations")
        if sum(self._breadths[self._stacks[stack][0]] for stack in counts if stack) > MAX_BREADTH:
            raise BadGrammar("it is too ambiguous: too many character classes match at once")

    def expanded(self, stack: int) -> tuple[int, ...]:
        """The stacks with a character on top, or the empty one, that `stack` stands for."""
        if stack not in self._expanded:
            found: list[int] = []
            todo, seen = [stack], {stack}
            while todo:
                each = todo.pop()
                self.spend(1)
                position, below = self._stacks[each]
                symbol = self._symbols[position]
                if each == 0 or not isinstance(symbol, int):
                    found.append(each)
                    continue
                rest = self._next(position, below)
                ways = {self._push(at, rest) if at >= 0 else rest for at in self._starts[symbol]}
                todo += ways - seen
                seen |= ways
            if len(found) > MAX_STACKS:
                raise BadGrammar("it is too ambiguous: too many rules may come next")
            self._expanded[stack] = tuple(found)
        return self._expanded[stack]

    def steps(self, counts: Counts) -> Iterator[tuple[int, Counts]]:
        """Each set of stacks that a character leads to, with such a character."""
        if len(counts) == 1:
            ((stack, count),) = counts.items()
            if stack and (char_set := self._char_set(stack)):
                yield char_set[0][0], dict.fromkeys(self._following(stack), count)
            return
        edges: dict[int, list[int]] = {}
        for stack in counts:
            for low, high in self._char_set(stack):
                edges.setdefault(low, []).append(stack)
                edges.setdefault(high + 1, []).append(-stack)
        alive: set[int] = set()
        done: set[frozenset[int]] = set()
        for char in sorted(edges):
            for stack in sorted(edges[char]):
                alive.add(stack) if stack > 0 else alive.discard(-stack)
            self.spend(1 + len(alive))
            if alive and (key := frozenset(alive)) not in done:
                done.add(key)
                yield char, self._merged(counts, alive)

    def step(self, counts: Counts, char: int) -> Counts:
        """The stacks that `char` leads to."""
        self.spend(len(counts))
        matching = {s for s in counts if any(low <= char <= high for low, high in self._char_set(s))}
        return self._merged(counts, matching)

    def signature(self, counts: Counts, age: int) -> tuple[object, ...]:
        """What tells states apart."""
        return (age, *sorted(self._tops[stack] for stack in counts))

    def _merged(self, counts: Counts, stacks: set[int]) -> Counts:
        merged: Counts = {}
        for stack in stacks:
            following = self._following(stack)
            self.spend(len(following))
            for each in following:
                merged[each] = merged.get(each, 0) + counts[stack]
        return merged

    def _following(self, stack: int) -> tuple[int, ...]:
        if stack not in self._after:
            self._after[stack] = self.expanded(self._next(*self._stacks[stack]))
        return self._after[stack]

    def _char_set(self, stack: int) -> CharSet:
        symbol = self._symbols[self._stacks[stack][0]] if stack else ()
        return () if isinstance(symbol, int) else symbol

    def _next(self, position: int, below: int) -> int:
        return below if self._is_last[position] else self._push(position + 1, below)

    def _push(self, position: int, below: int) -> int:
        number = self._numbers.setdefault((position, below), len(self._stacks))
        if number == len(self._stacks):
            self._stacks.append((position, below))
            self._tops.append((position, *self._tops[below][: _TOP - 1]))
        return number

    def spend(self, n_steps: int) -> None:
        """Count `n_steps` against the budget."""
        self._n_steps += n_steps
        if self._n_steps > MAX_STEPS:
            raise _OutOfStepsError


def _breadth(symbol: Symbol) -> int:
    """The ranges of a class that matches much; 0 for any other symbol."""
    if isinstance(symbol, int) or sum(high - low + 1 for low, high in symbol) <= _MUCH:
        return 0
    return len(symbol)
