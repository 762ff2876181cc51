"""Read and change the record of studies: settings, budgets, stop requests and array jobs."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.trial import TrialState
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.orm import Session

from storage.clock import now
from storage.database import retrying
from storage.liveness import HELD
from storage.optuna_tables import StudyModel, TrialModel, TrialValueModel
from storage.paths import path_from_record
from storage.tables import ArrayJob, Attempt, Epoch, Study
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
    key = StudyModel.study_name if isinstance(name_or_id, str) else StudyModel.study_id
    with Session(bind) as session:
        row = session.execute(
            sa.select(Study, StudyModel.study_name)
            .join(StudyModel, StudyModel.study_id == Study.study_id)
            .where(key == name_or_id)
        ).one_or_none()
    if row is None:
        return None
    study, name = row
    return StudyEntry(
        study.study_id,
        name,
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
    row = {"study_id": study_id, "optuna_version": optuna.__version__, **values}
    with engine.begin() as connection:
        is_there = sa.select(StudyModel.study_id).where(StudyModel.study_id == study_id)
        if connection.scalar(is_there.with_for_update(key_share=True)) is None:
            raise KeyError(study_id)
        connection.execute(insert(Study).values(row).on_conflict_do_nothing())
    entry = study_entry(engine, study_id)
    if entry is None:
        raise KeyError(study_id)
    return entry


@retrying
def update_study(engine: sa.Engine, study_id: int, **values: Any) -> None:
    """Change columns of a study, such as its budget or its stop request."""
    with engine.begin() as connection:
        connection.execute(sa.update(Study).where(Study.study_id == study_id).values(values))


@retrying
def agree_on_trunk(engine: sa.Engine, study_id: int, device: str, digest: str) -> str:
    """Record what the trunk computes on a device, if no worker has. Returns what is on record."""
    is_first = sa.and_(Study.study_id == study_id, ~Study.trunks.has_key(device))
    entry = sa.cast({device: digest}, JSONB)
    with engine.begin() as connection:
        connection.execute(sa.update(Study).where(is_first).values(trunks=Study.trunks.op("||")(entry)))
        recorded = sa.select(Study.trunks[device].astext).where(Study.study_id == study_id)
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
        connection.execute(insert(ArrayJob).values(row).on_conflict_do_nothing())


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
    return sa.select(ArrayJob.job).where(ArrayJob.study_id == study_id).order_by(ArrayJob.submitted)


@retrying
def study_names(engine: sa.Engine) -> list[str]:
    """The names of the studies on record, oldest first."""
    with engine.connect() as connection:
        return list(
            connection.scalars(
                sa.select(StudyModel.study_name)
                .join(Study, Study.study_id == StudyModel.study_id)
                .order_by(Study.created)
            )
        )


@retrying
def read_studies(engine: sa.Engine) -> list[StudyRow]:
    """All studies, the newest first; one statement."""
    finished = [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]
    trials = (
        sa.select(
            TrialModel.study_id,
            sa.func.count().filter(TrialModel.state.in_(finished)).label("finished"),
            sa.func.count().filter(TrialModel.state == TrialState.FAIL).label("failed"),
            sa.func.max(TrialValueModel.value)
            .filter(TrialModel.state == TrialState.COMPLETE, TRAINED_HERE)
            .label("best"),
        )
        .outerjoin(TrialValueModel, TrialValueModel.trial_id == TrialModel.trial_id)
        .group_by(TrialModel.study_id)
        .subquery()
    )
    workers = (
        sa.select(sa.func.count())
        .where(Attempt.study_id == Study.study_id, HELD)
        .scalar_subquery()
        .label("workers")
    )
    query = (
        sa.select(Study, StudyModel.study_name, trials, workers)
        .join(StudyModel, StudyModel.study_id == Study.study_id)
        .outerjoin(trials, trials.c.study_id == Study.study_id)
        .order_by(Study.created.desc())
    )
    with Session(engine) as session:
        return [
            StudyRow(
                study_id=row.Study.study_id,
                name=row.study_name,
                created=row.Study.created,
                max_trials=row.Study.max_trials,
                finished=row.finished or 0,
                failed=row.failed or 0,
                best=row.best,
                workers=row.workers,
            )
            for row in session.execute(query)
        ]


@retrying
def has_only_failed(engine: sa.Engine, study_id: int) -> bool:
    """Whether a study has trials, and all have failed."""
    query = sa.select(TrialModel.state).where(TrialModel.study_id == study_id).distinct()
    with engine.connect() as connection:
        return set(connection.scalars(query)) == {TrialState.FAIL}


@retrying
def trial_exists(engine: sa.Engine, trial_id: int) -> bool:
    """Whether Optuna has a trial with this id."""
    with engine.connect() as connection:
        query = sa.select(sa.literal(1)).where(TrialModel.trial_id == trial_id)
        return connection.scalar(query) is not None


@retrying
def is_held(engine: sa.Engine, trial_id: int) -> bool:
    """Whether a worker holds the trial."""
    with engine.connect() as connection:
        query = sa.select(sa.literal(1)).where(Attempt.trial_id == trial_id, HELD)
        return connection.scalar(query) is not None


@retrying
def stop_unless_held(engine: sa.Engine, study_id: int) -> bool:
    """Stop a study unless a worker holds one of its trials. Returns whether it is stopped now.

    A study must be stopped before it is deleted. The lock of its row keeps claims out meanwhile.
    """
    with Session(engine) as session, session.begin():
        study = session.get(Study, study_id, with_for_update=True)
        if session.scalar(sa.select(sa.literal(1)).where(Attempt.study_id == study_id, HELD).limit(1)):
            return False
        if study is not None:
            study.stop_requested = now()
    return True


@retrying
def epochs_of(engine: sa.Engine, study_id: int, trial_number: int) -> list[dict[str, Any]]:
    """A trial's epochs on record, in order; each with all columns of the table `epoch`."""
    query = (
        sa.select(Epoch.__table__)
        .join(TrialModel, TrialModel.trial_id == Epoch.trial_id)
        .where(TrialModel.study_id == study_id, TrialModel.number == trial_number)
        .order_by(Epoch.epoch)
    )
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]


def curve(engine: sa.Engine, study_id: int, trial_number: int) -> list[float]:
    """A trial's validation accuracies by epoch."""
    return [row["val_accuracy"] for row in epochs_of(engine, study_id, trial_number)]
