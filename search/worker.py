"""One worker: claim trials, train them, report every epoch, until there is nothing left to claim.

The laptop and the cluster run the same worker; SLURM only starts it more often. It trains up to `pack`
trials side by side: they join and leave where an epoch ends, and none of them waits for another.
"""

import logging
import os
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import optuna

from dashboards.plot import attach_curve
from dashboards.terminal import printable
from search.exit_codes import ExitCode
from search.sampling import ImputedStudy
from search.score import epoch_value, score
from search.stopping import Stop, on_signals
from search.strategy import Decision
from search.study_config import StudyConfig
from storage.database import DATABASE_ERRORS, retrying
from storage.leases import RENEW_SECONDS, LeaseKeeper
from storage.ledger import Claim, LeaseLost, Ledger
from storage.liveness import host
from storage.outcome import SICK_HOST, SPENT, STOPPED, Outcome
from storage.paths import RunFolder, path_to_record
from storage.prune import remove, superfluous
from storage.status import TrialRow
from trainer.checkpoint import CheckpointError, Checkpoints
from trainer.config import EpochResult
from trainer.device import is_device_fault, is_out_of_memory
from trainer.loop import Run, train_epoch
from trainer.predictions import Predictions
from trainer.workspace import Workspace

log = logging.getLogger(__name__)

# Samplers that change the number of torch's threads while they work, for the whole process.
THREAD_CHANGING_SAMPLERS = ("gp",)


class SickHostError(RuntimeError):
    """Nothing works on this host, whatever the trial; the message is one line."""

    exit_code = ExitCode.FAILED


class RefusedError(ValueError):
    """A trial that somebody enqueued is not one of this study's space; the message is one line."""


class SpoiltStudyError(ValueError):
    """A trial that somebody added keeps the study from having others; the message is one line."""


# Errors of this machine and its files, or of the whole study. They say nothing about the trial, like
# DATABASE_ERRORS, and end the worker.
OTHERS_ERRORS = (CheckpointError, OSError, SpoiltStudyError)


class _Offer(NamedTuple):
    """A trial that was claimed and waits for its first epoch here."""

    claim: Claim
    params: dict[str, Any] | Exception  # or why it has none


@dataclass(frozen=True)
class _Trial:
    """A trial in training."""

    claim: Claim
    run: Run
    checkpoints: Checkpoints


class Worker:
    """Trains trials of one study until the budget is spent or it has to stop."""

    def __init__(
        self,
        file: StudyConfig,
        study: optuna.Study,
        ledger: Ledger,
        workspace: Workspace,
        runs: RunFolder,
        wall_end: float | None = None,
        pack: int = 1,
    ) -> None:
        self.file, self.study, self.ledger, self.workspace = file, study, ledger, workspace
        self.runs = runs
        self.pack = pack  # trials at once; fewer if they turn out not to fit into the memory
        # Called when the wall time has ended the work; returns whether somebody will go on.
        self.requeue: Callable[[], bool] = lambda: False
        # Called before a trial's first epoch with its parameters; returns why it is not worth one.
        self.rules_out: Callable[[dict[str, Any]], str | None] = lambda _: None
        self.stop = Stop(wall_end, pack)
        self._attributes = workspace.dataset.attribute_table(workspace.config)
        self._strategy = file.make_strategy(study, ledger)
        self.made_progress = False  # at least one optimizer step
        self._failed_before: set[int] = set()  # trials that failed here before that
        self._turn_seconds = 0.0  # as last measured in this process
        self._keeper = LeaseKeeper(ledger)
        self._trials: list[_Trial] = []  # the newest last
        self._ahead: Future[_Offer | None] | None = None
        self._ask_again = 0.0  # nothing to claim before
        self._spent = False  # the study's GPU-hours are

    def run(self) -> ExitCode:
        """Work; returns why it ended, with the details in `stop.reason`."""
        self.ledger.register(gpu=self.workspace.device_name, log=_own_log())
        reason = "an error"
        try:
            with on_signals(self.stop), self._keeper, ThreadPoolExecutor(1) as self._executor:
                self._run()
                if self.stop.end == ExitCode.DONE:
                    self._sweep()
                    if self.ledger.has_only_failed():
                        self.stop.ask("every trial of the study has failed", ExitCode.FAILED)
                reason = self.stop.reason or "nothing left to claim"
                if self.stop.end == ExitCode.WALL_TIME and self.made_progress and self.requeue():
                    log.info("requeued: another run of this task goes on")
        except SickHostError as error:
            reason = str(error)
            self.ledger.excuse()
            raise
        finally:
            self.ledger.sign_off(reason)
        return self.stop.end

    def _run(self) -> None:
        try:
            self._fill()
            while self._trials:
                self._turn()
                self._fill()
        except DATABASE_ERRORS:
            raise
        except KeyboardInterrupt:
            self._release_all("stopped at once")
            raise
        except Exception:  # whatever ends this worker, its trials are for the next
            self._release_all(traceback.format_exc())
            raise

    def _release_all(self, reason: str) -> None:
        if self._ahead is not None:
            wait([self._ahead])
        self._ahead = None
        for claim in self._keeper.held():
            self.ledger.release(claim, reason=reason)
        self._trials.clear()

    def _may_go_on(self) -> bool:
        """Whether to begin another epoch."""
        if not self.stop.leaves_time_for(self._turn_seconds):
            self.stop.ask("wall time", ExitCode.WALL_TIME)
        return not self.stop.requested

    def _fill(self) -> None:
        """Begin trials in the free places; give all back if there is no time for another epoch."""
        while self._may_go_on() and len(self._trials) < self.pack:
            offer = self._next_offer()
            if offer is None:
                break
            self._begin(offer)
        if self.stop.requested:
            for trial in list(self._trials):
                if trial.run.stream_epoch is not None:  # in the middle of one
                    with self._errors_of(trial.claim, trial.checkpoints):
                        self._hand_over(trial)
            self._release_all(self.stop.reason or "")
        else:
            self._withdraw_ahead()  # no place became free here, but maybe elsewhere

    def _next_offer(self) -> _Offer | None:
        if self._spent:
            self._withdraw_ahead()
        offer = self._take_ahead()
        if offer is None and (not self._trials or time.monotonic() >= self._ask_again):
            offer = self._obtain(self._held())
            if offer is None:
                self._ask_again = time.monotonic() + RENEW_SECONDS
                if reason := self.ledger.stop_reason():
                    self.stop.ask(reason, ExitCode.STOPPED)
        return offer

    def _take_ahead(self) -> _Offer | None:
        ahead, self._ahead = self._ahead, None
        return ahead.result() if ahead else None

    def _withdraw_ahead(self) -> None:
        if offer := self._take_ahead():
            self._keeper.let_go(offer.claim)
            self.ledger.withdraw(offer.claim)

    def _obtain(self, held: Collection[int]) -> _Offer | None:
        claim = self.ledger.claim(held, self._strategy.promotes)
        if claim is None:
            return None
        self._keeper.hold(claim)
        try:
            return _Offer(claim, self._params(claim))
        except Exception as error:  # the trial's own, unless it is the database's
            return _Offer(claim, error)

    def _look_ahead(self) -> None:
        """While the device works, claim and sample for a place that may become free by that."""
        last = self.file.epochs - 1
        if self.file.study.sampler in THREAD_CHANGING_SAMPLERS or not self.stop.leaves_time_for(
            2 * self._turn_seconds
        ):
            return
        if any(
            len(trial.run.history) == last
            or (
                self._strategy.decides_at(len(trial.run.history))
                and not self.file.audits(trial.claim.trial_number)
            )
            for trial in self._trials
        ):
            self._ahead = self._executor.submit(self._obtain, self._held())

    def _held(self) -> list[int]:
        return [trial.claim.trial_id for trial in self._trials]

    def _begin(self, offer: _Offer) -> None:
        """Put a trial into a place, where its latest checkpoint stands."""
        claim = offer.claim
        log.info("trial %d: attempt %d", claim.trial_number, claim.attempt)
        checkpoints = Checkpoints(
            self.runs.checkpoints(claim.trial_number),
            claim.attempt,
            before_save=lambda: self.ledger.renew(claim),  # raises LeaseLost
        )
        with self._errors_of(claim, checkpoints):
            if isinstance(offer.params, Exception):
                raise offer.params
            if claim.last_epoch < 0 and (reason := self.rules_out(offer.params)):
                self.ledger.finish(claim, "pruned", reason=reason)
                return
            run = Run(
                self.file.config(offer.params),
                self.workspace,
                checkpoints,
                self.ledger.stream_epochs(claim),
            )
            trial = _Trial(claim, run, checkpoints)
            self._trials.append(trial)
            for result in list(run.history):  # what a kill has left unrecorded or undecided
                if trial in self._trials:
                    self._epoch(trial, result)

    def _turn(self) -> None:
        """Train the trials for an epoch."""
        self._look_ahead()
        started = time.monotonic()
        trials = {trial.run: trial for trial in self._trials}
        for run, outcome in train_epoch(list(trials), self._interrupt):
            trial = trials.pop(run)
            if isinstance(outcome, Exception):
                self._charge(trial.claim, trial.checkpoints, outcome)
            else:
                with self._errors_of(trial.claim, trial.checkpoints):
                    self._take(trial, outcome)
            del run, outcome, trial  # what a run that has left held is free for the others
        self._turn_seconds = time.monotonic() - started

    def _interrupt(self, run: Run, seconds_left: float) -> bool:
        if not self.made_progress:
            log.info("first optimizer step")  # all that goes before it is over: imports, compilers
            self.made_progress = True
        for trial in self._trials:
            if trial.run is run and self._keeper.has_lost(trial.claim):
                raise LeaseLost(f"trial {trial.claim.trial_number} is held by another worker now")
        return self.stop.cuts_epoch(seconds_left)

    def _take(self, trial: _Trial, outcome: EpochResult | None) -> None:
        """What a turn has brought a trial: an epoch, or an interruption."""
        if outcome is None:
            self._hand_over(trial)
        else:
            trial.run.save()
            self._epoch(trial, outcome)

    def _hand_over(self, trial: _Trial) -> None:
        """Save and release a trial in the middle of its epoch."""
        trial.run.save()
        self._give_back(trial, "released", self.stop.reason or "")

    def _give_back(self, trial: _Trial, outcome: str, reason: str) -> None:
        """Leave a trial, with its checkpoint, for another worker or another time."""
        self._trials.remove(trial)
        self._keeper.let_go(trial.claim)
        if not self.ledger.release(trial.claim, outcome=outcome, reason=reason):
            trial.checkpoints.withdraw()

    def _sweep(self) -> None:
        """Remove checkpoints of trials that waited to the end, or whose worker was killed at their end.

        Damaged ones that were set aside go too.
        """
        files = superfluous(self.ledger.engine, self.ledger.study_id, self.runs, keep=None)
        try:
            remove(path for path in files if path.match("trial-*/*"))
        except OSError:
            log.warning("checkpoints of ended trials are left", exc_info=True)

    def _epoch(self, trial: _Trial, result: EpochResult) -> None:
        """Record an epoch, and decide whether the trial goes on."""
        claim, value = trial.claim, self._value(result)
        if result.epoch > claim.last_epoch:
            self._record(trial, result, value)
        elif result.epoch < claim.last_epoch or claim.promoted:
            return  # decided before
        if not result.finite:
            # Of an epoch from a checkpoint the cause is known no more.
            cause = f": {result.cause}" if result.cause else ""
            reason = f"loss not finite in epoch {result.epoch + 1}{cause}"
            log.warning("trial %d: %s", claim.trial_number, reason)
            # Told as pruned, with the worst value: samplers do not see failed trials.
            self._finish(trial, "pruned", 0.0, reason)
        elif result.epoch + 1 == trial.run.config.epochs:
            history = trial.run.history
            # Before the end: a complete trial has its predictions. The same trial writes the same again.
            every = Predictions.join([one.predictions for one in history if one.predictions])
            every.save(self.runs.predictions(claim.trial_number))
            values = [self._value(one) for one in history]
            self._finish(trial, "complete", score(values, self.file.study.score))
        elif self._spent:
            self._give_back(trial, "released", SPENT)
        elif self._strategy.decides_at(result.epoch):
            self._decide(trial, result.epoch, value)

    def _decide(self, trial: _Trial, epoch: int, value: float) -> None:
        """Apply the strategy's verdict; of an audited trial it is only noted."""
        verdict = self._strategy.decide(trial.claim, epoch, value)
        if verdict == Decision.GOES_ON:
            return
        reason = f"{verdict.value} after {epoch + 1} epochs"
        if self.file.audits(trial.claim.trial_number):
            self.ledger.note_audit(trial.claim, epoch, verdict.value)
        elif verdict == Decision.PRUNED:
            self._finish(trial, "pruned", value, reason)
        else:
            self._give_back(trial, Outcome.PAUSED, reason)

    def _record(self, trial: _Trial, result: EpochResult, value: float) -> None:
        """Raises LeaseLost."""
        try:
            why = self.ledger.record(trial.claim, result.columns(), value)
        except LeaseLost:
            trial.checkpoints.withdraw()
            raise
        self._spent = why == SPENT
        if why == STOPPED:
            self.stop.ask(why, ExitCode.STOPPED)

    def _value(self, result: EpochResult) -> float:
        return epoch_value(result, self.file.study.score, self._attributes)

    def _finish(self, trial: _Trial, outcome: str, value: float, reason: str | None = None) -> None:
        """End the trial, with a picture of its curve. Raises LeaseLost."""
        claim = trial.claim
        picture = None
        try:
            row = TrialRow(claim.trial_number, outcome, value=value)
            curve = [one.columns() for one in trial.run.history]
            picture = attach_curve(self.runs.path.name, row, curve)
        except Exception:  # whatever it is: the trial is worth more than its picture
            log.warning("trial %d has no picture of its curve", claim.trial_number, exc_info=True)
        self.ledger.finish(claim, outcome, value, reason, artifact=picture)
        trial.checkpoints.clear()
        self._trials.remove(trial)

    @retrying
    def _params(self, claim: Claim) -> dict[str, Any]:
        """Sample what the trial lacks, then read back what is on record.

        A parameter is written once and never again, so a worker that was replaced while it sampled
        cannot make its successor train something else than the study says.
        """
        # A Study keeps the trials that it has seen until ask or tell, which are not used here: with
        # an old one the sampler would never learn.
        study = ImputedStudy(
            self.study.study_name, self.ledger.storage, self.study.sampler, self.file.rungs()
        )
        # Optuna's cache refuses parameters of a trial that it has not seen: another worker began it, or
        # the reply to its creation was lost. Only some samplers read all trials by themselves.
        self.ledger.storage.get_all_trials(self.ledger.study_id, deepcopy=False)
        self._refuse_foreign(self.ledger.storage.get_trial(claim.trial_id))
        trial = optuna.trial.Trial(study, claim.trial_id)
        for name, distribution in self.file.distributions().items():
            try:
                trial._suggest(name, distribution)
            except ValueError as error:  # Optuna's, of a trial that is finished already
                raise SpoiltStudyError(
                    f"study {self.study.study_name!r}: a trial that was added has another distribution "
                    f"of {name} ({error}); search in a study of another name"
                ) from error
        return self.ledger.storage.get_trial(claim.trial_id).params

    def _refuse_foreign(self, trial: optuna.trial.FrozenTrial) -> None:
        """Raises RefusedError for parameters, enqueued or suggested elsewhere, that are not ours."""
        given = trial.system_attrs.get("fixed_params", {}) | trial.params
        problem = self.file.foreign(given)
        ours = self.file.distributions()
        try:
            for name, theirs in trial.distributions.items() if problem is None else ():
                optuna.distributions.check_distribution_compatibility(theirs, ours[name])
        except ValueError as error:
            problem = f"{name} has another distribution: {error}"
        if problem is not None:
            raise RefusedError(f"refused: {problem}; enqueue another trial")

    @contextmanager
    def _errors_of(self, claim: Claim, checkpoints: Checkpoints) -> Iterator[None]:
        """What is raised in the `with` block is put on record as the trial's, where it is that."""
        try:
            yield
        except Exception as error:  # `_charge` tells a user's mistake from what ends the worker
            self._charge(claim, checkpoints, error)

    def _charge(self, claim: Claim, checkpoints: Checkpoints, error: Exception) -> None:
        """Put a trial's error on record. Raises what ends the worker."""
        company = any(trial.claim != claim for trial in self._trials)
        try:
            if isinstance(error, DATABASE_ERRORS):
                raise error
            self._trials = [trial for trial in self._trials if trial.claim != claim]
            if isinstance(error, OTHERS_ERRORS):
                reason = "".join(traceback.format_exception(error))
                if not self.ledger.release(claim, reason=reason):
                    # Not this machine's fault: a successor has ended the trial and cleared its files.
                    raise LeaseLost(f"trial {claim.trial_number} was lost: {error}")
            if isinstance(error, (LeaseLost, *OTHERS_ERRORS)):
                raise error
            if isinstance(error, RefusedError):
                self.ledger.refuse(claim, str(error))
                return
            if is_out_of_memory(error) and company:
                self.pack = len(self._trials)
                log.warning("trial %d does not fit beside %d", claim.trial_number, self.pack)
                self.ledger.release(claim, reason=f"out of memory beside {self.pack} other trials")
            elif self._failed(claim, error):
                checkpoints.clear()
            if is_device_fault(error):
                raise error
        except LeaseLost as lost:
            log.warning("%s", lost)

    def _failed(self, claim: Claim, error: Exception) -> bool:
        """Put an error on record. Returns whether the trial has ended by it."""
        text = "".join(traceback.format_exception(error))
        log.error("trial %d: %s", claim.trial_number, text)
        if self.stop.requested:  # the job's processes are being ended: not the trial's fault
            self.ledger.release(claim, reason=f"{self.stop.reason}\n{text}")
            return False
        if is_out_of_memory(error):
            # Pruned, not failed, and violating a constraint: so that the sampler learns from it.
            reason = f"out of memory\n{text}"
            self.ledger.finish(claim, "pruned", 0.0, reason, violated="memory")
            return True
        if not self.made_progress:
            self._failed_before.add(claim.trial_id)
            if len(self._failed_before) > 1 or is_device_fault(error):
                self.ledger.release(claim, "error", text)
                where = " ".join(filter(None, [host(), self.workspace.device_name]))
                [said] = traceback.format_exception_only(error)[:1]
                raise SickHostError(
                    f"{SICK_HOST} {where}: no trial has passed a first step there; what failed waits "
                    f"for another: {printable(said.splitlines()[0])}"
                )
        if self.ledger.is_bad(claim, self.file.study.max_failures):
            self.ledger.finish(claim, "failed", reason=text)
            return True
        self.ledger.release(claim, "error", text)
        return False


def _own_log() -> str | None:
    """The file that this process's messages go to, for the record; None for a terminal or a pipe."""
    try:
        path = os.readlink("/proc/self/fd/2")
    except OSError:
        return None
    return path_to_record(Path(path)) if os.path.isfile(path) else None
