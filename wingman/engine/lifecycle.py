"""The states of a job in the engine, as a table.

`advance` is the only way to change a state; a missing row is a bug and raises.
"""

from __future__ import annotations

import enum
from typing import Final


class JobState(enum.Enum):
    """Where a job is."""

    QUEUED = enum.auto()
    PREFILL = enum.auto()
    DECODE = enum.auto()
    FINISHED = enum.auto()
    CANCELLED = enum.auto()
    FAILED = enum.auto()


class JobMove(enum.Enum):
    """What can happen to it."""

    PLACE = enum.auto()
    """A slot was given to it."""
    SAMPLE = enum.auto()
    """Its prompt is evaluated and a token may be sampled."""
    PREEMPT = enum.auto()
    """Its cache was taken from it; it is to be evaluated again."""
    FINISH = enum.auto()
    CANCEL = enum.auto()
    FAIL = enum.auto()


TRANSITIONS: Final = {
    (JobState.QUEUED, JobMove.PLACE): JobState.PREFILL,
    (JobState.QUEUED, JobMove.CANCEL): JobState.CANCELLED,
    (JobState.QUEUED, JobMove.FAIL): JobState.FAILED,
    (JobState.PREFILL, JobMove.SAMPLE): JobState.DECODE,
    (JobState.PREFILL, JobMove.PREEMPT): JobState.PREFILL,
    (JobState.DECODE, JobMove.PREEMPT): JobState.PREFILL,
    (JobState.PREFILL, JobMove.FINISH): JobState.FINISHED,
    (JobState.PREFILL, JobMove.CANCEL): JobState.CANCELLED,
    (JobState.PREFILL, JobMove.FAIL): JobState.FAILED,
    (JobState.DECODE, JobMove.FINISH): JobState.FINISHED,
    (JobState.DECODE, JobMove.CANCEL): JobState.CANCELLED,
    (JobState.DECODE, JobMove.FAIL): JobState.FAILED,
}


def advance(state: JobState, move: JobMove) -> JobState:
    """The state after `move`; raises ValueError when the table has no such row."""
    try:
        return TRANSITIONS[state, move]
    except KeyError:
        raise ValueError(f"a job that is {state.name} can't {move.name}") from None
