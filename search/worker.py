"""One worker's loop: claim trials and train them, epoch by epoch, until there is nothing left to claim.

The laptop and the cluster run the same worker; SLURM only starts it more often. It trains up to `pack`
trials side by side. They join and leave where an epoch ends, and none of them waits for another.
"""

import logging
import os
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import optuna

from search.blame import Blame, SickHostError
from search.claims import Claims
from search.exit_codes import ExitCode
from search.slurm.job import seconds_to_kill
from search.stopping import Stop, on_signals
from search.strategy import make_strategy
from search.study_config import StudyConfig
from search.trial import Trial
from storage.leases import LeaseKeeper
from storage.ledger import LeaseLost, Ledger
from storage.optuna_storage import DATABASE_ERRORS
from storage.outcome import NOTHING_LEFT, SPENT, STOPPED, WALL_TIME, Outcome
from storage.paths import RunFolder, path_to_record
from storage.prune import remove, superfluous
from storage.studies import has_only_failed
from trainer.allocation import memory_limit
from trainer.loop import train_epoch
from trainer.run import Run
from trainer.saving import Snapshots
from trainer.workspace import Workspace

log = logging.getLogger(__name__)

# Seconds to wait for decisions about some trials while others are ready: those that go on may share the
# trunk's work with them. A decision takes a tenth of that.
PATIENCE = 0.05


class Worker:
    """Trains trials of one study until the budget is spent or it has to stop.

    `run` does it all. To drive it one step at a time, call `fill` and `train` by turns.
    """

    def __init__(
        self,
        study_config: StudyConfig,
        study: optuna.Study,
        ledger: Ledger,
        workspace: Workspace,
        runs: RunFolder,
        wall_end: float | None = None,
        pack: int = 1,
        make_thread: Callable[[str], Executor] = lambda name: ThreadPoolExecutor(1, name),
    ) -> None:
        """`make_thread` makes the threads that work beside the training, by their names."""
        self.study_config, self.study, self.ledger = study_config, study, ledger
        self.workspace, self.runs = workspace, runs
        self.pack = pack  # trials at once; fewer if they turn out not to fit into the memory
        # Called when the wall time has ended the work; returns whether somebody will go on.
        self.requeue: Callable[[], bool] = lambda: False
        self.attributes = workspace.attributes
        self.strategy = make_strategy(study_config, study, ledger)
        self.stop = Stop(wall_end, pack, seconds_to_kill())
        self.keeper = LeaseKeeper(ledger)
        self.blame = Blame(ledger, self.stop, study_config.study.max_failures, workspace.device_name)
        self.recorder, self.writer = make_thread("recorder"), make_thread("writer")  # see Trial
        self.snapshots = Snapshots()
        self._claimer = make_thread("claims")
        self.claims = Claims(
            study_config, study, ledger, self.keeper, self.strategy, self.stop, self._claimer
        )
        self.trials: list[Trial] = []  # in training, the newest last
        self.leaving: list[Trial] = []  # that wait to be saved and released, or ended
        self.epoch_seconds = 0.0  # as last measured in this process
        self.spent = False  # whether the study's GPU-hours were at the last record
        # Seconds since the last epoch, by what it waited for.
        self.waits = defaultdict[str, float](float)
        self.waited: dict[str, float] = {}  # before the running epoch, a trial's share

    @property
    def made_progress(self) -> bool:
        """Whether it has made at least one optimizer step."""
        return self.blame.made_progress

    def run(self) -> ExitCode:
        """Work; returns why it ended, with the details in `stop.reason`."""
        self.ledger.register(
            gpu=self.workspace.device_name, pack=self.pack, memory=memory_limit(), log=_log_file()
        )
        reason = "an error"
        try:
            with on_signals(self.stop), self.keeper, self._threads():
                self._work()
                if self.stop.end == ExitCode.DONE:
                    self._sweep()
                    if has_only_failed(self.ledger.engine, self.ledger.study_id):
                        self.stop.ask("every trial of the study has failed", ExitCode.FAILED)
                reason = self.stop.reason or NOTHING_LEFT
                if self.stop.end == ExitCode.WALL_TIME and self.made_progress and self.requeue():
                    log.info("requeued: another run of this task goes on")
        except SickHostError as error:
            reason = str(error)
            self.ledger.excuse()
            raise
        finally:
            self.ledger.sign_off(reason)
        return self.stop.end

    def _work(self) -> None:
        try:
            while self.fill():
                self.train()
        except DATABASE_ERRORS:
            raise
        except KeyboardInterrupt:
            self._cancel_jobs()
            self._release_all("stopped at once")
            raise
        except Exception:  # whatever ends this worker, its trials are for the next
            for trial in [*self.trials, *self.leaving]:
                trial.finish_jobs()
            self._release_all(traceback.format_exc())
            raise

    @contextmanager
    def _threads(self) -> Iterator[None]:
        """End the threads with the `with` block."""
        try:
            yield
        finally:
            self._cancel_jobs()
            for thread in (self._claimer, self.recorder, self.writer):
                thread.shutdown(cancel_futures=True)

    def _cancel_jobs(self) -> None:
        """Let nothing more be recorded or written. Nobody may wait for it from now on."""
        for thread in (self.recorder, self.writer):
            thread.shutdown(wait=False, cancel_futures=True)

    def fill(self) -> list[Trial]:
        """Begin trials in the free places. Returns those that can be trained now, maybe after a wait.

        If there is no time for another epoch, or if it has to stop, all are given back.
        """
        while True:
            self._look()
            if self.spent:
                self.claims.withdraw()
                self._give_all_back(SPENT)
                self.spent = False
            self._begin_new()
            if self.stop.requested:
                self._give_all_back(self.stop.reason or "")
                self._release_all(self.stop.reason or "")
            awaited = [job for trial in self.trials for job in trial.awaited]
            with self._waiting_for("database"):
                is_open = wait(awaited, timeout=PATIENCE).not_done
            if is_open or not awaited:
                ready = [trial for trial in self.trials if not trial.awaited]
                if ready or not self.trials:
                    self.claims.withdraw()
                    return ready
                with self._waiting_for("database"):
                    wait(awaited, return_when=FIRST_COMPLETED)

    @contextmanager
    def _waiting_for(self, what: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.waits[what] += time.monotonic() - started

    def _begin_new(self) -> None:
        while self._may_go_on() and len(self.trials) < self.pack:
            with self._waiting_for("database" if self.trials else "trials"):
                offer = self.claims.next(self._held())
            if offer is not None:
                Trial(self, offer).begin()
            elif self.leaving and not self.trials:  # a study is over only if nobody holds a trial
                self._finish_leaving()
            else:
                return
            if len(self.leaving) > self.pack:  # the disk is slower than the training
                self._finish_oldest()

    def _look(self, but: Collection[Trial] = ()) -> None:
        """Act on what has become of the trials meanwhile, but of those that are being trained."""
        for trial in [*self.trials, *self.leaving]:
            if trial not in but:
                trial.look()
        self.leaving[:] = [trial for trial in self.leaving if trial.has_jobs]

    def _give_all_back(self, reason: str) -> None:
        """Save and release the trials, but those that turn out to end."""
        for trial in list(self.trials):
            trial.finish_decision()
        for trial in self.trials:
            trial.drop_older_snapshot()
        while self.trials:
            self.trials[0].give_back(Outcome.RELEASED, reason)
            self._finish_leaving()  # one by one: their snapshots use the same memory
        self._finish_leaving()

    def _finish_leaving(self) -> None:
        while self.leaving:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        with self._waiting_for("disk"):
            self.leaving[0].finish_jobs()
        self._look()

    def train(self) -> None:
        """Train the trials that are ready for an epoch, and act on what it brings each of them."""
        if self.stop.leaves_time_for(2 * self.epoch_seconds) and any(
            trial.may_leave for trial in self.trials
        ):
            self.claims.look_ahead(self._held())
        started = time.monotonic()
        trials = {trial.run: trial for trial in self.trials if not trial.awaited}
        self.waited = {f"waited_for_{what}": s / len(trials) for what, s in self.waits.items()}
        self.waits.clear()
        for run, outcome in train_epoch(list(trials), self._interrupt):
            trials.pop(run).settle(outcome)
            del run, outcome  # else they would live until the next one comes
            self._look(but=trials.values())
        self.waits["images"] = self.workspace.stream.seconds_read()
        self.epoch_seconds = time.monotonic() - started

    def _may_go_on(self) -> bool:
        """Whether to begin another epoch."""
        if not self.stop.leaves_time_for(self.epoch_seconds):
            self.stop.ask(WALL_TIME, ExitCode.WALL_TIME)
        return not self.stop.requested

    def _held(self) -> list[int]:
        return [trial.claim.trial_id for trial in [*self.trials, *self.leaving]]

    def _interrupt(self, run: Run, seconds_left: float) -> bool:
        if not self.made_progress:
            log.info("first optimizer step")  # all that goes before it is over: imports, compilers
            self.blame.made_progress = True
        for trial in self.trials:
            if trial.run is run:
                trial.raise_errors()
                if self.keeper.has_lost(trial.claim):
                    raise LeaseLost(f"trial {trial.claim.trial_number} is held by another worker now")
        # It has just been recorded that no further epoch is wanted: this one has hardly begun.
        is_unwanted = self.spent or self.stop.reason == STOPPED
        return is_unwanted or self.stop.cuts_epoch(seconds_left)

    def _release_all(self, reason: str) -> None:
        """Give back what is still held, as it was last saved."""
        self.claims.finish_claiming()
        for claim in self.keeper.held():
            self.ledger.release(claim, reason=reason)
        self.trials.clear()
        self.leaving.clear()

    def _sweep(self) -> None:
        """Remove leftover checkpoints, now that no work is left.

        They are of trials that waited to the end, or whose worker was killed at their end, or damaged.
        """
        files = superfluous(self.ledger.engine, self.ledger.study_id, self.runs, keep=None)
        try:
            remove(path for path in files if path.match("trial-*/*"))
        except OSError:
            log.warning("checkpoints of ended trials could not be removed", exc_info=True)


def _log_file() -> str | None:
    """The file that this process logs to, as it goes on record; None for a terminal or a pipe."""
    try:
        path = os.readlink("/proc/self/fd/2")
    except OSError:
        return None
    return path_to_record(Path(path)) if os.path.isfile(path) else None
