"""How an attempt at a trial may end, and the reasons that programs look for."""

from enum import StrEnum


class Outcome(StrEnum):
    """How a worker's attempt at a trial has ended, as the database has it."""

    # These end the trial.
    COMPLETE = "complete"
    PRUNED = "pruned"
    FAILED = "failed"
    # After these somebody goes on with it.
    PAUSED = "paused"  # at a rung, until its strategy lets it go on
    RELEASED = "released"
    ERROR = "error"  # an exception; the trial is tried again
    LOST = "lost"  # the worker ended without a word


RESTORED = "the database was restored from a backup"
SICK_HOST = "sick host"  # how the reason of a worker begins that could do nothing on its host
STOPPED = "atelier stop"
SPENT = "the study's GPU-hours are spent"
