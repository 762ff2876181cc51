"""Keep the hits of every attribute; let our rows go with the study of Optuna that they describe."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"

OWNERS = (
    ("study", "study_id", "studies"),
    ("attempt", "trial_id", "trials"),
    ("epoch", "trial_id", "trials"),
)


def upgrade() -> None:
    op.add_column("study", sa.Column("attributes", postgresql.JSONB), schema="atelier")
    op.add_column("epoch", sa.Column("val_hits", postgresql.ARRAY(sa.Integer)), schema="atelier")
    for table, key, owner in OWNERS:
        # Rows of studies that were deleted before this revision.
        op.execute(f"DELETE FROM atelier.{table} WHERE {key} NOT IN (SELECT {key} FROM public.{owner})")
        op.create_foreign_key(
            f"{table}_{owner}",
            table,
            owner,
            [key],
            [key],
            source_schema="atelier",
            referent_schema="public",
            ondelete="CASCADE",
        )


def downgrade() -> None:
    for table, _, owner in OWNERS:
        op.drop_constraint(f"{table}_{owner}", table, schema="atelier")
    op.drop_column("epoch", "val_hits", schema="atelier")
    op.drop_column("study", "attributes", schema="atelier")
