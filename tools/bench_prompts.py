"""Prompts of the benchmark: the same for every server, from a seed that names round and level.

Words are common English ones, about a token each in any vocabulary. Prompts of different seeds
share no beginning, so that a round can't profit from the caches that the round before has filled.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Final

_WORDS: Final = (
    "the of and to in is that it for was on are with they be at one have this from had by word but what "
    "some we can out other were all there when up use your how said each she which do their time if will "
    "way about many then them write would like so these her long make thing see him two has look more day "
    "could go come did number sound no most people over know water than call first who may down side been "
    "now find any new work part take get place made live where after back little only round man year came "
    "show every good me give our under name very through just form great think say help low line turn"
).split()
_SHARED_WORDS: Final = 240
_QUESTION_WORDS: Final = (20, 30)
_COPIED_WORDS: Final = 60
_FIELDS: Final = 12


def make_prompts(seed: str, n_clients: int, n_requests: int, n_words: int) -> list[list[str]]:
    """Prompts of plain words, one list for each client. Same arguments, same prompts; another seed
    gives prompts that share no beginning worth caching."""
    rng = random.Random(seed)
    return [[_words(rng, n_words) for _ in range(n_requests)] for _ in range(n_clients)]


def shared_prompts(seed: str, n_prompts: int) -> list[str]:
    """Prompts with one long beginning, like a system prompt, and a question of their own each."""
    rng = random.Random(seed)
    beginning = _words(rng, _SHARED_WORDS)
    return [f"{beginning}\n\n{_question(rng)}" for _ in range(n_prompts)]


def questions(seed: str, n_talks: int, n_turns: int) -> list[list[str]]:
    """What the user says in each turn of each conversation."""
    rng = random.Random(seed)
    return [[_question(rng) for _ in range(n_turns)] for _ in range(n_talks)]


def copying_prompts(seed: str, n_clients: int, n_requests: int) -> list[list[str]]:
    """Prompts whose likely answer stands in them, a text to repeat and code to edit in turn."""
    rng = random.Random(seed)
    kinds: Sequence[Callable[[random.Random], str]] = (_text_to_repeat, _code_to_edit)
    return [[kinds[(c + r) % 2](rng) for r in range(n_requests)] for c in range(n_clients)]


def _words(rng: random.Random, n_words: int) -> str:
    return " ".join(rng.choices(_WORDS, k=n_words))


def _question(rng: random.Random) -> str:
    return f"{_words(rng, rng.randint(*_QUESTION_WORDS)).capitalize()}?"


def _text_to_repeat(rng: random.Random) -> str:
    text = _words(rng, _COPIED_WORDS).capitalize()
    return f"Repeat this text: {text}.\n\nThe text is: {text}.\n\nOnce more: {text[: len(text) // 4]}"


def _code_to_edit(rng: random.Random) -> str:
    names = rng.sample([word for word in _WORDS if len(word) > 3], _FIELDS)
    lines = [f"    {name} = record['{name}'] + total" for name in names]
    code = "\n".join(["def read(record, total):", *lines, "    return total", ""])
    return f"{code}\n# The same code, with a docstring:\n\n{code[: len(code) // 6]}"
