"""Create the tables study, worker, attempt and epoch."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None

NOW = sa.text("now()")


def upgrade() -> None:
    op.create_table(
        "study",
        sa.Column("study_id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("max_trials", sa.Integer, nullable=False),
        sa.Column("max_gpu_seconds", sa.Double),
        sa.Column("settings", postgresql.JSONB, nullable=False),
        sa.Column("dataset", sa.Text, nullable=False),
        sa.Column("optuna_version", sa.Text, nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False, server_default=NOW),
        schema="atelier",
    )
    op.create_table(
        "worker",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("host", sa.Text, nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("process", sa.Text, nullable=False),
        sa.Column("slurm_job", sa.Text),
        sa.Column("slurm_array_job", sa.Text),
        sa.Column("slurm_array_task", sa.Text),
        sa.Column("gpu", sa.Text),
        sa.Column("started", sa.DateTime(timezone=True), nullable=False, server_default=NOW),
        sa.Column("last_seen", sa.DateTime(timezone=True), nullable=False, server_default=NOW),
        sa.Column("stopped", sa.DateTime(timezone=True)),
        sa.Column("reason", sa.Text),
        schema="atelier",
    )
    op.create_table(
        "attempt",
        sa.Column("trial_id", sa.Integer, primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column(
            "study_id",
            sa.Integer,
            sa.ForeignKey("atelier.study.study_id", ondelete="CASCADE"),
            nullable=False,
            index=True,
        ),
        sa.Column("worker_id", sa.Text, sa.ForeignKey("atelier.worker.id"), nullable=False, index=True),
        sa.Column("claimed", sa.DateTime(timezone=True), nullable=False, server_default=NOW),
        sa.Column("renewed", sa.DateTime(timezone=True), nullable=False, server_default=NOW),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=False),
        sa.Column("released", sa.DateTime(timezone=True)),
        sa.Column("outcome", sa.Text),
        sa.Column("reason", sa.Text),
        schema="atelier",
    )
    # The database itself refuses a second holder of a trial.
    op.create_index(
        "attempt_open",
        "attempt",
        ["trial_id"],
        unique=True,
        schema="atelier",
        postgresql_where=sa.text("released IS NULL"),
    )
    op.create_table(
        "epoch",
        sa.Column("trial_id", sa.Integer, primary_key=True),
        sa.Column("epoch", sa.Integer, primary_key=True),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("recorded", sa.DateTime(timezone=True), nullable=False, server_default=NOW),
        sa.Column("lr", sa.Double, nullable=False),
        sa.Column("train_loss", sa.Double, nullable=False),
        sa.Column("val_loss", sa.Double, nullable=False),
        sa.Column("train_accuracy", sa.Double, nullable=False),
        sa.Column("val_accuracy", sa.Double, nullable=False),
        sa.Column("val_overall", sa.Double, nullable=False),
        sa.Column("val_category", postgresql.ARRAY(sa.Double), nullable=False),
        sa.Column("seconds", sa.Double, nullable=False),
        sa.Column("images", sa.Integer, nullable=False),
        sa.Column("peak_memory", sa.Double, nullable=False),
        schema="atelier",
    )


def downgrade() -> None:
    for table in ("epoch", "attempt", "worker", "study"):
        op.drop_table(table, schema="atelier")
