"""Note by how much an epoch on record differs where another attempt trained it again."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("epoch", sa.Column("again", JSONB), schema="atelier")


def downgrade() -> None:
    op.drop_column("epoch", "again", schema="atelier")
