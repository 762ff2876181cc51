"""Read which workers hold a study's trials, which held them before, and on which machines."""

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from storage.clock import seconds_since
from storage.database import retrying
from storage.liveness import HELD
from storage.optuna_tables import TrialModel
from storage.paths import path_from_record
from storage.tables import Attempt, Worker


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


@dataclass
class Machine:
    """A machine on which a study's trials ran."""

    host: str
    gpu: str | None
    workers: int  # processes
    slurm: bool


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
    return [
        WorkerRow(
            worker=worker.id,
            host=worker.host,
            pid=worker.pid,
            job=_job(worker),
            gpu=worker.gpu,
            log=_log(worker),
            trial=number,
            renewed=float(renewed),
            running_for=float(running_for),
        )
        for worker, number, renewed, running_for in session.execute(query)
    ]


@retrying
def read_machines(bind: sa.Engine | sa.Connection, study_id: int) -> list[Machine]:
    """The machines that a study's trials ran on; those with most workers first."""
    slurm = Worker.slurm_job.is_not(None)
    count = sa.func.count(Worker.id.distinct())
    query = (
        sa.select(Worker.host, Worker.gpu, count, slurm)
        .join(Attempt, Attempt.worker_id == Worker.id)
        .where(Attempt.study_id == study_id)
        .group_by(Worker.host, Worker.gpu, slurm)
        .order_by(count.desc(), Worker.host)
    )
    with Session(bind) as session:
        return [Machine(*row) for row in session.execute(query)]


@retrying
def read_attempts(engine: sa.Engine, study_id: int, trial: int | None = None) -> list[AttemptRow]:
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
    with Session(engine) as session:
        return [
            AttemptRow(
                trial=number,
                attempt=attempt.number,
                worker=f"{worker.host}:{worker.pid}",
                job=_job(worker),
                log=_log(worker),
                outcome=attempt.outcome,
                reason=attempt.reason,
            )
            for attempt, worker, number in session.execute(query)
        ]


def _job(worker: Worker) -> str | None:
    if worker.slurm_array_job is None:
        return worker.slurm_job
    return f"{worker.slurm_array_job}_{worker.slurm_array_task}"


def _log(worker: Worker) -> str | None:
    return None if worker.log is None else str(path_from_record(worker.log))
