"""Read learning curves and the ends of trials from the database, ready for plots."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from storage.database import connected, retrying
from storage.optuna_tables import TRIALS, VALUES
from storage.status import FINISHED, TrialRow
from storage.tables import ATTEMPTS, EPOCHS
from storage.workers import WAITS

DRAWN, MOST_DRAWN = 8, 40  # curves in one figure: by default, and at most
COMPARED = 60  # trials in a comparison
METRICS = ("lr", "train_loss", "val_loss", "train_accuracy", "val_accuracy", "val_overall")
# What else is on record of an epoch, one value each.
DETAILS = (
    *("val_log_loss", "value", "seconds", "images", "peak_memory", "busy"),
    *(column.key for column in WAITS.values()),
    *("attempt", "stream_epoch", "recorded"),
)


@dataclass
class Curve:
    """A trial and its epochs, a list per metric. Values may be NaN or infinite: training can diverge."""

    trial: TrialRow
    epochs: list[int] = field(default_factory=list)  # from 0
    metrics: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in METRICS})
    categories: list[Sequence[float]] = field(default_factory=list)  # their accuracies, a list per epoch
    hits: Sequence[int] | None = None  # correct images of each attribute, in the last epoch

    def add(self, epoch: Mapping[str, Any]) -> None:
        """Append an epoch, given the columns of the table `epoch`."""
        self.epochs.append(epoch["epoch"])
        self.categories.append(epoch["val_category"])
        self.hits = epoch["val_hits"]
        for name in METRICS:
            self.metrics[name].append(epoch[name])

    @property
    def gap(self) -> float | None:
        """Training minus validation accuracy at the last epoch: what over-fitting costs.

        None before the first epoch, or if one of the two is not finite.
        """
        if not self.epochs:
            return None
        gap = self.metrics["train_accuracy"][-1] - self.metrics["val_accuracy"][-1]
        return gap if math.isfinite(gap) else None


@retrying
def read_curves(bind: sa.Engine | sa.Connection, study_id: int, trials: list[TrialRow]) -> list[Curve]:
    """The curves of these trials, in their order; one statement."""
    curves = {row.number: Curve(row) for row in trials}
    columns = [EPOCHS.c[name] for name in METRICS]
    query = (
        sa.select(TRIALS.c.number, EPOCHS.c.epoch, EPOCHS.c.val_category, EPOCHS.c.val_hits, *columns)
        .join(TRIALS, TRIALS.c.trial_id == EPOCHS.c.trial_id)
        .where(TRIALS.c.study_id == study_id, TRIALS.c.number.in_(curves))
        .order_by(TRIALS.c.number, EPOCHS.c.epoch)
    )
    with connected(bind) as connection:
        for row in connection.execute(query):
            curves[row.number].add(row._asdict())
    return list(curves.values())


def select_epochs(study_id: int) -> sa.Select[Any]:
    """The query of all epochs of a study, by trial: METRICS, the accuracy of each category, DETAILS.

    `differs` tells whether the epoch gave other numbers when it was trained again.
    """
    return (
        sa.select(
            TRIALS.c.number.label("trial"),
            EPOCHS.c.epoch,
            *(EPOCHS.c[name] for name in METRICS),
            EPOCHS.c.val_category,
            *(EPOCHS.c[name] for name in DETAILS),
            EPOCHS.c.again.is_not(None).label("differs"),
        )
        .join(TRIALS, TRIALS.c.trial_id == EPOCHS.c.trial_id)
        .where(TRIALS.c.study_id == study_id)
        .order_by(TRIALS.c.number, EPOCHS.c.epoch)
    )


@dataclass
class EndPoint:
    """The end of one trial: when it was, and what the study had cost until then."""

    trial: int
    outcome: str  # complete, pruned or failed
    value: float | None
    hours: float  # since the study's first claim
    gpu_hours: float  # counts the trials that ran at that moment too


@retrying
def read_ends(bind: sa.Engine | sa.Connection, study_id: int) -> list[EndPoint]:
    """The ends of a study's trials in order of time; one statement."""
    start = sa.func.min(ATTEMPTS.c.claimed).over()
    query = (
        sa.select(
            TRIALS.c.number,
            ATTEMPTS.c.outcome,
            VALUES.c.value,
            sa.extract("epoch", ATTEMPTS.c.claimed - start) / 3600,
            sa.extract("epoch", ATTEMPTS.c.released - start) / 3600,
            ATTEMPTS.c.worker_id,
        )
        .join(TRIALS, TRIALS.c.trial_id == ATTEMPTS.c.trial_id)
        .outerjoin(VALUES, VALUES.c.trial_id == ATTEMPTS.c.trial_id)
        .where(ATTEMPTS.c.study_id == study_id)
    )
    # A claim or an end: hours, +1 or -1 trial that the worker holds, the worker, a finished trial's end
    changes: list[tuple[float, int, str, EndPoint | None]] = []
    with connected(bind) as connection:
        for number, outcome, value, claimed, released, worker in connection.execute(query):
            changes.append((float(claimed), 1, worker, None))
            if released is not None:
                end = EndPoint(number, outcome, value, float(released), 0.0)
                changes.append((end.hours, -1, worker, end if outcome in FINISHED else None))
    ends, held, spent, last = [], Counter[str](), 0.0, 0.0
    for hours, step, worker, finished in sorted(changes, key=lambda change: change[:2]):
        spent += sum(count > 0 for count in held.values()) * (hours - last)
        held[worker] += step
        last = hours
        if finished is not None:
            finished.gpu_hours = spent
            ends.append(finished)
    return ends


def category_names(attributes: list[dict[str, Any]], curves: list[Curve]) -> list[str]:
    """The names of the categories in these curves; numbers if the study has no names on record."""
    width = max((len(row) for curve in curves for row in curve.categories), default=0)
    return name_categories(attributes, width)


def name_categories(attributes: list[dict[str, Any]], width: int) -> list[str]:
    """The names of so many categories; numbers if the study has no names on record."""
    names = list(dict.fromkeys(row["category"] for row in attributes))
    return names if len(names) == width else [f"category {number + 1}" for number in range(width)]


def top(trials: list[TrialRow], count: int, states: set[str] | None = None) -> list[TrialRow]:
    """The best trials with epochs, of the given states or all: by their score, or last accuracy."""
    candidates = [row for row in trials if row.epochs and (not states or row.state in states)]
    return sorted(candidates, key=lambda row: (-row.worth, row.number))[:count]
