"""Trials side by side: the stream's epoch; and an epoch's worth, for pruning by one indexed query."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    for column in (
        sa.Column("study_id", sa.Integer),
        sa.Column("value", sa.Double),
        sa.Column("stream_epoch", sa.Integer),
    ):
        op.add_column("epoch", column, schema="atelier")
    op.execute("UPDATE atelier.epoch SET stream_epoch = epoch")
    op.execute(
        "UPDATE atelier.epoch e SET study_id = t.study_id FROM public.trials t "
        "WHERE t.trial_id = e.trial_id"
    )
    op.execute(
        "UPDATE atelier.epoch e SET value = v.intermediate_value "
        "FROM public.trial_intermediate_values v WHERE v.trial_id = e.trial_id AND v.step = e.epoch "
        "AND v.intermediate_value_type = 'FINITE'"
    )
    for name in ("study_id", "stream_epoch"):
        op.alter_column("epoch", name, nullable=False, schema="atelier")
    op.create_index("epoch_standing", "epoch", ["study_id", "epoch", "value"], schema="atelier")


def downgrade() -> None:
    for name in ("study_id", "value", "stream_epoch"):  # the index goes with them
        op.drop_column("epoch", name, schema="atelier")
