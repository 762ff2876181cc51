"""End a study: close the attempts of gone workers, and prune the paused trials in Optuna."""

from collections.abc import Collection

import sqlalchemy as sa
from optuna.trial import TrialState
from sqlalchemy.orm import Session

from storage.attempts import close_lost_attempt, lock_open_attempt
from storage.liveness import Liveness
from storage.optuna_tables import TrialModel, end_trial
from storage.outcome import NEVER_AMONG_THE_BEST, SPENT, Outcome
from storage.tables import Attempt, Epoch
from storage.trial_queue import PAUSED_TRIALS


def close_the_dead(
    session: Session,
    study_id: int,
    liveness: Liveness,
    worker_id: str | None,
    held: Collection[int],
) -> None:
    """Close the attempts of workers that ended without signing off: nobody will take their trials.

    This worker's own attempts at trials that are not `held` are closed too. They are from claims whose
    reply was lost.
    """
    is_open = sa.and_(Attempt.study_id == study_id, Attempt.released.is_(None))
    query = sa.select(Attempt.trial_id).where(is_open).order_by(Attempt.trial_id)
    for trial_id in session.scalars(query).all():
        row = lock_open_attempt(session, trial_id)
        if row is not None and trial_id not in held:
            attempt, lease_lasts = row
            is_ours = attempt.worker_id == worker_id
            if is_ours or not liveness.get(attempt.worker_id, lease_lasts):
                close_lost_attempt(attempt)


def prune_the_rest(session: Session, study_id: int, spent: bool) -> None:
    """Prune the paused trials; if the GPU-hours are spent, all trials in state RUNNING."""
    ending = sa.select(TrialModel).where(
        TrialModel.study_id == study_id, TrialModel.state == TrialState.RUNNING
    )
    if not spent:
        paused = sa.text(PAUSED_TRIALS).bindparams(study_id=study_id).columns(Attempt.trial_id)
        ending = ending.where(TrialModel.trial_id.in_(paused))
    for trial in session.scalars(ending.with_for_update()).all():
        values = sa.select(Epoch.value).where(Epoch.trial_id == trial.trial_id)
        value = session.scalar(values.order_by(Epoch.epoch.desc()).limit(1))
        end_trial(session, trial, TrialState.PRUNED, value, {})
        attempts = sa.select(Attempt).where(Attempt.trial_id == trial.trial_id)
        last = session.scalar(attempts.order_by(Attempt.number.desc()).limit(1))
        if last is not None and last.outcome == Outcome.PAUSED:
            last.outcome = Outcome.PRUNED
            last.reason = f"{last.reason}, and {SPENT if spent else NEVER_AMONG_THE_BEST}"
