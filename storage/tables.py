"""Define Atelier's tables, in the schema `atelier` beside Optuna's.

Their rows are deleted with the study or trial in Optuna's tables that they describe (migration 0003).
"""

from datetime import datetime
from typing import Any

from sqlalchemy import ARRAY, DateTime, Double, ForeignKey, Index, Integer, Text, func, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

SCHEMA = "atelier"


class Base(DeclarativeBase):
    """The base of all tables. All times are by the database's clock."""

    type_annotation_map = {  # noqa: RUF012  # SQLAlchemy's own form
        datetime: DateTime(timezone=True),
        dict[str, Any]: JSONB,
        str: Text,
        float: Double,
        list[float]: ARRAY(Double),
        list[int]: ARRAY(Integer),
        list[dict[str, Any]]: JSONB,
    }


class Study(Base):
    """A study's budget, and the settings that its trials share."""

    __tablename__ = "study"
    __table_args__ = {"schema": SCHEMA}  # noqa: RUF012

    study_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)  # Optuna's id
    max_trials: Mapped[int]
    max_gpu_seconds: Mapped[float | None]
    settings: Mapped[dict[str, Any]]  # the resolved study file
    dataset: Mapped[str]  # the dataset's fingerprint
    # Of the validation split: [{"name", "category", "images"}], in the order of `Epoch.val_hits`.
    attributes: Mapped[list[dict[str, Any]] | None]
    optuna_version: Mapped[str]
    created: Mapped[datetime] = mapped_column(server_default=func.now())
    stop_requested: Mapped[datetime | None]  # workers end while it is set
    # By device: the digest of what the trunk computes from some images (trainer/workspace.py).
    trunks: Mapped[dict[str, Any]] = mapped_column(server_default="{}")


class ArrayJob(Base):
    """A SLURM array job that was submitted for a study."""

    __tablename__ = "array_job"
    __table_args__ = {"schema": SCHEMA}  # noqa: RUF012

    study_id: Mapped[int] = mapped_column(
        ForeignKey(f"{SCHEMA}.study.study_id", ondelete="CASCADE"), primary_key=True
    )
    job: Mapped[str] = mapped_column(primary_key=True)  # SLURM's id of the whole array
    array: Mapped[str]  # as given to sbatch: 0-7%4
    submitted: Mapped[datetime] = mapped_column(server_default=func.now())


class Worker(Base):
    """One worker process."""

    __tablename__ = "worker"
    __table_args__ = {"schema": SCHEMA}  # noqa: RUF012

    id: Mapped[str] = mapped_column(primary_key=True)  # new at every process start
    host: Mapped[str]
    pid: Mapped[int]
    process: Mapped[str]  # tells this process from a later one with the same pid
    slurm_cluster: Mapped[str | None]  # set if the process is the whole job, so both end together
    slurm_job: Mapped[str | None]
    slurm_array_job: Mapped[str | None]
    slurm_array_task: Mapped[str | None]
    slurm_restarts: Mapped[int] = mapped_column(server_default="0")  # a requeued job keeps its id
    gpu: Mapped[str | None]
    pack: Mapped[int | None]  # trials that it trains at once
    memory: Mapped[float | None]  # bytes of main memory that it was granted; NULL without a limit
    peak_memory: Mapped[float | None]  # the most bytes of main memory that it has used
    wall_seconds: Mapped[float | None]  # of wall time that it had at its start; NULL without a limit
    log: Mapped[str | None]  # its log file: see storage.paths.path_to_record
    started: Mapped[datetime] = mapped_column(server_default=func.now())
    last_seen: Mapped[datetime] = mapped_column(server_default=func.now())
    stopped: Mapped[datetime | None]
    reason: Mapped[str | None]


class Attempt(Base):
    """One worker's hold on one trial. It is open until `released`; a trial has one open attempt."""

    __tablename__ = "attempt"
    __table_args__ = (
        Index("attempt_open", "trial_id", unique=True, postgresql_where=text("released IS NULL")),
        {"schema": SCHEMA},
    )

    trial_id: Mapped[int] = mapped_column(primary_key=True)  # Optuna's id
    number: Mapped[int] = mapped_column(primary_key=True)  # from 1
    study_id: Mapped[int] = mapped_column(
        ForeignKey(f"{SCHEMA}.study.study_id", ondelete="CASCADE"), index=True
    )
    worker_id: Mapped[str] = mapped_column(ForeignKey(f"{SCHEMA}.worker.id"), index=True)
    claimed: Mapped[datetime] = mapped_column(server_default=func.now())
    renewed: Mapped[datetime] = mapped_column(server_default=func.now())
    lease_until: Mapped[datetime]
    released: Mapped[datetime | None]
    outcome: Mapped[str | None]  # a storage.outcome.Outcome
    reason: Mapped[str | None]  # in words; a traceback for a failed attempt


class Epoch(Base):
    """One epoch of one trial: the columns of trainer.metrics.EpochResult.columns, and its value."""

    __tablename__ = "epoch"
    __table_args__ = (
        Index("epoch_standing", "study_id", "epoch", "value"),  # for ranks
        {"schema": SCHEMA},
    )

    trial_id: Mapped[int] = mapped_column(primary_key=True)
    epoch: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int]
    attempt: Mapped[int]
    value: Mapped[float | None]  # what Optuna was told; NULL for NaN
    stream_epoch: Mapped[int]
    recorded: Mapped[datetime] = mapped_column(server_default=func.now())
    lr: Mapped[float]
    train_loss: Mapped[float]
    val_loss: Mapped[float]
    train_accuracy: Mapped[float]
    val_accuracy: Mapped[float]
    val_overall: Mapped[float]
    val_category: Mapped[list[float]]
    val_hits: Mapped[list[int] | None]
    val_log_loss: Mapped[float | None]
    seconds: Mapped[float]
    images: Mapped[int]
    peak_memory: Mapped[float]  # bytes
    busy: Mapped[float | None]  # share of the time in which the GPU computed; NULL if nobody knows
    # Seconds since the record before in which the worker could not train; the run's share of them.
    waited_for_database: Mapped[float | None]
    waited_for_disk: Mapped[float | None]
    waited_for_images: Mapped[float | None]  # read from their file
    waited_for_trials: Mapped[float | None]  # nothing was there to claim
    # If another attempt trained it again with other numbers: that attempt, and by how much they differ.
    again: Mapped[dict[str, Any] | None]
