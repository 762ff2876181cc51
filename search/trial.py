"""One trial's life in a worker: it begins, records its epochs, then ends, waits or is given back.

Beside the worker's own thread, one thread records epochs and takes decisions, and another writes files
and ends trials. Each works in order, and does nothing more for a trial after an error. So an epoch is
recorded, then decided about, then in a checkpoint. And nothing is written of a trial after its end.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, wait
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dashboards.plot import attach_curve
from search.blame import Fault, whole_text
from search.claims import Offer
from search.exit_codes import ExitCode
from search.score import epoch_value, score
from search.strategy import Decision
from storage.ledger import LeaseLost
from storage.outcome import SPENT, STOPPED, Outcome
from storage.status import State, TrialRow
from trainer.checkpoint import Checkpoints
from trainer.loop import EpochOutcome
from trainer.metrics import COLUMNS, EpochResult
from trainer.predictions import Predictions
from trainer.run import Run
from trainer.saving import Snapshot, Unsaved

if TYPE_CHECKING:
    from search.worker import Worker

log = logging.getLogger(__name__)

MOST_UNRECORDED = 2  # epochs of a trial; with so many it waits for the database


class Trial:
    """A claimed trial and its training run, until its attempt ends."""

    run: Run  # from `begin` on, until it leaves its place
    _history: list[EpochResult]  # the run's, which may have left by the time of its end
    _found: int  # epochs in the checkpoint that it went on from

    def __init__(self, worker: "Worker", offer: Offer) -> None:
        claim, self._params, recorded = offer
        self.claim, self._worker = claim, worker
        self._checkpoints = Checkpoints(
            worker.runs.checkpoints(claim.trial_number),
            claim.attempt,
            before_save=lambda: worker.ledger.renew(claim),  # raises LeaseLost
        )
        self._recorded = [EpochResult(**{name: row[name] for name in COLUMNS}) for row in recorded]
        self._values = [math.nan if row["value"] is None else row["value"] for row in recorded]
        self._records: list[Future[Any]] = []  # what is to be recorded, in order
        self._writes: list[Future[Any]] = []  # what is to be written or ended, in order
        self._verdict: Future[Decision] | None = None  # the record that says whether it goes on
        self._newest: Snapshot | None = None
        self._waiting: Snapshot | None = None  # that is yet to be written
        self._is_due = False  # whether it is to be saved if it goes on
        self._has_ended = False

    def begin(self) -> None:
        """Take a place in the worker and go on from the latest checkpoint."""
        claim, worker = self.claim, self._worker
        log.info("trial %d: attempt %d", claim.trial_number, claim.attempt)
        with self._charged():
            if isinstance(self._params, Exception):
                raise self._params
            self.run = Run(
                worker.study_config.config(self._params),
                worker.workspace,
                self._checkpoints,
                [result.stream_epoch for result in self._recorded],
            )
            self._history, self._found = self.run.history, len(self.run.history)
            self._unsaved = Unsaved(self.run, worker.study_config.study.checkpoint_seconds)
            worker.trials.append(self)
            for result in self.run.history[max(claim.last_epoch, 0) :]:  # a kill left it undecided
                self._conclude(result)

    def settle(self, outcome: EpochOutcome) -> None:
        """Act on what the training has brought: an epoch, an error, or None for an interruption."""
        if isinstance(outcome, Exception):
            self._charge(outcome)
        elif outcome is not None:
            with self._charged():
                self._conclude(outcome)

    def look(self) -> None:
        """Act on what was decided meanwhile, and on what went wrong."""
        decision = None
        with self._charged():
            self.raise_errors()
            if self._verdict is None or not self._verdict.done():
                return
            decision, self._verdict = self._verdict.result(), None
            if self._has_ended:
                self._leave()
            elif decision == Decision.GOES_ON and self._may_save:
                self._queue(self._worker.writer, self._writes, self._save, self._snapshot())
        if decision == Decision.PAUSED:  # what goes wrong there is charged there
            self.give_back(Outcome.PAUSED, decision.after(len(self.run.history)))

    def raise_errors(self) -> None:
        """Raise what went wrong with its records or its files."""
        for jobs in (self._records, self._writes):
            while jobs and jobs[0].done():
                jobs.pop(0).result()

    @property
    def awaited(self) -> "list[Future[Any]]":
        """What must be done before it may train another epoch: nothing, if it is ready."""
        if self._verdict is not None:
            return [self._verdict]
        unrecorded = [record for record in self._records if not record.done()]
        return unrecorded[:1] if len(unrecorded) >= MOST_UNRECORDED else []

    @property
    def may_leave(self) -> bool:
        """Whether it may leave its place after the epoch that comes next."""
        return self._is_decisive(len(self.run.history))

    def give_back(self, outcome: Outcome, reason: str) -> None:
        """Leave the trial, with its checkpoint, for another worker or another time."""
        with self._charged():
            snapshot = None if self._unsaved.is_nothing else self._snapshot()
            self._queue(
                self._worker.recorder, self._records, self._release_later, snapshot, outcome, reason
            )
            self._leave()

    def drop_older_snapshot(self) -> None:
        """Let no snapshot be written, if a newer one is going to be."""
        if not self._unsaved.is_nothing:
            self._newest = None

    def finish_decision(self) -> None:
        """Wait until it is known whether it goes on, and act on that."""
        wait(self._records)
        self.look()

    def finish_jobs(self) -> None:
        """Wait until all is recorded and written."""
        wait(self._records)  # first: these may add to the others
        wait(self._writes)

    @property
    def has_jobs(self) -> bool:
        """Whether something is yet to be recorded or written, or has failed."""
        return bool(self._records or self._writes)

    def _is_decisive(self, epoch: int) -> bool:
        if epoch + 1 == self._worker.study_config.epochs:
            return True
        audited = self._worker.study_config.audits(self.claim.trial_number)
        return self._worker.strategy.decides_at(epoch) and not audited

    def _conclude(self, result: EpochResult) -> None:
        """Let an epoch be recorded, and then the run be saved if that is due."""
        is_decisive = self._is_decisive(result.epoch) or not self._on_record(result).finite
        is_rung = result.epoch in self._worker.study_config.rungs()
        self._is_due = self._unsaved.is_due() or (is_decisive and is_rung)
        snapshot = self._snapshot() if self._may_save and not is_decisive else None
        self._queue(
            self._worker.recorder, self._records, self._record, result, self._worker.waited, snapshot
        )
        if is_decisive:
            self._verdict = self._records[-1]

    @property
    def _may_save(self) -> bool:
        """Whether a save is due. One at a time waits to be written: else the memory would fill."""
        return self._is_due and not self._unsaved.is_nothing and self._waiting is None

    def _queue(
        self, thread: Executor, jobs: "list[Future[Any]]", job: Callable[..., Any], *details: Any
    ) -> None:
        """Let a thread do something after the jobs before, unless one of these has failed."""
        before = jobs[-1] if jobs else None

        def do() -> Any:
            if before is not None:
                before.result()  # it is done: the thread works in order
            return job(*details)

        jobs.append(thread.submit(do))

    def _snapshot(self) -> Snapshot:
        self._unsaved.reset()
        self._newest = self._waiting = self._worker.snapshots.take(self.run)
        return self._newest

    def _leave(self) -> None:
        """Make place for another, and free the device's memory."""
        self._worker.trials.remove(self)
        self._worker.leaving.append(self)
        self._drop_run()

    def _drop_run(self) -> None:
        for name in ("run", "_unsaved"):  # which may be missing, if it did not begin
            self.__dict__.pop(name, None)

    # In the thread that records.

    def _record(
        self, result: EpochResult, waited: Mapping[str, float], snapshot: Snapshot | None
    ) -> Decision:
        """Record an epoch and decide whether the trial goes on. Raises LeaseLost."""
        decision = self._decide(result, waited)
        if snapshot is not None:
            self._queue(self._worker.writer, self._writes, self._save, snapshot)
        return decision

    def _release_later(self, snapshot: Snapshot | None, outcome: Outcome, reason: str) -> None:
        writer = self._worker.writer
        if snapshot is not None:
            self._queue(writer, self._writes, self._save, snapshot)
        self._queue(writer, self._writes, self._release, outcome, reason)

    def _decide(self, result: EpochResult, waited: Mapping[str, float]) -> Decision:
        last, spent = self.claim.last_epoch, False  # of who has just got the trial hours are left
        if result.epoch > last:
            spent = self._add(result, waited)
        elif result.epoch >= self._found:
            self._compare(result)
        if result.epoch < last or (result.epoch == last and self.claim.promoted):
            return Decision.GOES_ON  # decided before
        if not self._on_record(result).finite:
            self._diverge(result)
        elif result.epoch + 1 == self._worker.study_config.epochs:
            self._complete()
        elif not spent and self._worker.strategy.decides_at(result.epoch):
            return self._ask_strategy(result.epoch)
        return Decision.GOES_ON

    def _on_record(self, result: EpochResult) -> EpochResult:
        """The first record of an epoch: it stands if the epoch is trained again."""
        return self._recorded[result.epoch] if result.epoch <= self.claim.last_epoch else result

    def _add(self, result: EpochResult, waited: Mapping[str, float]) -> bool:
        """Record an epoch. Returns whether the study's GPU-hours are spent. Raises LeaseLost."""
        worker = self._worker
        value = epoch_value(result, worker.study_config.study.score, worker.attributes)
        why = worker.ledger.record(self.claim, {**result.columns(), **waited}, value)
        self._values.append(value)
        worker.spent = why == SPENT
        if why == STOPPED:
            worker.stop.ask(why, ExitCode.STOPPED)
        return worker.spent

    def _compare(self, result: EpochResult) -> None:
        """Compare an epoch that was trained again with the record, which stands. Raises LeaseLost."""
        what = f"trial {self.claim.trial_number}: epoch {result.epoch + 1} was trained again"
        difference = result.differing(vars(self._recorded[result.epoch]))
        if difference:
            log.warning("%s, and differs from its record in %s", what, ", ".join(difference))
            self._worker.ledger.mark(self.claim, result.epoch, difference)
        else:
            log.info("%s, and equals its record", what)

    def _ask_strategy(self, epoch: int) -> Decision:
        """The strategy's decision; of an audited trial it is only noted."""
        worker, claim, value = self._worker, self.claim, self._values[epoch]
        decision = worker.strategy.decide(claim, epoch, value)
        if decision != Decision.GOES_ON and worker.study_config.audits(claim.trial_number):
            worker.ledger.note_audit(claim, epoch, decision.value)
            return Decision.GOES_ON
        if decision == Decision.PRUNED:
            self._end(Outcome.PRUNED, value, decision.after(epoch + 1))
        return decision

    def _diverge(self, result: EpochResult) -> None:
        # The cause is not in a checkpoint, so it may be unknown here.
        cause = f": {result.cause}" if result.cause else ""
        reason = f"loss not finite in epoch {result.epoch + 1}{cause}"
        log.warning("trial %d: %s", self.claim.trial_number, reason)
        # Told as pruned, with the worst value: samplers do not see failed trials.
        self._end(Outcome.PRUNED, 0.0, reason)

    def _complete(self) -> None:
        self._end(Outcome.COMPLETE, score(self._values, self._worker.study_config.study.score))

    def _end(self, outcome: Outcome, value: float, reason: str | None = None) -> None:
        self._has_ended = True
        self._queue(self._worker.writer, self._writes, self._finish, outcome, value, reason)

    # In the thread that writes.

    def _save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint, unless a newer one or the trial's end follows. Raises LeaseLost."""
        worker = self._worker
        if snapshot is self._newest and not self._has_ended:
            snapshot.save(self._checkpoints)
            try:
                worker.ledger.renew(self.claim)
            except LeaseLost:  # while it wrote
                self._checkpoints.withdraw()
                raise
        worker.snapshots.free(snapshot)
        if self._waiting is snapshot:
            self._waiting = None

    def _finish(self, outcome: Outcome, value: float, reason: str | None) -> None:
        """End the trial, with a picture of its curve. Raises LeaseLost, OSError."""
        worker, number = self._worker, self.claim.trial_number
        worker.ledger.renew(self.claim)  # it may have waited for long
        if outcome == Outcome.COMPLETE:  # before the end: a complete trial has its predictions
            predictions = [result.predictions for result in self._history if result.predictions]
            Predictions.join(predictions).save(worker.runs.predictions(number))
        picture = None
        try:
            row = TrialRow(number, State(outcome), value=value)
            curve = [result.columns() for result in self._history]
            picture = attach_curve(worker.runs.path.name, row, curve)
        except Exception:  # any error: the trial is worth more than its picture
            log.warning("trial %d has no picture of its curve", number, exc_info=True)
        worker.ledger.finish(self.claim, outcome, value, reason, artifact=picture)
        self._checkpoints.clear()
        worker.keeper.let_go(self.claim)

    def _release(self, outcome: Outcome, reason: str) -> None:
        if outcome == Outcome.PAUSED:  # most paused trials never go on
            self._worker.ledger.renew(self.claim)
            self._checkpoints.keep_newest()
        self._worker.keeper.let_go(self.claim)
        if not self._worker.ledger.release(self.claim, outcome=outcome, reason=reason):
            self._checkpoints.withdraw()  # it was ended, or taken over, just before

    # In the worker's thread again: what goes wrong.

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
        if fault is Fault.MEMORY and self._has_ended:
            fault = Fault.MACHINE  # the training, which is over, had enough
        self.finish_jobs()
        for jobs in (self._records, self._writes):  # their errors would keep the run in memory
            jobs.clear()
        self._drop_run()
        worker.trials[:] = others
        worker.leaving[:] = [trial for trial in worker.leaving if trial is not self]
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
