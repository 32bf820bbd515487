"""Prompt lookup: what is proposed, that it is what followed, and what it keeps."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wingman.engine import drafting
from wingman.engine.drafting import MAX_MATCH, MAX_TOKENS, NO_DRAFT, Draft, NgramDrafter


def drafter(*tokens: int) -> NgramDrafter:
    one = NgramDrafter()
    one.extend(tokens)
    return one


@pytest.mark.parametrize("tokens", [(), (1,), (1, 2), (1, 1), (1, 2, 3), (1, 2, 3, 2)])
def test_nothing_to_go_on(tokens: tuple[int, ...]) -> None:
    assert drafter(*tokens).draft(4) == NO_DRAFT


@pytest.mark.parametrize("n_max", [0, -1])
def test_nothing_wanted(n_max: int) -> None:
    assert drafter(1, 2, 3, 1, 2).draft(n_max) == NO_DRAFT


def test_proposes_what_followed() -> None:
    assert drafter(1, 2, 3, 4, 5, 9, 1, 2).draft(3) == Draft([3, 4, 5], 2)


def test_latest_of_equal_places() -> None:
    assert drafter(1, 2, 3, 8, 1, 2, 4, 9, 1, 2).draft(1) == Draft([4], 2)


def test_longest_past_wins() -> None:
    assert drafter(7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2).draft(1) == Draft([3], 3)


@pytest.mark.parametrize("period", [1, 2, 3, 7])
def test_loops_go_on(period: int) -> None:
    tokens = [index % period for index in range(2 * period + 3)]
    found = drafter(*tokens).draft(40)
    assert found.tokens == [index % period for index in range(len(tokens), len(tokens) + 40)]
    assert found.n_match >= 2


def test_tokens_may_come_one_by_one() -> None:
    one = NgramDrafter()
    rng = random.Random(0)
    tokens = [rng.randrange(5) for _ in range(200)]
    for end, token in enumerate(tokens, 1):
        one.extend((token,))
        assert one.draft(6) == drafter(*tokens[:end]).draft(6)


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 20))
def test_sources_are_real(tokens: list[int], n_max: int) -> None:
    found = drafter(*tokens).draft(n_max)
    if not found.tokens:
        assert tuple(tokens[-2:]) not in list(itertools.pairwise(tokens[:-1]))
        return
    assert len(found.tokens) == n_max
    assert 2 <= found.n_match <= MAX_MATCH
    whole = tokens + found.tokens
    past = tokens[-found.n_match :]
    starts = range(len(tokens) - found.n_match)
    assert any(past + found.tokens == whole[start : start + len(past) + n_max] for start in starts)


def test_old_tokens_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafting, "MAX_TOKENS", 40)
    monkeypatch.setattr(drafting, "_KEPT_TOKENS", 30)
    one = drafter(*range(40))
    one.extend((0, 1))
    assert one.draft(2) == NO_DRAFT
    one.extend((2, 20, 21))
    assert one.draft(2) == Draft([22, 23], 2)


def test_memory_is_bounded() -> None:
    one = NgramDrafter()
    for start in range(0, 4 * MAX_TOKENS, 1000):
        one.extend(range(start, start + 1000))
        one.draft(4)
        assert max(len(one._tokens), len(one._latest), len(one._earlier)) <= MAX_TOKENS
