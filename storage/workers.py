"""Read which workers hold a study's trials, which held them before, and on which machines."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from storage.clock import seconds_since
from storage.database import connected, retrying
from storage.liveness import HELD
from storage.optuna_tables import TRIALS
from storage.paths import path_from_record
from storage.tables import ATTEMPTS, EPOCHS, WORKERS, Row

LATELY = 300  # seconds
# Which attempt trained an epoch.
TRAINED_IN = sa.and_(EPOCHS.c.trial_id == ATTEMPTS.c.trial_id, EPOCHS.c.attempt == ATTEMPTS.c.number)
# Trial-images per second of all epochs of a group.
IMAGES_PER_SECOND = sa.cast(sa.func.sum(EPOCHS.c.images), sa.Double) / sa.func.nullif(
    sa.func.sum(EPOCHS.c.seconds), 0.0
)
# What a worker may wait for while it trains nothing.
WAITS = {
    "database": EPOCHS.c.waited_for_database,
    "disk": EPOCHS.c.waited_for_disk,
    "trials": EPOCHS.c.waited_for_trials,
    "images": EPOCHS.c.waited_for_images,
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


def read_workers(connection: sa.Connection, study_id: int) -> list[WorkerRow]:
    """The trials that workers hold now."""
    query = (
        sa.select(
            WORKERS,
            TRIALS.c.number.label("trial"),
            seconds_since(ATTEMPTS.c.renewed).label("renewed"),
            seconds_since(WORKERS.c.started).label("running_for"),
        )
        .join(ATTEMPTS, ATTEMPTS.c.worker_id == WORKERS.c.id)
        .join(TRIALS, TRIALS.c.trial_id == ATTEMPTS.c.trial_id)
        .where(ATTEMPTS.c.study_id == study_id, HELD)
        .order_by(TRIALS.c.number)
    )
    rows = connection.execute(query).all()
    paces = _paces(connection, {row.id for row in rows})
    return [
        WorkerRow(
            worker=row.id,
            host=row.host,
            pid=row.pid,
            job=job_of(row),
            gpu=row.gpu,
            log=_log(row),
            trial=row.trial,
            renewed=float(row.renewed),
            running_for=float(row.running_for),
            **paces.get(row.id, {}),
        )
        for row in rows
    ]


def _paces(connection: sa.Connection, workers: set[str]) -> dict[str, dict[str, Any]]:
    """How fast workers have trained lately, as fields of WorkerRow."""
    columns = (EPOCHS.c.seconds, EPOCHS.c.images, *WAITS.values())
    sums = [sa.cast(sa.func.coalesce(sa.func.sum(column), 0), sa.Double) for column in columns]
    query = (
        sa.select(ATTEMPTS.c.worker_id, sa.func.avg(EPOCHS.c.busy), *sums)
        .join(ATTEMPTS, TRAINED_IN)
        .where(ATTEMPTS.c.worker_id.in_(workers), seconds_since(EPOCHS.c.recorded) < LATELY)
        .group_by(ATTEMPTS.c.worker_id)
    )
    return {worker: _pace(busy, *sums) for worker, busy, *sums in connection.execute(query)}


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
    slurm = WORKERS.c.slurm_job.is_not(None)
    count = sa.func.count(WORKERS.c.id.distinct())
    query = (
        sa.select(
            WORKERS.c.host, WORKERS.c.gpu, count, slurm, IMAGES_PER_SECOND, sa.func.avg(EPOCHS.c.busy)
        )
        .join(ATTEMPTS, ATTEMPTS.c.worker_id == WORKERS.c.id)
        .outerjoin(EPOCHS, TRAINED_IN)
        .where(ATTEMPTS.c.study_id == study_id)
        .group_by(WORKERS.c.host, WORKERS.c.gpu, slurm)
        .order_by(count.desc(), WORKERS.c.host)
    )
    with connected(bind) as connection:
        return [Machine(*row) for row in connection.execute(query)]


@retrying
def read_attempts(
    bind: sa.Engine | sa.Connection, study_id: int, trial: int | None = None
) -> list[AttemptRow]:
    """A study's attempts, or one trial's, oldest first."""
    query = (
        sa.select(
            TRIALS.c.number.label("trial"),
            ATTEMPTS.c.number.label("attempt"),
            *(ATTEMPTS.c.outcome, ATTEMPTS.c.reason, ATTEMPTS.c.claimed, ATTEMPTS.c.released),
            *(WORKERS.c.host, WORKERS.c.pid, WORKERS.c.log, WORKERS.c.gpu),
            *(WORKERS.c.slurm_job, WORKERS.c.slurm_array_job, WORKERS.c.slurm_array_task),
        )
        .join(WORKERS, WORKERS.c.id == ATTEMPTS.c.worker_id)
        .join(TRIALS, TRIALS.c.trial_id == ATTEMPTS.c.trial_id)
        .where(ATTEMPTS.c.study_id == study_id)
        .order_by(ATTEMPTS.c.claimed)
    )
    if trial is not None:
        query = query.where(TRIALS.c.number == trial)
    with connected(bind) as connection:
        return [
            AttemptRow(
                trial=row.trial,
                attempt=row.attempt,
                worker=f"{row.host}:{row.pid}",
                job=job_of(row),
                log=_log(row),
                outcome=row.outcome,
                reason=row.reason,
                gpu=row.gpu,
                claimed=row.claimed.astimezone(UTC),
                released=row.released and row.released.astimezone(UTC),
            )
            for row in connection.execute(query)
        ]


def job_of(worker: Row) -> str | None:
    """A worker's job in SLURM, as in 12_3."""
    job: str | None = worker.slurm_job
    return (
        job if worker.slurm_array_job is None else f"{worker.slurm_array_job}_{worker.slurm_array_task}"
    )


def _log(worker: Row) -> str | None:
    return None if worker.log is None else str(path_from_record(worker.log))
