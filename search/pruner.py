"""When a trial is not worth another epoch. The decision follows from reported values alone.

A trial may be killed between a report and its decision, and be resumed by another worker, which takes
the decision again; so nothing is remembered beside the values.
"""

from typing import Protocol

import optuna

from storage.database import retrying
from storage.ledger import Claim, Ledger


class Pruner(Protocol):
    """A rule by name in the study file."""

    def decides_at(self, epoch: int) -> bool:
        """Whether a trial may be pruned after this epoch."""

    def prunes(self, claim: Claim, epoch: int, value: float) -> bool:
        """Whether to stop the claim's trial after such an epoch, which is on record."""


class RungPruner:
    """At each rung a trial goes on if it is in the top third of those that have been there.

    ASHA (Li et al., MLSys 2020) in its stopping form. Optuna's SuccessiveHalvingPruner keeps what it
    decided in trial attributes, and reads all trials; this asks the database for two counts.
    """

    def __init__(self, ledger: Ledger, rungs: list[int], reduction_factor: int = 3) -> None:
        self._ledger, self._rungs, self._factor = ledger, rungs, reduction_factor

    def decides_at(self, epoch: int) -> bool:
        """At the rungs only."""
        return epoch in self._rungs

    def prunes(self, claim: Claim, epoch: int, value: float) -> bool:
        """Whether too many of the trials that have been at this rung were better."""
        better, peers = self._ledger.standing(epoch, value)
        return better >= max(peers // self._factor, 1)


class OptunaPruner:
    """One of Optuna's, from epoch `first` on; it reads all the study's trials."""

    def __init__(
        self, study: optuna.Study, ledger: Ledger, pruner: optuna.pruners.BasePruner, first: int
    ) -> None:
        self._study, self._ledger, self._pruner, self._first = study, ledger, pruner, first

    def decides_at(self, epoch: int) -> bool:
        """After any epoch but the earliest."""
        return epoch >= self._first

    @retrying
    def prunes(self, claim: Claim, epoch: int, value: float) -> bool:
        """What Optuna says."""
        # Not Trial.should_prune: a Trial knows only the values that it reported itself.
        return self._pruner.prune(self._study, self._ledger.storage.get_trial(claim.trial_id))
