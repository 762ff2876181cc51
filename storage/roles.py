"""Connect to a database as the viewer or worker role, which have fewer rights than its owner."""

import logging
from typing import NamedTuple

import sqlalchemy as sa

from storage.database import PAGES, WORK, Sessions, log, retrying
from storage.network import VIEWER, WORKER
from storage.optuna_storage import BaseStorage, with_engine
from storage.properties import is_owner, why_without


class Restricted(NamedTuple):
    """A connection with fewer rights than the owner's."""

    engine: sa.Engine
    storage: BaseStorage
    has_role: bool  # whether a role limits the rights; if not, at most a setting of the connection does


def read_only(engine: sa.Engine) -> Restricted:
    """Connect to the same database as the role `atelier_viewer`, which may only SELECT.

    If this user may not act as the role, the connection asks for read-only transactions instead.
    """
    return _restricted(engine, VIEWER, PAGES.having(default_transaction_read_only="on"))


@retrying
def for_worker(engine: sa.Engine) -> Restricted:
    """Connect to the same database as the role `atelier_worker`, which can only fill tables.

    If this user may not act as the role, the worker has this user's rights, and logs that.
    Raises DatabaseError.
    """
    work = _restricted(engine, WORKER, WORK)
    if not work.has_role:
        with engine.connect() as connection:
            owner = is_owner(connection)
            why = why_without(connection, WORKER)
        # The owner was warned when the tables were made, so a log line is enough.
        log.log(logging.INFO if owner else logging.WARNING, "with all rights of this user: %s", why)
    return work


def _restricted(engine: sa.Engine, role: str, sessions: Sessions) -> Restricted:
    with engine.connect() as connection:
        has_role = why_without(connection, role) is None
    sessions = sessions.having(role=role) if has_role else sessions
    storage, restricted = with_engine(engine.url, sessions)
    return Restricted(restricted, storage, has_role)
