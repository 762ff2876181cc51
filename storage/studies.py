"""Read and change the record of studies: settings, budgets, stop requests and array jobs."""

from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB, insert

from storage.clock import now
from storage.database import connected, retrying
from storage.liveness import HELD
from storage.optuna_tables import STUDY_NAMES, TRIALS, UNFINISHED, VALUES, TrialState
from storage.paths import path_from_record
from storage.tables import ARRAY_JOBS, ATTEMPTS, EPOCHS, STUDIES
from storage.usage import TRAINED_HERE


@dataclass(frozen=True)
class StudyEntry:
    """What is on record about a study."""

    study_id: int
    name: str
    max_trials: int
    settings: dict[str, Any]
    dataset: str
    attributes: list[dict[str, Any]]  # see storage.tables.Study
    optuna_version: str
    created: datetime
    trunks: dict[str, str]  # what the trunk computes, by device: see `agree_on_trunk`

    @property
    def places(self) -> dict[str, str]:
        """The paths of the dataset and the weights, in the present home."""
        places = self.settings.get("places", {})
        return {name: str(path_from_record(path)) for name, path in places.items()}


@dataclass
class StudyRow:
    """A study's line in the list of studies."""

    study_id: int
    name: str
    created: datetime
    max_trials: int
    finished: int
    failed: int
    best: float | None
    workers: int  # that hold a trial


@retrying
def study_entry(bind: sa.Engine | sa.Connection, name_or_id: str | int) -> StudyEntry | None:
    """Look a study up by its name, or by Optuna's id."""
    key = STUDY_NAMES.c.study_name if isinstance(name_or_id, str) else STUDY_NAMES.c.study_id
    with connected(bind) as connection:
        study = connection.execute(
            sa.select(STUDIES, STUDY_NAMES.c.study_name)
            .join(STUDY_NAMES, STUDY_NAMES.c.study_id == STUDIES.c.study_id)
            .where(key == name_or_id)
        ).one_or_none()
    if study is None:
        return None
    return StudyEntry(
        study.study_id,
        study.study_name,
        study.max_trials,
        study.settings,
        study.dataset,
        study.attributes or [],
        study.optuna_version,
        study.created,
        study.trunks,
    )


@retrying
def enter_study(engine: sa.Engine, study_id: int, **values: Any) -> StudyEntry:
    """Put a study on record, unless it is there already. Returns what is on record.

    Raises KeyError, as Optuna does, if somebody has just deleted the study.
    """
    row = {"study_id": study_id, "optuna_version": version("optuna"), **values}
    with engine.begin() as connection:
        is_there = sa.select(STUDY_NAMES.c.study_id).where(STUDY_NAMES.c.study_id == study_id)
        if connection.scalar(is_there.with_for_update(key_share=True)) is None:
            raise KeyError(study_id)
        connection.execute(insert(STUDIES).values(row).on_conflict_do_nothing())
    entry = study_entry(engine, study_id)
    if entry is None:
        raise KeyError(study_id)
    return entry


@retrying
def update_study(engine: sa.Engine, study_id: int, **values: Any) -> None:
    """Change columns of a study, such as its budget or its stop request."""
    with engine.begin() as connection:
        connection.execute(sa.update(STUDIES).where(STUDIES.c.study_id == study_id).values(values))


@retrying
def agree_on_trunk(engine: sa.Engine, study_id: int, device: str, digest: str) -> str:
    """Record what the trunk computes on a device, if no worker has. Returns what is on record."""
    is_first = sa.and_(STUDIES.c.study_id == study_id, ~STUDIES.c.trunks.has_key(device))
    entry = sa.cast({device: digest}, JSONB)
    with engine.begin() as connection:
        connection.execute(
            sa.update(STUDIES).where(is_first).values(trunks=STUDIES.c.trunks.op("||")(entry))
        )
        recorded = sa.select(STUDIES.c.trunks[device].astext).where(STUDIES.c.study_id == study_id)
        return connection.scalar(recorded) or digest  # without one: the study was deleted meanwhile


@retrying
def request_stop(engine: sa.Engine, study_id: int, stop: bool = True) -> None:
    """Ask all workers of a study to stop, also later ones; with `stop` false take the request back."""
    update_study(engine, study_id, stop_requested=now() if stop else None)


@retrying
def enter_array_job(engine: sa.Engine, study_id: int, job: str, array: str) -> None:
    """Record a SLURM array job that was submitted for a study."""
    row = {"study_id": study_id, "job": job, "array": array}
    with engine.begin() as connection:
        connection.execute(insert(ARRAY_JOBS).values(row).on_conflict_do_nothing())


def split_job(job: str) -> tuple[str, str]:
    """Split an array job on record into its number and its cluster (empty for the default cluster)."""
    number, _, cluster = job.partition(";")  # as sbatch --parsable prints it
    return number, cluster


def job_in_words(job: str) -> str:
    """An array job on record, in words for people."""
    number, cluster = split_job(job)
    return f"{number} of cluster {cluster}" if cluster else number


@retrying
def array_jobs(engine: sa.Engine, study_id: int) -> list[str]:
    """SLURM's ids of the array jobs of a study, oldest first."""
    with engine.connect() as connection:
        return list(connection.scalars(select_array_jobs(study_id)))


def select_array_jobs(study_id: int) -> sa.Select[str]:
    """The query of `array_jobs`, for a read that has more than that."""
    return (
        sa.select(ARRAY_JOBS.c.job)
        .where(ARRAY_JOBS.c.study_id == study_id)
        .order_by(ARRAY_JOBS.c.submitted)
    )


@retrying
def study_names(engine: sa.Engine) -> list[str]:
    """The names of the studies on record, oldest first."""
    with engine.connect() as connection:
        return list(
            connection.scalars(
                sa.select(STUDY_NAMES.c.study_name)
                .join(STUDIES, STUDIES.c.study_id == STUDY_NAMES.c.study_id)
                .order_by(STUDIES.c.created)
            )
        )


@retrying
def read_studies(engine: sa.Engine) -> list[StudyRow]:
    """All studies, the newest first; one statement."""
    trials = (
        sa.select(
            TRIALS.c.study_id,
            sa.func.count().filter(TRIALS.c.state.not_in(UNFINISHED)).label("finished"),
            sa.func.count().filter(TRIALS.c.state == TrialState.FAIL).label("failed"),
            sa.func.max(VALUES.c.value)
            .filter(TRIALS.c.state == TrialState.COMPLETE, TRAINED_HERE)
            .label("best"),
        )
        .outerjoin(VALUES, VALUES.c.trial_id == TRIALS.c.trial_id)
        .group_by(TRIALS.c.study_id)
        .subquery()
    )
    workers = (
        sa.select(sa.func.count(ATTEMPTS.c.worker_id.distinct()))
        .where(ATTEMPTS.c.study_id == STUDIES.c.study_id, HELD)
        .scalar_subquery()
    )
    query = (
        sa.select(
            STUDIES.c.study_id,
            STUDY_NAMES.c.study_name,
            STUDIES.c.created,
            STUDIES.c.max_trials,
            sa.func.coalesce(trials.c.finished, 0),
            sa.func.coalesce(trials.c.failed, 0),
            trials.c.best,
            workers,
        )
        .join(STUDY_NAMES, STUDY_NAMES.c.study_id == STUDIES.c.study_id)
        .outerjoin(trials, trials.c.study_id == STUDIES.c.study_id)
        .order_by(STUDIES.c.created.desc())
    )
    with engine.connect() as connection:
        return [StudyRow(*row) for row in connection.execute(query)]


@retrying
def has_only_failed(engine: sa.Engine, study_id: int) -> bool:
    """Whether a study has trials, and all have failed."""
    query = sa.select(TRIALS.c.state).where(TRIALS.c.study_id == study_id).distinct()
    with engine.connect() as connection:
        return set(connection.scalars(query)) == {TrialState.FAIL}


@retrying
def trial_exists(engine: sa.Engine, trial_id: int) -> bool:
    """Whether Optuna has a trial with this id."""
    with engine.connect() as connection:
        query = sa.select(sa.literal(1)).where(TRIALS.c.trial_id == trial_id)
        return connection.scalar(query) is not None


@retrying
def is_held(engine: sa.Engine, trial_id: int) -> bool:
    """Whether a worker holds the trial."""
    with engine.connect() as connection:
        query = sa.select(sa.literal(1)).where(ATTEMPTS.c.trial_id == trial_id, HELD)
        return connection.scalar(query) is not None


@retrying
def stop_unless_held(engine: sa.Engine, study_id: int) -> bool:
    """Stop a study unless a worker holds one of its trials. Returns whether it is stopped now.

    A study must be stopped before it is deleted. The lock of its row keeps claims out meanwhile.
    """
    with engine.begin() as connection:
        row = sa.select(STUDIES.c.study_id).where(STUDIES.c.study_id == study_id)
        connection.execute(row.with_for_update())
        if connection.scalar(
            sa.select(sa.literal(1)).where(ATTEMPTS.c.study_id == study_id, HELD).limit(1)
        ):
            return False
        stop = sa.update(STUDIES).where(STUDIES.c.study_id == study_id)
        connection.execute(stop.values(stop_requested=now()))
    return True


@retrying
def epochs_of(engine: sa.Engine, study_id: int, trial_number: int) -> list[dict[str, Any]]:
    """A trial's epochs on record, in order; each with all columns of the table `epoch`."""
    query = (
        sa.select(EPOCHS)
        .join(TRIALS, TRIALS.c.trial_id == EPOCHS.c.trial_id)
        .where(TRIALS.c.study_id == study_id, TRIALS.c.number == trial_number)
        .order_by(EPOCHS.c.epoch)
    )
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]


def curve(engine: sa.Engine, study_id: int, trial_number: int) -> list[float]:
    """A trial's validation accuracies by epoch."""
    return [row["val_accuracy"] for row in epochs_of(engine, study_id, trial_number)]
