"""Open, lock, close and read the attempts at trials, within the caller's transaction."""

import sqlalchemy as sa
from sqlalchemy.orm import Session

from storage import recording
from storage.clock import now
from storage.optuna_tables import TrialModel
from storage.outcome import LEFT, Outcome
from storage.tables import Attempt, Worker


def lock_open_attempt(session: Session, trial_id: int) -> tuple[Attempt, bool] | None:
    """Lock a trial's open attempt. Returns it, and whether its lease lasts; None without one."""
    row = session.execute(
        sa.select(Attempt, Attempt.lease_until > now())
        .where(Attempt.trial_id == trial_id, Attempt.released.is_(None))
        .with_for_update()
    ).one_or_none()
    return None if row is None else (row[0], row[1])


def open_attempt(
    session: Session, study_id: int, trial_id: int, worker_id: str | None, lease_seconds: float
) -> int:
    """Add a worker's attempt at a trial without an open attempt. Returns its number."""
    last = session.scalar(sa.select(sa.func.max(Attempt.number)).where(Attempt.trial_id == trial_id))
    number = (last or 0) + 1
    session.execute(
        sa.insert(Attempt).values(
            trial_id=trial_id,
            number=number,
            study_id=study_id,
            worker_id=worker_id,
            claimed=now(),
            renewed=now(),
            lease_until=recording.lease_end(lease_seconds),
        )
    )
    return number


def close_attempt(attempt: Attempt, outcome: Outcome, reason: str | None) -> None:
    """End an attempt now."""
    attempt.released = attempt.renewed = now()
    attempt.outcome, attempt.reason = outcome, reason


def close_if_ended(attempt: Attempt, trial: TrialModel) -> str | None:
    """Close an attempt as lost if somebody has ended the trial, as in optuna-dashboard. Returns how."""
    if not trial.state.is_finished():
        return None
    how = f"the trial was set to {trial.state.name} by somebody else"
    close_attempt(attempt, Outcome.LOST, how)
    return how


def close_lost_attempt(attempt: Attempt) -> None:
    """End a gone worker's attempt, as of its last renewal: until then it surely lived."""
    attempt.released = attempt.renewed
    attempt.outcome, attempt.reason = Outcome.LOST, LEFT


def release_all(connection: sa.Connection, worker_id: str | None, reason: str) -> None:
    """Give back whatever a worker holds."""
    connection.execute(
        sa.update(Attempt)
        .where(Attempt.worker_id == worker_id, Attempt.released.is_(None))
        .values(released=now(), renewed=now(), outcome=Outcome.RELEASED, reason=reason)
    )


def hosts_of_failures(session: Session, trial_id: int) -> list[str]:
    """The host of each attempt at a trial that ended with an error."""
    query = (
        sa.select(Worker.host)
        .join(Attempt, Attempt.worker_id == Worker.id)
        .where(Attempt.trial_id == trial_id, Attempt.outcome == Outcome.ERROR)
    )
    return list(session.scalars(query))
