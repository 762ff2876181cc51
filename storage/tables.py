"""Define Atelier's tables, in the schema `atelier` beside Optuna's.

Their rows are deleted with the study or trial in Optuna's tables that they describe (migration 0003).
All times are by the database's clock. There are no classes for the rows: SQLAlchemy takes longer to map
such classes than most commands take for their work.
"""

from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy import ARRAY, Column, DateTime, Double, ForeignKey, Index, Integer, Text
from sqlalchemy.dialects.postgresql import JSONB

SCHEMA = "atelier"
Row = sa.Row[*tuple[Any, ...]]  # with columns of any types
METADATA = sa.MetaData(schema=SCHEMA)
_Time = DateTime(timezone=True)
_required = partial(Column, nullable=False)


def _study() -> ForeignKey:
    return ForeignKey(f"{SCHEMA}.study.study_id", ondelete="CASCADE")


# A study's budget, and the settings that its trials share.
STUDIES = sa.Table(
    "study",
    METADATA,
    Column("study_id", Integer, primary_key=True, autoincrement=False),  # Optuna's id
    _required("max_trials", Integer),
    Column("max_gpu_seconds", Double),
    _required("settings", JSONB),  # the resolved study file
    _required("dataset", Text),  # the dataset's fingerprint
    # Of the validation split: [{"name", "category", "images"}], in the order of an epoch's val_hits.
    Column("attributes", JSONB),
    _required("optuna_version", Text),
    _required("created", _Time, server_default=sa.func.now()),
    Column("stop_requested", _Time),  # workers end while it is set
    # By device: the digest of what the trunk computes from some images (trainer/workspace.py).
    _required("trunks", JSONB, server_default="{}"),
)

# SLURM array jobs that were submitted for a study.
ARRAY_JOBS = sa.Table(
    "array_job",
    METADATA,
    Column("study_id", Integer, _study(), primary_key=True),
    Column("job", Text, primary_key=True),  # SLURM's id of the whole array
    _required("array", Text),  # as given to sbatch: 0-7%4
    _required("submitted", _Time, server_default=sa.func.now()),
)

# Worker processes.
WORKERS = sa.Table(
    "worker",
    METADATA,
    Column("id", Text, primary_key=True),  # new at every process start
    _required("host", Text),
    _required("pid", Integer),
    _required("process", Text),  # tells this process from a later one with the same pid
    Column("slurm_cluster", Text),  # set if the process is the whole job, so both end together
    Column("slurm_job", Text),
    Column("slurm_array_job", Text),
    Column("slurm_array_task", Text),
    _required("slurm_restarts", Integer, server_default="0"),  # a requeued job keeps its id
    Column("gpu", Text),
    Column("pack", Integer),  # trials that it trains at once
    Column("memory", Double),  # bytes of main memory that it was granted; NULL without a limit
    Column("peak_memory", Double),  # the most bytes of main memory that it has used
    Column("wall_seconds", Double),  # of wall time that it had at its start; NULL without a limit
    Column("log", Text),  # its log file: see storage.paths.path_to_record
    _required("started", _Time, server_default=sa.func.now()),
    _required("last_seen", _Time, server_default=sa.func.now()),
    Column("stopped", _Time),
    Column("reason", Text),
)

# One worker's hold on one trial. It is open until `released`; a trial has one open attempt.
ATTEMPTS = sa.Table(
    "attempt",
    METADATA,
    Column("trial_id", Integer, primary_key=True),  # Optuna's id
    Column("number", Integer, primary_key=True),  # from 1
    _required("study_id", Integer, _study(), index=True),
    _required("worker_id", Text, ForeignKey(f"{SCHEMA}.worker.id"), index=True),
    _required("claimed", _Time, server_default=sa.func.now()),
    _required("renewed", _Time, server_default=sa.func.now()),
    _required("lease_until", _Time),
    Column("released", _Time),
    Column("outcome", Text),  # a storage.outcome.Outcome
    Column("reason", Text),  # in words; a traceback for a failed attempt
    Index("attempt_open", "trial_id", unique=True, postgresql_where=sa.text("released IS NULL")),
)

# One epoch of one trial: the columns of trainer.metrics.EpochResult.columns, and its value.
EPOCHS = sa.Table(
    "epoch",
    METADATA,
    Column("trial_id", Integer, primary_key=True),
    Column("epoch", Integer, primary_key=True),
    _required("study_id", Integer),
    _required("attempt", Integer),
    Column("value", Double),  # what Optuna was told; NULL for NaN
    _required("stream_epoch", Integer),
    _required("recorded", _Time, server_default=sa.func.now()),
    _required("lr", Double),
    _required("train_loss", Double),
    _required("val_loss", Double),
    _required("train_accuracy", Double),
    _required("val_accuracy", Double),
    _required("val_overall", Double),
    _required("val_category", ARRAY(Double)),
    Column("val_hits", ARRAY(Integer)),
    Column("val_log_loss", Double),
    _required("seconds", Double),
    _required("images", Integer),
    _required("peak_memory", Double),  # bytes
    Column("busy", Double),  # share of the time in which the GPU computed; NULL if nobody knows
    # Seconds since the record before in which the worker could not train; the run's share of them.
    Column("waited_for_database", Double),
    Column("waited_for_disk", Double),
    Column("waited_for_images", Double),  # read from their file
    Column("waited_for_trials", Double),  # nothing was there to claim
    # If another attempt trained it again with other numbers: that attempt, and by how much they differ.
    Column("again", JSONB),
    Index("epoch_standing", "study_id", "epoch", "value"),  # for ranks
)
