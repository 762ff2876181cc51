"""What a study has spent, as SQL."""

import sqlalchemy as sa

from storage.clock import NOW
from storage.optuna_tables import TrialModel
from storage.outcome import Outcome
from storage.tables import Attempt

# A trial that was completed by a worker, and not told or added by somebody else.
TRAINED_HERE = sa.exists().where(
    Attempt.trial_id == TrialModel.trial_id, Attempt.outcome == Outcome.COMPLETE
)

# Seconds in which workers have held trials of a study. A worker that holds several counts once.
GPU_SECONDS = f"""
SELECT coalesce(sum(extract(epoch FROM upper(span) - lower(span))), 0.0)
FROM (
    SELECT unnest(range_agg(tstzrange(claimed, greatest(held_until, claimed)))) AS span
    FROM (
        SELECT worker_id, claimed, coalesce(released, least({NOW}, lease_until)) AS held_until
        FROM atelier.attempt
        WHERE study_id = :study_id
    ) AS hold
    GROUP BY worker_id
) AS busy
"""


def gpu_seconds(study_id: int) -> sa.ScalarSelect[float]:
    """The same as part of another statement."""
    query = sa.text(GPU_SECONDS).bindparams(study_id=study_id)
    return query.columns(sa.column("seconds", sa.Double)).scalar_subquery()


# Whether a study that has a budget in GPU-hours has used it up. Without a budget nothing is summed.
IS_SPENT = f"""
SELECT CASE WHEN max_gpu_seconds IS NULL THEN false ELSE ({GPU_SECONDS}) >= max_gpu_seconds END
FROM atelier.study
WHERE study_id = :study_id
"""
