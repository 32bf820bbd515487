"""How many prompt tokens a step takes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from wingman.engine.pace import TILE_TOKENS, PrefillPace


def test_alone_a_prompt_takes_a_whole_batch() -> None:
    assert PrefillPace(2048, 512, 0.2).budget(0) == 512


def test_beside_others_a_step_is_as_long_as_it_may_be() -> None:
    pace = PrefillPace(2048, 512, 0.2)
    assert pace.budget(3) == TILE_TOKENS + 1  # the speed is not known
    pace.observe(200, 0.2)
    assert pace.budget(3) == 197
    pace.observe(8, 10.0)  # says nothing about prompts
    assert pace.budget(3) == 197


def test_a_slow_machine_takes_a_tile_unless_that_is_far_too_long() -> None:
    pace = PrefillPace(2048, 512, 0.2)
    pace.observe(100, 0.5)
    assert pace.budget(1) == TILE_TOKENS + 1
    slow = PrefillPace(2048, 512, 0.2)
    slow.observe(100, 5.0)
    assert slow.budget(1) < TILE_TOKENS


def test_a_long_prompt_leaves_gaps_no_longer_than_pay() -> None:
    pace = PrefillPace(2048, 512, 0.25)
    pace.observe(200, 0.2)
    pace.observe(3, 0.01)
    assert pace.piece(240, 247, 3, is_first=True) == 240  # one step, whatever its size
    assert pace.piece(1800, 247, 3, is_first=True) == TILE_TOKENS + 1
    assert pace.piece(1800, 247, 0, is_first=True) == 3 * TILE_TOKENS + 1
    fast = PrefillPace(2048, 512, 0.25)
    fast.observe(500, 0.05)
    fast.observe(3, 0.005)  # a pass costs as much as a tile: four of them share one
    assert fast.piece(1800, 509, 3, is_first=True) == 4 * TILE_TOKENS + 1


@given(
    n_left=st.integers(1, 1000),
    budget=st.integers(1, 600),
    n_decoding=st.integers(0, 8),
    is_first=st.booleans(),
)
def test_pieces_are_whole_tiles_or_the_rest(
    n_left: int, budget: int, n_decoding: int, is_first: bool
) -> None:
    pace = PrefillPace(2048, 512, 0.25)
    piece = pace.piece(n_left, budget, n_decoding, is_first=is_first)
    assert 0 <= piece <= min(n_left, budget)
    assert piece or not is_first
    assert piece in (0, n_left) or piece % TILE_TOKENS == 1 or (is_first and budget <= TILE_TOKENS)
