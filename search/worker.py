"""One worker's loop: claim trials and train them, epoch by epoch, until there is nothing left to claim.

The laptop and the cluster run the same worker; SLURM only starts it more often. It trains up to `pack`
trials side by side. They join and leave where an epoch ends, and none of them waits for another.
"""

import logging
import os
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import optuna

from search.blame import Blame, SickHostError
from search.claims import Claims
from search.exit_codes import ExitCode
from search.slurm.job import seconds_to_kill
from search.stopping import Stop, on_signals
from search.study_config import StudyConfig
from search.trial import Trial
from storage.database import DATABASE_ERRORS
from storage.leases import LeaseKeeper
from storage.ledger import LeaseLost, Ledger
from storage.outcome import NOTHING_LEFT
from storage.paths import RunFolder, path_to_record
from storage.prune import remove, superfluous
from storage.studies import has_only_failed
from trainer.loop import train_epoch
from trainer.run import Run
from trainer.workspace import Workspace

log = logging.getLogger(__name__)


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
        executor: Executor | None = None,
    ) -> None:
        """`executor` claims and samples the next trial beside the training."""
        self.study_config, self.study, self.ledger = study_config, study, ledger
        self.workspace, self.runs = workspace, runs
        self.pack = pack  # trials at once; fewer if they turn out not to fit into the memory
        # Called when the wall time has ended the work; returns whether somebody will go on.
        self.requeue: Callable[[], bool] = lambda: False
        # Called before a trial's first epoch with its parameters; returns why it is not worth one.
        self.rules_out: Callable[[dict[str, Any]], str | None] = lambda _: None
        self.attributes = workspace.dataset.attribute_table(workspace.config)
        self.strategy = study_config.make_strategy(study, ledger)
        self.stop = Stop(wall_end, pack, seconds_to_kill())
        self.keeper = LeaseKeeper(ledger)
        self.blame = Blame(ledger, self.stop, study_config.study.max_failures, workspace.device_name)
        self._executor = executor or ThreadPoolExecutor(1)
        self.claims = Claims(
            study_config, study, ledger, self.keeper, self.strategy, self.stop, self._executor
        )
        self.trials: list[Trial] = []  # in training, the newest last
        self.epoch_seconds = 0.0  # as last measured in this process
        self.spent = False  # whether the study's GPU-hours were at the last record

    @property
    def made_progress(self) -> bool:
        """Whether it has made at least one optimizer step."""
        return self.blame.made_progress

    def run(self) -> ExitCode:
        """Work; returns why it ended, with the details in `stop.reason`."""
        self.ledger.register(gpu=self.workspace.device_name, log=_log_file())
        reason = "an error"
        try:
            with on_signals(self.stop), self.keeper, self._executor:
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
            self._release_all("stopped at once")
            raise
        except Exception:  # whatever ends this worker, its trials are for the next
            self._release_all(traceback.format_exc())
            raise

    def fill(self) -> list[Trial]:
        """Begin trials in the free places. Returns those in training.

        If there is no time for another epoch, or if it has to stop, all are given back.
        """
        while self._may_go_on() and len(self.trials) < self.pack:
            if self.spent:
                self.claims.withdraw()
            offer = self.claims.next(self._held())
            if offer is None:
                break
            Trial(self, offer.claim).begin(offer.params)
        if self.stop.requested:
            for trial in list(self.trials):
                if trial.is_inside_epoch:
                    trial.settle(None)
            self._release_all(self.stop.reason or "")
        else:
            self.claims.withdraw()
        return self.trials

    def train(self) -> None:
        """Train the trials for an epoch, and act on what it brings each of them."""
        if self.stop.leaves_time_for(2 * self.epoch_seconds) and any(
            trial.may_leave for trial in self.trials
        ):
            self.claims.look_ahead(self._held())
        started = time.monotonic()
        trials = {trial.run: trial for trial in self.trials}
        for run, outcome in train_epoch(list(trials), self._interrupt):
            trials.pop(run).settle(outcome)
            del run, outcome  # else they would live until the next one comes
        self.epoch_seconds = time.monotonic() - started

    def _may_go_on(self) -> bool:
        """Whether to begin another epoch."""
        if not self.stop.leaves_time_for(self.epoch_seconds):
            self.stop.ask("wall time", ExitCode.WALL_TIME)
        return not self.stop.requested

    def _held(self) -> list[int]:
        return [trial.claim.trial_id for trial in self.trials]

    def _interrupt(self, run: Run, seconds_left: float) -> bool:
        if not self.made_progress:
            log.info("first optimizer step")  # all that goes before it is over: imports, compilers
            self.blame.made_progress = True
        for trial in self.trials:
            if trial.run is run and self.keeper.has_lost(trial.claim):
                raise LeaseLost(f"trial {trial.claim.trial_number} is held by another worker now")
        return self.stop.cuts_epoch(seconds_left)

    def _release_all(self, reason: str) -> None:
        self.claims.finish_claiming()
        for claim in self.keeper.held():
            self.ledger.release(claim, reason=reason)
        self.trials.clear()

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
