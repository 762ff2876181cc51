"""Choose which trials of a study may be claimed next, and in which order."""

from collections.abc import Callable
from functools import cached_property

import sqlalchemy as sa

from storage.clock import NOW
from storage.liveness import Liveness, hosts_at_work
from storage.optuna_tables import TRIALS, UNFINISHED, TrialState
from storage.outcome import SICK_HOST, Outcome
from storage.ranks import Rank, read_ranks
from storage.tables import ATTEMPTS, WORKERS, Row
from storage.usage import TRAINED_HERE

# Trials that are paused: their last attempt ended so.
PAUSED_TRIALS = f"""
SELECT trial_id
FROM atelier.attempt AS pause
WHERE study_id = :study_id AND outcome = '{Outcome.PAUSED}' AND NOT EXISTS (
    SELECT FROM atelier.attempt AS later
    WHERE later.trial_id = pause.trial_id AND later.number > pause.number
)
"""
LAST_EPOCHS_OF_PAUSED = f"""
SELECT trial_id, max(epoch) AS epoch
FROM atelier.epoch
WHERE trial_id IN ({PAUSED_TRIALS})
GROUP BY trial_id
"""
# Trials that may wait for a worker; this worker's own come first, from a claim whose reply was lost.
# `Ledger.claim` checks each holder again under a lock. This query only skips trials surely in work.
# A trial prefers the kind of device that it was last on: there its numbers stay the same. It does so for
# a lease after it was released, or after its holder's lease has ended.
UNFINISHED_TRIALS = f"""
SELECT
    trials.trial_id,
    coalesce(
        latest.gpu IS DISTINCT FROM (SELECT gpu FROM atelier.worker WHERE id = :worker_id)
            AND {NOW} < latest.ended + make_interval(secs => :lease_seconds),
        false
    ) AS prefers_another
FROM trials
LEFT JOIN atelier.attempt ON attempt.trial_id = trials.trial_id AND attempt.released IS NULL
LEFT JOIN LATERAL (
    SELECT worker.gpu, coalesce(past.released, past.lease_until) AS ended
    FROM atelier.attempt AS past JOIN atelier.worker ON worker.id = past.worker_id
    WHERE past.trial_id = trials.trial_id
    ORDER BY past.number DESC
    LIMIT 1
) AS latest ON true
WHERE trials.study_id = :study_id AND trials.state = 'RUNNING'
    AND trials.trial_id NOT IN ({PAUSED_TRIALS})
    AND (
        attempt.worker_id IS NULL
        OR attempt.worker_id = :worker_id
        OR attempt.worker_id = ANY(:gone_workers)
        OR attempt.lease_until <= {NOW}
    )
ORDER BY coalesce(attempt.worker_id = :worker_id, false) DESC, trials.number
"""

# All trials and the enqueued ones as of one moment: users enqueue without the lock.
COUNT_AND_WAITING = """
SELECT count(*), coalesce(array_agg(trial_id ORDER BY number) FILTER (WHERE state = 'WAITING'), '{}')
FROM trials
WHERE study_id = :study_id
"""


class TrialQueue:
    """The trials that a worker may claim, as Optuna's ids. The caller has locked the study's row.

    Each list is read only when a claim asks for it: most claims need only the first.
    """

    def __init__(
        self,
        connection: sa.Connection,
        study: Row,
        worker_id: str | None,
        host: str,
        liveness: Liveness,
        lease_seconds: float,
    ) -> None:
        self._connection, self._study, self._lease_seconds = connection, study, lease_seconds
        self._worker_id, self._host, self._liveness = worker_id, host, liveness

    @cached_property
    def unfinished(self) -> dict[int, bool]:
        """Trials that were begun, are not paused, and seem to have no holder.

        Each with whether it prefers another kind of device than this worker's, for now.
        """
        parameters = {
            "study_id": self._study.study_id,
            "worker_id": self._worker_id,
            "gone_workers": [worker for worker, alive in self._liveness.items() if not alive],
            "lease_seconds": self._lease_seconds,
        }
        rows = self._connection.execute(sa.text(UNFINISHED_TRIALS), parameters)
        return {trial_id: prefers_another for trial_id, prefers_another in rows}

    def interrupted(self, prefers_another: bool = False) -> list[int]:
        """Unfinished trials that have not failed, and may go on here, or prefer another device."""
        return [
            trial_id
            for trial_id, prefers in self.unfinished.items()
            if prefers == prefers_another and trial_id not in self._failures
        ]

    def enqueued(self) -> list[int]:
        """Trials that a user enqueued, if the budget has a place for one."""
        count, waiting = self._count_and_waiting
        return waiting if count - len(waiting) < self._study.max_trials else []

    def promoted(self, promotes: Callable[[Rank], bool]) -> list[int]:
        """Paused trials that the strategy promotes now."""
        return [trial_id for trial_id, rank in self._paused.items() if promotes(rank)]

    def allows_new(self) -> bool:
        """Whether the budget has a place for a new trial."""
        count, _ = self._count_and_waiting
        return bool(count < self._study.max_trials)

    def failed(self) -> list[int]:
        """Unfinished trials that have failed; last those that failed on this host.

        While a host is at work that has not tried a trial, the trial is left to that host.
        """
        other_hosts = hosts_at_work(self._connection, self._study.study_id) - {self._host}
        failures = {
            trial_id: self._failures[trial_id]
            for trial_id in self.unfinished
            if trial_id in self._failures
        }
        may_try = [
            trial_id
            for trial_id, hosts in failures.items()
            if self._host not in hosts or other_hosts <= hosts
        ]
        return sorted(may_try, key=lambda trial_id: self._host in failures[trial_id])

    def rest_of_paused(self, is_over: bool) -> list[int]:
        """Paused trials that go on because no other trial can; the best first.

        With a budget in GPU-hours all of it is spent. A small search may have no trial in the top
        third at a rung, yet it must end with a complete trial.
        """
        may_go_on = self._study.max_gpu_seconds is not None or (is_over and not self._has_complete())
        return list(self._paused) if may_go_on else []

    def somebody_is_at_work(self) -> bool:
        """Whether a trial has an open attempt, and has not been ended elsewhere."""
        query = (
            sa.select(ATTEMPTS.c.trial_id)
            .join(TRIALS, TRIALS.c.trial_id == ATTEMPTS.c.trial_id)
            .where(ATTEMPTS.c.study_id == self._study.study_id, ATTEMPTS.c.released.is_(None))
            .where(TRIALS.c.state.in_(UNFINISHED))
        )
        return self._connection.scalar(query.limit(1)) is not None

    @cached_property
    def _failures(self) -> dict[int, set[str]]:
        """The hosts on which trials have failed, by trial; with those that `Ledger.excuse` excused."""
        failed = (ATTEMPTS.c.outcome == Outcome.ERROR) | ATTEMPTS.c.reason.startswith(SICK_HOST)
        query = (
            sa.select(ATTEMPTS.c.trial_id, WORKERS.c.host)
            .join(WORKERS, WORKERS.c.id == ATTEMPTS.c.worker_id)
            .where(ATTEMPTS.c.study_id == self._study.study_id, failed)
        )
        hosts: dict[int, set[str]] = {}
        for trial_id, name in self._connection.execute(query):
            hosts.setdefault(trial_id, set()).add(name)
        return hosts

    @cached_property
    def _count_and_waiting(self) -> tuple[int, list[int]]:
        """How many trials there are, and those that a user enqueued."""
        parameters = {"study_id": self._study.study_id}
        count, waiting = self._connection.execute(sa.text(COUNT_AND_WAITING), parameters).one()
        return count, waiting

    @cached_property
    def _paused(self) -> dict[int, Rank]:
        """The ranks of paused trials at their last epochs; the latest epoch first, then the best."""
        return read_ranks(self._connection, self._study.study_id, LAST_EPOCHS_OF_PAUSED)

    def _has_complete(self) -> bool:
        query = sa.select(TRIALS.c.trial_id).where(
            TRIALS.c.study_id == self._study.study_id,
            TRIALS.c.state == TrialState.COMPLETE,
            TRAINED_HERE,
        )
        return self._connection.scalar(query.limit(1)) is not None
