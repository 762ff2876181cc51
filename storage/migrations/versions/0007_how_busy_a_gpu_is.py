"""How busy a GPU was in an epoch, and what it waited for; what a study's trunk computes on a device."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0007"
down_revision = "0006"

EPOCH = ("busy", "waited_for_database", "waited_for_disk", "waited_for_trials")


def upgrade() -> None:
    for name in EPOCH:
        op.add_column("epoch", sa.Column(name, sa.Double), schema="atelier")
    op.add_column(
        "study", sa.Column("trunks", JSONB, nullable=False, server_default="{}"), schema="atelier"
    )


def downgrade() -> None:
    for name in EPOCH:
        op.drop_column("epoch", name, schema="atelier")
    op.drop_column("study", "trunks", schema="atelier")
