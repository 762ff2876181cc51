"""What a study has spent, as SQL."""

from typing import Any

import sqlalchemy as sa

from storage.optuna_tables import (
    TrialModel,
)
from storage.tables import Attempt, Study

# A trial that was completed by a worker, and not told or added by somebody else.
TRAINED_HERE = sa.exists().where(Attempt.trial_id == TrialModel.trial_id, Attempt.outcome == "complete")


def gpu_seconds(study_id: int) -> sa.ScalarSelect[float]:
    """Seconds in which workers have held trials of a study, any number at once: what it has spent."""
    held_until = sa.func.coalesce(Attempt.released, sa.func.least(now(), Attempt.lease_until))
    end = sa.func.greatest(held_until, Attempt.claimed)
    spans = (
        sa.select(
            sa.func.unnest(sa.func.range_agg(sa.func.tstzrange(Attempt.claimed, end))).label("span")
        )
        .where(Attempt.study_id == study_id)
        .group_by(Attempt.worker_id)
        .subquery()
    )
    seconds = sa.extract("epoch", sa.func.upper(spans.c.span) - sa.func.lower(spans.c.span))
    return sa.select(sa.func.coalesce(sa.func.sum(seconds), 0.0)).scalar_subquery()


def is_spent(study_id: int) -> sa.ScalarSelect[bool]:
    """Whether a study that has a budget in GPU-hours has used it up."""
    budget = Study.max_gpu_seconds
    # A CASE, so that without a budget nothing is summed.
    spent = sa.case((budget.is_(None), sa.false()), else_=gpu_seconds(study_id) >= budget)
    return sa.select(spent).where(Study.study_id == study_id).scalar_subquery()


def now() -> sa.ColumnElement[Any]:
    # Not now(), which is when the transaction began: it may have waited for a lock since.
    return sa.func.clock_timestamp()
