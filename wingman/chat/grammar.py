"""Is this GBNF safe to hand to llama.cpp?

Owns the answer: syntax is in `wingman.chat.gbnf`, ambiguity in `wingman.chat.ambiguity`. The API
layer calls it on any thread but the event loop's, as a large grammar takes some tenths of a second.
A grammar that llama.cpp merely can't parse costs a null pointer, but these end the process or never
end (b11434, src/llama-grammar.cpp):

- a rule that begins with itself behind something that may be empty, which the check there overlooks
  when the emptiness is not in that rule itself: stacks grow until memory ends;
- a rule that can neither begin with a character nor be empty: no stack is left, an assertion fails;
- many ways to reach a rule: the check for left recursion there walks each of them, recursively;
- many derivations of one text, as in `("a" | "a")+`.
"""

from __future__ import annotations

from collections.abc import Iterator

from wingman.chat.ambiguity import check_ambiguity
from wingman.chat.gbnf import BadGrammar, Grammar, Rule, Sequence, parse
from wingman.errors import InvalidRequest

MAX_LEFT_CALLS = 1_000_000
"""Calls in llama.cpp's check for left recursion, some 20 ns each."""
MAX_LEFT_DEPTH = 5_000
"""Its depth of recursion, some 200 bytes of stack each."""

Edges = list[dict[int, bool]]
"""By rule: the rules it may begin with, and whether something may follow such a beginning."""


def check_grammar(text: str, field: str = "grammar", *, must_finish: bool = True) -> None:
    """Raise InvalidRequest, naming `field`, when `text` is no grammar or llama.cpp is not to see it.

    `must_finish` refuses what is too large to be searched for ambiguity: right for text from a
    stranger, while a grammar of our own making may be large.
    """
    try:
        grammar = parse(text)
        check_recursion(grammar)
        check_ambiguity(grammar, must_finish)
    except BadGrammar as error:
        raise InvalidRequest(f"failed to parse grammar: {error}", field) from None


def check_recursion(grammar: Grammar) -> None:
    """Raise BadGrammar for rules without an end at the left."""
    empty = _empty_rules(grammar.rules)
    edges = [_left_edges(rule, empty) for rule in grammar.rules]
    if len(empty | _starting_rules(grammar.rules, empty, edges)) < len(grammar.rules):
        raise BadGrammar("a rule refers to itself before any character")
    calls, depths = [0] * len(edges), [0] * len(edges)
    for component in _components(edges):  # what a rule begins with comes first
        for rule in component:
            if any(called in component and grows for called, grows in edges[rule].items()):
                raise BadGrammar("a rule begins with itself (left recursion)")
            calls[rule] = 1 + sum(calls[s] for s in _left_references(grammar.rules[rule], empty))
            depths[rule] = 1 + max((depths[called] for called in edges[rule]), default=0)
            if calls[rule] > MAX_LEFT_CALLS or depths[rule] > MAX_LEFT_DEPTH:
                raise BadGrammar("rules refer to each other in too many ways")
    if sum(calls) > MAX_LEFT_CALLS:
        raise BadGrammar("rules refer to each other in too many ways")


def _empty_rules(rules: list[Rule]) -> set[int]:
    """Rules that may match nothing."""
    owners: list[int] = []  # by sequence without characters
    n_left: list[int] = []
    users: list[list[int]] = [[] for _ in rules]
    for number, rule in enumerate(rules):
        for sequence in rule:
            references = [symbol for symbol in sequence if isinstance(symbol, int)]
            if len(references) < len(sequence):
                continue
            for reference in references:
                users[reference].append(len(owners))
            owners.append(number)
            n_left.append(len(references))
    todo = [owner for owner, n in zip(owners, n_left, strict=True) if n == 0]
    found: set[int] = set()
    while todo:
        number = todo.pop()
        if number not in found:
            found.add(number)
            for user in users[number]:
                n_left[user] -= 1
                if n_left[user] == 0:
                    todo.append(owners[user])
    return found


def _starting_rules(rules: list[Rule], empty: set[int], edges: Edges) -> set[int]:
    """Rules that may begin with a character."""
    users: list[list[int]] = [[] for _ in rules]
    for number, called in enumerate(edges):
        for each in called:
            users[each].append(number)
    todo = [
        number for number, rule in enumerate(rules) if any(_has_char_at_left(each, empty) for each in rule)
    ]
    found: set[int] = set()
    while todo:
        number = todo.pop()
        if number not in found:
            found.add(number)
            todo += users[number]
    return found


def _has_char_at_left(sequence: Sequence, empty: set[int]) -> bool:
    return not isinstance(next((symbol for symbol in sequence if symbol not in empty), 0), int)


def _left_references(rule: Rule, empty: set[int]) -> Iterator[int]:
    """Rules that `rule` may begin with, each as often as llama.cpp follows it."""
    return (symbol for symbol, _ in _left_symbols(rule, empty))


def _left_symbols(rule: Rule, empty: set[int]) -> Iterator[tuple[int, bool]]:
    for sequence in rule:
        for i, symbol in enumerate(sequence):
            if not isinstance(symbol, int):
                break
            yield symbol, i + 1 < len(sequence)
            if symbol not in empty:
                break


def _left_edges(rule: Rule, empty: set[int]) -> dict[int, bool]:
    edges: dict[int, bool] = {}
    for symbol, grows in _left_symbols(rule, empty):
        edges[symbol] = edges.get(symbol, False) or grows
    return edges


def _components(edges: Edges) -> Iterator[set[int]]:
    """Strongly connected components, those that others lead to first (Tarjan 1972, without recursion)."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    open_: list[int] = []
    is_open: set[int] = set()
    for start in range(len(edges)):
        path = [] if start in index else [(start, iter(edges[start]))]
        while path:
            rule, following = path[-1]
            if rule not in index:
                index[rule] = low[rule] = len(index)
                open_.append(rule)
                is_open.add(rule)
            for called in following:
                if called not in index:
                    path.append((called, iter(edges[called])))
                    break
                if called in is_open:
                    low[rule] = min(low[rule], index[called])
            else:
                path.pop()
                if path:
                    low[path[-1][0]] = min(low[path[-1][0]], low[rule])
                if low[rule] == index[rule]:
                    component = {rule}
                    while (member := open_.pop()) != rule:
                        component.add(member)
                    is_open -= component
                    yield component
