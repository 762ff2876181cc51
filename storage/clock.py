"""The database's clock: SQL for the time of leases, claims and ends."""

import time
from typing import Any

import sqlalchemy as sa

# Not now(): that is when the transaction began, and it may have waited for a lock since. All times of
# workers, leases, attempts, epochs and ends come from this expression. So rules may compare them
# (search/verify), and a simulation moves them all with its own clock_timestamp() in the database, as
# benchmarks/search_efficiency.py does. Only the times when a study was `created` and a job `submitted`
# are the server's default, now().
NOW = "clock_timestamp()"


def now() -> sa.ColumnElement[Any]:
    """NOW for a statement that SQLAlchemy builds."""
    return sa.literal_column(NOW)


def clock_lead(connection: sa.Connection) -> float:
    """By how many seconds this machine's clock is ahead of the database's."""
    before = time.time()
    theirs = connection.scalar(sa.select(sa.cast(sa.extract("epoch", now()), sa.Double)))
    return (before + time.time()) / 2 - float(theirs or 0)


def seconds_since(moment: Any) -> sa.ColumnElement[Any]:
    """The seconds since a moment, by the database's clock."""
    return sa.extract("epoch", now() - moment)
