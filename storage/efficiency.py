"""Read what a study's workers were granted, and what they made of it."""

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from storage.clock import seconds_since
from storage.database import connected, retrying
from storage.tables import ARRAY_JOBS, ATTEMPTS, EPOCHS, WORKERS, Row
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
        sa.func.count(ATTEMPTS.c.trial_id.distinct()).label("trials"), study_id=study_id
    ).subquery()
    trained = (
        _by_worker(
            sa.func.count().label("epochs"),
            sa.func.sum(EPOCHS.c.seconds).label("seconds"),
            sa.func.avg(EPOCHS.c.busy).label("busy"),
            *(sa.func.sum(column).label(f"waited_{what}") for what, column in WAITS.items()),
            study_id=study_id,
        )
        .join(EPOCHS, TRAINED_IN)
        .subquery()
    )
    last_sign = sa.func.coalesce(WORKERS.c.stopped, WORKERS.c.last_seen)
    jobs = sa.select(sa.func.split_part(ARRAY_JOBS.c.job, ";", 1)).where(
        ARRAY_JOBS.c.study_id == study_id
    )
    query = (
        sa.select(
            WORKERS,
            held.c.trials,
            trained,
            sa.extract("epoch", last_sign - WORKERS.c.started).label("lasted"),
            sa.and_(WORKERS.c.stopped.is_(None), seconds_since(last_sign) < LATELY).label("is_alive"),
        )
        .outerjoin(held, held.c.worker_id == WORKERS.c.id)
        .outerjoin(trained, trained.c.worker_id == WORKERS.c.id)
        .where(sa.or_(held.c.trials.is_not(None), WORKERS.c.slurm_array_job.in_(jobs)))
        .order_by(WORKERS.c.started)
    )
    with connected(bind) as connection:
        return [_use(row) for row in connection.execute(query)]


def _by_worker(*columns: sa.ColumnElement[Any], study_id: int) -> sa.Select[Any]:
    of_study = sa.select(ATTEMPTS.c.worker_id, *columns).where(ATTEMPTS.c.study_id == study_id)
    return of_study.group_by(ATTEMPTS.c.worker_id)


def _use(worker: Row) -> WorkerUse:
    return WorkerUse(
        worker=f"{worker.host}:{worker.pid}",
        job=job_of(worker),
        restarts=worker.slurm_restarts,
        gpu=worker.gpu,
        ended=worker.reason,
        is_alive=worker.is_alive,
        pack=worker.pack,
        trials=worker.trials or 0,
        epochs=worker.epochs or 0,
        seconds=float(worker.lasted),
        seconds_training=worker.seconds or 0.0,
        waits={what: getattr(worker, f"waited_{what}") or 0.0 for what in WAITS},
        wall_seconds=worker.wall_seconds,
        memory=worker.memory,
        peak_memory=worker.peak_memory,
        busy=worker.busy,
    )
