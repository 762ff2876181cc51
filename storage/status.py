"""Read a study's status as of one moment: its trials, their cost, and who works at them."""

import json
import math
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import distinct_on

from storage.clock import now, seconds_since
from storage.database import one_moment, retrying
from storage.liveness import HELD
from storage.optuna_tables import (
    AUDIT,
    PARAMS,
    TRIALS,
    UNFINISHED,
    USER_ATTRIBUTES,
    VALUES,
    TrialState,
    parameter,
)
from storage.outcome import SICK_HOST, Outcome
from storage.ranks import read_ranks
from storage.studies import select_array_jobs
from storage.tables import ATTEMPTS, EPOCHS, STUDIES, WORKERS, Row
from storage.usage import gpu_seconds
from storage.words import counted
from storage.workers import IMAGES_PER_SECOND, WorkerRow, read_workers


class State(StrEnum):
    """A trial's state as we show it, in the order of the lists. Optuna's states are TrialState."""

    RUNNING = "running"
    WAITING = "waiting"  # for a worker
    COMPLETE = "complete"
    PAUSED = "paused"  # at a rung, for its turn
    PRUNED = "pruned"
    FAILED = "failed"


STATES: tuple[str, ...] = tuple(State)
ACCURACIES = {"mean-last-5", "best", "last"}  # the kinds of score that are a share of the images
FINISHED = (State.COMPLETE, State.PRUNED, State.FAILED)
# The trials that were audited, each with the epoch after which it would have been stopped.
NOTED_EPOCHS = """
SELECT * FROM unnest(CAST(:trial_ids AS int[]), CAST(:epochs AS int[])) AS noted (trial_id, epoch)
"""
# The State of a trial that is not running, by Optuna's state.
_END_STATES = {
    TrialState.COMPLETE: State.COMPLETE,
    TrialState.PRUNED: State.PRUNED,
    TrialState.FAIL: State.FAILED,
    TrialState.WAITING: State.WAITING,
}


@dataclass
class TrialRow:
    """One trial."""

    number: int
    state: str  # a State
    params: dict[str, Any] = field(default_factory=dict)
    epochs: int = 0
    seconds: float = 0.0  # that its epochs took
    images_per_second: float | None = None
    busy: float | None = None  # share of the time in which its GPU computed; None if nobody knows
    accuracy: float | None = None  # of the last epoch
    value: float | None = None
    attempts: int = 0
    worker: str | None = None  # host:pid of the holder
    renewed: float | None = None  # seconds since the holder last renewed its lease
    reason: str | None = None  # of the last attempt's end
    audit: str | None = None  # what would have happened to it without the audit
    differing: int = 0  # epochs that gave other numbers when they were trained again

    @property
    def resumed(self) -> bool:
        """Whether it runs again after an interruption."""
        return self.state == State.RUNNING and self.attempts > 1

    @property
    def worth(self) -> float:
        """The trial's score, else its last accuracy; 0 without both, and for NaN."""
        value = self.accuracy if self.value is None else self.value
        return 0.0 if value is None or math.isnan(value) else value

    @property
    def words(self) -> str:
        """The state in words; an interrupted trial that waits or was resumed is not called failed."""
        why = (self.reason or "").strip().splitlines()
        if self.state == State.WAITING:
            return f"waiting to go on, after: {why[0]}" if why else "waiting for a worker"
        if self.state == State.RUNNING:
            return f"running, resumed (attempt {self.attempts})" if self.resumed else "running"
        if self.state == State.PAUSED and why:
            return why[0]
        if self.state in (State.FAILED, State.PRUNED) and why:
            return f"{self.state}: {why[-1] if self.state == State.FAILED else why[0]}"
        return self.state


@dataclass
class Status:
    """A whole study. `counts` are of trials; `gpu_hours` is the time that workers held trials."""

    study: str
    max_trials: int
    max_gpu_hours: float | None
    max_epochs: int
    counts: dict[str, int]
    gpu_hours: float
    seconds: float  # from the first claim to now, or to the last release
    stopping: bool  # after `atelier stop`
    array_jobs: list[str]  # SLURM's ids
    workers: list[WorkerRow]
    trials: list[TrialRow]
    overdue_seconds: float | None  # since the oldest lease ended whose trial nobody has taken over
    surplus: int  # enqueued trials for which the budget has no place
    sick_hosts: list[str]  # why workers failed on hosts where none has begun since
    disk_bytes: int | None = None  # of its run folder
    tasks: dict[str, int] | None = None  # array tasks by SLURM's state; None if SLURM does not answer
    tasks_problem: str | None = None  # why the counts in `tasks` may be incomplete
    pending: dict[str, int] = field(default_factory=dict)  # tasks that wait, by SLURM's reason
    # Of each attribute, by which a trial was judged; empty if the score is no accuracy.
    attribute_images: list[int] = field(default_factory=list)

    @property
    def finished(self) -> int:
        """How many trials are complete, pruned or failed."""
        return sum(self.counts[state] for state in FINISHED)

    @property
    def has_ended(self) -> bool:
        """Whether as many trials are finished as the budget allows."""
        return self.finished >= self.max_trials

    @property
    def best(self) -> TrialRow | None:
        """The best complete trial; None before there is one."""
        return next(iter(self.completed()), None)

    def completed(self) -> list[TrialRow]:
        """The complete trials that have trained all epochs, the best first.

        Trials that others finished with Study.tell or add_trial have no epochs.
        """
        complete = [row for row in self.ranked() if row.state == State.COMPLETE]
        return [row for row in complete if row.value is not None and row.epochs == self.max_epochs]

    def ranked(self) -> list[TrialRow]:
        """The trials by state, running ones first; in each state the best first."""
        return sorted(self.trials, key=lambda row: (STATES.index(row.state), -row.worth, row.number))

    @property
    def gpu_hours_saved(self) -> float:
        """What the rest of paused and pruned trials would have cost, at their own seconds per epoch."""
        cut = [row for row in self.trials if row.state in (State.PAUSED, State.PRUNED) and row.epochs]
        return sum((self.max_epochs - r.epochs) * r.seconds / r.epochs for r in cut) / 3600

    @property
    def budget_spent(self) -> bool:
        """Whether the GPU-hours are used up, so that no new trial will start."""
        return self.max_gpu_hours is not None and self.gpu_hours >= self.max_gpu_hours

    @property
    def seconds_left(self) -> float | None:
        """An estimate from the cost per trial so far; None without workers, or before the first end."""
        ended = self.finished + self.counts[State.PAUSED]  # most paused trials do not go on
        if not ended or not self.workers:
            return None
        seconds_per_trial = self.gpu_hours * 3600 / ended
        left = seconds_per_trial * max(self.max_trials - ended, 0) / self.processes
        if self.processes == 1:
            return left
        # At the end the last worker still trains while the others have nothing to do.
        return left + max((row.seconds for row in self.completed()), default=0.0) / 2

    @property
    def processes(self) -> int:
        """How many worker processes hold a trial."""
        return len({row.worker for row in self.workers})

    def as_dict(self) -> dict[str, Any]:
        """The form of `--json`, which programs rely on: it stays stable."""
        best = self.best
        return asdict(self) | {
            "finished": self.finished,
            "best": None if best is None else asdict(best),
            "gpu_hours_saved": self.gpu_hours_saved,
            "seconds_left": self.seconds_left,
        }


@retrying
def read_status(bind: sa.Engine | sa.Connection, study_id: int, name: str) -> Status:
    """Read a study as of one moment; the number of statements does not grow with its trials.

    On a connection of `storage.database.one_moment`, several reads show the same moment.
    """
    if isinstance(bind, sa.Engine):
        with one_moment(bind) as connection:
            return read_status(connection, study_id, name)
    study = bind.execute(sa.select(STUDIES).where(STUDIES.c.study_id == study_id)).one()
    end = sa.func.max(
        sa.func.coalesce(ATTEMPTS.c.released, sa.func.least(now(), ATTEMPTS.c.lease_until))
    )
    overdue = sa.func.max(seconds_since(ATTEMPTS.c.lease_until)).filter(
        ATTEMPTS.c.released.is_(None),
        ATTEMPTS.c.lease_until <= now(),
        # Nobody takes over a trial that was ended elsewhere, as in optuna-dashboard.
        ATTEMPTS.c.trial_id.in_(
            sa.select(TRIALS.c.trial_id).where(
                TRIALS.c.study_id == study_id,
                TRIALS.c.state.in_(UNFINISHED),
            )
        ),
    )
    hours, seconds, overdue_seconds, sick_hosts = bind.execute(
        sa.select(
            gpu_seconds(study_id) / 3600,
            sa.func.coalesce(sa.extract("epoch", end - sa.func.min(ATTEMPTS.c.claimed)), 0.0),
            overdue,
            _sick_hosts(study_id),
        ).where(ATTEMPTS.c.study_id == study_id),
    ).one()
    jobs = bind.scalars(select_array_jobs(study_id))
    rows = _trials(bind, study_id)
    enqueued = sum(row.state == State.WAITING and not row.attempts for row in rows)
    counts: dict[str, int] = dict.fromkeys(STATES, 0)
    for row in rows:
        counts[row.state] += 1
    return Status(
        study=name,
        max_trials=study.max_trials,
        max_gpu_hours=study.max_gpu_seconds and study.max_gpu_seconds / 3600,
        max_epochs=int(study.settings["train"]["epochs"]),
        counts=counts,
        gpu_hours=float(hours),
        seconds=float(seconds),
        stopping=study.stop_requested is not None,
        array_jobs=list(jobs),
        workers=read_workers(bind, study_id),
        trials=rows,
        overdue_seconds=None if overdue_seconds is None else float(overdue_seconds),
        surplus=min(max(len(rows) - study.max_trials, 0), enqueued),
        sick_hosts=sick_hosts or [],
        attribute_images=_attribute_images(study),
    )


def _attribute_images(study: Row) -> list[int]:
    if study.settings.get("study", {}).get("score") not in ACCURACIES:
        return []
    # With folds, those of a fold: each has as many.
    return [row.get("folds", [row["images"]])[0] for row in study.attributes or []]


def _sick_hosts(study_id: int) -> sa.ScalarSelect[list[str]]:
    """Why hosts are sick: the reasons of the last workers there, of hosts where none is at work."""
    at_work = (
        sa.select(WORKERS.c.host)
        .join(ATTEMPTS, ATTEMPTS.c.worker_id == WORKERS.c.id)
        .where(ATTEMPTS.c.study_id == study_id, HELD)
    )
    latest = (
        sa.select(WORKERS.c.reason)
        .join(ATTEMPTS, ATTEMPTS.c.worker_id == WORKERS.c.id)
        .where(ATTEMPTS.c.study_id == study_id, WORKERS.c.host.not_in(at_work))
        .ext(distinct_on(WORKERS.c.host))
        .order_by(WORKERS.c.host, WORKERS.c.started.desc())
        .subquery()
    )
    sick = sa.select(sa.func.array_agg(latest.c.reason)).where(latest.c.reason.startswith(SICK_HOST))
    return sick.scalar_subquery()


def _trials(connection: sa.Connection, study_id: int) -> list[TrialRow]:
    epochs = (
        sa.select(
            EPOCHS.c.trial_id,
            sa.func.max(EPOCHS.c.epoch).label("last"),
            sa.func.sum(EPOCHS.c.seconds).label("seconds"),
            IMAGES_PER_SECOND.label("pace"),
            sa.func.avg(EPOCHS.c.busy).label("busy"),
            sa.func.count(EPOCHS.c.again).label("differing"),
        )
        .join(TRIALS, TRIALS.c.trial_id == EPOCHS.c.trial_id)
        .where(TRIALS.c.study_id == study_id)
        .group_by(EPOCHS.c.trial_id)
        .subquery()
    )
    attempts = (
        sa.select(ATTEMPTS.c.trial_id, sa.func.max(ATTEMPTS.c.number).label("number"))
        .where(ATTEMPTS.c.study_id == study_id)
        .group_by(ATTEMPTS.c.trial_id)
        .subquery()
    )
    query = (
        sa.select(
            TRIALS.c.trial_id,
            TRIALS.c.number,
            TRIALS.c.state,
            VALUES.c.value,
            epochs.c.last,
            epochs.c.seconds,
            epochs.c.pace,
            epochs.c.busy,
            epochs.c.differing,
            EPOCHS.c.val_accuracy,
            ATTEMPTS.c.number.label("attempts"),
            HELD.label("held"),
            ATTEMPTS.c.outcome,
            ATTEMPTS.c.reason,
            seconds_since(ATTEMPTS.c.renewed).label("age"),
            WORKERS.c.host,
            WORKERS.c.pid,
        )
        .outerjoin(VALUES, VALUES.c.trial_id == TRIALS.c.trial_id)
        .outerjoin(epochs, epochs.c.trial_id == TRIALS.c.trial_id)
        .outerjoin(
            EPOCHS, sa.and_(EPOCHS.c.trial_id == TRIALS.c.trial_id, EPOCHS.c.epoch == epochs.c.last)
        )
        .outerjoin(attempts, attempts.c.trial_id == TRIALS.c.trial_id)
        .outerjoin(
            ATTEMPTS,
            sa.and_(ATTEMPTS.c.trial_id == TRIALS.c.trial_id, ATTEMPTS.c.number == attempts.c.number),
        )
        .outerjoin(WORKERS, WORKERS.c.id == ATTEMPTS.c.worker_id)
        .where(TRIALS.c.study_id == study_id)
        .order_by(TRIALS.c.number)
    )
    params, audits = _params(connection, study_id), _audits(connection, study_id)
    return [
        _trial_row(row, params.get(row.trial_id, {}), audits.get(row.trial_id))
        for row in connection.execute(query)
    ]


def _audits(connection: sa.Connection, study_id: int) -> dict[int, str]:
    """What would have happened to audited trials without the audit, by Optuna's id.

    Left out are trials that would have been paused, but are among the best by now: they would go on.
    """
    query = (
        sa.select(USER_ATTRIBUTES.c.trial_id, USER_ATTRIBUTES.c.value_json)
        .join(TRIALS, TRIALS.c.trial_id == USER_ATTRIBUTES.c.trial_id)
        .where(TRIALS.c.study_id == study_id, USER_ATTRIBUTES.c.key == AUDIT)
    )
    noted = {trial_id: json.loads(text) for trial_id, text in connection.execute(query)}
    present_ranks = read_ranks(
        connection,
        study_id,
        NOTED_EPOCHS,
        trial_ids=list(noted),
        epochs=[note["epoch"] for note in noted.values()],
    )
    return {
        trial_id: f"{note['verdict']} after {counted(note['epoch'] + 1, 'epoch')}"
        for trial_id, note in noted.items()
        if note["verdict"] != Outcome.PAUSED or not present_ranks[trial_id].is_among_the_best
    }


def _trial_row(row: Row, params: dict[str, Any], audit: str | None) -> TrialRow:
    held = bool(row.held) and row.state == TrialState.RUNNING
    waits = State.PAUSED if row.outcome == Outcome.PAUSED else State.WAITING
    return TrialRow(
        number=row.number,
        state=_END_STATES.get(row.state, State.RUNNING if held else waits),
        params=params,
        epochs=0 if row.last is None else row.last + 1,
        seconds=row.seconds or 0.0,
        images_per_second=row.pace,
        busy=row.busy,
        accuracy=row.val_accuracy,
        value=row.value,
        attempts=row.attempts or 0,
        worker=f"{row.host}:{row.pid}" if held else None,
        renewed=float(row.age) if held else None,
        reason=row.reason,
        audit=audit,
        differing=row.differing or 0,
    )


def _params(connection: sa.Connection, study_id: int) -> dict[int, dict[str, Any]]:
    query = (
        sa.select(
            PARAMS.c.trial_id,
            PARAMS.c.param_name,
            PARAMS.c.param_value,
            PARAMS.c.distribution_json,
        )
        .join(TRIALS, TRIALS.c.trial_id == PARAMS.c.trial_id)
        .where(TRIALS.c.study_id == study_id)
    )
    params: dict[int, dict[str, Any]] = {}
    for row in connection.execute(query):
        params.setdefault(row.trial_id, {})[row.param_name] = parameter(row)
    return params


def difference_line(trials: list[TrialRow]) -> str:
    """Which of the trials have epochs that differ from their record. Empty if none have."""
    numbers = [str(row.number) for row in trials if row.differing]
    if not numbers:
        return ""
    return (
        f"trained again after an interruption, epochs of trial {', '.join(numbers)} gave other numbers, "
        "as on another kind of machine; the first record counts"
    )


def parameter_names(trials: list[TrialRow]) -> list[str]:
    """The hyperparameters that some of these trials have."""
    return sorted({name for row in trials for name in row.params})
