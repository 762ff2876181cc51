"""Rules of what a trial has learned: its parameters, its epochs, and what Optuna was told of them."""

import math
from collections.abc import Sequence
from typing import Any

from search.score import epoch_value, score
from search.verify.evidence import Evidence, Found, Trial
from storage.outcome import Outcome

# What a value is computed from. Earlier versions did not record all of it.
SOURCES = {"balanced-log-loss": "val_log_loss", "shrunken-mean-last-5": "val_hits"}


def a_trained_trial_has_parameters_of_the_space(evidence: Evidence) -> Found:
    names = evidence.config.parameters().keys()
    for trial in evidence.trials:
        if not trial.epochs:
            continue
        if missing := names - trial.params.keys():
            yield trial.number, f"was trained without {', '.join(sorted(missing))}"
        elif problem := evidence.config.foreign(trial.params):
            yield trial.number, f"was trained with {problem}"


def a_rerun_has_the_parameters_of_the_plan(evidence: Evidence) -> Found:
    plan = evidence.config.plan
    if plan is None:
        return
    for trial in evidence.trials:
        if not trial.epochs or trial.is_enqueued:
            continue
        planned = plan(trial.number)
        if other := sorted(name for name in planned if trial.params.get(name) != planned[name]):
            yield trial.number, f"was trained with another {', '.join(other)} than planned"


def epochs_are_on_record_once(evidence: Evidence) -> Found:
    for trial in evidence.trials:
        numbers = [row.epoch for row in trial.epochs]
        if numbers != list(range(len(numbers))) or len(numbers) > evidence.config.epochs:
            yield trial.number, f"has the epochs {numbers} of {evidence.config.epochs} on record"


def an_epoch_is_of_an_attempt(evidence: Evidence) -> Found:
    """Of one that was open then: a worker that was replaced records nothing."""
    for trial in evidence.trials:
        attempts = {row.number: row for row in trial.attempts}
        before = 0
        for row in trial.epochs:
            attempt = attempts.get(row.attempt)
            if attempt is None or row.attempt < before:
                problem = f"after {before}"
            elif not attempt.claimed <= row.recorded <= (attempt.released or row.recorded):
                problem = "which was not open then"
            else:
                before = row.attempt
                continue
            yield trial.number, f"has epoch {row.epoch} of attempt {row.attempt}, {problem}"
            break


def a_trial_goes_forward_through_the_stream(evidence: Evidence) -> Found:
    for trial in evidence.trials:
        stream = [row.stream_epoch for row in trial.epochs]
        if stream != sorted(set(stream)):
            yield trial.number, f"went through the epochs {stream} of the stream"


def optuna_was_told_the_same(evidence: Evidence) -> Found:
    for trial in evidence.trials:
        known = [(row.epoch, _finite(row.value)) for row in trial.epochs]
        if known and trial.told != known:  # others may tell of trials that were trained elsewhere
            numbers = sorted({epoch for epoch, _ in set(known) ^ set(trial.told)})
            where = f"of the epochs {numbers}" if numbers else "of an epoch twice"
            yield trial.number, f"has other values {where} in Optuna than on record"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def a_value_is_what_the_numbers_give(evidence: Evidence) -> Found:
    kind, attributes = evidence.config.study.score, evidence.entry.attributes
    source = SOURCES.get(kind, "val_accuracy")
    if source == "val_hits" and not attributes:  # an earlier version did not record them
        return
    for trial in evidence.trials:
        for row in trial.epochs:
            if row.value is not None and getattr(row, source) is not None:
                value = epoch_value(row, kind, attributes)
                # Machines may differ in the last bit of a logarithm.
                if not math.isclose(value, row.value, rel_tol=1e-9):
                    yield trial.number, f"has the value {row.value} in epoch {row.epoch}, not {value}"
                    break


def a_complete_trial_has_its_epochs_and_its_score(evidence: Evidence) -> Found:
    wanted, kind = evidence.config.epochs, evidence.config.study.score
    for trial in evidence.trials:
        if trial.outcome != Outcome.COMPLETE:  # others may have completed it
            continue
        values = [row.value for row in trial.epochs]
        if len(values) != wanted:
            yield trial.number, f"is complete after {len(values)} of {wanted} epochs"
        elif None not in values and trial.values != [score(values, kind)]:
            yield trial.number, f"has the score {trial.values}, its epochs give {score(values, kind)}"


def an_ended_trial_has_one_score(evidence: Evidence) -> Found:
    for trial in evidence.trials:
        if len(trial.values) > 1 or (trial.state == "COMPLETE" and not trial.values):
            yield trial.number, f"is {trial.state} with the scores {trial.values}"
        elif trial.outcome == Outcome.PRUNED and trial.epochs:
            # 0 if its loss was not finite, or if it ran out of memory.
            last = trial.epochs[-1].value
            if trial.values not in ([0.0], [last]) and last is not None:
                yield trial.number, f"was pruned with the score {trial.values}, after a value of {last}"


def training_ends_where_the_loss_is_not_finite(evidence: Evidence) -> Found:
    for trial in evidence.trials:
        diverged = next((row.epoch for row in trial.epochs if not _has_finite_loss(row)), None)
        if diverged is None:
            continue
        if trial.epochs[-1].epoch != diverged or trial.outcome == Outcome.COMPLETE:
            yield trial.number, f"went on after epoch {diverged}, where its loss was not finite"


def _has_finite_loss(row: Any) -> bool:
    is_validated = bool(row.val_category)
    return math.isfinite(row.train_loss) and (not is_validated or math.isfinite(row.val_loss))


def a_curve_is_that_of_an_undisturbed_run(evidence: Evidence) -> Found:
    for trial in evidence.trials:
        if trial.epochs:
            for row, result in zip(trial.epochs, _again(evidence, trial), strict=False):
                if differing := result.differing(row._mapping):
                    yield trial.number, f"has another {', '.join(differing)} in epoch {row.epoch}"
                    break


def _again(evidence: Evidence, trial: Trial) -> Sequence[Any]:
    assert evidence.reference is not None  # the table says that the rule needs it
    return evidence.reference(evidence.config, trial)
