"""The next trial of a worker: claimed and sampled, when a place is free or a little before."""

import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Executor, Future, wait
from contextlib import contextmanager
from typing import Any, NamedTuple

import optuna

from search.exit_codes import ExitCode
from search.sampling import ImputedStudy, distributions
from search.stopping import Stop
from search.strategy import Strategy
from search.study_config import StudyConfig
from storage.database import retrying
from storage.leases import RENEW_SECONDS, LeaseKeeper
from storage.ledger import Claim, LeaseLost, Ledger
from storage.outcome import Outcome
from storage.studies import epochs_of

# Samplers that change the number of torch's threads while they work, for the whole process.
THREAD_CHANGING_SAMPLERS = ("gp",)


class RefusedError(ValueError):
    """An enqueued trial has parameters that the study does not have. The message is one line."""


class SpoiltStudyError(ValueError):
    """A trial that somebody added keeps the study from having others. The message is one line."""


class Offer(NamedTuple):
    """A claimed trial that waits for its first epoch here."""

    claim: Claim
    params: dict[str, Any] | Exception  # the error if they could not be sampled
    recorded: list[dict[str, Any]]  # its epochs on record, with the columns of the table


class Claims:
    """Claims trials of a study for one worker, and samples their parameters.

    `look_ahead` begins this in a thread while the device works. So `next` need not wait for long.
    """

    def __init__(
        self,
        config: StudyConfig,
        study: optuna.Study,
        ledger: Ledger,
        keeper: LeaseKeeper,
        strategy: Strategy,
        stop: Stop,
        executor: Executor,
    ) -> None:
        self._config, self._study, self._ledger, self._keeper = config, study, ledger, keeper
        # Says why parameters are not worth a first epoch; None if they are.
        self.rules_out: Callable[[dict[str, Any]], str | None] = lambda _: None
        self._strategy, self._stop, self._executor = strategy, stop, executor
        self._ahead: Future[Offer | None] | None = None
        self._undoing: Future[None] | None = None
        self._ask_again = 0.0  # before that time there is nothing to claim

    def next(self, held: Collection[int]) -> Offer | None:
        """Another trial beside those that are held, by Optuna's ids; None if there is none.

        A worker that holds some asks again only after a while. If all are to stop, so is this worker.
        """
        self._finish_undoing()
        ahead, self._ahead = self._ahead, None
        offer = ahead.result() if ahead else None
        if offer is not None or (held and time.monotonic() < self._ask_again):
            return offer
        offer = self._obtain(held)
        if offer is None:
            self._ask_again = time.monotonic() + RENEW_SECONDS
            if reason := self._ledger.stop_reason():
                self._stop.ask(reason, ExitCode.STOPPED)
        return offer

    def look_ahead(self, held: Collection[int]) -> None:
        """Claim and sample the next one meanwhile, if the sampler can work beside the training."""
        self._finish_undoing()
        if self._config.study.sampler not in THREAD_CHANGING_SAMPLERS:
            self._ahead = self._executor.submit(self._obtain, held)

    def withdraw(self) -> None:
        """Let a claim that was made ahead be undone: no place became free here, but maybe elsewhere."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            self._undoing = self._executor.submit(self._undo, ahead)

    def _undo(self, ahead: "Future[Offer | None]") -> None:
        if offer := ahead.result():
            self._keeper.let_go(offer.claim)
            self._ledger.withdraw(offer.claim)

    def _finish_undoing(self) -> None:
        undoing, self._undoing = self._undoing, None
        if undoing is not None:
            undoing.result()

    def finish_claiming(self) -> None:
        """Wait for a claim that is being made or undone. The keeper holds it then, as all others."""
        jobs: list[Future[Any]] = [job for job in (self._ahead, self._undoing) if job is not None]
        wait(jobs)
        self._ahead = self._undoing = None

    def _obtain(self, held: Collection[int]) -> Offer | None:
        while (claim := self._ledger.claim(held, self._strategy.promotes)) is not None:
            self._keeper.hold(claim)
            try:
                params = self.sample(claim)
                recorded = self._recorded(claim)
                reason = None if recorded else self.rules_out(params)
                if reason is None:
                    return Offer(claim, params, recorded)
                self._ledger.finish(claim, Outcome.PRUNED, reason=reason)
                self._keeper.let_go(claim)
            except Exception as error:  # the trial's own, unless it is the database's: see blame.py
                return Offer(claim, error, [])
        return None

    def _recorded(self, claim: Claim) -> list[dict[str, Any]]:
        if claim.last_epoch < 0:
            return []
        return epochs_of(self._ledger.engine, self._ledger.study_id, claim.trial_number)

    @retrying
    def sample(self, claim: Claim) -> dict[str, Any]:
        """Sample the parameters that the trial lacks, then read back what is on record.

        A parameter is written once and never again. So a worker that was replaced while it sampled
        cannot make its successor train something else than the study says.
        """
        storage, space = self._ledger.storage, distributions(self._config)
        # Optuna's cache refuses parameters of a trial that it has not seen: another worker began it, or
        # the reply to its creation was lost. Only some samplers read all trials by themselves.
        with _deletion_is_a_loss(claim):
            trials = storage.get_all_trials(self._ledger.study_id, deepcopy=False)
            begun = {one._trial_id: one for one in trials}[claim.trial_id]
        self._refuse_foreign(begun)
        if space.keys() <= begun.params.keys():
            return begun.params  # of a trial that goes on
        # A Study keeps the trials that it has seen until ask or tell, which are not used here. With
        # an old one the sampler would never learn.
        name, sampler = self._study.study_name, self._study.sampler
        with _deletion_is_a_loss(claim):
            study = ImputedStudy(name, storage, sampler, self._config.rungs())
            trial = optuna.trial.Trial(study, claim.trial_id)
        for parameter, distribution in space.items():
            try:
                trial._suggest(parameter, distribution)
            except ValueError as error:  # Optuna's, of a trial that is finished already
                raise SpoiltStudyError(
                    f"study {name!r}: a trial that was added has another distribution of {parameter} "
                    f"({error}); search in a study of another name"
                ) from error
        with _deletion_is_a_loss(claim):
            params = storage.get_trial(claim.trial_id).params
            return {parameter: params[parameter] for parameter in space}

    def _refuse_foreign(self, trial: optuna.trial.FrozenTrial) -> None:
        """Raises RefusedError for enqueued or suggested parameters that the study does not have."""
        given = trial.system_attrs.get("fixed_params", {}) | trial.params
        problem = self._config.foreign(given)
        ours = distributions(self._config)
        try:
            for name, theirs in trial.distributions.items() if problem is None else ():
                optuna.distributions.check_distribution_compatibility(theirs, ours[name])
        except ValueError as error:
            problem = f"{name} has another distribution: {error}"
        if problem is not None:
            raise RefusedError(f"refused: {problem}; enqueue another trial")


@contextmanager
def _deletion_is_a_loss(claim: Claim) -> Iterator[None]:
    """For what raises a KeyError only if Optuna no longer has the trial or its study.

    Raises LeaseLost then.
    """
    try:
        yield
    except KeyError:  # Optuna's
        raise LeaseLost(f"trial {claim.trial_number} was deleted") from None
