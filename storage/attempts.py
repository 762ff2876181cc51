"""Open, lock, close and read the attempts at trials, within the caller's transaction."""

from typing import Any

import sqlalchemy as sa

from storage import recording
from storage.clock import now
from storage.optuna_tables import TrialState
from storage.outcome import LEFT, Outcome
from storage.tables import ATTEMPTS, WORKERS, Row


def is_attempt(trial_id: int, number: int) -> sa.ColumnElement[bool]:
    """Selects one attempt."""
    return sa.and_(ATTEMPTS.c.trial_id == trial_id, ATTEMPTS.c.number == number)


def lock_open_attempt(connection: sa.Connection, trial_id: int) -> Row | None:
    """Lock a trial's open attempt. Returns its row, with whether its `lease_lasts`; None without one."""
    is_open = sa.and_(ATTEMPTS.c.trial_id == trial_id, ATTEMPTS.c.released.is_(None))
    lease_lasts = (ATTEMPTS.c.lease_until > now()).label("lease_lasts")
    query = sa.select(ATTEMPTS, lease_lasts).where(is_open).with_for_update()
    return connection.execute(query).one_or_none()


def lock_attempt(connection: sa.Connection, trial_id: int, number: int) -> Row | None:
    """Lock an attempt at a trial. Returns its row; None if there is none of this number."""
    query = sa.select(ATTEMPTS).where(is_attempt(trial_id, number)).with_for_update()
    return connection.execute(query).one_or_none()


def open_attempt(
    connection: sa.Connection, study_id: int, trial_id: int, worker_id: str | None, lease_seconds: float
) -> int:
    """Add a worker's attempt at a trial without an open attempt. Returns its number."""
    last = connection.scalar(
        sa.select(sa.func.max(ATTEMPTS.c.number)).where(ATTEMPTS.c.trial_id == trial_id)
    )
    number = (last or 0) + 1
    connection.execute(
        sa.insert(ATTEMPTS).values(
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


def close_attempt(
    connection: sa.Connection, trial_id: int, number: int, outcome: Outcome, reason: str | None
) -> None:
    """End an attempt now."""
    _update(connection, trial_id, number, released=now(), renewed=now(), outcome=outcome, reason=reason)


def close_if_ended(
    connection: sa.Connection, trial_id: int, number: int, state: TrialState
) -> str | None:
    """Close an attempt as lost if somebody has ended the trial, as in optuna-dashboard. Returns how."""
    if not state.is_finished():
        return None
    how = f"the trial was set to {state} by somebody else"
    close_attempt(connection, trial_id, number, Outcome.LOST, how)
    return how


def close_lost_attempt(connection: sa.Connection, trial_id: int, number: int) -> None:
    """End a gone worker's attempt, as of its last renewal: until then it surely lived."""
    end = ATTEMPTS.c.renewed
    _update(connection, trial_id, number, released=end, outcome=Outcome.LOST, reason=LEFT)


def _update(connection: sa.Connection, trial_id: int, number: int, **values: Any) -> None:
    connection.execute(sa.update(ATTEMPTS).where(is_attempt(trial_id, number)).values(values))


def release_all(connection: sa.Connection, worker_id: str | None, reason: str) -> None:
    """Give back whatever a worker holds."""
    connection.execute(
        sa.update(ATTEMPTS)
        .where(ATTEMPTS.c.worker_id == worker_id, ATTEMPTS.c.released.is_(None))
        .values(released=now(), renewed=now(), outcome=Outcome.RELEASED, reason=reason)
    )


def hosts_of_failures(connection: sa.Connection, trial_id: int) -> list[str]:
    """The host of each attempt at a trial that ended with an error."""
    query = (
        sa.select(WORKERS.c.host)
        .join(ATTEMPTS, ATTEMPTS.c.worker_id == WORKERS.c.id)
        .where(ATTEMPTS.c.trial_id == trial_id, ATTEMPTS.c.outcome == Outcome.ERROR)
    )
    return list(connection.scalars(query))
