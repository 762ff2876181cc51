"""How fast a pass over the stream goes: when it will end, and each run's share of the time."""

import time
from collections.abc import Sequence

from trainer.run import Run


class Pace:
    """The pace of runs that go side by side. Times are those of this process."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._steps_left = sum(run.steps_left for run in runs)
        self._evaluation_steps = sum(run.evaluation_steps for run in runs)
        self._steps_done = 0
        self._started = self._shared = time.monotonic()

    def seconds_left(self) -> float:
        """The estimated seconds until the results. To be called once after each step."""
        self._steps_left, self._steps_done = self._steps_left - 1, self._steps_done + 1
        seconds_per_step = (time.monotonic() - self._started) / self._steps_done
        return seconds_per_step * (self._steps_left + self._evaluation_steps)

    def leave_out(self, run: Run) -> None:
        """Expect no more steps of a run that has left."""
        self._steps_left -= run.steps_left
        self._evaluation_steps -= run.evaluation_steps

    def share_out(self, runs: Sequence[Run]) -> None:
        """Charge the runs with the time since the last call, in equal parts."""
        now = time.monotonic()
        for run in runs:
            run.partial.seconds += (now - self._shared) / len(runs)
        self._shared = now
