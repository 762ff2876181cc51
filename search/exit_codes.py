"""The exit codes of `atelier`, for the shell, for the search that started a worker, and for SLURM."""

import enum


class ExitCode(enum.IntEnum):
    """Why a command ended."""

    DONE = 0  # of a worker: nothing left to claim
    FAILED = 1
    WRONG_INPUT = 2
    STOPPED = 3  # asked to stop, with work left
    WALL_TIME = 4  # the time that SLURM granted is over, with work left
    INTERRUPTED = 130  # by Ctrl-C, in the shells' own numbering
