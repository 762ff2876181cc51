"""What the exit codes of `atelier` say: to the shell, to the search that started a worker, to SLURM."""

import enum


class ExitCode(enum.IntEnum):
    """Why a command ended."""

    DONE = 0  # of a worker: nothing left to claim
    FAILED = 1
    WRONG_INPUT = 2
    STOPPED = 3  # asked to, with work left
    WALL_TIME = 4  # the time that SLURM granted is over, with work left
    INTERRUPTED = 130  # by Ctrl-C, as shells count it
