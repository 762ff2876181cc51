"""What we read and write of Optuna's tables, without its import; it starts and ends trials.

That import would take as long as SQLAlchemy's. A test compares these columns with Optuna's own.
"""

import json
import math
from collections.abc import Mapping
from enum import StrEnum
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy import DateTime, Double, Integer, Text

from storage.clock import now
from storage.tables import Row


class TrialState(StrEnum):
    """The names that Optuna's table has for the states of optuna.trial.TrialState."""

    RUNNING = "RUNNING"
    COMPLETE = "COMPLETE"
    PRUNED = "PRUNED"
    FAIL = "FAIL"
    WAITING = "WAITING"

    def is_finished(self) -> bool:
        """Whether the trial has ended."""
        return self not in UNFINISHED


UNFINISHED = (TrialState.RUNNING, TrialState.WAITING)


def _table(name: str, **columns: Any) -> sa.TableClause:
    return sa.table(name, *(sa.column(column, kind) for column, kind in columns.items()))


def _attributes(of: str, whose: str) -> sa.TableClause:
    name = f"{of}_{whose}_attribute"
    keys = {f"{name}_id": Integer, f"{of}_id": Integer}
    return _table(f"{name}s", **keys, key=Text, value_json=Text)


# The first column of each is its key.
STUDY_NAMES = _table("studies", study_id=Integer, study_name=Text)
TRIALS = _table(
    "trials",
    trial_id=Integer,
    number=Integer,  # from 0, in its study
    study_id=Integer,
    state=sa.Enum(TrialState),
    datetime_start=DateTime,  # UTC, naive
    datetime_complete=DateTime,
)
PARAMS = _table(
    "trial_params",
    param_id=Integer,
    trial_id=Integer,
    param_name=Text,
    param_value=Double,
    distribution_json=Text,
)
VALUES = _table(
    "trial_values",
    trial_value_id=Integer,
    trial_id=Integer,
    objective=Integer,
    value=Double,
    value_type=Text,
)
USER_ATTRIBUTES = _attributes("trial", "user")
SYSTEM_ATTRIBUTES = _attributes("trial", "system")
VERSION = _table("version_info", version_info_id=Integer, schema_version=Integer, library_version=Text)
# All of Optuna's tables, parents first.
OPTUNAS_TABLES = (
    VERSION,
    STUDY_NAMES,
    _table(
        "study_directions",
        study_direction_id=Integer,
        direction=Text,
        study_id=Integer,
        objective=Integer,
    ),
    _attributes("study", "system"),
    _attributes("study", "user"),
    TRIALS,
    _table("trial_heartbeats", trial_heartbeat_id=Integer, trial_id=Integer, heartbeat=DateTime),
    _table(
        "trial_intermediate_values",
        trial_intermediate_value_id=Integer,
        trial_id=Integer,
        step=Integer,
        intermediate_value=Double,
        intermediate_value_type=Text,
    ),
    PARAMS,
    SYSTEM_ATTRIBUTES,
    USER_ATTRIBUTES,
    VALUES,
)

# The user attribute of an audited trial: the "epoch" after which its strategy would first have stopped
# it, and the "verdict" then.
AUDIT = "atelier:audit"


def add_trial(connection: sa.Connection, study_id: int) -> list[int]:
    """Add a trial and start it, as Study.ask does. Returns Optuna's id of it; none of a deleted study.

    Not by Optuna's storage: that tries again by itself if the reply to its commit is lost, and may add
    two trials. Here the trial is added with its first attempt, or not at all.
    """
    study = sa.select(STUDY_NAMES.c.study_id).where(STUDY_NAMES.c.study_id == study_id)
    if connection.scalar(study.with_for_update()) is None:  # two must not get one number
        return []
    count = sa.select(sa.func.count()).select_from(TRIALS).where(TRIALS.c.study_id == study_id)
    trial = sa.insert(TRIALS).values(
        study_id=study_id,
        number=count.scalar_subquery(),
        state=TrialState.RUNNING,
        datetime_start=_utc_now(),
    )
    return [connection.execute(trial.returning(TRIALS.c.trial_id)).scalar_one()]


def lock_trial(connection: sa.Connection, trial_id: int) -> Row:
    """Lock a trial's row until the transaction ends. Returns it."""
    query = sa.select(TRIALS).where(TRIALS.c.trial_id == trial_id)
    return connection.execute(query.with_for_update()).one()


def rename_params(connection: sa.Connection, trial_id: int, suffix: str) -> None:
    """Let the names of a trial's parameters end so, if they do not yet."""
    name = PARAMS.c.param_name
    to_rename = sa.update(PARAMS).where(PARAMS.c.trial_id == trial_id, ~name.endswith(suffix))
    connection.execute(to_rename.values(param_name=name + suffix))


def begin_trial(connection: sa.Connection, trial_id: int) -> None:
    """Start an enqueued trial: write what Study.ask writes."""
    _update(connection, trial_id, state=TrialState.RUNNING, datetime_start=_utc_now())


def end_trial(
    connection: sa.Connection,
    trial_id: int,
    state: TrialState,
    value: float | None,
    system_attributes: Mapping[str, Any],
) -> None:
    """End a trial: write what Study.tell writes, and system attributes. The value is no NaN."""
    _update(connection, trial_id, state=state, datetime_complete=_utc_now())
    if value is not None:
        number, kind = stored(value)
        row = {"trial_id": trial_id, "objective": 0, "value": number, "value_type": kind}
        connection.execute(sa.insert(VALUES).values(row))
    for key, content in system_attributes.items():
        row = {"trial_id": trial_id, "key": key, "value_json": json.dumps(content)}
        connection.execute(sa.insert(SYSTEM_ATTRIBUTES).values(row))


def _update(connection: sa.Connection, trial_id: int, **values: Any) -> None:
    connection.execute(sa.update(TRIALS).where(TRIALS.c.trial_id == trial_id).values(values))


def _utc_now() -> sa.ColumnElement[Any]:
    return sa.func.timezone("UTC", now())  # Optuna 5 keeps naive UTC


def stored(value: float) -> tuple[float | None, str]:
    """A value in the form of Optuna's tables: a finite number or None, and the name of its kind.

    Only the table of intermediate values has the kind NAN.
    """
    if math.isnan(value):
        return None, "NAN"
    if math.isinf(value):
        return None, "INF_POS" if value > 0 else "INF_NEG"
    return value, "FINITE"


@lru_cache  # few distributions differ
def _distribution(text: str) -> tuple[str, list[Any]]:
    distribution = json.loads(text)
    return distribution["name"], distribution["attributes"].get("choices", [])


def parameter(row: Row) -> Any:
    """A parameter's value, from its row in PARAMS. Optuna stores a number, such as a choice's index."""
    name, choices = _distribution(row.distribution_json)
    if name == "CategoricalDistribution":
        return choices[int(row.param_value)]
    return int(row.param_value) if name.startswith("Int") else row.param_value
