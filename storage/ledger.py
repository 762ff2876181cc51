"""Who holds which trial, and what it has done: claim, renew, record, finish, release.

Optuna samples and remembers; this module owns the life of a trial. A worker holds a trial by an
*attempt* with a lease; a unique index allows one open attempt per trial. Every write names its
attempt and is fenced in its own transaction: the attempt is locked and must still be open, else the
worker has been replaced and gets LeaseLost. What Optuna must know of an epoch or an end is written to
Optuna's tables in that same transaction, which is why its models are imported here. Rows are keyed
by (trial, epoch) and (trial, attempt), so an operation that is repeated after a lost reply changes
nothing.
"""

import json
import math
import os
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from optuna.storages import BaseStorage
from optuna.trial import TrialState
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session, aliased

from storage.database import retrying
from storage.liveness import HELD, Holder, Liveness, host, probe_this_host, process_identity
from storage.optuna_tables import (
    TrialIntermediateValueModel,
    TrialModel,
    TrialParamModel,
    TrialSystemAttributeModel,
    TrialUserAttributeModel,
    TrialValueModel,
)
from storage.tables import Attempt, Epoch, Study, Worker
from storage.usage import TRAINED_HERE, is_spent, now

LEASE_SECONDS = 120.0
RESTORED = "the database was restored from a backup"
REFUSED = " (refused)"  # how the names of a refused trial's parameters end
SICK_HOST = "sick host"  # how the reason of a worker begins that could do nothing there
STOPPED, SPENT = "atelier stop", "the study's GPU-hours are spent"

# The outcome of an attempt whose trial waits until its strategy lets it go on.
PAUSED = "paused"

# The user attribute of an audited trial: {"epoch", "verdict"} of when its strategy would first have
# stopped it.
AUDIT = "atelier:audit"
REDUCTION_FACTOR = 3

# How a trial may end. One that is only released stays RUNNING for Optuna and waits for a worker.
END_STATES = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


class LeaseLost(Exception):  # noqa: N818  # it is an event, not a fault
    """Another worker holds the trial now; this one must stop and write nothing more."""


@dataclass(frozen=True)
class Claim:
    """A hold on a trial: what every write has to show."""

    trial_id: int
    trial_number: int
    attempt: int
    last_epoch: int  # the last one on record, -1 before the first
    promoted: bool = False  # it was paused after that epoch, and goes on


@dataclass(frozen=True)
class Rank:
    """A trial's place at an epoch, among the trials that have been there."""

    better: int  # how many were worth more
    peers: int  # how many there are, itself included

    @property
    def is_among_the_best(self) -> bool:
        """Whether it is in the top third."""
        return self.better < self.peers // REDUCTION_FACTOR


def _lost(claim: Claim) -> LeaseLost:
    return LeaseLost(f"trial {claim.trial_number} is no longer held by this worker")


class Ledger:
    """The trials of one study, as one worker (or an onlooker) sees them.

    `probe_liveness` says which holders are alive and which are gone. Where it cannot say, the lease
    decides. `job` are the columns of this worker's SLURM job.
    """

    def __init__(
        self,
        engine: sa.Engine,
        storage: BaseStorage,
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
    def register(self, gpu: str | None = None, log: str | None = None) -> str:
        """Enter this process as a worker. Returns its id, which is new for every process."""
        self.worker_id = self.worker_id or uuid.uuid4().hex
        values = {
            "id": self.worker_id,
            "host": host(),
            "pid": os.getpid(),
            "process": process_identity(),
            "gpu": gpu,
            "log": log,
            **self._job,
        }
        with self.engine.begin() as connection:
            connection.execute(insert(Worker).values(values).on_conflict_do_nothing())
        return self.worker_id

    @retrying
    def sign_off(self, reason: str) -> None:
        """Note that this worker stops, and why."""
        with self.engine.begin() as connection:
            connection.execute(
                sa.update(Worker)
                .where(Worker.id == self.worker_id)
                .values(stopped=now(), last_seen=now(), reason=reason)
            )

    @retrying
    def claim(
        self,
        held: Collection[int] = (),
        promotes: Callable[[Rank], bool] = lambda _: False,
    ) -> Claim | None:
        """Take a trial that was interrupted, else one that somebody enqueued, a paused one that
        `promotes`, a new one, one that has failed.

        A budget in GPU-hours is there to be spent: if no further trial may begin, the best of the paused
        goes on. So it does if nobody is at work and no trial is complete. None if the budget is spent,
        if `stop_reason` gives one, or if the study was deleted. `held` are Optuna's ids of the trials
        that this worker has in hand; another one of its own is from a claim whose reply was lost.

        Claims of a study follow one another (the study's row is locked), so that any number of workers
        neither overshoots the budget nor takes a trial twice. The one that finds nothing more to do, for
        itself or anybody, tells Optuna that the paused trials are pruned.
        """
        verdicts = self._probe_liveness(self._holders())  # before the lock: it may take its time
        with Session(self.engine) as session, session.begin():
            study = session.get(Study, self.study_id, with_for_update=True)
            if study is None or self._stop_reason(session) is not None:
                return None
            spent = bool(session.scalar(sa.select(is_spent(self.study_id))))
            if spent:
                self._close_the_dead(session, verdicts, held)
            # Asked first: what a worker releases meanwhile may be claimable, or make others so.
            is_over = not self._somebody_is_at_work(session)
            if not spent:
                for trial_id in self._claimable(session, study, verdicts, promotes, is_over):
                    if trial_id not in held and (claim := self._take(session, trial_id, verdicts)):
                        return claim
            if is_over:
                self._settle(session, spent)
            return None

    def _claimable(
        self,
        session: Session,
        study: Study,
        verdicts: Liveness,
        promotes: Callable[[Rank], bool],
        is_over: bool,
    ) -> Iterator[int]:
        """Trials to take, the first first; new ones begin when they are asked for."""
        unfinished = self._unfinished(session, verdicts)
        failed = self._failures(session)
        # What has failed comes last: so a host on which everything fails meets different trials.
        put_off = sorted(
            failed.keys() & set(unfinished), key=lambda trial_id: host() in failed[trial_id]
        )
        yield from (trial_id for trial_id in unfinished if trial_id not in failed)
        enqueued = sa.select(TrialModel.trial_id).where(
            TrialModel.study_id == self.study_id, TrialModel.state == TrialState.WAITING
        )
        waiting = session.scalars(enqueued.order_by(TrialModel.number)).all()
        trials = sa.select(sa.func.count()).where(TrialModel.study_id == self.study_id)
        n_trials = session.scalars(trials).one()
        if n_trials - len(waiting) < study.max_trials:
            yield from waiting
        paused = self._ranks_of_paused(session)
        for trial_id, standing in paused.items():
            if promotes(standing):
                yield trial_id
        if n_trials < study.max_trials:
            # In a transaction of its own: if we die before the commit of the claim, the trial is
            # RUNNING without an attempt, and the next claim takes it.
            yield self.storage.create_new_trial(self.study_id)
        others = self._hosts_at_work(session) - {host()}
        for trial_id in put_off:
            if host() not in failed[trial_id] or others <= failed[trial_id]:
                yield trial_id  # else it is for a host that has not tried it
        # A small search may have nobody in the top third at a rung, and must not end with nothing.
        if study.max_gpu_seconds is not None or (is_over and not self._has_complete(session)):
            yield from paused

    def _failures(self, session: Session) -> dict[int, set[str]]:
        """The hosts on which trials have failed, by Optuna's id; also where that was excused."""
        failed = (Attempt.outcome == "error") | Attempt.reason.startswith(SICK_HOST)
        query = (
            sa.select(Attempt.trial_id, Worker.host)
            .join(Worker, Worker.id == Attempt.worker_id)
            .where(Attempt.study_id == self.study_id, failed)
        )
        hosts: dict[int, set[str]] = {}
        for trial_id, name in session.execute(query):
            hosts.setdefault(trial_id, set()).add(name)
        return hosts

    def _hosts_at_work(self, session: Session) -> set[str]:
        """The hosts of workers that hold a trial."""
        query = (
            sa.select(Worker.host)
            .distinct()
            .join(Attempt, Attempt.worker_id == Worker.id)
            .where(Attempt.study_id == self.study_id, HELD)
        )
        return set(session.scalars(query))

    def _has_complete(self, session: Session) -> bool:
        query = sa.select(TrialModel.trial_id).where(
            TrialModel.study_id == self.study_id, TrialModel.state == TrialState.COMPLETE, TRAINED_HERE
        )
        return session.scalar(query.limit(1)) is not None

    @retrying
    def _holders(self) -> list[Holder]:
        query = (
            sa.select(
                Worker.id,
                Worker.process,
                Worker.slurm_cluster,
                Worker.slurm_job,
                Worker.slurm_restarts,
            )
            .join(Attempt, Attempt.worker_id == Worker.id)
            .where(Attempt.study_id == self.study_id, Attempt.released.is_(None))
            .where(Worker.id != self.worker_id)
        )
        with self.engine.connect() as connection:
            return [Holder(*row) for row in connection.execute(query)]

    def _unfinished(self, session: Session, verdicts: Liveness) -> list[int]:
        """Trials that may wait for a worker; first our own, from a claim whose reply was lost."""
        holder = Attempt.worker_id
        gone = [worker for worker, alive in verdicts.items() if not alive]
        query = (
            sa.select(TrialModel.trial_id)
            .outerjoin(
                Attempt, sa.and_(Attempt.trial_id == TrialModel.trial_id, Attempt.released.is_(None))
            )
            .where(TrialModel.study_id == self.study_id)
            .where(TrialModel.state == TrialState.RUNNING)
            .where(TrialModel.trial_id.not_in(self._paused()))
            # `_take` judges them again, under a lock; this spares it those that are at work.
            .where(
                holder.is_(None)
                | (holder == self.worker_id)
                | holder.in_(gone)
                | (Attempt.lease_until <= now())
            )
            .order_by(sa.func.coalesce(holder == self.worker_id, False).desc(), TrialModel.number)
        )
        return list(session.scalars(query))

    def _paused(self) -> sa.Select[Any]:
        """The ids of the paused trials: nobody has taken them since."""
        later = aliased(Attempt)
        return sa.select(Attempt.trial_id).where(
            Attempt.study_id == self.study_id,
            Attempt.outcome == PAUSED,
            ~sa.exists().where(later.trial_id == Attempt.trial_id, later.number > Attempt.number),
        )

    def _ranks_of_paused(self, session: Session) -> dict[int, Rank]:
        """By Optuna's id; the furthest first, then the best."""
        rungs = (
            sa.select(Epoch.trial_id, sa.func.max(Epoch.epoch).label("epoch"))
            .where(Epoch.trial_id.in_(self._paused()))
            .group_by(Epoch.trial_id)
            .cte()
        )
        places = ranks(self.study_id, sa.select(rungs.c.epoch))
        query = (
            sa.select(places.c.trial_id, places.c.better, places.c.peers)
            .join(rungs, sa.and_(rungs.c.trial_id == places.c.trial_id, rungs.c.epoch == places.c.epoch))
            .order_by(places.c.epoch.desc(), places.c.better, places.c.trial_id)
        )
        return {trial_id: Rank(*place) for trial_id, *place in session.execute(query)}

    def _somebody_is_at_work(self, session: Session) -> bool:
        """Whether an attempt is open at a trial that nobody has ended otherwise."""
        query = (
            sa.select(Attempt.trial_id)
            .join(TrialModel, TrialModel.trial_id == Attempt.trial_id)
            .where(Attempt.study_id == self.study_id, Attempt.released.is_(None))
            .where(TrialModel.state.in_([TrialState.RUNNING, TrialState.WAITING]))
        )
        return session.scalar(query.limit(1)) is not None

    def _close_the_dead(self, session: Session, verdicts: Liveness, held: Collection[int]) -> None:
        """Close the attempts of workers that ended without a word: nobody will take their trials."""
        for trial_id in self._unfinished(session, verdicts):
            row = self._open_attempt(session, trial_id)
            if row is not None and trial_id not in held:
                attempt, leased = row
                own = attempt.worker_id == self.worker_id  # of a claim whose reply was lost
                if own or not verdicts.get(attempt.worker_id, leased):
                    _lose(attempt)

    def _settle(self, session: Session, spent: bool) -> None:
        """Tell Optuna that what is paused will not go on; nothing will, if the GPU-hours are spent."""
        ending = sa.select(TrialModel).where(
            TrialModel.study_id == self.study_id, TrialModel.state == TrialState.RUNNING
        )
        if not spent:
            ending = ending.where(TrialModel.trial_id.in_(self._paused()))
        for trial in session.scalars(ending.with_for_update()).all():
            values = sa.select(Epoch.value).where(Epoch.trial_id == trial.trial_id)
            value = session.scalar(values.order_by(Epoch.epoch.desc()).limit(1))
            _end(session, trial, TrialState.PRUNED, value, {})
            attempts = sa.select(Attempt).where(Attempt.trial_id == trial.trial_id)
            last = session.scalar(attempts.order_by(Attempt.number.desc()).limit(1))
            if last is not None and last.outcome == PAUSED:
                last.outcome = "pruned"
                last.reason = f"{last.reason}, and {SPENT if spent else 'never among the best'}"

    def _open_attempt(self, session: Session, trial_id: int) -> tuple[Attempt, bool] | None:
        """Locked, and whether its lease lasts."""
        row = session.execute(
            sa.select(Attempt, Attempt.lease_until > now())
            .where(Attempt.trial_id == trial_id, Attempt.released.is_(None))
            .with_for_update()
        ).one_or_none()
        return None if row is None else (row[0], row[1])

    def _take(self, session: Session, trial_id: int, verdicts: Liveness) -> Claim | None:
        """Hold the trial, unless it is finished or its holder lives.

        The rows are locked before they are judged, in the order in which `finish` locks them.
        """
        row = self._open_attempt(session, trial_id)
        trial = session.get_one(TrialModel, trial_id, with_for_update=True, populate_existing=True)
        if trial.state.is_finished():
            return None
        if row is not None:
            attempt, leased = row
            if attempt.worker_id == self.worker_id:
                return self._claim_of(session, trial, attempt.number)
            if verdicts.get(attempt.worker_id, leased):
                return None
            _lose(attempt)
            session.flush()
        if trial.state == TrialState.WAITING:  # enqueued by hand
            trial.state = TrialState.RUNNING
            trial._datetime_start_utc = _utc_now()
        number = 1 + (
            session.scalar(sa.select(sa.func.max(Attempt.number)).where(Attempt.trial_id == trial_id))
            or 0
        )
        session.execute(
            insert(Attempt).values(
                trial_id=trial_id,
                number=number,
                study_id=self.study_id,
                worker_id=self.worker_id,
                claimed=now(),
                renewed=now(),
                lease_until=self._lease(),
            )
        )
        return self._claim_of(session, trial, number)

    def _claim_of(self, session: Session, trial: TrialModel, number: int) -> Claim:
        epochs = sa.select(Epoch.epoch, Epoch.attempt).where(Epoch.trial_id == trial.trial_id)
        last = session.execute(epochs.order_by(Epoch.epoch.desc()).limit(1)).one_or_none()
        epoch, recorded_by = last or (-1, 0)
        paused_since = sa.exists().where(
            Attempt.trial_id == trial.trial_id,
            Attempt.number >= recorded_by,
            Attempt.outcome == PAUSED,
        )
        return Claim(
            trial_id=int(trial.trial_id),
            trial_number=int(trial.number),
            attempt=number,
            last_epoch=epoch,
            promoted=bool(session.scalar(sa.select(paused_since))),
        )

    def _lease(self) -> sa.ColumnElement[Any]:
        return now() + sa.func.make_interval(0, 0, 0, 0, 0, 0, self.lease_seconds)

    def _fence(self, session: Session, claim: Claim) -> Attempt:
        """Lock the claim's attempt, which must still be open. Raises LeaseLost."""
        attempt = session.scalar(sa.select(Attempt).where(self._is_open(claim)).with_for_update())
        if attempt is None:
            raise _lost(claim)
        return attempt

    def _is_open(self, claim: Claim) -> sa.ColumnElement[bool]:
        return sa.and_(
            Attempt.trial_id == claim.trial_id,
            Attempt.number == claim.attempt,
            Attempt.worker_id == self.worker_id,
            Attempt.released.is_(None),
        )

    def _held(self, claim: Claim) -> sa.CTE:
        """Part of a statement: prolong the lease; a row if the claim's attempt is still open.

        Its UPDATE locks the attempt until the whole statement is done, which is the fence.
        """
        return (
            sa.update(Attempt)
            .where(self._is_open(claim))
            .values(renewed=now(), lease_until=self._lease())  # the database's clock
            .returning(Attempt.trial_id)
            .cte("held")
        )

    def _while_held(self, claim: Claim, rows: Mapping[Any, Mapping[str, Any]]) -> str | None:
        """Prolong the lease and enter rows, by model: one statement, one round trip.

        Returns why all workers are to stop. Raises LeaseLost.
        """
        held = self._held(claim)
        entries = [_entry(model, values, held) for model, values in rows.items()]
        seen = sa.update(Worker).where(Worker.id == self.worker_id).values(last_seen=now()).cte("seen")
        study = sa.select(Study.stop_requested).where(Study.study_id == self.study_id)
        statement = (
            sa.select(study.scalar_subquery(), is_spent(self.study_id))
            .select_from(held)
            .add_cte(held, seen, *entries)
        )
        with self._autocommitting() as connection:
            row = connection.execute(statement).one_or_none()
        if row is None:
            raise _lost(claim)
        stopped, spent = row
        return STOPPED if stopped is not None else SPENT if spent else None

    @contextmanager
    def _autocommitting(self) -> Iterator[sa.Connection]:
        """For a single statement, without a BEGIN and a COMMIT on the way."""
        with self.engine.connect() as connection:
            # Not by SQLAlchemy's isolation level, whose reset is a round trip too.
            driver: Any = connection.connection.dbapi_connection
            driver.autocommit = True
            try:
                yield connection
            finally:
                if not driver.closed:
                    driver.autocommit = False

    @retrying
    def renew(self, claim: Claim) -> None:
        """Prolong the lease. Raises LeaseLost."""
        self._while_held(claim, {})

    @retrying
    def record(self, claim: Claim, result: Mapping[str, Any], value: float) -> str | None:
        """Enter one epoch, tell Optuna what it is worth, prolong the lease. Raises LeaseLost.

        `result` has the columns that trainer.metrics.EpochResult.columns gives. Returns why all workers
        of the study are to stop, if they are: STOPPED or SPENT.
        """
        stored, kind = TrialIntermediateValueModel.intermediate_value_to_stored_repr(value)
        epoch = {
            "trial_id": claim.trial_id,
            "study_id": self.study_id,
            "attempt": claim.attempt,
            "value": None if math.isnan(value) else value,
            **result,
        }
        told = {
            "trial_id": claim.trial_id,
            "step": result["epoch"],
            "intermediate_value": stored,
            "intermediate_value_type": kind,
        }
        return self._while_held(claim, {Epoch: epoch, TrialIntermediateValueModel: told})

    @retrying
    def stream_epochs(self, claim: Claim) -> list[int]:
        """The epochs of the stream that the trial's epochs on record went through."""
        if claim.last_epoch < 0:
            return []
        query = sa.select(Epoch.stream_epoch).where(Epoch.trial_id == claim.trial_id)
        with self._autocommitting() as connection:
            return list(connection.scalars(query.order_by(Epoch.epoch)))

    @retrying
    def rank(self, epoch: int, value: float) -> Rank:
        """The standing of a trial that was worth this much after an epoch."""
        query = sa.select(sa.func.count().filter(Epoch.value > value), sa.func.count()).where(
            Epoch.study_id == self.study_id, Epoch.epoch == epoch
        )
        with self._autocommitting() as connection:
            return Rank(*connection.execute(query).one())

    @retrying
    def finish(
        self,
        claim: Claim,
        outcome: str,
        value: float | None = None,
        reason: str | None = None,
        violated: str | None = None,
        artifact: Mapping[str, Any] | None = None,
    ) -> None:
        """End the trial for Optuna and the attempt, with `value` as its score. Raises LeaseLost.

        `violated` names a constraint that the trial does not satisfy; samplers learn from it.
        `artifact` is a file that goes with the trial, in optuna.artifacts' form.
        """
        attributes: dict[str, Any] = {}  # as Trial.set_constraint and upload_artifact would write them
        if violated is not None:
            attributes[f"constraints:{violated}"] = 1.0
        if artifact is not None:
            attributes[f"artifacts:{artifact['artifact_id']}"] = json.dumps(artifact)
        with Session(self.engine) as session, session.begin():
            attempt = session.get(Attempt, (claim.trial_id, claim.attempt), with_for_update=True)
            if attempt is not None and attempt.outcome == outcome:
                return  # our own earlier call, whose reply was lost
            attempt = self._fence(session, claim)
            trial = session.get_one(TrialModel, claim.trial_id, with_for_update=True)
            ended_elsewhere = trial.state.is_finished()
            if ended_elsewhere:
                outcome, reason = "lost", f"the trial was set to {trial.state.name} by somebody else"
            else:
                _end(session, trial, END_STATES[outcome], value, attributes)
            _close(attempt, outcome, reason)
        if ended_elsewhere:
            raise LeaseLost(f"trial {claim.trial_number}: {reason}")

    @retrying
    def refuse(self, claim: Claim, reason: str) -> None:
        """End a trial whose parameters are none of the study's. Raises LeaseLost.

        They get other names: Optuna lets no trial have another distribution than an earlier one.
        """
        name = TrialParamModel.param_name
        with Session(self.engine) as session, session.begin():
            self._fence(session, claim)
            session.execute(
                sa.update(TrialParamModel)
                .where(TrialParamModel.trial_id == claim.trial_id, ~name.endswith(REFUSED))
                .values(param_name=name + REFUSED)
            )
        self.finish(claim, "failed", reason=reason)

    @retrying
    def note_audit(self, claim: Claim, epoch: int, verdict: str) -> None:
        """Note when a trial would have been stopped, if that was not noted before. Raises LeaseLost."""
        with Session(self.engine) as session, session.begin():
            self._fence(session, claim)
            noted = json.dumps({"epoch": epoch, "verdict": verdict})
            row = {"trial_id": claim.trial_id, "key": AUDIT, "value_json": noted}
            session.execute(insert(TrialUserAttributeModel).values(row).on_conflict_do_nothing())

    @retrying
    def release(self, claim: Claim, outcome: str = "released", reason: str = "") -> bool:
        """Give the trial back, unfinished, for the next worker. Returns False if it was lost."""
        with Session(self.engine) as session, session.begin():
            attempt = session.get(Attempt, (claim.trial_id, claim.attempt), with_for_update=True)
            if attempt is None or attempt.worker_id != self.worker_id:
                return False
            if attempt.released is None:
                _close(attempt, outcome, reason)
            return attempt.outcome == outcome  # also of our own earlier call, whose reply was lost

    @retrying
    def withdraw(self, claim: Claim) -> None:
        """Undo a claim of which nothing has come. Nothing to do if it was lost."""
        with self.engine.begin() as connection:
            connection.execute(sa.delete(Attempt).where(self._is_open(claim)))

    @retrying
    def stop_reason(self) -> str | None:
        """Why this worker gets nothing more to do; None if it may."""
        with Session(self.engine) as session:
            return self._stop_reason(session)

    def _stop_reason(self, session: Session) -> str | None:
        study = sa.select(Study.stop_requested).where(Study.study_id == self.study_id)
        # A restored database has other workers: of this one it has no row, or one that has ended.
        worker = sa.select(Worker.id).where(Worker.id == self.worker_id, Worker.stopped.is_(None))
        stopped, known = session.execute(
            sa.select(study.scalar_subquery(), worker.scalar_subquery())
        ).one()
        if known is None:
            return RESTORED
        return None if stopped is None else STOPPED

    @retrying
    def is_bad(self, claim: Claim, max_failures: int) -> bool:
        """Whether a trial that fails now is to blame, and not this host.

        It has failed on another host too; or, where no other host could try it, `max_failures` times.
        """
        charged = (
            sa.select(Worker.host)
            .join(Attempt, Attempt.worker_id == Worker.id)
            .where(Attempt.trial_id == claim.trial_id, Attempt.outcome == "error")
        )
        with Session(self.engine) as session:
            hosts = session.scalars(charged).all()
            if {*hosts} - {host()}:
                return True
            return len(hosts) >= max_failures and self._hosts_at_work(session) <= {host()}

    @retrying
    def excuse(self) -> None:
        """Charge no trial with what has failed in this worker: it was the host's fault."""
        with self.engine.begin() as connection:
            connection.execute(
                sa.update(Attempt)
                .where(Attempt.worker_id == self.worker_id, Attempt.outcome == "error")
                .values(outcome="released", reason=sa.literal(f"{SICK_HOST}: ") + Attempt.reason)
            )

    @retrying
    def has_only_failed(self) -> bool:
        """Whether every trial of the study has failed, and there is one."""
        query = sa.select(TrialModel.state).where(TrialModel.study_id == self.study_id).distinct()
        with self.engine.connect() as connection:
            return set(connection.scalars(query)) == {TrialState.FAIL}


def _end(
    session: Session,
    trial: TrialModel,
    state: TrialState,
    value: float | None,
    attributes: Mapping[str, Any],
) -> None:
    """What Study.tell writes, and system attributes."""
    trial.state = state
    trial._datetime_complete_utc = _utc_now()
    if value is not None:
        stored, kind = TrialValueModel.value_to_stored_repr(value)
        session.add(TrialValueModel(trial_id=trial.trial_id, objective=0, value=stored, value_type=kind))
    for key, content in attributes.items():
        session.add(
            TrialSystemAttributeModel(trial_id=trial.trial_id, key=key, value_json=json.dumps(content))
        )


def _entry(model: Any, values: Mapping[str, Any], held: sa.CTE) -> sa.CTE:
    """Part of a statement: enter a row, unless it is there, if the claim is held."""
    types = {name: model.__table__.c[name].type for name in values}
    row = [sa.cast(sa.literal(value, types[name]), types[name]) for name, value in values.items()]
    entered = insert(model).from_select(list(values), sa.select(*row).select_from(held))
    return entered.on_conflict_do_nothing().cte(f"entered_{model.__tablename__}")


def _close(attempt: Attempt, outcome: str, reason: str | None) -> None:
    attempt.released = attempt.renewed = now()
    attempt.outcome, attempt.reason = outcome, reason


def _lose(attempt: Attempt) -> None:
    attempt.released = attempt.renewed  # the last moment that it is known to have lived
    attempt.outcome, attempt.reason = "lost", "the worker ended without a word"


def ranks(study_id: int, epochs: sa.Select[Any] | Collection[int]) -> sa.Subquery:
    """The standing of every trial at these epochs: trial_id, epoch, better, peers."""
    at_epoch: dict[str, Any] = {"partition_by": Epoch.epoch}
    rank = sa.func.rank().over(**at_epoch, order_by=Epoch.value.desc().nulls_last())
    return (
        sa.select(
            Epoch.trial_id,
            Epoch.epoch,
            (rank - 1).label("better"),
            sa.func.count().over(**at_epoch).label("peers"),
        )
        .where(Epoch.study_id == study_id, Epoch.epoch.in_(epochs))
        .subquery()
    )


def _utc_now() -> sa.ColumnElement[Any]:
    return sa.func.timezone("UTC", now())  # Optuna 5 keeps naive UTC
