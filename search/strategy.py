"""Which trials get further epochs. The decision follows from values on record alone.

A trial may be killed between a report and its decision, and be resumed by another worker, which takes
the decision again; so nothing that decides is remembered beside the values.
"""

from enum import Enum
from typing import Protocol

import optuna

from storage.database import retrying
from storage.ledger import Claim, Ledger
from storage.ranks import REDUCTION_FACTOR, Rank


class Decision(Enum):
    """What becomes of a trial after an epoch."""

    GOES_ON = "goes on"
    PAUSED = "paused"  # with its checkpoint: it may go on later
    PRUNED = "pruned"


class Strategy(Protocol):
    """A rule by name in the study file."""

    def decides_at(self, epoch: int) -> bool:
        """Whether a trial may be told to end or to wait after this epoch."""

    def decide(self, claim: Claim, epoch: int, value: float) -> Decision:
        """What becomes of the claim's trial after such an epoch, which is on record."""

    def promotes(self, standing: Rank) -> bool:
        """Whether a paused trial of this standing is to go on before a new one begins."""


class Rungs:
    """At each rung a trial goes on if it is in the top third of those that have been there.

    ASHA (Li et al., MLSys 2020). In its stopping form (`pauses` is False) the others end there, and the
    first at a rung goes on. In its promoting form they wait, the first too, until so many have come that
    they are among the best. Optuna's SuccessiveHalvingPruner keeps what it decided in trial attributes,
    and reads all trials; this asks the database for two counts.
    """

    def __init__(self, ledger: Ledger, rungs: list[int], pauses: bool) -> None:
        self._ledger, self._rungs, self._pauses = ledger, rungs, pauses

    def decides_at(self, epoch: int) -> bool:
        """At the rungs only."""
        return epoch in self._rungs

    def decide(self, claim: Claim, epoch: int, value: float) -> Decision:
        """Whether too many of the trials that have been at this rung were better."""
        standing = self._ledger.rank(epoch, value)
        if self._pauses:
            return Decision.GOES_ON if self.promotes(standing) else Decision.PAUSED
        places = max(standing.peers // REDUCTION_FACTOR, 1)
        return Decision.GOES_ON if standing.better < places else Decision.PRUNED

    def promotes(self, standing: Rank) -> bool:
        """Whether it is in the top third by now. What another strategy has left waiting goes on."""
        return not self._pauses or standing.is_among_the_best


class OptunasPruner:
    """One of Optuna's pruners, from epoch `first` on; it reads all the study's trials.

    Hyperband notes in the trial's attributes which rungs it has passed before it answers: a trial whose
    worker is killed just then is not asked again at that rung.
    """

    def __init__(
        self, study: optuna.Study, ledger: Ledger, pruner: optuna.pruners.BasePruner, first: int
    ) -> None:
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

    def promotes(self, standing: Rank) -> bool:
        """What another strategy has left waiting goes on."""
        return True
