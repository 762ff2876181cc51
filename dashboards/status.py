"""What a study is doing now, read from the database and drawn for a terminal."""

from dataclasses import asdict, dataclass, field
from typing import Any

import optuna
import pandas as pd
import sqlalchemy as sa
from optuna.storages._rdb.models import TrialModel, TrialParamModel, TrialValueModel
from optuna.trial import TrialState
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from sqlalchemy.orm import Session

from storage.ledger import gpu_seconds
from storage.models import Attempt, Epoch, Study, Worker

FINISHED = ("complete", "pruned", "failed")
_STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.WAITING: "waiting",
}


@dataclass
class TrialRow:
    """One trial. `state`: waiting, running, complete, pruned or failed."""

    number: int
    state: str
    params: dict[str, Any]
    epochs: int
    accuracy: float | None  # of the last epoch
    value: float | None
    attempts: int
    worker: str | None  # host:pid of the holder
    renewed: float | None  # seconds since the holder last renewed its lease
    reason: str | None  # of the last attempt's end


@dataclass
class Status:
    """A whole study. Counts are of trials; `gpu_hours` is what workers have held trials for."""

    study: str
    max_trials: int
    max_epochs: int
    counts: dict[str, int]
    gpu_hours: float
    seconds: float  # from the first claim to now, or to the last release
    trials: list[TrialRow] = field(default_factory=list)
    workers: int = 0

    @property
    def finished(self) -> int:
        return sum(self.counts[state] for state in FINISHED)

    @property
    def best(self) -> TrialRow | None:
        done = [row for row in self.trials if row.state == "complete" and row.value is not None]
        return max(done, key=lambda row: row.value or 0.0, default=None)

    @property
    def seconds_left(self) -> float | None:
        """At the present rate; None before the first trial is finished."""
        if not self.finished:
            return None
        return self.seconds / self.finished * (self.max_trials - self.finished)

    def as_dict(self) -> dict[str, Any]:
        """For programs: the form of `--json`, which stays stable."""
        best = self.best
        return asdict(self) | {
            "finished": self.finished,
            "best": None if best is None else asdict(best),
            "seconds_left": self.seconds_left,
        }


def read_status(engine: sa.Engine, study_id: int, name: str) -> Status:
    """Read a study with a fixed number of statements, however many trials it has."""
    with Session(engine) as session:
        study = session.get_one(Study, study_id)
        end = sa.func.max(sa.func.coalesce(Attempt.released, sa.func.now()))
        hours, seconds = session.execute(
            sa.select(
                gpu_seconds(study_id) / 3600,
                sa.func.coalesce(sa.extract("epoch", end - sa.func.min(Attempt.claimed)), 0.0),
            ).where(Attempt.study_id == study_id)
        ).one()
        workers = session.scalar(
            sa.select(sa.func.count(sa.distinct(Attempt.worker_id))).where(
                Attempt.study_id == study_id, Attempt.released.is_(None)
            )
        )
        rows = _trials(session, study_id)
    counts = dict.fromkeys(("waiting", "running", *FINISHED), 0)
    for row in rows:
        counts[row.state] += 1
    return Status(
        name,
        study.max_trials,
        int(study.settings["train"]["epochs"]),
        counts,
        float(hours),
        float(seconds),
        rows,
        workers or 0,
    )


def _trials(session: Session, study_id: int) -> list[TrialRow]:
    epochs = (
        sa.select(Epoch.trial_id, sa.func.max(Epoch.epoch).label("last"))
        .join(TrialModel, TrialModel.trial_id == Epoch.trial_id)
        .where(TrialModel.study_id == study_id)
        .group_by(Epoch.trial_id)
        .subquery()
    )
    attempts = (
        sa.select(Attempt.trial_id, sa.func.max(Attempt.number).label("number"))
        .where(Attempt.study_id == study_id)
        .group_by(Attempt.trial_id)
        .subquery()
    )
    query = (
        sa.select(
            TrialModel.trial_id,
            TrialModel.number,
            TrialModel.state,
            TrialValueModel.value,
            epochs.c.last,
            Epoch.val_accuracy,
            Attempt.number.label("attempts"),
            Attempt.released,
            Attempt.reason,
            sa.extract("epoch", sa.func.now() - Attempt.renewed).label("age"),
            Worker.host,
            Worker.pid,
        )
        .outerjoin(TrialValueModel, TrialValueModel.trial_id == TrialModel.trial_id)
        .outerjoin(epochs, epochs.c.trial_id == TrialModel.trial_id)
        .outerjoin(Epoch, sa.and_(Epoch.trial_id == TrialModel.trial_id, Epoch.epoch == epochs.c.last))
        .outerjoin(attempts, attempts.c.trial_id == TrialModel.trial_id)
        .outerjoin(
            Attempt,
            sa.and_(Attempt.trial_id == TrialModel.trial_id, Attempt.number == attempts.c.number),
        )
        .outerjoin(Worker, Worker.id == Attempt.worker_id)
        .where(TrialModel.study_id == study_id)
        .order_by(TrialModel.number)
    )
    params = _params(session, study_id)
    return [_trial_row(row, params.get(row.trial_id, {})) for row in session.execute(query)]


def _trial_row(row: sa.Row[Any], params: dict[str, Any]) -> TrialRow:
    held = row.attempts is not None and row.released is None and row.state == TrialState.RUNNING
    return TrialRow(
        number=row.number,
        state=_STATES.get(row.state, "running" if held else "waiting"),
        params=params,
        epochs=0 if row.last is None else row.last + 1,
        accuracy=row.val_accuracy,
        value=row.value,
        attempts=row.attempts or 0,
        worker=f"{row.host}:{row.pid}" if held else None,
        renewed=float(row.age) if held else None,
        reason=row.reason,
    )


def _params(session: Session, study_id: int) -> dict[int, dict[str, Any]]:
    query = (
        sa.select(
            TrialParamModel.trial_id,
            TrialParamModel.param_name,
            TrialParamModel.param_value,
            TrialParamModel.distribution_json,
        )
        .join(TrialModel, TrialModel.trial_id == TrialParamModel.trial_id)
        .where(TrialModel.study_id == study_id)
    )
    params: dict[int, dict[str, Any]] = {}
    for row in session.execute(query):
        distribution = optuna.distributions.json_to_distribution(row.distribution_json)
        value = distribution.to_external_repr(row.param_value)
        params.setdefault(row.trial_id, {})[row.param_name] = value
    return params


def trials_frame(status: Status) -> pd.DataFrame:
    """The trials as a table, a column per parameter."""
    rows = [
        {key: value for key, value in asdict(row).items() if key != "params"} | row.params
        for row in status.trials
    ]
    return pd.DataFrame(rows)


def progress_line(status: Status) -> str:
    """The study in one line, for logs and for output that is not a terminal."""
    counts = ", ".join(f"{n} {state}" for state, n in status.counts.items() if n)
    best = status.best
    leader = f"; best {best.value:.4f} (trial {best.number})" if best else ""
    left = status.seconds_left
    ahead = f"; about {_duration(left)} left" if left else ""
    done = f"{status.finished}/{status.max_trials} trials"
    return f"{done} ({counts or 'none yet'}) in {_duration(status.seconds)}{leader}{ahead}"


def render(status: Status, rows: int = 12) -> RenderableType:
    """The study as a table: those in work first, then the best."""
    # Fits 80 columns with five parameters: long names fold, numbers do not.
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for column in ("trial", "state", "epoch", "accuracy", "score"):
        table.add_column(column, justify="left" if column == "state" else "right", min_width=len(column))
    names = sorted({name for row in status.trials for name in row.params})
    for name in names:
        table.add_column(name.replace("_", " "), justify="right", min_width=7)
    for row in _interesting(status, rows):
        table.add_row(
            str(row.number),
            row.state,
            f"{row.epochs}/{status.max_epochs}",
            "" if row.accuracy is None else f"{row.accuracy:.4f}",
            "" if row.value is None else f"{row.value:.4f}",
            *(_number(row.params.get(name)) for name in names),
            style="dim" if row.state == "pruned" else None,
        )
    head = Text(f"{status.study}: {progress_line(status)}", style="bold")
    foot = Text(f"{status.workers} workers, {status.gpu_hours:.2f} GPU-hours", style="dim")
    return Group(head, table, foot)


def _number(value: float | int | None) -> str:
    if isinstance(value, float):
        return f"{value:.2g}"
    return "" if value is None else str(value)


def _interesting(status: Status, rows: int) -> list[TrialRow]:
    def rank(row: TrialRow) -> tuple[int, float]:
        order = ("running", "waiting", "complete", "pruned", "failed").index(row.state)
        return order, -(row.value or row.accuracy or 0.0)

    return sorted(status.trials, key=rank)[:rows]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
