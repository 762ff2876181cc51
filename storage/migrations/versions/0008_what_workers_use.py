"""What a worker was granted, and used of it; how long it waited for images."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

WORKER = {
    "pack": sa.Integer,
    "memory": sa.Double,
    "peak_memory": sa.Double,
    "wall_seconds": sa.Double,
}


def upgrade() -> None:
    for name, kind in WORKER.items():
        op.add_column("worker", sa.Column(name, kind), schema="atelier")
    op.add_column("epoch", sa.Column("waited_for_images", sa.Double), schema="atelier")


def downgrade() -> None:
    for name in WORKER:
        op.drop_column("worker", name, schema="atelier")
    op.drop_column("epoch", "waited_for_images", schema="atelier")
