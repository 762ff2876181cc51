"""When a process that trains has to stop: on a signal, at the wall time, or with its parent process."""

import logging
import math
import multiprocessing
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from search.exit_codes import ExitCode
from storage.outcome import WALL_TIME

log = logging.getLogger(__name__)

SAVE_SECONDS = 15.0  # what a last checkpoint and the release may take
SAVE_ANOTHER_SECONDS = 5.0  # each further trial's


class Stop:
    """Whether this process has to stop, and by when: after the epoch, or inside it if time is short.

    `wall_end` is when the job's time is over, in seconds since 1970; so many `trials` have to be saved
    by then. A SIGTERM is followed by a SIGKILL after `kill_seconds`; None if nobody kills.
    """

    def __init__(
        self, wall_end: float | None = None, trials: int = 1, kill_seconds: float | None = None
    ) -> None:
        self.reason: str | None = None
        self.end = ExitCode.DONE
        self.deadline = math.inf if wall_end is None else wall_end
        self._kill_seconds = kill_seconds
        self._save_seconds = SAVE_SECONDS + SAVE_ANOTHER_SECONDS * (trials - 1)
        self._search = multiprocessing.parent_process()  # None if no search has started this worker

    def __call__(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason is not None:
            raise KeyboardInterrupt  # typed twice: at once
        if number == signal.SIGTERM and self._kill_seconds is not None:
            self.deadline = min(self.deadline, time.time() + self._kill_seconds)
        name = signal.Signals(number).name
        self.ask(name, ExitCode.WALL_TIME if number == signal.SIGUSR2 else ExitCode.STOPPED)
        log.info("%s: stopping, with the work saved", name)

    def ask(self, reason: str, end: ExitCode) -> None:
        """Stop after the epoch. The first reason counts."""
        if self.reason is None:
            self.reason, self.end = reason, end

    @property
    def requested(self) -> bool:
        if self._search is not None and not self._search.is_alive():
            self.ask("the search that started this worker has ended", ExitCode.STOPPED)
        return self.reason is not None

    def leaves_time_for(self, seconds: float) -> bool:
        """Whether work of so many seconds can end before the deadline."""
        return time.time() + seconds + self._save_seconds < self.deadline

    def cuts_epoch(self, seconds_left: float) -> bool:
        """Whether an epoch that needs so many seconds more has to be interrupted now."""
        if self.leaves_time_for(seconds_left):
            return False
        if not self.requested and self.leaves_time_for(0):
            return False  # no signal yet: use the time there is
        self.ask(WALL_TIME, ExitCode.WALL_TIME)
        return True


@contextmanager
def on_signals(stop: Stop) -> Iterator[None]:
    """Turn SIGTERM, SIGINT and SIGUSR2 into a request; restore the old handlers at the end."""
    # SIGUSR2 is SLURM's warning here: NCCL uses SIGUSR1.
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
    old = {number: signal.signal(number, stop) for number in signals}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
