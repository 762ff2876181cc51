"""Who holds which trial, and what it has done: claim, renew, record, finish, release.

Optuna samples and remembers; this module owns the life of a trial. A worker holds a trial by an
*attempt* with a lease; a unique index allows one open attempt per trial. Every write names its
attempt and is fenced in its own transaction: the attempt is locked and must still be open, else the
worker has been replaced and gets LeaseLost. What Optuna must know of an epoch or an end is written to
Optuna's tables in that same transaction, which is why its models are imported here. Rows are keyed
by (trial, epoch) and (trial, attempt), so an operation that is repeated after a lost reply changes
nothing.
"""

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import optuna
import psutil
import sqlalchemy as sa
from optuna.storages import BaseStorage
from optuna.storages._rdb.models import (
    StudyModel,
    TrialIntermediateValueModel,
    TrialModel,
    TrialValueModel,
)
from optuna.trial import TrialState
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from storage.database import retrying
from storage.models import Attempt, Epoch, Study, Worker

LEASE_SECONDS = 120.0
RENEW_SECONDS = 30.0

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


def process_identity(pid: int | None = None) -> str:
    """Names a process so that a later one with the same pid has another name.

    Raises psutil.NoSuchProcess.
    """
    pid = pid or os.getpid()
    return f"{_machine()}:{pid}:{psutil.Process(pid).create_time():.2f}"


def _machine() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()}:{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def is_gone(process: str) -> bool:
    """True if the process ran on this machine and has ended; False when nobody here can know."""
    machine, pid, _ = process.rsplit(":", 2)
    if machine != _machine():
        return False
    try:
        if psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE:
            return True  # killed, and its parent has not noticed yet
        return process_identity(int(pid)) != process
    except psutil.NoSuchProcess:
        return True


class Ledger:
    """The trials of one study, as one worker (or an onlooker) sees them."""

    def __init__(
        self,
        engine: sa.Engine,
        storage: BaseStorage,
        study_id: int,
        lease_seconds: float = LEASE_SECONDS,
        gone: Callable[[str], bool] = is_gone,
    ) -> None:
        self.engine, self.storage, self.study_id = engine, storage, study_id
        self.lease_seconds = lease_seconds
        self._gone = gone
        self.worker_id: str | None = None

    @retrying
    def register(self, gpu: str | None = None) -> str:
        """Enter this process as a worker. Returns its id, which is new for every process."""
        self.worker_id = self.worker_id or uuid.uuid4().hex
        values = {
            "id": self.worker_id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process": process_identity(),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "slurm_array_job": os.environ.get("SLURM_ARRAY_JOB_ID"),
            "slurm_array_task": os.environ.get("SLURM_ARRAY_TASK_ID"),
            "gpu": gpu,
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
                .values(stopped=_now(), last_seen=_now(), reason=reason)
            )

    @retrying
    def claim(self) -> Claim | None:
        """Take a trial that waits for a worker, else a new one if the budget allows, else None.

        Claims of a study follow one another (the study's row is locked), so that any number of
        workers neither overshoots the budget nor takes a trial twice.
        """
        with Session(self.engine) as session, session.begin():
            study = session.get_one(Study, self.study_id, with_for_update=True)
            trial = self._mine(session) or self._waiting(session)
            if trial is None and self._budget_left(session, study):
                # In a transaction of its own: if we die before the commit below, the trial is
                # RUNNING without an attempt, and the next claim takes it.
                trial_id = self.storage.create_new_trial(self.study_id)
                trial = session.get_one(TrialModel, trial_id)
            return None if trial is None else self._hold(session, trial)

    def _mine(self, session: Session) -> TrialModel | None:
        """A trial that this worker claimed before, when the reply to its claim was lost."""
        return session.scalar(
            sa.select(TrialModel)
            .join(Attempt, Attempt.trial_id == TrialModel.trial_id)
            .where(Attempt.worker_id == self.worker_id, Attempt.released.is_(None))
            .where(Attempt.study_id == self.study_id)
            .limit(1)
        )

    def _waiting(self, session: Session) -> TrialModel | None:
        """The first unfinished trial that nobody trains."""
        rows = session.execute(
            sa.select(TrialModel, Worker.process, Attempt.lease_until > _now())
            .outerjoin(
                Attempt,
                sa.and_(Attempt.trial_id == TrialModel.trial_id, Attempt.released.is_(None)),
            )
            .outerjoin(Worker, Worker.id == Attempt.worker_id)
            .where(TrialModel.study_id == self.study_id)
            .where(TrialModel.state.in_([TrialState.RUNNING, TrialState.WAITING]))
            .order_by(TrialModel.number)
        )
        for trial, process, leased in rows:
            if not leased or self._gone(process):  # `leased` is None without an open attempt
                return trial
        return None

    def _budget_left(self, session: Session, study: Study) -> bool:
        trials = session.scalar(
            sa.select(sa.func.count())
            .select_from(TrialModel)
            .where(TrialModel.study_id == self.study_id)
        )
        if trials is not None and trials >= study.max_trials:
            return False
        return (
            study.max_gpu_seconds is None
            or (session.scalar(sa.select(gpu_seconds(self.study_id))) or 0.0) < study.max_gpu_seconds
        )

    def _hold(self, session: Session, trial: TrialModel) -> Claim:
        attempts = session.scalars(
            sa.select(Attempt)
            .where(Attempt.trial_id == trial.trial_id)
            .order_by(Attempt.number.desc())
            .with_for_update()
        ).all()
        newest = attempts[0] if attempts else None
        if newest is not None and newest.released is None:
            if newest.worker_id == self.worker_id:
                return self._claim_of(session, trial, newest.number)
            newest.released = newest.renewed  # the last moment that it is known to have lived
            newest.outcome, newest.reason = "lost", "the worker ended without a word"
            session.flush()
        if trial.state == TrialState.WAITING:  # enqueued by hand
            trial.state = TrialState.RUNNING
            trial._datetime_start_utc = _utc_now()
        number = len(attempts) + 1
        session.execute(
            insert(Attempt).values(
                trial_id=trial.trial_id,
                number=number,
                study_id=self.study_id,
                worker_id=self.worker_id,
                claimed=_now(),
                renewed=_now(),
                lease_until=self._lease(),
            )
        )
        return self._claim_of(session, trial, number)

    def _claim_of(self, session: Session, trial: TrialModel, number: int) -> Claim:
        last = session.scalar(
            sa.select(sa.func.max(Epoch.epoch)).where(Epoch.trial_id == trial.trial_id)
        )
        return Claim(
            trial_id=int(trial.trial_id),
            trial_number=int(trial.number),
            attempt=number,
            last_epoch=-1 if last is None else last,
        )

    def _lease(self) -> sa.ColumnElement[Any]:
        return _now() + sa.func.make_interval(0, 0, 0, 0, 0, 0, self.lease_seconds)

    def _fence(self, session: Session, claim: Claim) -> Attempt:
        """Lock the claim's attempt, which must still be open. Raises LeaseLost."""
        attempt = session.scalar(
            sa.select(Attempt)
            .where(Attempt.trial_id == claim.trial_id, Attempt.number == claim.attempt)
            .where(Attempt.released.is_(None))
            .with_for_update()
        )
        if attempt is None:
            raise LeaseLost(f"trial {claim.trial_number} is no longer held by this worker")
        return attempt

    @retrying
    def renew(self, claim: Claim) -> None:
        """Prolong the lease. Raises LeaseLost."""
        with Session(self.engine) as session, session.begin():
            self._prolong(session, claim)

    def _prolong(self, session: Session, claim: Claim) -> None:
        attempt = self._fence(session, claim)
        attempt.renewed = _now()  # the database's clock
        attempt.lease_until = self._lease()
        session.execute(sa.update(Worker).where(Worker.id == self.worker_id).values(last_seen=_now()))

    @retrying
    def record(self, claim: Claim, result: Mapping[str, Any]) -> None:
        """Enter one epoch, tell Optuna its value, prolong the lease. Raises LeaseLost.

        `result` has the columns of the table `epoch` (EpochResult as a dict).
        """
        with Session(self.engine) as session, session.begin():
            self._prolong(session, claim)
            session.execute(
                insert(Epoch)
                .values(trial_id=claim.trial_id, attempt=claim.attempt, **result)
                .on_conflict_do_nothing()
            )
            value, kind = TrialIntermediateValueModel.intermediate_value_to_stored_repr(
                result["val_accuracy"]
            )
            session.execute(
                insert(TrialIntermediateValueModel)
                .values(
                    trial_id=claim.trial_id,
                    step=result["epoch"],
                    intermediate_value=value,
                    intermediate_value_type=kind,
                )
                .on_conflict_do_nothing()
            )

    @retrying
    def finish(
        self, claim: Claim, outcome: str, value: float | None = None, reason: str | None = None
    ) -> None:
        """End the trial for Optuna and the attempt, with `value` as its score. Raises LeaseLost."""
        with Session(self.engine) as session, session.begin():
            attempt = session.get_one(Attempt, (claim.trial_id, claim.attempt), with_for_update=True)
            if attempt.outcome == outcome:
                return  # our own earlier call, whose reply was lost
            self._fence(session, claim)
            trial = session.get_one(TrialModel, claim.trial_id, with_for_update=True)
            trial.state = END_STATES[outcome]
            trial._datetime_complete_utc = _utc_now()
            if value is not None:
                stored, kind = TrialValueModel.value_to_stored_repr(value)
                session.add(
                    TrialValueModel(trial_id=claim.trial_id, objective=0, value=stored, value_type=kind)
                )
            _close(attempt, outcome, reason)

    @retrying
    def release(self, claim: Claim, outcome: str = "released", reason: str = "") -> None:
        """Give the trial back, unfinished, for the next worker. Nothing to do if it was lost."""
        with Session(self.engine) as session, session.begin():
            try:
                _close(self._fence(session, claim), outcome, reason)
            except LeaseLost:
                return

    @retrying
    def failures(self, claim: Claim) -> int:
        """How many attempts at this trial have ended with an error."""
        with self.engine.connect() as connection:
            return (
                connection.scalar(
                    sa.select(sa.func.count())
                    .select_from(Attempt)
                    .where(Attempt.trial_id == claim.trial_id, Attempt.outcome == "error")
                )
                or 0
            )


def _close(attempt: Attempt, outcome: str, reason: str | None) -> None:
    attempt.released = attempt.renewed = _now()
    attempt.outcome, attempt.reason = outcome, reason


def gpu_seconds(study_id: int) -> sa.ScalarSelect[float]:
    """Seconds that workers have held trials of a study: what it has spent."""
    end = sa.func.coalesce(Attempt.released, Attempt.renewed)
    return (
        sa.select(sa.func.coalesce(sa.func.sum(sa.extract("epoch", end - Attempt.claimed)), 0.0))
        .where(Attempt.study_id == study_id)
        .scalar_subquery()
    )


def _now() -> sa.ColumnElement[Any]:
    # Not now(), which is when the transaction began: it may have waited for a lock since.
    return sa.func.clock_timestamp()


def _utc_now() -> sa.ColumnElement[Any]:
    return sa.func.timezone("UTC", _now())  # Optuna 5 keeps naive UTC


class LeaseKeeper:
    """Renews one claim from a thread of its own until the `with` block ends.

    It outlives any database error: `Ledger.renew` retries with back-off, and after that the next
    turn tries again. `lost` is set once another worker holds the trial.
    """

    def __init__(self, ledger: Ledger, claim: Claim, every: float = RENEW_SECONDS) -> None:
        self._ledger, self._claim, self._every = ledger, claim, every
        self._done = threading.Event()
        self.lost = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease-keeper", daemon=True)

    def __enter__(self) -> "LeaseKeeper":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def _run(self) -> None:
        while not self._done.wait(self._every):
            try:
                self._ledger.renew(self._claim)
            except LeaseLost:
                self.lost.set()
                return
            except Exception:  # whatever the database does, the lease must go on while we live
                time.sleep(1)


@dataclass(frozen=True)
class StudyEntry:
    """What is on record about a study."""

    study_id: int
    max_trials: int
    settings: dict[str, Any]
    dataset: str
    optuna_version: str


@retrying
def study_entry(engine: sa.Engine, name: str) -> StudyEntry | None:
    """Look a study up by its name."""
    with Session(engine) as session:
        study = session.scalar(
            sa.select(Study)
            .join(StudyModel, StudyModel.study_id == Study.study_id)
            .where(StudyModel.study_name == name)
        )
    if study is None:
        return None
    return StudyEntry(
        study.study_id, study.max_trials, study.settings, study.dataset, study.optuna_version
    )


@retrying
def enter_study(engine: sa.Engine, study_id: int, **values: Any) -> None:
    """Put a study on record, or update what it may spend."""
    row = {"study_id": study_id, "optuna_version": optuna.__version__, **values}
    with engine.begin() as connection:
        connection.execute(
            insert(Study).values(row).on_conflict_do_update(index_elements=["study_id"], set_=values)
        )


@retrying
def study_names(engine: sa.Engine) -> list[str]:
    """The studies on record, oldest first."""
    with engine.connect() as connection:
        return list(
            connection.scalars(
                sa.select(StudyModel.study_name)
                .join(Study, Study.study_id == StudyModel.study_id)
                .order_by(Study.created)
            )
        )


@retrying
def curve(engine: sa.Engine, study_id: int, trial_number: int) -> list[float]:
    """A trial's validation accuracies by epoch."""
    with engine.connect() as connection:
        return list(
            connection.scalars(
                sa.select(Epoch.val_accuracy)
                .join(TrialModel, TrialModel.trial_id == Epoch.trial_id)
                .where(TrialModel.study_id == study_id, TrialModel.number == trial_number)
                .order_by(Epoch.epoch)
            )
        )
