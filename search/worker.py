"""One worker: claim a trial, train it, report every epoch, until there is nothing left to claim.

The laptop and the cluster run the same worker; SLURM only starts it more often.
"""

import logging
import os
import traceback
from collections.abc import Callable
from typing import Any

import optuna
from sqlalchemy.exc import SQLAlchemyError

from dashboards.files import attach_curve
from dashboards.status import TrialRow
from search.exit_codes import ExitCode
from search.score import epoch_value, score
from search.stopping import Stop, on_signals
from search.study import StudyFile
from storage.database import retrying
from storage.ledger import Claim, LeaseKeeper, LeaseLost, Ledger
from storage.runs import RunFolder
from trainer.allocation import is_device_fault, is_out_of_memory
from trainer.checkpoint import CheckpointError, Checkpoints
from trainer.config import EpochResult
from trainer.loop import Interrupt, Workspace, train
from trainer.predictions import Predictions
from trainer.stream import LoaderError

log = logging.getLogger(__name__)

# Errors that say nothing about the trial: of this machine and its files, and of the database. They end
# the worker.
MACHINE_ERRORS = (CheckpointError, LoaderError, OSError)
DATABASE_ERRORS = (SQLAlchemyError, optuna.exceptions.StorageInternalError)


class Worker:
    """Trains trials of one study until the budget is spent or it has to stop."""

    def __init__(
        self,
        file: StudyFile,
        study: optuna.Study,
        ledger: Ledger,
        workspace: Workspace,
        runs: RunFolder,
        wall_end: float | None = None,
    ) -> None:
        self.file, self.study, self.ledger, self.workspace = file, study, ledger, workspace
        self.runs = runs
        # Called when the wall time has ended the work; returns whether somebody will go on.
        self.requeue: Callable[[], bool] = lambda: False
        # Called before a trial's first epoch with its parameters; returns why it is not worth one.
        self.rules_out: Callable[[dict[str, Any]], str | None] = lambda _: None
        self.stop = Stop(wall_end)
        self._attributes = workspace.dataset.attribute_table("val")
        self.made_progress = False  # at least one optimizer step
        self._epoch_seconds = 0.0  # as last measured in this process

    def run(self) -> ExitCode:
        """Work; returns why it ended, with the details in `stop.reason`."""
        self.ledger.register(gpu=self.workspace.device_name, log=_own_log())
        reason = "an error"
        try:
            with on_signals(self.stop):
                self._run()
                reason = self.stop.reason or "nothing left to claim"
                if self.stop.end == ExitCode.WALL_TIME and self.made_progress and self.requeue():
                    log.info("requeued: another run of this task goes on")
        finally:
            self.ledger.sign_off(reason)
        return self.stop.end

    def _run(self) -> None:
        while self._may_go_on():
            claim = self.ledger.claim()
            if claim is None:
                self._may_go_on()  # was it that somebody asked to stop?
                return
            with LeaseKeeper(self.ledger, claim) as keeper:
                self._attempt(claim, keeper)

    def _may_go_on(self) -> bool:
        """Whether to begin another epoch."""
        if self.ledger.stop_requested():
            self.stop.ask("atelier stop", ExitCode.STOPPED)
        if not self.stop.leaves_time_for(self._epoch_seconds):
            self.stop.ask("wall time", ExitCode.WALL_TIME)
        return not self.stop.requested

    def _attempt(self, claim: Claim, keeper: LeaseKeeper) -> None:
        """Train one trial to its end, to its release, or to an error that is put on record."""
        log.info("trial %d: attempt %d", claim.trial_number, claim.attempt)
        checkpoints = Checkpoints(
            self.runs.checkpoints(claim.trial_number),
            before_save=lambda: self.ledger.renew(claim),  # raises LeaseLost
        )

        def interrupt(seconds_left: float) -> bool:
            self.made_progress = True
            if keeper.lost.is_set():
                raise LeaseLost(f"trial {claim.trial_number} is held by another worker now")
            return self.stop.cuts_epoch(seconds_left)

        try:
            try:
                ended = self._train(claim, checkpoints, interrupt)
            except (LeaseLost, *MACHINE_ERRORS, *DATABASE_ERRORS):
                raise
            except Exception as error:  # whatever else the training raises belongs to the trial
                ended = self._failed(claim, error)
                if is_device_fault(error):
                    raise
            if ended:
                checkpoints.clear()
        except LeaseLost as error:
            log.warning("%s", error)
        except KeyboardInterrupt:
            self.ledger.release(claim, reason="stopped at once")
            raise
        except MACHINE_ERRORS:
            self.ledger.release(claim, reason=traceback.format_exc())
            raise

    def _train(self, claim: Claim, checkpoints: Checkpoints, interrupt: Interrupt) -> bool:
        """Returns whether the trial has ended; else it was released."""
        params = self._params(claim)
        config = self.file.config(params)
        if claim.last_epoch < 0 and (reason := self.rules_out(params)):
            self.ledger.finish(claim, "pruned", reason=reason)
            return True
        results: list[EpochResult] = []
        for result in train(config, self.workspace, checkpoints, interrupt):
            results.append(result)
            if result.epoch > claim.last_epoch:
                self.ledger.record(claim, result.columns(), self._value(result))
                self._epoch_seconds = result.seconds
            elif result.epoch < claim.last_epoch:
                continue  # decided before
            if not result.finite:
                # Told as pruned, with the worst value: samplers do not see failed trials.
                self._finish(claim, results, "pruned", 0.0, f"loss not finite, epoch {result.epoch}")
                return True
            if result.epoch + 1 < config.epochs:
                if self._should_prune(claim):
                    reason = f"pruned after epoch {result.epoch}"
                    self._finish(claim, results, "pruned", self._value(result), reason)
                    return True
                if not self._may_go_on():
                    break
        if len(results) < config.epochs:
            self.ledger.release(claim, reason=self.stop.reason or "")
            return False
        # Before the end: a complete trial has its predictions. The same trial writes the same again.
        every = Predictions.join([one.predictions for one in results if one.predictions])
        every.save(self.runs.predictions(claim.trial_number))
        values = [self._value(result) for result in results]
        self._finish(claim, results, "complete", score(values, self.file.study.score))
        return True

    def _value(self, result: EpochResult) -> float:
        return epoch_value(result, self.file.study.score, self._attributes)

    def _finish(
        self,
        claim: Claim,
        results: list[EpochResult],
        outcome: str,
        value: float,
        reason: str | None = None,
    ) -> None:
        """End the trial, with a picture of its curve. Raises LeaseLost."""
        picture = None
        try:
            trial = TrialRow(claim.trial_number, outcome, value=value)
            picture = attach_curve(self.runs.path.name, trial, [one.columns() for one in results])
        except Exception:  # whatever it is: the trial is worth more than its picture
            log.warning("trial %d has no picture of its curve", claim.trial_number, exc_info=True)
        self.ledger.finish(claim, outcome, value, reason, artifact=picture)

    @retrying
    def _params(self, claim: Claim) -> dict[str, Any]:
        """Sample what the trial lacks, then read back what is on record.

        A parameter is written once and never again, so a worker that was replaced while it sampled
        cannot make its successor train something else than the study says.
        """
        # A Study keeps the trials that it has seen until ask or tell, which are not used here: with
        # an old one the sampler would never learn.
        study = optuna.Study(
            self.study.study_name, self.ledger.storage, self.study.sampler, self.study.pruner
        )
        trial = optuna.trial.Trial(study, claim.trial_id)
        for name, distribution in self.file.distributions().items():
            trial._suggest(name, distribution)
        return self.ledger.storage.get_trial(claim.trial_id).params

    @retrying
    def _should_prune(self, claim: Claim) -> bool:
        # Not Trial.should_prune: a Trial knows only the values that it reported itself.
        return self.study.pruner.prune(self.study, self.ledger.storage.get_trial(claim.trial_id))

    def _failed(self, claim: Claim, error: Exception) -> bool:
        """Put an error on record. Returns whether the trial has ended by it."""
        text = traceback.format_exc()
        log.error("trial %d: %s", claim.trial_number, text)
        if self.stop.requested:  # the job's processes are being ended: not the trial's fault
            self.ledger.release(claim, reason=f"{self.stop.reason}\n{text}")
            return False
        if is_out_of_memory(error):
            # Pruned, not failed, and violating a constraint: so that the sampler learns from it.
            reason = f"out of memory\n{text}"
            self.ledger.finish(claim, "pruned", 0.0, reason, violated="memory")
            return True
        if self.ledger.failures(claim) >= self.file.study.max_failures:
            self.ledger.finish(claim, "failed", reason=text)
            return True
        self.ledger.release(claim, "error", text)
        return False


def _own_log() -> str | None:
    """The file that this process's messages go to; None if that is a terminal or a pipe."""
    try:
        path = os.readlink("/proc/self/fd/2")
    except OSError:
        return None
    return path if os.path.isfile(path) else None
