"""One worker: claim a trial, train it, report every epoch, until there is nothing left to claim.

The laptop and the cluster run the same worker; SLURM only starts it more often.
"""

import logging
import os
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import FrameType

import optuna

from search.study import StudyFile, score
from storage.database import retrying
from storage.ledger import Claim, LeaseKeeper, LeaseLost, Ledger
from storage.runs import RunFolder
from trainer.allocation import is_out_of_memory
from trainer.checkpoint import CheckpointError, Checkpoints
from trainer.config import TrainConfig
from trainer.loop import Workspace, train

log = logging.getLogger(__name__)

# Set by `atelier search` for its workers: they stop when it is gone.
PARENT_VARIABLE = "ATELIER_SEARCH_PID"


class Stop:
    """Whether this worker was asked to stop: after the epoch, or (asked twice) at once."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._parent = int(os.environ.get(PARENT_VARIABLE, 0))

    def __call__(self, number: int, _: FrameType | None) -> None:
        if self.reason is not None:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name
        log.info("%s: finishing the epoch, then releasing the trial", self.reason)

    @property
    def requested(self) -> bool:
        if self.reason is None and self._parent and os.getppid() != self._parent:
            self.reason = "the search that started this worker has ended"
        return self.reason is not None


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Turn SIGTERM, SIGINT and SIGUSR2 into a request; restore the old handlers at the end."""
    # SIGUSR2 is SLURM's warning here: NCCL uses SIGUSR1.
    stop = Stop()
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
    old = {number: signal.signal(number, stop) for number in signals}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class Worker:
    """Trains trials of one study until the budget is spent or it is asked to stop."""

    def __init__(
        self, file: StudyFile, study: optuna.Study, ledger: Ledger, workspace: Workspace
    ) -> None:
        self.file, self.study, self.ledger, self.workspace = file, study, ledger, workspace
        self.runs = RunFolder(file.study.name)

    def run(self) -> str:
        """Returns why it ended."""
        self.ledger.register(gpu=self.workspace.device_name)
        reason = "an error"
        try:
            with stop_on_signals() as stop:
                reason = self._run(stop)
        finally:
            self.ledger.sign_off(reason)
        return reason

    def _run(self, stop: Stop) -> str:
        while not stop.requested:
            claim = self.ledger.claim()
            if claim is None:
                return "nothing left to claim"
            with LeaseKeeper(self.ledger, claim):
                self._attempt(claim, stop)
        return stop.reason or "stopped"

    def _attempt(self, claim: Claim, stop: Stop) -> None:
        """Train one trial to its end, to its release, or to an error that is put on record."""
        log.info("trial %d: attempt %d", claim.trial_number, claim.attempt)
        checkpoints = Checkpoints(self.runs.checkpoints(claim.trial_number))
        try:
            ended = self._train(claim, checkpoints, stop)
        except LeaseLost:
            log.warning("trial %d: taken over by another worker", claim.trial_number)
            return
        except KeyboardInterrupt:
            self.ledger.release(claim, reason="stopped at once")
            raise
        except CheckpointError:
            self.ledger.release(claim, "error", traceback.format_exc())
            raise
        except Exception as error:  # whatever the training raises belongs to the trial
            ended = self._failed(claim, error)
        if ended:
            checkpoints.clear()

    def _train(self, claim: Claim, checkpoints: Checkpoints, stop: Stop) -> bool:
        config = self._config(claim)
        values: list[float] = []
        for result in train(config, self.workspace, checkpoints):
            values.append(result.val_accuracy)
            if result.epoch > claim.last_epoch:
                self.ledger.record(claim, asdict(result))
            elif result.epoch < claim.last_epoch:
                continue  # decided before
            if not result.finite:
                # Told as pruned, with the worst value: samplers do not see failed trials.
                self.ledger.finish(claim, "pruned", 0.0, f"loss not finite, epoch {result.epoch}")
                return True
            if result.epoch + 1 < config.epochs:
                if self._should_prune(claim):
                    reason = f"pruned after epoch {result.epoch}"
                    self.ledger.finish(claim, "pruned", result.val_accuracy, reason)
                    return True
                if stop.requested:
                    self.ledger.release(claim, reason=stop.reason or "")
                    return False
        self.ledger.finish(claim, "complete", score(values, self.file.study.score))
        return True

    @retrying
    def _config(self, claim: Claim) -> TrainConfig:
        """Sample what the trial lacks, then read back what is on record.

        A parameter is written once and never again, so a worker that was replaced while it sampled
        cannot make its successor train something else than the study says.
        """
        trial = optuna.trial.Trial(self.study, claim.trial_id)
        for name, distribution in self.file.distributions().items():
            trial._suggest(name, distribution)
        stored = self.ledger.storage.get_trial(claim.trial_id).params
        return self.file.config(stored)

    @retrying
    def _should_prune(self, claim: Claim) -> bool:
        # Not Trial.should_prune: a Trial knows only the values that it reported itself.
        return self.study.pruner.prune(self.study, self.ledger.storage.get_trial(claim.trial_id))

    def _failed(self, claim: Claim, error: Exception) -> bool:
        text = traceback.format_exc()
        log.error("trial %d: %s", claim.trial_number, text)
        if is_out_of_memory(error):
            # As a constraint the sampler learns from it; from a failed trial it would not.
            self._constrain(claim, "memory")
            self.ledger.finish(claim, "failed", reason=f"out of memory\n{text}")
            return True
        if self.ledger.failures(claim) >= self.file.study.max_failures:
            self.ledger.finish(claim, "failed", reason=text)
            return True
        self.ledger.release(claim, "error", text)
        return False

    @retrying
    def _constrain(self, claim: Claim, key: str) -> None:
        optuna.trial.Trial(self.study, claim.trial_id).set_constraint(key, 1.0)
