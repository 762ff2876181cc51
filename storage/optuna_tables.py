"""The only file that imports Optuna's table models; it starts and ends trials as Optuna does."""

import json
from collections.abc import Mapping
from typing import Any

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
from optuna.trial import TrialState
from sqlalchemy.orm import Session

from storage.clock import now
from storage.database import WORK, Sessions, pool, watched
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
    "add_trial",
    "begin_trial",
    "end_trial",
    "optuna_storage",
    "show_optunas_tables",
    "with_engine",
]


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
) -> optuna.storages.BaseStorage:
    """Optuna's storage on the same database, with its cache of finished trials.

    Raises DatabaseError if Optuna's tables were made by another version.
    """
    return with_engine(engine.url, sessions, make_tables)[0]


def with_engine(
    url: sa.URL, sessions: Sessions, make_tables: bool = False
) -> tuple[optuna.storages.BaseStorage, sa.Engine]:
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


def add_trial(session: Session, study_id: int) -> list[int]:
    """Add a trial and start it, as Study.ask does. Returns Optuna's id of it; none of a deleted study.

    Not by Optuna's storage: that tries again by itself if the reply to its commit is lost, and may add
    two trials. Here the trial is added with its first attempt, or not at all.
    """
    study = session.get(StudyModel, study_id, with_for_update=True)  # two must not get one number
    if study is None:
        return []
    trial = TrialModel(study_id=study_id, number=None, state=TrialState.RUNNING)
    trial._datetime_start_utc = _utc_now()
    session.add(trial)
    session.flush()
    trial.number = trial.count_past_trials(session)
    session.flush()
    return [int(trial.trial_id)]


def begin_trial(trial: TrialModel) -> None:
    """Start an enqueued trial: write what Study.ask writes."""
    trial.state = TrialState.RUNNING
    trial._datetime_start_utc = _utc_now()


def end_trial(
    session: Session,
    trial: TrialModel,
    state: TrialState,
    value: float | None,
    system_attributes: Mapping[str, Any],
) -> None:
    """End a trial: write what Study.tell writes, and system attributes."""
    trial.state = state
    trial._datetime_complete_utc = _utc_now()
    if value is not None:
        stored, kind = TrialValueModel.value_to_stored_repr(value)
        session.add(TrialValueModel(trial_id=trial.trial_id, objective=0, value=stored, value_type=kind))
    for key, content in system_attributes.items():
        session.add(
            TrialSystemAttributeModel(trial_id=trial.trial_id, key=key, value_json=json.dumps(content))
        )


def _utc_now() -> sa.ColumnElement[Any]:
    return sa.func.timezone("UTC", now())  # Optuna 5 keeps naive UTC
