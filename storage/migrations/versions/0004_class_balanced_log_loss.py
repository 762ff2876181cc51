"""Keep the class-balanced log-loss of every epoch, which a study may be ranked by."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("epoch", sa.Column("val_log_loss", sa.Double), schema="atelier")


def downgrade() -> None:
    op.drop_column("epoch", "val_log_loss", schema="atelier")
