"""SQL for the GPU time that a study has spent, and whether its budget is used up."""

import sqlalchemy as sa

from storage.clock import NOW
from storage.optuna_tables import TRIALS
from storage.outcome import Outcome
from storage.tables import ATTEMPTS

# Whether a worker completed the trial: others may add finished trials with Study.tell or add_trial.
TRAINED_HERE = sa.exists().where(
    ATTEMPTS.c.trial_id == TRIALS.c.trial_id, ATTEMPTS.c.outcome == Outcome.COMPLETE
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
    """GPU_SECONDS as a part of another statement."""
    query = sa.text(GPU_SECONDS).bindparams(study_id=study_id)
    return query.columns(sa.column("seconds", sa.Double)).scalar_subquery()


# Whether a study has used up its budget in GPU-hours. Without a budget this sums nothing.
IS_SPENT = f"""
SELECT CASE WHEN max_gpu_seconds IS NULL THEN false ELSE ({GPU_SECONDS}) >= max_gpu_seconds END
FROM atelier.study
WHERE study_id = :study_id
"""
