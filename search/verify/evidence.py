"""Read all that is on record of a study, as raw rows: what the rules of search/verify/rules.py judge."""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from optuna.distributions import json_to_distribution

from search.confirm.plan import recorded
from search.errors import InputError
from search.study_config import StudyConfig
from storage.paths import RunFolder
from storage.studies import study_entry


@dataclass
class Trial:
    """One trial with all that is on record of it. `attempts` and `epochs` are rows of those tables."""

    trial_id: int  # Optuna's
    number: int
    state: str  # the name of Optuna's
    params: dict[str, Any] = field(default_factory=dict)
    values: list[float | None] = field(default_factory=list)  # None for an infinite one
    told: list[tuple[int, float | None]] = field(default_factory=list)  # Optuna's intermediate values
    attempts: list[Any] = field(default_factory=list)  # by number
    epochs: list[Any] = field(default_factory=list)  # by epoch


@dataclass
class Evidence:
    """A study as of one moment, and the folder of its files."""

    config: StudyConfig  # from the record
    max_trials: int
    max_gpu_seconds: float | None
    trials: list[Trial]  # by number
    workers: dict[str, Any]  # all workers of the database, rows by id
    runs: RunFolder

    @property
    def has_files(self) -> bool:
        """Whether the study's files are in this home."""
        return self.runs.path.is_dir()


def gather(connection: sa.Connection, name: str) -> Evidence:
    """Read a study, whatever constraints its tables have or have lost. Raises InputError.

    On a connection of `storage.database.one_moment` all of it is of one moment.
    """
    entry = study_entry(connection, name)
    if entry is None:
        raise InputError(f"no study {name!r} in the database; see: atelier db status")

    def rows(query: str) -> list[Any]:
        return list(connection.execute(sa.text(query), {"study_id": entry.study_id}))

    own = "WHERE trial_id IN (SELECT trial_id FROM public.trials WHERE study_id = :study_id)"
    trials = {
        row.trial_id: Trial(row.trial_id, row.number, row.state)
        for row in rows("SELECT * FROM public.trials WHERE study_id = :study_id ORDER BY number")
    }
    for row in rows(f"SELECT * FROM public.trial_params {own}"):
        value = _distribution(row.distribution_json).to_external_repr(row.param_value)
        trials[row.trial_id].params[row.param_name] = value
    for row in rows(f"SELECT * FROM public.trial_values {own}"):
        trials[row.trial_id].values.append(row.value)
    for row in rows(f"SELECT * FROM public.trial_intermediate_values {own} ORDER BY step"):
        trials[row.trial_id].told.append((row.step, row.intermediate_value))
    for row in rows(f"SELECT * FROM atelier.attempt {own} ORDER BY number"):
        trials[row.trial_id].attempts.append(row)
    for row in rows(f"SELECT * FROM atelier.epoch {own} ORDER BY epoch"):
        trials[row.trial_id].epochs.append(row)
    [budget] = rows("SELECT * FROM atelier.study WHERE study_id = :study_id")
    return Evidence(
        config=recorded(entry) or StudyConfig.from_record(entry),
        max_trials=budget.max_trials,
        max_gpu_seconds=budget.max_gpu_seconds,
        trials=list(trials.values()),
        workers={row.id: row for row in rows("SELECT * FROM atelier.worker")},
        runs=RunFolder(entry.name, entry.created),
    )


_distribution = lru_cache(json_to_distribution)  # few distributions differ
