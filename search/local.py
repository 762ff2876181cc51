"""A whole search on this machine: N worker processes and a live view."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.live import Live

from dashboards.study_tables import progress_line, render
from dashboards.terminal import can_redraw
from search import forking
from search.errors import SearchError
from search.exit_codes import ExitCode
from storage.leases import RENEW_SECONDS
from storage.paths import RunFolder
from storage.status import State, Status
from trainer.allocation import cpu_count, visible_gpus

POLL_SECONDS = 1.0
PLAIN_SECONDS = 20.0  # between lines where the output is not a terminal


class WorkersFailedError(SearchError):
    """Every worker ended with an error; the message names the log."""


MAX_RESTARTS = 3  # of killed workers, for each place, until another epoch is recorded


@dataclass
class _Slot:
    """A place for one worker. If the worker is killed, another takes its place."""

    number: int
    process: ForkServerProcess
    log: Path


class LocalSearch:
    """Starts workers, replaces those that are killed, passes Ctrl-C on, and shows progress.

    `work` is a module's function that works with `arguments`, in a process that is forked for it.
    """

    def __init__(
        self,
        work: Callable[[list[str]], None],
        arguments: list[str],
        workers: int,
        runs: RunFolder,
        status: Callable[[], Status],
        console: Console,
    ) -> None:
        self._work, self._arguments = work, arguments
        self._n_workers, self._runs = workers, runs
        self.status, self._console = status, console
        self._interrupts = 0
        self._slots: list[_Slot] = []
        self._logs: dict[int, Path] = {}  # by slot number; a slot's workers share one log
        self._failures: list[_Slot] = []
        self._restarts, self._epochs = 0, 0
        self._next_look = 0.0  # when to start a worker for trials that others may have left
        self._done = False  # whether the last worker to end found nothing left to claim

    @property
    def interrupted(self) -> bool:
        """Whether somebody typed Ctrl-C."""
        return self._interrupts > 0

    def run(self) -> None:
        """Raises WorkersFailedError if no worker could go on."""
        old = signal.signal(signal.SIGINT, self._interrupt)
        old_term = signal.signal(signal.SIGTERM, self._interrupt)
        try:
            status = self.status()
            # No more workers than trials that are left.
            self._n_workers = min(self._n_workers, max(status.max_trials - status.finished, 1))
            for number in range(1, self._n_workers + 1):
                self._slots.append(self._start(number))
            self._watch()
        finally:
            for slot in self._slots:
                slot.process.kill()
                slot.process.join()
            signal.signal(signal.SIGINT, old)
            signal.signal(signal.SIGTERM, old_term)
        status = self.status()
        if self._failures and not status.has_ended and not self.interrupted:
            slot = self._failures[0]
            raise WorkersFailedError(f"{_why(slot)}; the whole log is {slot.log}")

    def _start(self, number: int) -> _Slot:
        if number not in self._logs:  # made here, where an error can be shown to the user
            self._logs[number] = self._runs.new_log()
        log = self._logs[number]
        environment = {
            **os.environ,
            "ATELIER_CPUS": str(max(cpu_count() // self._n_workers, 1)),
        }
        if gpus := visible_gpus():
            environment["CUDA_VISIBLE_DEVICES"] = gpus[(number - 1) % len(gpus)]
        process = forking.start(self._work, self._arguments, environment=environment, output=log)
        return _Slot(number, process, log)

    def _interrupt(self, _: int, __: FrameType | None) -> None:
        self._interrupts += 1
        if self._interrupts == 1:
            self._console.print(
                "Stopping: the workers finish their epoch and release. Once more stops at once."
            )
        for slot in self._slots:
            if slot.process.is_alive():
                slot.process.terminate() if self._interrupts == 1 else slot.process.kill()

    def _watch(self) -> None:
        if not can_redraw(self._console):
            self._watch_plainly()
            return
        with Live(console=self._console, refresh_per_second=4) as live:
            while self._tend(status := self.status()):
                live.update(render(status))
                time.sleep(POLL_SECONDS)
            live.update(render(self.status()))

    def _watch_plainly(self) -> None:
        shown, finished = time.monotonic(), 0
        while self._tend(status := self.status()):
            if status.finished != finished or time.monotonic() - shown > PLAIN_SECONDS:
                self._console.print(progress_line(status), soft_wrap=True)
                shown, finished = time.monotonic(), status.finished
            time.sleep(POLL_SECONDS)
        self._console.print(progress_line(self.status()), soft_wrap=True)

    def _tend(self, status: Status) -> bool:
        """Replace killed workers. False once there is nothing left to do or to wait for."""
        epochs = sum(row.epochs for row in status.trials)
        if epochs > self._epochs:
            self._epochs, self._restarts = epochs, 0
        for slot in list(self._slots):
            code = slot.process.exitcode
            if code is None:
                continue
            self._slots.remove(slot)
            self._done = code == ExitCode.DONE
            if code < 0 and not self.interrupted and self._restarts < MAX_RESTARTS * self._n_workers:
                self._restarts += 1
                self._slots.append(self._start(slot.number))
            elif code not in (ExitCode.DONE, ExitCode.STOPPED, ExitCode.WALL_TIME):
                self._failures.append(slot)
        return bool(self._slots) or self._others_are_at_work(status)

    def _others_are_at_work(self, status: Status) -> bool:
        """Whether to wait for trials that other workers hold. Starts a worker for what they leave."""
        if self.interrupted or self._failures or status.stopping or not self._done:
            return False
        running, waiting = status.counts[State.RUNNING], status.counts[State.WAITING] - status.surplus
        if status.budget_spent:
            return bool(running)
        if not waiting and (running or not status.counts[State.PAUSED]):
            return bool(running)
        # A worker resumes waiting and paused trials, or ends the search. While other workers run, they
        # may claim these trials themselves, so a worker is started now and then only.
        if not running or time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + RENEW_SECONDS
            self._slots.append(self._start(1))
        return True


def _why(slot: _Slot) -> str:
    code = slot.process.exitcode or 0
    if code < 0:
        return f"workers are killed by {signal.Signals(-code).name} before they finish an epoch"
    lines = slot.log.read_text("utf-8", "replace").strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else "a worker ended with an error"
