"""Asynchronous successive halving without a memory of its own."""

import optuna


class RungPruner(optuna.pruners.BasePruner):
    """At each rung a trial goes on if it is in the top third of those that have been there.

    ASHA (Li et al., MLSys 2020) in its stopping form, as Optuna's SuccessiveHalvingPruner. That one
    keeps what it decided in trial attributes; here a trial may be killed between the report and the
    decision, and be resumed by another worker, so the decision follows from the reported values alone
    and can be taken again.
    """

    def __init__(self, rungs: list[int], reduction_factor: int = 3) -> None:
        self.rungs, self.reduction_factor = rungs, reduction_factor

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        """Whether to stop `trial`, whose last reported step may be a rung."""
        rung = trial.last_step
        if rung not in self.rungs:
            return False
        value = trial.intermediate_values[rung]
        peers = [
            other.intermediate_values[rung]
            for other in study.get_trials(deepcopy=False)
            if rung in other.intermediate_values
        ]
        better = sum(peer > value for peer in peers)
        return better >= max(len(peers) // self.reduction_factor, 1)
