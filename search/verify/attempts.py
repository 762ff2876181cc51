"""Rules of who holds a trial: attempts, leases and workers, and the one end that a trial has."""

import itertools
from typing import Any

from search.verify.evidence import Evidence, Found, Trial
from storage.outcome import RESTORED, Outcome
from storage.words import counted

OUTCOMES = {*Outcome}
# The outcome of its last attempt, by Optuna's state of a trial that a worker has ended.
ENDS = {"COMPLETE": Outcome.COMPLETE, "PRUNED": Outcome.PRUNED, "FAIL": Outcome.FAILED}


def trials_are_numbered_without_a_gap(evidence: Evidence) -> Found:
    for expected, trial in enumerate(evidence.trials):
        if trial.number != expected:
            yield None, f"has a trial {trial.number} where trial {expected} is to be"
            return


def attempts_are_numbered_without_a_gap(evidence: Evidence) -> Found:
    for trial in evidence.trials:
        numbers = [row.number for row in trial.attempts]
        if numbers != list(range(1, len(numbers) + 1)):
            yield trial.number, f"has the attempts {numbers}"


def an_attempt_begins_when_the_one_before_has_ended(evidence: Evidence) -> Found:
    for trial in evidence.trials:
        for one, other in itertools.pairwise(trial.attempts):
            if one.released is None or other.claimed < one.released:
                yield trial.number, f"had attempt {other.number} before attempt {one.number} had ended"


def a_lost_trial_is_taken_when_its_lease_has_ended(evidence: Evidence) -> Found:
    for trial in evidence.trials:
        for one, other in itertools.pairwise(trial.attempts):
            lost_early = one.outcome == Outcome.LOST and other.claimed < one.lease_until
            if lost_early and not (
                _was_seen(evidence, one, other) or was_a_lost_reply(evidence, trial, one)
            ):
                yield trial.number, f"had attempt {other.number} within the lease of {one.number}"


def was_a_lost_reply(evidence: Evidence, trial: Trial, one: Any) -> bool:
    """Whether it may be a claim whose reply was lost.

    Its own worker closes such a claim when the GPU-hours are spent. They may be raised just then.
    """
    has_trained = any(row.attempt == one.number for row in trial.epochs)
    return evidence.max_gpu_seconds is not None and not has_trained


def _was_seen(evidence: Evidence, one: Any, other: Any) -> bool:
    """Whether somebody could see that the holder had ended, before the other claim.

    That need not be who claimed: the one who saw it may have withdrawn a claim of its own.
    """
    holder = evidence.workers.get(one.worker_id)
    if one.reason == RESTORED or holder is None or holder.slurm_cluster is not None:
        return True
    machine, _, _ = holder.process.rsplit(":", 2)  # pid and start follow
    return any(
        worker.process.startswith(f"{machine}:")
        and worker.id != holder.id
        and worker.started <= other.claimed
        for worker in evidence.workers.values()
    )


def an_attempt_that_has_ended_says_how(evidence: Evidence) -> Found:
    for trial in evidence.trials:
        for row in trial.attempts:
            if (row.released is None) != (row.outcome is None):
                when = "no end" if row.released is None else "an end"
                yield trial.number, f"has attempt {row.number} with {when} and the outcome {row.outcome}"
            elif row.outcome is not None and row.outcome not in OUTCOMES:
                yield trial.number, f"has attempt {row.number} with an unknown outcome, {row.outcome!r}"
            elif row.released is not None and row.released < row.claimed:
                yield trial.number, f"has attempt {row.number}, which ended before it began"


def a_worker_takes_trials_while_it_is_signed_on(evidence: Evidence) -> Found:
    """Also: a restored database refuses the workers of the time before, who count as stopped there."""
    for trial in evidence.trials:
        for row in trial.attempts:
            worker = evidence.workers.get(row.worker_id)
            if worker is None:
                yield trial.number, f"has attempt {row.number} of a worker that is not on record"
            elif row.claimed < worker.started:
                yield trial.number, f"had attempt {row.number} before its worker had begun"
            elif worker.stopped is not None and worker.stopped < row.claimed:
                yield trial.number, f"had attempt {row.number} after its worker had signed off"


def rows_are_of_the_study_of_their_trial(evidence: Evidence) -> Found:
    for trial in evidence.trials:
        for row in (*trial.attempts, *trial.epochs):
            if row.study_id != evidence.entry.study_id:
                yield trial.number, f"has rows of study {row.study_id}, and is of another"
                break


def a_trial_ends_once(evidence: Evidence) -> Found:
    for trial in evidence.trials:
        early = [row.number for row in trial.attempts[:-1] if row.outcome in ENDS.values()]
        if early:
            yield trial.number, f"goes on after attempt {early[0]}, which ended it"
        if trial.outcome in ENDS.values() and trial.outcome != ENDS.get(trial.state):
            yield trial.number, f"is {trial.state} in Optuna, and its last attempt is {trial.outcome}"
        if trial.attempts and trial.state == "WAITING":
            yield (
                trial.number,
                f"is WAITING in Optuna, and has begun with {counted(len(trial.attempts), 'attempt')}",
            )


def every_trial_was_ended_by_a_worker(evidence: Evidence) -> Found:
    for trial in evidence.trials:
        # Spent GPU-hours end a trial that nobody holds.
        is_cut = trial.state == "PRUNED" and evidence.max_gpu_seconds is not None
        if trial.outcome != ENDS.get(trial.state, "held by nobody") and not is_cut:
            yield trial.number, f"is {trial.state} in Optuna, and its last attempt is {trial.outcome}"


def no_trial_has_failed(evidence: Evidence) -> Found:
    for trial in evidence.trials:
        if trial.state == "FAIL":
            reasons = [row.reason for row in trial.attempts if row.outcome in ("error", "failed")]
            yield trial.number, f"has failed: {reasons}"
