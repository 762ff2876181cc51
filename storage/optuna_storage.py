"""Optuna's own storage on our database: the only file of this package that imports Optuna."""

import optuna
import sqlalchemy as sa
from optuna.storages import BaseStorage as BaseStorage
from sqlalchemy.exc import SQLAlchemyError

from storage.database import WORK, Sessions, pool, watched
from storage.tables import SCHEMA
from storage.url import DatabaseError

# Errors of the database: they are not the trial's fault.
DATABASE_ERRORS = (SQLAlchemyError, optuna.exceptions.StorageInternalError, DatabaseError)


def show_optunas_tables(connection: sa.Connection) -> None:
    """Let programs such as optuna-dashboard find Optuna's tables before ours: see WORK."""
    role, name = connection.execute(sa.text("SELECT current_user, current_database()")).one()
    if role == SCHEMA:
        database = connection.dialect.identifier_preparer.quote_identifier(name)
        connection.execute(
            sa.text(f"ALTER ROLE {SCHEMA} IN DATABASE {database} SET search_path = public")
        )


def optuna_storage(
    engine: sa.Engine, sessions: Sessions = WORK, make_tables: bool = True
) -> BaseStorage:
    """Optuna's storage on the same database, with its cache of finished trials.

    Raises DatabaseError if Optuna's tables were made by another version.
    """
    return with_engine(engine.url, sessions, make_tables)[0]


def with_engine(
    url: sa.URL, sessions: Sessions, make_tables: bool = False
) -> tuple[BaseStorage, sa.Engine]:
    """Optuna's storage as above, and its engine, so that others can use the same connections."""
    try:
        storage = optuna.storages.RDBStorage(
            url.render_as_string(hide_password=False),
            engine_kwargs=pool(url, sessions),
            skip_table_creation=not make_tables,
        )
    except RuntimeError as error:
        raise DatabaseError(f"Optuna cannot use this database: {error}".replace("\n", " ")) from error
    return optuna.storages.get_storage(storage), watched(storage.engine, sessions)
