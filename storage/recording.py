"""The SQL statements that renew a lease and record or mark an epoch, in one round trip."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa

from storage.clock import NOW
from storage.tables import EPOCHS
from storage.usage import IS_SPENT

_LEASE_END = f"{NOW} + make_interval(secs => :lease_seconds)"

# The UPDATE of `held` is the fence. It finds the attempt only while that is open, and locks it until the
# whole statement is done. If it finds none, nothing is recorded and no row is returned.
_RENEWAL = f"""
held AS (
    UPDATE atelier.attempt
    SET renewed = {NOW}, lease_until = {_LEASE_END}
    WHERE trial_id = :trial_id AND number = :attempt AND worker_id = :worker_id AND released IS NULL
    RETURNING trial_id, renewed
), seen AS (
    UPDATE atelier.worker SET last_seen = {NOW}, peak_memory = :peak_memory WHERE id = :worker_id
)
"""
_ANSWER = f"""
SELECT
    (SELECT stop_requested IS NOT NULL FROM atelier.study WHERE study_id = :study_id) AS stopped,
    ({IS_SPENT}) AS spent
FROM held
"""
RENEW = sa.text(f"WITH {_RENEWAL} {_ANSWER}")

MARK = sa.text(f"""
WITH {_RENEWAL}, marked AS (
    UPDATE atelier.epoch SET again = CAST(:again AS jsonb)
    FROM held WHERE epoch.trial_id = held.trial_id AND epoch.epoch = :epoch
)
{_ANSWER}
""")

# All columns of the table, so that a new metric is added only there.
_COLUMNS = [column for column in EPOCHS.columns if column.name not in ("recorded", "again")]
# Of a result that says nothing of how busy the worker was.
UNKNOWN = dict.fromkeys(
    name for column in _COLUMNS if (name := column.name) == "busy" or name.startswith("waited_for_")
)
RECORD = sa.text(f"""
WITH {_RENEWAL}, epoch_entry AS (
    INSERT INTO atelier.epoch (recorded, {", ".join(column.name for column in _COLUMNS)})
    SELECT renewed, {", ".join(f":{column.name}" for column in _COLUMNS)} FROM held
    ON CONFLICT DO NOTHING
), value_for_optuna AS (
    INSERT INTO trial_intermediate_values
        (trial_id, step, intermediate_value, intermediate_value_type)
    SELECT :trial_id, :epoch, :intermediate_value, :intermediate_value_type FROM held
    ON CONFLICT DO NOTHING
)
{_ANSWER}
""").bindparams(*(sa.bindparam(column.name, type_=column.type) for column in _COLUMNS))


def lease_end(seconds: float) -> sa.TextClause:
    """The end of a lease that begins now."""
    return sa.text(_LEASE_END).bindparams(lease_seconds=seconds)


def run(
    engine: sa.Engine, statement: sa.TextClause, parameters: Mapping[str, Any]
) -> tuple[bool, bool] | None:
    """Run the statement. Returns whether the study is stopped, and whether its budget is spent.

    Returns None if the claim is lost.
    """
    with autocommitting(engine) as connection:
        answer = connection.execute(statement, parameters).one_or_none()
    return None if answer is None else (bool(answer.stopped), bool(answer.spent))


@contextmanager
def autocommitting(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A connection for a single statement, without the round trips of BEGIN and COMMIT."""
    with engine.connect() as connection:
        # Not through SQLAlchemy's isolation level: resetting that is a round trip too.
        driver: Any = connection.connection.dbapi_connection
        driver.autocommit = True
        try:
            yield connection
        finally:
            if not driver.closed:
                driver.autocommit = False
