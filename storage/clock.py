"""The time of day, which is the database's: leases, claims and ends are all measured on this clock."""

from typing import Any

import sqlalchemy as sa

# Not now(), which is when the transaction began: it may have waited for a lock since. No query asks
# for the time in another way, so whoever gives a database a clock_timestamp() of its own moves the
# time of every lease (benchmarks/search_efficiency.py does).
NOW = "clock_timestamp()"


def now() -> sa.ColumnElement[Any]:
    """The same for a statement that is no text."""
    return sa.func.clock_timestamp()


def seconds_since(moment: Any) -> sa.ColumnElement[Any]:
    """How long ago a moment was."""
    return sa.extract("epoch", now() - moment)
