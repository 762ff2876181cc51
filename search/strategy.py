"""Which trials get further epochs. The decision follows from values on record alone.

A worker may be killed between a report and its decision. Another worker then takes the decision again,
so nothing but the values on record may decide.
"""

from collections.abc import Callable
from enum import Enum
from typing import Protocol

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner

from search.study_config import StudyConfig
from storage.database import retrying
from storage.ledger import Claim, Ledger
from storage.outcome import Outcome
from storage.ranks import REDUCTION_FACTOR, Rank
from storage.words import counted


class Decision(Enum):
    """What becomes of a trial after an epoch."""

    GOES_ON = "goes on"
    PAUSED = Outcome.PAUSED.value  # with its checkpoint: it may go on later
    PRUNED = Outcome.PRUNED.value

    def after(self, epochs: int) -> str:
        """In words, as a reason."""
        return f"{self.value} after {counted(epochs, 'epoch')}"


class Strategy(Protocol):
    """A rule by name in the study file."""

    def decides_at(self, epoch: int) -> bool:
        """Whether a trial may be told to end or to wait after this epoch."""

    def decide(self, claim: Claim, epoch: int, value: float) -> Decision:
        """What becomes of the claim's trial after such an epoch, which is on record."""

    def promotes(self, rank: Rank) -> bool:
        """Whether a paused trial of this rank goes on before a new one begins."""


def make_strategy(config: StudyConfig, study: optuna.Study, trials: Ledger) -> Strategy:
    """The study's strategy. Each one starts at the first rung."""
    name, rungs = config.study.strategy, config.rungs()
    makers: dict[str, Callable[[], BasePruner]] = {
        "median": lambda: MedianPruner(n_startup_trials=5, n_warmup_steps=rungs[0]),
        "hyperband": lambda: HyperbandPruner(
            min_resource=max(rungs[0], 1),
            max_resource=config.epochs,
            reduction_factor=REDUCTION_FACTOR,
        ),
    }
    if name in makers and rungs:
        return OptunasPruner(study, trials, makers[name](), rungs[0])
    return Rungs(trials, rungs, pauses=name == "promote")


class Rungs:
    """At each rung a trial goes on if it is in the top third of those that have been there.

    ASHA (Li et al., MLSys 2020). In its stopping form (`pauses` is False) the others end there, and the
    first at a rung goes on. In its promoting form the others wait, and so does the first. One goes on
    as soon as enough have come for it to be among the best.

    This asks the database for two counts. Optuna's SuccessiveHalvingPruner reads all trials, and keeps
    its decisions in trial attributes.
    """

    def __init__(self, ledger: Ledger, rungs: list[int], pauses: bool) -> None:
        self._ledger, self._rungs, self._pauses = ledger, rungs, pauses

    def decides_at(self, epoch: int) -> bool:
        """At the rungs only."""
        return epoch in self._rungs

    def decide(self, claim: Claim, epoch: int, value: float) -> Decision:
        """Whether too many of the trials that have been at this rung were better."""
        rank = self._ledger.rank(epoch, value)
        if self._pauses:
            return Decision.GOES_ON if self.promotes(rank) else Decision.PAUSED
        places = max(rank.peers // REDUCTION_FACTOR, 1)
        return Decision.GOES_ON if rank.better < places else Decision.PRUNED

    def promotes(self, rank: Rank) -> bool:
        """Whether it is in the top third by now. A trial that another strategy has paused goes on."""
        return not self._pauses or rank.is_among_the_best


class OptunasPruner:
    """One of Optuna's pruners, from epoch `first` on. It reads all the study's trials.

    Hyperband notes the rungs that a trial has passed in its attributes, before it answers. If the worker
    is killed just then, the trial is not judged again at that rung.
    """

    def __init__(self, study: optuna.Study, ledger: Ledger, pruner: BasePruner, first: int) -> None:
        self._study, self._ledger, self._pruner, self._first = study, ledger, pruner, first

    def decides_at(self, epoch: int) -> bool:
        """After any epoch but the earliest."""
        return epoch >= self._first

    @retrying
    def decide(self, claim: Claim, epoch: int, value: float) -> Decision:
        """What Optuna says."""
        # Not Trial.should_prune: a Trial knows only the values that it reported itself.
        prunes = self._pruner.prune(self._study, self._ledger.storage.get_trial(claim.trial_id))
        return Decision.PRUNED if prunes else Decision.GOES_ON

    def promotes(self, rank: Rank) -> bool:
        """A trial that another strategy has paused goes on."""
        return True
