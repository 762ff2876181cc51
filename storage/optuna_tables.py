"""The one door to Optuna's tables: its models, and its storage on our engine."""

import optuna
import sqlalchemy as sa
from optuna.storages._rdb.models import (
    BaseModel,
    StudyModel,
    TrialIntermediateValueModel,
    TrialModel,
    TrialParamModel,
    TrialSystemAttributeModel,
    TrialUserAttributeModel,
    TrialValueModel,
    VersionInfoModel,
)

from storage.database import WORK, Sessions, follow_failovers, pool
from storage.tables import SCHEMA
from storage.url import DatabaseError

__all__ = [
    "BaseModel",
    "StudyModel",
    "TrialIntermediateValueModel",
    "TrialModel",
    "TrialParamModel",
    "TrialSystemAttributeModel",
    "TrialUserAttributeModel",
    "TrialValueModel",
    "VersionInfoModel",
    "optuna_storage",
    "show_optunas_tables",
]


def show_optunas_tables(connection: sa.Connection) -> None:
    """Let other programs, as optuna-dashboard, find Optuna's tables before ours: see WORK."""
    role, name = connection.execute(sa.text("SELECT current_user, current_database()")).one()
    if role == SCHEMA:
        database = connection.dialect.identifier_preparer.quote_identifier(name)
        connection.execute(
            sa.text(f"ALTER ROLE {SCHEMA} IN DATABASE {database} SET search_path = public")
        )


def optuna_storage(
    engine: sa.Engine, sessions: Sessions = WORK, make_tables: bool = True
) -> optuna.storages.BaseStorage:
    """Optuna's storage on the same database, with its cache of finished trials.

    Raises DatabaseError if Optuna's tables were made by another version.
    """
    try:
        storage = optuna.storages.RDBStorage(
            engine.url.render_as_string(hide_password=False),
            engine_kwargs=pool(engine.url, sessions),
            skip_table_creation=not make_tables,
        )
    except RuntimeError as error:
        raise DatabaseError(f"Optuna cannot use this database: {error}".replace("\n", " ")) from error
    follow_failovers(storage.engine, sessions)
    return optuna.storages.get_storage(storage)
