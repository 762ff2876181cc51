"""Note submitted arrays, requeues, log files, and the request to stop a study."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "array_job",
        sa.Column(
            "study_id",
            sa.Integer,
            sa.ForeignKey("atelier.study.study_id", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("job", sa.Text, primary_key=True),
        sa.Column("array", sa.Text, nullable=False),
        sa.Column(
            "submitted", sa.DateTime(timezone=True), nullable=False, server_default=sa.text("now()")
        ),
        schema="atelier",
    )
    op.add_column(
        "worker",
        sa.Column("slurm_restarts", sa.Integer, nullable=False, server_default="0"),
        schema="atelier",
    )
    op.add_column("worker", sa.Column("slurm_cluster", sa.Text), schema="atelier")
    op.add_column("worker", sa.Column("log", sa.Text), schema="atelier")
    op.add_column("study", sa.Column("stop_requested", sa.DateTime(timezone=True)), schema="atelier")


def downgrade() -> None:
    op.drop_column("study", "stop_requested", schema="atelier")
    op.drop_column("worker", "log", schema="atelier")
    op.drop_column("worker", "slurm_cluster", schema="atelier")
    op.drop_column("worker", "slurm_restarts", schema="atelier")
    op.drop_table("array_job", schema="atelier")
