"""Read which workers hold a study's trials, which held them before, and on which machines."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from storage.clock import seconds_since
from storage.database import retrying
from storage.liveness import HELD
from storage.optuna_tables import TrialModel
from storage.paths import path_from_record
from storage.tables import Attempt, Epoch, Worker

LATELY = 300  # seconds
# Which attempt trained an epoch.
TRAINED_IN = sa.and_(Epoch.trial_id == Attempt.trial_id, Epoch.attempt == Attempt.number)
# Trial-images per second of all epochs of a group.
IMAGES_PER_SECOND = sa.cast(sa.func.sum(Epoch.images), sa.Double) / sa.func.nullif(
    sa.func.sum(Epoch.seconds), 0.0
)
# What a worker may wait for while it trains nothing.
WAITS = {
    "database": Epoch.waited_for_database,
    "disk": Epoch.waited_for_disk,
    "trials": Epoch.waited_for_trials,
    "images": Epoch.waited_for_images,
}
INSIDE = "images"  # what is waited for inside an epoch's seconds


@dataclass
class WorkerRow:
    """One trial that a worker holds. Times are seconds."""

    worker: str  # the worker's id; it may hold several trials
    host: str
    pid: int
    job: str | None  # SLURM's, as in 12_3
    gpu: str | None
    log: str | None
    trial: int
    renewed: float  # since it last renewed its lease
    running_for: float
    # Of the worker's last minutes, for all of its trials; None before its first epoch.
    images_per_second: float | None = None  # trial-images
    busy: float | None = None  # share of the time in which its GPU computed; None if nobody knows
    waits: float | None = None  # share of the time in which it could not train
    waits_for: str | None = None  # what for, of WAITS: what took longest


@dataclass
class Machine:
    """A machine on which a study's trials ran."""

    host: str
    gpu: str | None
    workers: int  # processes
    slurm: bool
    images_per_second: float | None  # trial-images of one worker
    busy: float | None  # mean share of the time in which its GPU computed; None if nobody knows


@dataclass
class AttemptRow:
    """One worker's hold on one trial."""

    trial: int
    attempt: int
    worker: str  # host:pid
    job: str | None
    log: str | None
    outcome: str | None  # None while it lasts
    reason: str | None
    gpu: str | None
    claimed: datetime
    released: datetime | None  # None while it lasts


def read_workers(session: Session, study_id: int) -> list[WorkerRow]:
    """The trials that workers hold now."""
    query = (
        sa.select(
            Worker, TrialModel.number, seconds_since(Attempt.renewed), seconds_since(Worker.started)
        )
        .join(Attempt, Attempt.worker_id == Worker.id)
        .join(TrialModel, TrialModel.trial_id == Attempt.trial_id)
        .where(Attempt.study_id == study_id, HELD)
        .order_by(TrialModel.number)
    )
    rows = session.execute(query).all()
    paces = _paces(session, {worker.id for worker, *_ in rows})
    return [
        WorkerRow(
            worker=worker.id,
            host=worker.host,
            pid=worker.pid,
            job=job_of(worker),
            gpu=worker.gpu,
            log=_log(worker),
            trial=number,
            renewed=float(renewed),
            running_for=float(running_for),
            **paces.get(worker.id, {}),
        )
        for worker, number, renewed, running_for in rows
    ]


def _paces(session: Session, workers: set[str]) -> dict[str, dict[str, Any]]:
    """How fast workers have trained lately, as fields of WorkerRow."""
    columns = (Epoch.seconds, Epoch.images, *WAITS.values())
    sums = [sa.cast(sa.func.coalesce(sa.func.sum(column), 0), sa.Double) for column in columns]
    query = (
        sa.select(Attempt.worker_id, sa.func.avg(Epoch.busy), *sums)
        .join(Attempt, TRAINED_IN)
        .where(Attempt.worker_id.in_(workers), seconds_since(Epoch.recorded) < LATELY)
        .group_by(Attempt.worker_id)
    )
    return {worker: _pace(busy, *sums) for worker, busy, *sums in session.execute(query)}


def _pace(busy: float | None, seconds: float, images: float, *waits: float) -> dict[str, Any]:
    by_what = dict(zip(WAITS, waits, strict=True))
    what = max(by_what, key=lambda name: by_what[name])
    outside = sum(waits) - by_what[INSIDE]
    return {
        "images_per_second": images / seconds if seconds else None,
        "busy": busy,
        "waits": sum(waits) / (outside + seconds) if seconds else None,
        "waits_for": what if by_what[what] else None,
    }


@retrying
def read_machines(bind: sa.Engine | sa.Connection, study_id: int) -> list[Machine]:
    """The machines that a study's trials ran on; those with most workers first."""
    slurm = Worker.slurm_job.is_not(None)
    count = sa.func.count(Worker.id.distinct())
    query = (
        sa.select(Worker.host, Worker.gpu, count, slurm, IMAGES_PER_SECOND, sa.func.avg(Epoch.busy))
        .join(Attempt, Attempt.worker_id == Worker.id)
        .outerjoin(Epoch, TRAINED_IN)
        .where(Attempt.study_id == study_id)
        .group_by(Worker.host, Worker.gpu, slurm)
        .order_by(count.desc(), Worker.host)
    )
    with Session(bind) as session:
        return [Machine(*row) for row in session.execute(query)]


@retrying
def read_attempts(
    bind: sa.Engine | sa.Connection, study_id: int, trial: int | None = None
) -> list[AttemptRow]:
    """A study's attempts, or one trial's, oldest first."""
    query = (
        sa.select(Attempt, Worker, TrialModel.number)
        .join(Worker, Worker.id == Attempt.worker_id)
        .join(TrialModel, TrialModel.trial_id == Attempt.trial_id)
        .where(Attempt.study_id == study_id)
        .order_by(Attempt.claimed)
    )
    if trial is not None:
        query = query.where(TrialModel.number == trial)
    with Session(bind) as session:
        return [
            AttemptRow(
                trial=number,
                attempt=attempt.number,
                worker=f"{worker.host}:{worker.pid}",
                job=job_of(worker),
                log=_log(worker),
                outcome=attempt.outcome,
                reason=attempt.reason,
                gpu=worker.gpu,
                claimed=attempt.claimed.astimezone(UTC),
                released=attempt.released and attempt.released.astimezone(UTC),
            )
            for attempt, worker, number in session.execute(query)
        ]


def job_of(worker: Worker) -> str | None:
    """A worker's job in SLURM, as in 12_3."""
    if worker.slurm_array_job is None:
        return worker.slurm_job
    return f"{worker.slurm_array_job}_{worker.slurm_array_task}"


def _log(worker: Worker) -> str | None:
    return None if worker.log is None else str(path_from_record(worker.log))
