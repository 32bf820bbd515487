"""How many prompt tokens a step takes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from wingman.engine.pace import TILE_TOKENS, PrefillPace, piece_of


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


@given(n_left=st.integers(1, 1000), budget=st.integers(1, 600), is_first=st.booleans())
def test_pieces_are_whole_tiles_or_the_rest(n_left: int, budget: int, is_first: bool) -> None:
    piece = piece_of(n_left, budget, is_first=is_first)
    assert 0 <= piece <= min(n_left, budget)
    assert piece or not is_first
    assert piece in (0, n_left) or piece % TILE_TOKENS == 1 or (is_first and budget <= TILE_TOKENS)
