"""The outcomes of an attempt at a trial, and the reasons of ends that programs look for."""

from enum import StrEnum


class Outcome(StrEnum):
    """How a worker's attempt at a trial has ended; the values are the database's."""

    # These end the trial.
    COMPLETE = "complete"
    PRUNED = "pruned"
    FAILED = "failed"
    # After these the trial may go on in another attempt.
    PAUSED = "paused"  # at a rung, until the strategy promotes it
    RELEASED = "released"
    ERROR = "error"  # an exception; the trial is tried again
    LOST = "lost"  # the worker ended without signing off, or somebody else ended the trial


LEFT = "the worker ended without signing off"  # the reason of a lost attempt
RESTORED = "the database was restored from a backup"
SICK_HOST = "sick host"  # the reason of a worker whose host is at fault begins so
STOPPED = "atelier stop"
WALL_TIME = "wall time"
SPENT = "the study's GPU-hours are spent"
NOTHING_LEFT = "nothing left to claim"
NEVER_AMONG_THE_BEST = "never among the best"  # the reason of a trial that was paused to the end ends so
