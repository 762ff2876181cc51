"""Rank a trial after an epoch, among all trials of its study that have reached it."""

from dataclasses import dataclass

import sqlalchemy as sa

REDUCTION_FACTOR = 3

# `places` is a query that gives each trial in question (trial_id) and the epoch to rank it at.
RANKS = """
WITH place AS ({places}), ranked AS (
    SELECT
        trial_id,
        epoch,
        rank() OVER (PARTITION BY epoch ORDER BY value DESC NULLS LAST) - 1 AS better,
        count(*) OVER (PARTITION BY epoch) AS peers
    FROM atelier.epoch
    WHERE study_id = :study_id AND epoch IN (SELECT epoch FROM place)
)
SELECT trial_id, better, peers
FROM ranked JOIN place USING (trial_id, epoch)
ORDER BY epoch DESC, better, trial_id
"""


@dataclass(frozen=True)
class Rank:
    """A trial's place at an epoch, among the trials that have reached it."""

    better: int  # how many have a higher value
    peers: int  # how many there are, with the trial itself

    @property
    def is_among_the_best(self) -> bool:
        """Whether it is in the top third."""
        return self.better < self.peers // REDUCTION_FACTOR


def read_ranks(
    connection: sa.Connection, study_id: int, places: str, **parameters: object
) -> dict[int, Rank]:
    """Ranks by Optuna's trial id: the latest epoch first, then the best trial."""
    query = sa.text(RANKS.format(places=places))
    rows = connection.execute(query, {"study_id": study_id, **parameters})
    return {trial_id: Rank(better, peers) for trial_id, better, peers in rows}
