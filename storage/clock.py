"""The time of day, which is the database's: leases, claims and ends are all measured on this clock."""

from typing import Any

import sqlalchemy as sa

# Not now(), which is when the transaction began: it may have waited for a lock since. All times of
# leases, attempts and ends come from this one expression. So a simulation moves them all by giving the
# database a clock_timestamp() of its own, as benchmarks/search_efficiency.py does. Only when a row was
# entered (`created`, `started`, `submitted`, `recorded`) is the server's default, now().
NOW = "clock_timestamp()"


def now() -> sa.ColumnElement[Any]:
    """The same for a statement that is no text."""
    return sa.literal_column(NOW)


def seconds_since(moment: Any) -> sa.ColumnElement[Any]:
    """How long ago a moment was."""
    return sa.extract("epoch", now() - moment)
