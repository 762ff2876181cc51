"""Read all that is on record of a study, as raw rows: the evidence that its rules judge."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from search.confirm.plan import recorded
from search.errors import InputError
from search.study_config import StudyConfig
from storage.optuna_tables import UNFINISHED, parameter
from storage.outcome import NOTHING_LEFT
from storage.paths import RunFolder
from storage.studies import StudyEntry, study_entry

if TYPE_CHECKING:  # it imports torch
    from trainer.metrics import EpochResult

# What a rule finds: a trial's number or None for the study, and what is wrong with it.
Found = Iterator[tuple[int | None, str]]
# Trains a trial again, alone, through the epochs of the stream that it has on record.
Reference = Callable[[StudyConfig, "Trial"], "list[EpochResult]"]


@dataclass
class Trial:
    """One trial with all that is on record of it. `attempts` and `epochs` are rows of those tables."""

    trial_id: int  # Optuna's
    number: int
    state: str  # the name of Optuna's
    ended: datetime | None  # by the database's clock, if no user ended it
    is_enqueued: bool = False  # a user chose parameters
    params: dict[str, Any] = field(default_factory=dict)
    values: list[float | None] = field(default_factory=list)  # None for an infinite one
    told: list[tuple[int, float | None]] = field(default_factory=list)  # the same, after each epoch
    attempts: list[Any] = field(default_factory=list)  # by number
    epochs: list[Any] = field(default_factory=list)  # by epoch

    @property
    def outcome(self) -> str | None:
        """How its last attempt ended; None if it has not, or if no worker ever held the trial."""
        return self.attempts[-1].outcome if self.attempts else None

    @property
    def is_unfinished(self) -> bool:
        """Whether it may go on."""
        return self.state in UNFINISHED


@dataclass
class Evidence:
    """A study as of one moment, and the folder of its files, which may be read later."""

    entry: StudyEntry
    config: StudyConfig  # from the record
    max_gpu_seconds: float | None
    trials: list[Trial]  # by number
    workers: dict[str, Any]  # all workers of the database, rows by id
    runs: RunFolder
    reference: Reference | None = None

    @property
    def has_files(self) -> bool:
        """Whether the study's files are in this home."""
        return self.runs.path.is_dir()

    @cached_property
    def attempts(self) -> list[Any]:
        """All trials' attempts."""
        return [row for trial in self.trials for row in trial.attempts]

    @property
    def has_ended(self) -> bool:
        """Whether the last worker found nothing more to do, so that it removed what was left."""
        begun = [trial for trial in self.trials if trial.state != "WAITING"]
        may_begin = len(begun) < self.entry.max_trials and self.max_gpu_seconds is None
        if may_begin or not self.attempts or any(row.released is None for row in self.attempts):
            return False
        last = max(self.attempts, key=lambda row: row.released)
        worker = self.workers.get(last.worker_id)
        if worker is None or worker.stopped is None or worker.reason != NOTHING_LEFT:
            return False
        ends = [None if trial.is_unfinished else trial.ended for trial in begun]
        return all(end is not None and end <= worker.stopped for end in ends)


def gather(connection: sa.Connection, name: str) -> Evidence:
    """Read a study, whatever constraints its tables have or have lost. Raises InputError.

    On a connection of `storage.database.one_moment` all of it is of one moment.
    """
    entry = study_entry(connection, name)
    if entry is None:
        raise InputError(f"no study {name!r} in the database; see: atelier db status")

    def rows(query: str) -> Sequence[Any]:
        return connection.execute(sa.text(query), {"study_id": entry.study_id}).all()

    own = "WHERE trial_id IN (SELECT trial_id FROM public.trials WHERE study_id = :study_id)"
    trials = {
        row.trial_id: Trial(
            row.trial_id,
            row.number,
            row.state,
            row.datetime_complete and row.datetime_complete.replace(tzinfo=UTC),
        )
        for row in rows("SELECT * FROM public.trials WHERE study_id = :study_id ORDER BY number")
    }
    for row in rows(f"SELECT * FROM public.trial_system_attributes {own} AND key = 'fixed_params'"):
        trials[row.trial_id].is_enqueued = True
    for row in rows(f"SELECT * FROM public.trial_params {own}"):
        trials[row.trial_id].params[row.param_name] = parameter(row)
    for row in rows(f"SELECT * FROM public.trial_values {own}"):
        trials[row.trial_id].values.append(row.value)
    for row in rows(f"SELECT * FROM public.trial_intermediate_values {own} ORDER BY step"):
        trials[row.trial_id].told.append((row.step, row.intermediate_value))
    for row in rows(f"SELECT * FROM atelier.attempt {own} ORDER BY number"):
        trials[row.trial_id].attempts.append(row)
    for row in rows(f"SELECT * FROM atelier.epoch {own} ORDER BY epoch"):
        trials[row.trial_id].epochs.append(row)
    [study] = rows("SELECT * FROM atelier.study WHERE study_id = :study_id")
    return Evidence(
        entry=entry,
        config=recorded(entry) or StudyConfig.from_record(entry),
        max_gpu_seconds=study.max_gpu_seconds,
        trials=list(trials.values()),
        workers={row.id: row for row in rows("SELECT * FROM atelier.worker")},
        runs=RunFolder(entry.name, entry.created),
    )
