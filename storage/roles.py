"""Ways into a database with fewer rights than its owner's."""

import logging
from typing import NamedTuple

import optuna
import sqlalchemy as sa

from storage.database import PAGES, WORK, Sessions, log, make_engine, retrying
from storage.network import VIEWER, WORKER
from storage.optuna_tables import optuna_storage
from storage.properties import is_owner, why_without


class Restricted(NamedTuple):
    """Ways into a database with fewer rights than its owner's."""

    engine: sa.Engine
    storage: optuna.storages.BaseStorage
    has_role: bool  # a role sees to it; else nothing does, or the connection's own setting


def read_only(engine: sa.Engine) -> Restricted:
    """Look at the same database as the role `atelier_viewer`, which may only SELECT.

    Where this user may not act as the role, transactions are read-only because the connection asks for
    it.
    """
    return _restricted(engine, VIEWER, PAGES.having(default_transaction_read_only="on"))


@retrying
def for_worker(engine: sa.Engine) -> Restricted:
    """Work in the same database as the role `atelier_worker`: it deletes no study and alters no table.

    Where this user may not act as the role, the worker has this user's rights, and says so.
    Raises DatabaseError.
    """
    work = _restricted(engine, WORKER, WORK)
    if not work.has_role:
        with engine.connect() as connection:
            owner = is_owner(connection)
            why = why_without(connection, WORKER)
        # The owner was told when the tables were made.
        log.log(logging.INFO if owner else logging.WARNING, "with all rights of this user: %s", why)
    return work


def _restricted(engine: sa.Engine, role: str, sessions: Sessions) -> Restricted:
    with engine.connect() as connection:
        has_role = why_without(connection, role) is None
    sessions = sessions.having(role=role) if has_role else sessions
    other = make_engine(engine.url, sessions)
    return Restricted(other, optuna_storage(engine, sessions, make_tables=False), has_role)
