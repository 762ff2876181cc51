"""Read what a study's workers were granted, and what they made of it."""

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from storage.clock import seconds_since
from storage.database import retrying
from storage.tables import ArrayJob, Attempt, Epoch, Worker
from storage.workers import INSIDE, LATELY, TRAINED_IN, WAITS, job_of


@dataclass
class WorkerUse:
    """One worker process. Times are seconds, memory is bytes. None stands for what nobody knows."""

    worker: str  # host:pid
    job: str | None  # SLURM's, as in 12_3
    restarts: int  # how often SLURM had requeued it before
    gpu: str | None
    ended: str | None  # why; None while it lasts, and after a kill
    is_alive: bool  # whether it has given a sign lately
    pack: int | None  # trials at once
    trials: int  # that it has held
    epochs: int  # that are on record from it
    seconds: float  # from its first sign to its last
    seconds_training: float  # of its epochs
    waits: dict[str, float]  # seconds, by what it waited for
    wall_seconds: float | None  # that it was granted
    memory: float | None  # that it was granted
    peak_memory: float | None  # that it has used
    busy: float | None  # share of its epochs' time in which the GPU computed
    queued: float | None = None  # before it began; only SLURM's accounting knows

    @property
    def seconds_waiting(self) -> float:
        """What it waited outside its epochs."""
        return sum(seconds for what, seconds in self.waits.items() if what != INSIDE)

    @property
    def seconds_lost(self) -> float:
        """The rest: saving, ending, and what it trained without getting to an epoch's end."""
        return max(self.seconds - self.seconds_training - self.seconds_waiting, 0.0)


@retrying
def read_uses(bind: sa.Engine | sa.Connection, study_id: int) -> list[WorkerUse]:
    """The workers that have held trials of a study, and those of its array jobs, by their start."""
    held = _by_worker(
        sa.func.count(Attempt.trial_id.distinct()).label("trials"), study_id=study_id
    ).subquery()
    trained = (
        _by_worker(
            sa.func.count().label("epochs"),
            sa.func.sum(Epoch.seconds).label("seconds"),
            sa.func.avg(Epoch.busy).label("busy"),
            *(sa.func.sum(column).label(f"waited_{what}") for what, column in WAITS.items()),
            study_id=study_id,
        )
        .join(Epoch, TRAINED_IN)
        .subquery()
    )
    last_sign = sa.func.coalesce(Worker.stopped, Worker.last_seen)
    jobs = sa.select(sa.func.split_part(ArrayJob.job, ";", 1)).where(ArrayJob.study_id == study_id)
    query = (
        sa.select(
            Worker,
            held.c.trials,
            trained,
            sa.extract("epoch", last_sign - Worker.started).label("lasted"),
            sa.and_(Worker.stopped.is_(None), seconds_since(last_sign) < LATELY).label("is_alive"),
        )
        .outerjoin(held, held.c.worker_id == Worker.id)
        .outerjoin(trained, trained.c.worker_id == Worker.id)
        .where(sa.or_(held.c.trials.is_not(None), Worker.slurm_array_job.in_(jobs)))
        .order_by(Worker.started)
    )
    with Session(bind) as session:
        return [_use(row) for row in session.execute(query)]


def _by_worker(*columns: sa.ColumnElement[Any], study_id: int) -> sa.Select[Any]:
    of_study = sa.select(Attempt.worker_id, *columns).where(Attempt.study_id == study_id)
    return of_study.group_by(Attempt.worker_id)


def _use(row: sa.Row[Any]) -> WorkerUse:
    worker = row.Worker
    return WorkerUse(
        worker=f"{worker.host}:{worker.pid}",
        job=job_of(worker),
        restarts=worker.slurm_restarts,
        gpu=worker.gpu,
        ended=worker.reason,
        is_alive=row.is_alive,
        pack=worker.pack,
        trials=row.trials or 0,
        epochs=row.epochs or 0,
        seconds=float(row.lasted),
        seconds_training=row.seconds or 0.0,
        waits={what: getattr(row, f"waited_{what}") or 0.0 for what in WAITS},
        wall_seconds=worker.wall_seconds,
        memory=worker.memory,
        peak_memory=worker.peak_memory,
        busy=row.busy,
    )
