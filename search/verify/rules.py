"""What must hold of a study: one table of rules, which read its tables and files as they lie there."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum, auto
from typing import TYPE_CHECKING, Any

from search.score import score
from search.study_config import StudyConfig
from search.verify.evidence import Evidence, Trial
from storage.outcome import RESTORED
from storage.ranks import REDUCTION_FACTOR
from trainer.predictions import Predictions

if TYPE_CHECKING:  # it imports torch
    from trainer.metrics import EpochResult

ENDS = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}

Found = Iterator[tuple[int | None, str]]  # a trial's number, and what is wrong with it
# Trains a trial again, alone, through the epochs of the stream that it has on record.
Reference = Callable[[StudyConfig, Trial], "list[EpochResult]"]


class Holds(IntEnum):
    """Of which studies a rule holds; a later one has all that the earlier ones have."""

    ALWAYS = auto()  # of any study, at any moment
    ENDED = auto()  # of a study that has ended by itself
    UNDISTURBED = auto()  # ... and that nobody but its workers has touched, nor lowered its budgets


@dataclass(frozen=True)
class Finding:
    """Where a rule does not hold."""

    rule: str
    trial: int | None  # its number; None for the whole study
    text: str

    def __str__(self) -> str:
        where = "the study" if self.trial is None else f"trial {self.trial}"
        return f"{self.rule}: {where} {self.text}"


def the_budget_is_used_up(evidence: Evidence) -> Found:
    numbers = [trial.number for trial in evidence.trials]
    if numbers != list(range(evidence.max_trials)):
        yield None, f"was allowed {evidence.max_trials} trials and has {numbers}"


def every_trial_has_ended_well(evidence: Evidence) -> Found:
    for trial in evidence.trials:
        if trial.state not in ("COMPLETE", "PRUNED"):
            reasons = [row.reason for row in trial.attempts if row.outcome in ("error", "failed")]
            yield trial.number, f"is {trial.state}: {reasons}"
        elif len(trial.values) != 1:
            yield trial.number, f"has the values {trial.values}"


def nobody_held_what_another_held(evidence: Evidence) -> Found:
    for trial in evidence.trials:
        if [row.number for row in trial.attempts] != list(range(1, len(trial.attempts) + 1)):
            yield trial.number, f"has the attempts {[row.number for row in trial.attempts]}"
        for one, other in zip(trial.attempts, trial.attempts[1:], strict=False):
            if one.released is None or other.claimed < one.released:
                yield trial.number, f"had attempt {other.number} before {one.number} had ended"
            if (
                one.outcome == "lost"
                and other.claimed < one.lease_until
                and not _was_seen(evidence, one, other)
            ):
                yield trial.number, f"had attempt {other.number} before the lease of {one.number} ended"


def nobody_holds_a_trial(evidence: Evidence) -> Found:
    for trial in evidence.trials:
        for row in trial.attempts:
            if row.released is None:
                yield trial.number, f"is still held, by attempt {row.number}"


def _was_seen(evidence: Evidence, one: Any, other: Any) -> bool:
    """Whether somebody could see that the holder had ended, before the other claim.

    That need not be who claimed: the one who saw it may have withdrawn a claim of its own.
    """
    holder = evidence.workers[one.worker_id]
    if one.reason == RESTORED or holder.slurm_cluster is not None:
        return True
    machine, _, _ = holder.process.rsplit(":", 2)  # pid and start follow
    return any(
        worker.process.startswith(machine + ":")
        and worker.id != one.worker_id
        and worker.started <= other.claimed
        for worker in evidence.workers.values()
    )


def each_attempt_ended_once(evidence: Evidence) -> Found:
    for trial in evidence.trials:
        outcomes = [row.outcome for row in trial.attempts]
        if outcomes[-1:] != [ENDS.get(trial.state)] or set(outcomes[:-1]) & set(ENDS.values()):
            yield trial.number, f"is {trial.state}, its attempts {outcomes}"


def each_epoch_is_on_record_once(evidence: Evidence) -> Found:
    wanted = evidence.config.epochs
    for trial in evidence.trials:
        numbers = [row.epoch for row in trial.epochs]
        if numbers != list(range(len(numbers))):
            yield trial.number, f"has the epochs {numbers}"
        if trial.state == "COMPLETE" and len(numbers) != wanted:
            yield trial.number, f"is complete after {len(numbers)} of {wanted} epochs"
        attempts = [row.attempt for row in trial.epochs]
        if attempts != sorted(attempts) or not set(attempts) <= {row.number for row in trial.attempts}:
            yield trial.number, f"has epochs of the attempts {attempts}"


def optuna_was_told_the_same(evidence: Evidence) -> Found:
    for trial in evidence.trials:
        known = [(row.epoch, row.value) for row in trial.epochs]
        if trial.told != known:
            yield trial.number, f"has {trial.told} in Optuna, its epochs say {known}"
        values = [value for _, value in known]
        if trial.state == "COMPLETE" and trial.values != [score(values, evidence.config.study.score)]:
            yield trial.number, f"has the score {trial.values}, its epochs {values}"


def the_best_at_each_rung_went_on(evidence: Evidence) -> Found:
    """Of a search whose trials wait at rungs: none that belongs to the best third waited to the end."""
    if evidence.config.study.strategy != "promote":
        return
    for rung in evidence.config.rungs():
        been = [trial for trial in evidence.trials if len(trial.epochs) > rung]
        for trial in been:
            better = sum(one.epochs[rung].value > trial.epochs[rung].value for one in been)
            if len(trial.epochs) == rung + 1 and better < len(been) // REDUCTION_FACTOR:
                yield trial.number, f"waits at epoch {rung}, {better} of {len(been)} are better"


def each_complete_trial_has_its_predictions(evidence: Evidence) -> Found:
    for trial in evidence.trials:
        if evidence.has_files and trial.state == "COMPLETE":
            path = evidence.runs.predictions(trial.number)
            try:
                predictions = Predictions.load(path)
            except (OSError, ValueError) as error:
                yield trial.number, f"has no predictions: {error}"
                continue
            right = (predictions.classes == predictions.labels).sum((1, 2))
            if [*right] != [sum(row.val_hits) for row in trial.epochs]:
                yield trial.number, "has the predictions of another run"


def nothing_is_left(evidence: Evidence) -> Found:
    for path in sorted(evidence.runs.path.glob("trial-*/*")):
        yield None, f"has left {path}"
    wanted = {evidence.runs.predictions(trial.number).name for trial in evidence.trials}
    for path in sorted(evidence.runs.predictions(0).parent.glob("*")):
        if path.name not in wanted:
            yield None, f"has {path}, which belongs to no trial"


@dataclass(frozen=True)
class Rule:
    """One rule of the table."""

    holds: Holds
    check: Callable[[Evidence], Found]

    @property
    def name(self) -> str:
        return self.check.__name__


RULES = (
    Rule(Holds.ALWAYS, nobody_held_what_another_held),
    Rule(Holds.UNDISTURBED, the_budget_is_used_up),
    Rule(Holds.UNDISTURBED, every_trial_has_ended_well),
    Rule(Holds.UNDISTURBED, nobody_holds_a_trial),
    Rule(Holds.UNDISTURBED, each_attempt_ended_once),
    Rule(Holds.UNDISTURBED, each_epoch_is_on_record_once),
    Rule(Holds.UNDISTURBED, optuna_was_told_the_same),
    Rule(Holds.UNDISTURBED, the_best_at_each_rung_went_on),
    Rule(Holds.UNDISTURBED, each_complete_trial_has_its_predictions),
    Rule(Holds.ENDED, nothing_is_left),
)


def violations(
    evidence: Evidence, holds: Holds = Holds.ALWAYS, reference: Reference | None = None
) -> list[Finding]:
    """Where the rules that hold of such a study are broken; empty if all is well.

    With a `reference` the curves are compared with it too, bit for bit. That takes a training of each.
    """
    found = [
        Finding(rule.name, trial, text)
        for rule in RULES
        if rule.holds <= holds
        for trial, text in rule.check(evidence)
    ]
    if reference is not None:
        name = each_curve_is_that_of_an_undisturbed_run.__name__
        found += [
            Finding(name, trial, text)
            for trial, text in each_curve_is_that_of_an_undisturbed_run(evidence, reference)
        ]
    return found


def each_curve_is_that_of_an_undisturbed_run(evidence: Evidence, reference: Reference) -> Found:
    """The one rule that needs training."""
    for trial in evidence.trials:
        for row, result in zip(trial.epochs, reference(evidence.config, trial), strict=False):
            if differing := result.differing(row._mapping):
                yield trial.number, f"in epoch {row.epoch}: {', '.join(differing)} differ"
