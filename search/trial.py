"""One trial's life in a worker: it begins, records its epochs, then ends, waits or is given back."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dashboards.plot import attach_curve
from search.blame import Fault, whole_text
from search.exit_codes import ExitCode
from search.score import epoch_value, score
from search.strategy import Decision
from storage.ledger import Claim, LeaseLost
from storage.outcome import SPENT, STOPPED, Outcome
from storage.status import State, TrialRow
from trainer.checkpoint import Checkpoints
from trainer.loop import EpochOutcome
from trainer.metrics import EpochResult
from trainer.predictions import Predictions
from trainer.run import Run

if TYPE_CHECKING:
    from search.worker import Worker

log = logging.getLogger(__name__)


class Trial:
    """A claimed trial and its training run, until its attempt ends."""

    run: Run  # from `begin` on

    def __init__(self, worker: "Worker", claim: Claim) -> None:
        self.claim, self._worker = claim, worker
        self._checkpoints = Checkpoints(
            worker.runs.checkpoints(claim.trial_number),
            claim.attempt,
            before_save=lambda: worker.ledger.renew(claim),  # raises LeaseLost
        )

    def begin(self, params: dict[str, Any] | Exception) -> None:
        """Take a place in the worker and go on from the latest checkpoint."""
        claim, worker = self.claim, self._worker
        log.info("trial %d: attempt %d", claim.trial_number, claim.attempt)
        with self._charged():
            if isinstance(params, Exception):
                raise params
            if claim.last_epoch < 0 and (reason := worker.rules_out(params)):
                worker.ledger.finish(claim, Outcome.PRUNED, reason=reason)
                return
            self.run = Run(
                worker.study_config.config(params),
                worker.workspace,
                self._checkpoints,
                worker.ledger.stream_epochs(claim),
            )
            worker.trials.append(self)
            for result in list(self.run.history):  # what a kill has left unrecorded or undecided
                if self in worker.trials:
                    self._conclude(result)

    def settle(self, outcome: EpochOutcome) -> None:
        """Act on what the training has brought: an epoch, an error, or None for an interruption."""
        if isinstance(outcome, Exception):
            self._charge(outcome)
            return
        with self._charged():
            self.run.save()
            if outcome is None:
                self._give_back(Outcome.RELEASED, self._worker.stop.reason or "")
            else:
                self._conclude(outcome)

    @property
    def is_inside_epoch(self) -> bool:
        """Whether it was interrupted in the middle of an epoch."""
        return self.run.stream_epoch is not None

    @property
    def may_leave(self) -> bool:
        """Whether it may leave its place after the epoch that comes next."""
        worker, epoch = self._worker, len(self.run.history)
        if epoch + 1 == self.run.config.epochs:
            return True
        audited = worker.study_config.audits(self.claim.trial_number)
        return worker.strategy.decides_at(epoch) and not audited

    def _conclude(self, result: EpochResult) -> None:
        """Record an epoch, and decide whether the trial goes on."""
        value, spent = self._value(result), False  # of who has just got the trial hours are left
        if result.epoch > self.claim.last_epoch:
            spent = self._record(result, value)
        elif result.epoch < self.claim.last_epoch or self.claim.promoted:
            return  # decided before
        if not result.finite:
            self._diverge(result)
        elif result.epoch + 1 == self.run.config.epochs:
            self._complete()
        elif spent:
            self._give_back(Outcome.RELEASED, SPENT)
        elif self._worker.strategy.decides_at(result.epoch):
            self._decide(result.epoch, value)

    def _record(self, result: EpochResult, value: float) -> bool:
        """Returns whether the study's GPU-hours are spent. Raises LeaseLost."""
        worker = self._worker
        try:
            why = worker.ledger.record(self.claim, result.columns(), value)
        except LeaseLost:
            self._checkpoints.withdraw()
            raise
        worker.spent = why == SPENT
        if why == STOPPED:
            worker.stop.ask(why, ExitCode.STOPPED)
        return worker.spent

    def _diverge(self, result: EpochResult) -> None:
        # The cause is not in a checkpoint, so it may be unknown here.
        cause = f": {result.cause}" if result.cause else ""
        reason = f"loss not finite in epoch {result.epoch + 1}{cause}"
        log.warning("trial %d: %s", self.claim.trial_number, reason)
        # Told as pruned, with the worst value: samplers do not see failed trials.
        self._finish(Outcome.PRUNED, 0.0, reason)

    def _complete(self) -> None:
        history, worker = self.run.history, self._worker
        # Before the end: a complete trial has its predictions. The same trial writes the same again.
        predictions = [result.predictions for result in history if result.predictions]
        Predictions.join(predictions).save(worker.runs.predictions(self.claim.trial_number))
        values = [self._value(result) for result in history]
        self._finish(Outcome.COMPLETE, score(values, worker.study_config.study.score))

    def _decide(self, epoch: int, value: float) -> None:
        """Apply the strategy's decision; of an audited trial it is only noted."""
        worker, claim = self._worker, self.claim
        decision = worker.strategy.decide(claim, epoch, value)
        if decision == Decision.GOES_ON:
            return
        reason = f"{decision.value} after {epoch + 1} epochs"
        if worker.study_config.audits(claim.trial_number):
            worker.ledger.note_audit(claim, epoch, decision.value)
        elif decision == Decision.PRUNED:
            self._finish(Outcome.PRUNED, value, reason)
        else:
            self._give_back(Outcome.PAUSED, reason)

    def _value(self, result: EpochResult) -> float:
        return epoch_value(result, self._worker.study_config.study.score, self._worker.attributes)

    def _finish(self, outcome: Outcome, value: float, reason: str | None = None) -> None:
        """End the trial, with a picture of its curve. Raises LeaseLost."""
        picture = None
        try:
            row = TrialRow(self.claim.trial_number, State(outcome), value=value)
            curve = [result.columns() for result in self.run.history]
            picture = attach_curve(self._worker.runs.path.name, row, curve)
        except Exception:  # any error: the trial is worth more than its picture
            log.warning("trial %d has no picture of its curve", self.claim.trial_number, exc_info=True)
        self._worker.ledger.finish(self.claim, outcome, value, reason, artifact=picture)
        self._checkpoints.clear()
        self._worker.trials.remove(self)

    def _give_back(self, outcome: Outcome, reason: str) -> None:
        """Leave the trial, with its checkpoint, for another worker or another time."""
        self._worker.trials.remove(self)
        self._worker.keeper.let_go(self.claim)
        if not self._worker.ledger.release(self.claim, outcome=outcome, reason=reason):
            self._checkpoints.withdraw()

    @contextmanager
    def _charged(self) -> Iterator[None]:
        """Charge the trial with what is raised in the `with` block."""
        try:
            yield
        except Exception as error:  # blame.py tells the trial's own from what ends the worker
            self._charge(error)

    def _charge(self, error: Exception) -> None:
        """Put an error on record, as blame.py judges it. Raises what ends the worker."""
        worker = self._worker
        others = [trial for trial in worker.trials if trial is not self]
        fault = worker.blame.judge(self.claim, error, in_company=bool(others))
        if fault is Fault.DATABASE:
            raise error
        worker.trials[:] = others
        if fault is Fault.LEASE:
            log.warning("%s", error)
            return
        try:
            if fault is Fault.CROWDED:
                worker.pack = len(others)
                log.warning("trial %d does not fit beside %d", self.claim.trial_number, worker.pack)
            self._end_attempt(fault, error)
        except LeaseLost as lost:
            log.warning("%s", lost)
            return
        if fault is Fault.HOST:
            raise worker.blame.sick_host(error)
        if fault.ends_worker(error):
            raise error

    def _end_attempt(self, fault: Fault, error: Exception) -> None:
        """Write what the fault does to the attempt. Raises LeaseLost."""
        claim, ledger, stop = self.claim, self._worker.ledger, self._worker.stop
        assert fault.outcome is not None  # the others are not written
        text = whole_text(error)
        reasons = {
            Fault.CROWDED: f"out of memory beside {self._worker.pack} other trials",
            Fault.STOPPING: f"{stop.reason}\n{text}",
            Fault.MEMORY: f"out of memory\n{text}",
        }
        reason = reasons.get(fault, text)
        if fault is Fault.REFUSED:
            ledger.refuse(claim, str(error))
        elif fault is Fault.MEMORY:
            ledger.finish(claim, fault.outcome, 0.0, reason, violated="memory")
            self._checkpoints.clear()
        elif fault is Fault.BAD_TRIAL:
            ledger.finish(claim, fault.outcome, reason=reason)
            self._checkpoints.clear()
        elif not ledger.release(claim, fault.outcome, reason) and fault is Fault.MACHINE:
            # It only looks like this machine's: the trial has ended, and another cleared its files.
            raise LeaseLost(f"trial {claim.trial_number} was lost: {error}")
