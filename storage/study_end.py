"""End a study: close the attempts of gone workers, and prune the paused trials in Optuna."""

from collections.abc import Collection

import sqlalchemy as sa

from storage.attempts import close_lost_attempt, lock_open_attempt
from storage.liveness import Liveness
from storage.optuna_tables import TRIALS, TrialState, end_trial
from storage.outcome import NEVER_AMONG_THE_BEST, SPENT, Outcome
from storage.tables import ATTEMPTS, EPOCHS
from storage.trial_queue import PAUSED_TRIALS


def close_the_dead(
    connection: sa.Connection,
    study_id: int,
    liveness: Liveness,
    worker_id: str | None,
    held: Collection[int],
) -> None:
    """Close the attempts of workers that ended without signing off: nobody will take their trials.

    This worker's own attempts at trials that are not `held` are closed too. They are from claims whose
    reply was lost.
    """
    is_open = sa.and_(ATTEMPTS.c.study_id == study_id, ATTEMPTS.c.released.is_(None))
    query = sa.select(ATTEMPTS.c.trial_id).where(is_open).order_by(ATTEMPTS.c.trial_id)
    for trial_id in connection.scalars(query).all():
        attempt = lock_open_attempt(connection, trial_id)
        if attempt is not None and trial_id not in held:
            is_ours = attempt.worker_id == worker_id
            if is_ours or not liveness.get(attempt.worker_id, attempt.lease_lasts):
                close_lost_attempt(connection, trial_id, attempt.number)


def prune_the_rest(connection: sa.Connection, study_id: int, spent: bool) -> None:
    """Prune the paused trials; if the GPU-hours are spent, all trials in state RUNNING."""
    ending = sa.select(TRIALS.c.trial_id).where(
        TRIALS.c.study_id == study_id, TRIALS.c.state == TrialState.RUNNING
    )
    if not spent:
        paused = sa.text(PAUSED_TRIALS).bindparams(study_id=study_id).columns(ATTEMPTS.c.trial_id)
        ending = ending.where(TRIALS.c.trial_id.in_(paused))
    why = f", and {SPENT if spent else NEVER_AMONG_THE_BEST}"
    for trial_id in connection.scalars(ending.with_for_update()).all():
        values = sa.select(EPOCHS.c.value).where(EPOCHS.c.trial_id == trial_id)
        value = connection.scalar(values.order_by(EPOCHS.c.epoch.desc()).limit(1))
        end_trial(connection, trial_id, TrialState.PRUNED, value, {})
        numbers = sa.select(sa.func.max(ATTEMPTS.c.number)).where(ATTEMPTS.c.trial_id == trial_id)
        last = numbers.scalar_subquery()
        connection.execute(
            sa.update(ATTEMPTS)
            .where(ATTEMPTS.c.trial_id == trial_id, ATTEMPTS.c.number == last)
            .where(ATTEMPTS.c.outcome == Outcome.PAUSED)
            .values(outcome=Outcome.PRUNED, reason=ATTEMPTS.c.reason + why)
        )
