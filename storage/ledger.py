"""Every write of a worker for its trials: claim, renew, record an epoch, finish, release.

Optuna samples and keeps the trials; this module decides who trains them. A worker holds a trial by an
*attempt* with a lease, and a unique index allows one open attempt per trial.

Every write is fenced in its own transaction: it locks its attempt, which must still be open. Otherwise
another worker has taken over the trial, and this one gets LeaseLost. Epochs and ends are written to
Optuna's tables in the same transaction.

Rows are keyed by (trial, epoch) and (trial, attempt). So an operation may be repeated after a lost
reply: the second time it changes nothing.
"""

import json
import math
import os
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from storage import recording
from storage.attempts import (
    close_attempt,
    close_if_ended,
    close_lost_attempt,
    hosts_of_failures,
    is_attempt,
    lock_attempt,
    lock_open_attempt,
    open_attempt,
    release_all,
)
from storage.clock import now
from storage.database import retrying
from storage.liveness import (
    Holder,
    Liveness,
    host,
    hosts_at_work,
    peak_memory,
    probe_this_host,
    process_identity,
    read_holders,
)
from storage.optuna_tables import (
    AUDIT,
    USER_ATTRIBUTES,
    TrialState,
    add_trial,
    begin_trial,
    end_trial,
    lock_trial,
    rename_params,
    stored,
)
from storage.outcome import RESTORED, SICK_HOST, SPENT, STOPPED, Outcome
from storage.ranks import Rank
from storage.study_end import close_the_dead, prune_the_rest
from storage.tables import ATTEMPTS, EPOCHS, STUDIES, WORKERS, Row
from storage.trial_queue import TrialQueue
from storage.usage import IS_SPENT

if TYPE_CHECKING:  # Optuna's import takes as long as SQLAlchemy's, and looking needs none
    from storage.optuna_storage import BaseStorage

LEASE_SECONDS = 120.0
REFUSED = " (refused)"  # the names of a refused trial's parameters end so

# Optuna's state for each outcome that ends a trial. A released trial stays RUNNING until it goes on.
END_STATES = {
    Outcome.COMPLETE: TrialState.COMPLETE,
    Outcome.PRUNED: TrialState.PRUNED,
    Outcome.FAILED: TrialState.FAIL,
}


class LeaseLost(Exception):  # noqa: N818  # an event, not an error
    """Another worker holds the trial now; the loser must stop and write nothing more."""


@dataclass(frozen=True)
class Claim:
    """A worker's hold on a trial; every write must present it."""

    trial_id: int
    trial_number: int
    attempt: int
    last_epoch: int  # on record; -1 before the first
    promoted: bool = False  # whether it was paused after that epoch and goes on now


def _lost(claim: Claim) -> LeaseLost:
    return LeaseLost(f"trial {claim.trial_number} is no longer held by this worker")


class Ledger:
    """The trials of one study, for one worker or for a process that only reads.

    `probe_liveness` says which holders are alive and which are gone. If it cannot say, the lease
    decides. `job` has the columns of this worker's SLURM job.
    """

    def __init__(
        self,
        engine: sa.Engine,
        storage: "BaseStorage",
        study_id: int,
        lease_seconds: float = LEASE_SECONDS,
        probe_liveness: Callable[[list[Holder]], Liveness] = probe_this_host,
        job: Mapping[str, Any] | None = None,
    ) -> None:
        self.engine, self.storage, self.study_id = engine, storage, study_id
        self._job = job or {}
        self.lease_seconds = lease_seconds
        self._probe_liveness = probe_liveness
        self.worker_id: str | None = None

    @retrying
    def register(self, **columns: Any) -> str:
        """Put this process on record as a worker. Returns its id; every process gets a new one."""
        self.worker_id = self.worker_id or uuid.uuid4().hex
        values = {
            "id": self.worker_id,
            "host": host(),
            "pid": os.getpid(),
            "process": process_identity(),
            "started": now(),
            "last_seen": now(),
            **self._job,
            **columns,
        }
        with self.engine.begin() as connection:
            connection.execute(insert(WORKERS).values(values).on_conflict_do_nothing())
        return self.worker_id

    @retrying
    def sign_off(self, reason: str) -> None:
        """Record that this worker stops, and why. What it still holds is given back.

        It may hold a trial without knowing, from a claim whose reply was lost.
        """
        with self.engine.begin() as connection:
            release_all(connection, self.worker_id, reason)
            connection.execute(
                sa.update(WORKERS)
                .where(WORKERS.c.id == self.worker_id)
                .values(stopped=now(), last_seen=now(), reason=reason, peak_memory=peak_memory())
            )

    @retrying
    def claim(
        self,
        held: Collection[int] = (),
        promotes: Callable[[Rank], bool] = lambda _: False,
    ) -> Claim | None:
        """Take the next trial. Returns None if there is none for this worker.

        There is none if the budget is spent, if `stop_reason` gives a reason, or if the study was
        deleted. `promotes` says whether a paused trial may go on. `held` are Optuna's ids of the trials
        that this worker trains. It may have another open attempt, from a claim whose reply was lost.

        A lock on the study's row lets only one claim at a time run. So many workers do not overshoot the
        budget, and do not take a trial twice. When no worker has anything more to do, the claim prunes
        the paused trials.
        """
        liveness = self._probe_liveness(self._holders())  # before the lock: it may be slow
        with self.engine.begin() as connection:
            row = sa.select(STUDIES).where(STUDIES.c.study_id == self.study_id)
            study = connection.execute(row.with_for_update()).one_or_none()
            if study is None or self._stop_reason(connection) is not None:
                return None
            queue = TrialQueue(connection, study, self.worker_id, host(), liveness, self.lease_seconds)
            spent = self._is_spent(connection)
            if spent:
                close_the_dead(connection, self.study_id, liveness, self.worker_id, held)
                spent = self._is_spent(connection)  # a gone worker's lease had counted to its end
            # Asked before the queue is read: else a trial that is released meanwhile may be pruned.
            # Who holds trials, but is not at work, has just given one back, and asks again.
            is_over = not held and not queue.somebody_is_at_work()
            take_first = partial(self._take_first, connection, liveness, held)
            claim = None
            if not spent:
                claim = (
                    take_first(queue.interrupted())
                    or take_first(queue.enqueued())
                    or take_first(queue.promoted(promotes))
                    or take_first(add_trial(connection, self.study_id) if queue.allows_new() else [])
                    or take_first(queue.interrupted(prefers_another=True))
                    # Late, so that a host on which everything fails tries different trials first.
                    or take_first(queue.failed())
                    or take_first(queue.rest_of_paused(is_over))
                )
            if claim is None and is_over:
                prune_the_rest(connection, self.study_id, spent)
            return claim

    def _is_spent(self, connection: sa.Connection) -> bool:
        """Whether the GPU-hours are spent, with what this transaction has changed."""
        return bool(connection.scalar(sa.text(IS_SPENT), {"study_id": self.study_id}))

    @retrying
    def _holders(self) -> list[Holder]:
        """The other workers that hold trials."""
        with self.engine.connect() as connection:
            holders = read_holders(connection, self.study_id)
        return [holder for holder in holders if holder.worker_id != self.worker_id]

    def _take_first(
        self,
        connection: sa.Connection,
        liveness: Liveness,
        held: Collection[int],
        trial_ids: Iterable[int],
    ) -> Claim | None:
        for trial_id in trial_ids:
            if trial_id not in held and (claim := self._take(connection, trial_id, liveness)):
                return claim
        return None

    def _take(self, connection: sa.Connection, trial_id: int, liveness: Liveness) -> Claim | None:
        """Claim the trial, unless it is finished or its holder is alive.

        The rows are locked before they are read, in the same order as in `finish`.
        """
        attempt = lock_open_attempt(connection, trial_id)
        trial = lock_trial(connection, trial_id)
        if trial.state.is_finished():
            return None
        if attempt is not None:
            if attempt.worker_id == self.worker_id:
                return self._claim_of(connection, trial, attempt.number)
            if liveness.get(attempt.worker_id, attempt.lease_lasts):
                return None
            close_lost_attempt(connection, trial_id, attempt.number)
        if trial.state == TrialState.WAITING:  # enqueued by hand
            begin_trial(connection, trial_id)
        number = open_attempt(connection, self.study_id, trial_id, self.worker_id, self.lease_seconds)
        return self._claim_of(connection, trial, number)

    def _claim_of(self, connection: sa.Connection, trial: Row, number: int) -> Claim:
        epochs = sa.select(EPOCHS.c.epoch, EPOCHS.c.attempt).where(EPOCHS.c.trial_id == trial.trial_id)
        latest = epochs.order_by(EPOCHS.c.epoch.desc()).limit(1)
        epoch, recorded_by = connection.execute(latest).one_or_none() or (-1, 0)
        paused_since = sa.exists().where(
            ATTEMPTS.c.trial_id == trial.trial_id,
            ATTEMPTS.c.number >= recorded_by,
            ATTEMPTS.c.outcome == Outcome.PAUSED,
        )
        return Claim(
            trial_id=trial.trial_id,
            trial_number=trial.number,
            attempt=number,
            last_epoch=epoch,
            promoted=bool(connection.scalar(sa.select(paused_since))),
        )

    def _fence(self, connection: sa.Connection, claim: Claim) -> None:
        """Lock the claim's attempt, which must still be open. Raises LeaseLost."""
        attempt = sa.select(ATTEMPTS.c.number).where(self._is_open(claim))
        if connection.scalar(attempt.with_for_update()) is None:
            raise _lost(claim)

    def _is_open(self, claim: Claim) -> sa.ColumnElement[bool]:
        return sa.and_(
            is_attempt(claim.trial_id, claim.attempt),
            ATTEMPTS.c.worker_id == self.worker_id,
            ATTEMPTS.c.released.is_(None),
        )

    def _renew(
        self, claim: Claim, statement: sa.TextClause = recording.RENEW, **entries: Any
    ) -> str | None:
        """Prolong the lease, and run what else the statement does. Raises LeaseLost.

        Returns why all workers are to stop, or None.
        """
        parameters = entries | {
            "study_id": self.study_id,
            "worker_id": self.worker_id,
            "peak_memory": peak_memory(),
            "lease_seconds": self.lease_seconds,
            "trial_id": claim.trial_id,
            "attempt": claim.attempt,
        }
        answer = recording.run(self.engine, statement, parameters)
        if answer is None:
            raise _lost(claim)
        stopped, spent = answer
        return STOPPED if stopped else SPENT if spent else None

    @retrying
    def renew(self, claim: Claim) -> None:
        """Prolong the lease. Raises LeaseLost."""
        self._renew(claim)

    @retrying
    def record(self, claim: Claim, result: Mapping[str, Any], value: float) -> str | None:
        """Record an epoch, report its value to Optuna, and prolong the lease. Raises LeaseLost.

        `result` has the columns that trainer.metrics.EpochResult.columns gives, and maybe those of what
        was waited for. Returns why all workers of the study are to stop: STOPPED or SPENT; or None.
        """
        number, kind = stored(value)
        return self._renew(
            claim,
            recording.RECORD,
            **{**recording.UNKNOWN, **result},
            value=None if math.isnan(value) else value,
            intermediate_value=number,
            intermediate_value_type=kind,
        )

    @retrying
    def mark(self, claim: Claim, epoch: int, difference: Mapping[str, float | None]) -> None:
        """Note by how much an epoch differs now that it was trained again. Raises LeaseLost."""
        again = json.dumps({"attempt": claim.attempt, **difference})
        self._renew(claim, recording.MARK, epoch=epoch, again=again)

    @retrying
    def rank(self, epoch: int, value: float) -> Rank:
        """The rank of a trial with this value after an epoch."""
        query = sa.select(sa.func.count().filter(EPOCHS.c.value > value), sa.func.count()).where(
            EPOCHS.c.study_id == self.study_id, EPOCHS.c.epoch == epoch
        )
        with recording.autocommitting(self.engine) as connection:
            return Rank(*connection.execute(query).one())

    @retrying
    def finish(
        self,
        claim: Claim,
        outcome: Outcome,
        value: float | None = None,
        reason: str | None = None,
        violated: str | None = None,
        artifact: Mapping[str, Any] | None = None,
    ) -> None:
        """End the trial for Optuna and the attempt, with `value` as its score. Raises LeaseLost.

        `violated` names a constraint that the trial violates; samplers learn from it. `artifact`
        describes a file of the trial, in optuna.artifacts' form.
        """
        attributes: dict[str, Any] = {}  # as Trial.set_constraint and upload_artifact would write them
        if violated is not None:
            attributes[f"constraints:{violated}"] = 1.0
        if artifact is not None:
            attributes[f"artifacts:{artifact['artifact_id']}"] = json.dumps(artifact)
        with self.engine.begin() as connection:
            key = claim.trial_id, claim.attempt
            attempt = lock_attempt(connection, *key)
            if attempt is not None and attempt.outcome == outcome:
                return  # an earlier call did it, and its reply was lost
            if attempt is None or attempt.worker_id != self.worker_id or attempt.released is not None:
                raise _lost(claim)
            trial = lock_trial(connection, claim.trial_id)
            ended_elsewhere = close_if_ended(connection, *key, trial.state)
            if ended_elsewhere is None:
                end_trial(connection, claim.trial_id, END_STATES[outcome], value, attributes)
                close_attempt(connection, *key, outcome, reason)
        if ended_elsewhere is not None:
            raise LeaseLost(f"trial {claim.trial_number}: {ended_elsewhere}")

    @retrying
    def refuse(self, claim: Claim, reason: str) -> None:
        """Fail a trial whose parameters do not fit the study. Raises LeaseLost.

        The parameters are renamed: Optuna allows only one distribution per name in a study.
        """
        with self.engine.begin() as connection:
            self._fence(connection, claim)
            rename_params(connection, claim.trial_id, REFUSED)
        self.finish(claim, Outcome.FAILED, reason=reason)

    @retrying
    def note_audit(self, claim: Claim, epoch: int, verdict: str) -> None:
        """Record when a trial would have been stopped, unless that is on record. Raises LeaseLost."""
        with self.engine.begin() as connection:
            self._fence(connection, claim)
            note = json.dumps({"epoch": epoch, "verdict": verdict})
            row = {"trial_id": claim.trial_id, "key": AUDIT, "value_json": note}
            connection.execute(insert(USER_ATTRIBUTES).values(row).on_conflict_do_nothing())

    @retrying
    def release(self, claim: Claim, outcome: Outcome = Outcome.RELEASED, reason: str = "") -> bool:
        """Let another worker have the trial. Returns False if it was lost, or ended elsewhere."""
        with self.engine.begin() as connection:
            key = claim.trial_id, claim.attempt
            attempt = lock_attempt(connection, *key)
            if attempt is None or attempt.worker_id != self.worker_id:
                return False
            if attempt.released is not None:  # maybe by an earlier call whose reply was lost
                return bool(attempt.outcome == outcome)
            trial = lock_trial(connection, claim.trial_id)
            if close_if_ended(connection, *key, trial.state) is not None:
                return False
            close_attempt(connection, *key, outcome, reason)
            return True

    @retrying
    def withdraw(self, claim: Claim) -> None:
        """Delete a claim's attempt that recorded nothing. Does nothing if the claim was lost."""
        with self.engine.begin() as connection:
            connection.execute(sa.delete(ATTEMPTS).where(self._is_open(claim)))

    @retrying
    def stop_reason(self) -> str | None:
        """Why this worker gets no more trials; None if it may get some."""
        with self.engine.connect() as connection:
            return self._stop_reason(connection)

    def _stop_reason(self, connection: sa.Connection) -> str | None:
        study = sa.select(STUDIES.c.stop_requested).where(STUDIES.c.study_id == self.study_id)
        # A restored database does not have this worker, or has it as stopped.
        is_at_work = sa.and_(WORKERS.c.id == self.worker_id, WORKERS.c.stopped.is_(None))
        worker = sa.select(WORKERS.c.id).where(is_at_work)
        stopped, registered = connection.execute(
            sa.select(study.scalar_subquery(), worker.scalar_subquery())
        ).one()
        if registered is None:
            return RESTORED
        return None if stopped is None else STOPPED

    @retrying
    def is_bad(self, claim: Claim, max_failures: int) -> bool:
        """Whether the trial is to blame for failing now, and not this host.

        It is if it failed on another host too, or `max_failures` times where no other could try it.
        """
        with self.engine.connect() as connection:
            hosts = hosts_of_failures(connection, claim.trial_id)
            if {*hosts} - {host()}:
                return True
            return len(hosts) >= max_failures and hosts_at_work(connection, self.study_id) <= {host()}

    @retrying
    def excuse(self) -> None:
        """Charge this worker's failures to its host, not to the trials."""
        reason = sa.literal(f"{SICK_HOST}: ") + ATTEMPTS.c.reason
        with self.engine.begin() as connection:
            connection.execute(
                sa.update(ATTEMPTS)
                .where(ATTEMPTS.c.worker_id == self.worker_id, ATTEMPTS.c.outcome == Outcome.ERROR)
                .values(outcome=Outcome.RELEASED, reason=reason)
            )
