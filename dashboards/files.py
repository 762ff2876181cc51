"""Figures of a study as files, for a report: `atelier plot`, and the picture that goes with a trial."""

import os
import uuid
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from dashboards import curves, drawing, figures
from dashboards.outputs import check_overwritable, mark
from dashboards.status import Status, TrialRow, parameter_names, read_status
from storage.ledger import StudyEntry
from storage.runs import artifacts, make_private

KINDS = ("curves", "compare", "history")


class PlotError(ValueError):
    """The figure cannot be drawn; the message is one line and says what to do next."""


def plot_study(
    engine: sa.Engine,
    entry: StudyEntry,
    kind: str,
    output: Path,
    trials: str = "",
    top: int | None = None,
    by: str | None = None,
    smooth: float = 0.0,
) -> None:
    """Draw one of the pages' figures of a study into a file. Raises PlotError, OutputError, OSError."""
    if kind not in KINDS:
        raise PlotError(f"--kind {kind!r}: allowed are {', '.join(KINDS)}")
    if output.suffix not in drawing.FORMATS:
        raise PlotError(f"{output}: allowed are files that end in {', '.join(drawing.FORMATS)}")
    check_figure(output, entry.name)
    status = read_status(engine, entry.study_id, entry.name)
    if kind == "history":
        ends = curves.read_ends(engine, entry.study_id)
        if not ends:
            raise PlotError(f"study {entry.name!r} has no finished trial yet")
        drawing.save(figures.history(ends), entry.name, output, mark(entry.name))
        return
    chosen = _choose(status, trials, top or (curves.DRAWN if kind == "curves" else curves.COMPARED))
    some = curves.read_curves(engine, entry.study_id, chosen)
    if kind == "curves":
        drawn = figures.curves(some, curves.category_names(entry.attributes, some), smooth)
    else:
        names = parameter_names(chosen)
        if by is not None and by not in names:
            raise PlotError(f"--by {by}: allowed are {', '.join(names)}")
        drawn = figures.compare(some, by or next(iter(names), ""))
    drawing.save(drawn, entry.name, output, mark(entry.name))


def check_figure(output: Path, study: str) -> None:
    """That a figure of the study may be drawn there. Raises OutputError, OSError."""
    check_overwritable(output, mark(study), f"a figure of study {study!r}")


def attach_curve(folder: str, trial: TrialRow, epochs: list[dict[str, Any]]) -> dict[str, Any]:
    """Draw a trial's curve for optuna-dashboard. Returns its entry, in optuna.artifacts' form.

    `folder` tells the study from all others; `epochs` have the columns of the table `epoch`. The same
    trial gets the same file again, so a repetition leaves nothing behind. Raises OSError.
    """
    name = f"trial-{trial.number}.png"
    curve = curves.Curve(trial)
    for epoch in epochs:
        curve.add(epoch)
    make_private(artifacts())
    identity = str(uuid.uuid5(uuid.NAMESPACE_OID, f"{folder}/{trial.number}"))
    drawn = artifacts() / f"{identity}.png"
    drawing.save(figures.curves([curve], []), f"trial {trial.number}, {trial.state}", drawn)
    os.replace(drawn, artifacts() / identity)
    return {"artifact_id": identity, "filename": name, "mimetype": "image/png", "encoding": None}


def _choose(status: Status, trials: str, top: int) -> list[TrialRow]:
    words = trials.replace(",", " ").split()
    if not all(word.isascii() and word.isdecimal() and len(word) < 10 for word in words):
        raise PlotError(f"--trials {trials!r}: write numbers, as in 3,14")
    numbers = {int(word) for word in words}
    chosen = [row for row in status.trials if row.number in numbers and row.epochs]
    if missing := numbers - {row.number for row in chosen}:
        raise PlotError(f"--trials: no epoch on record of trial {min(missing)}")
    chosen = chosen or curves.top(status.trials, top)
    if not chosen:
        raise PlotError(f"study {status.study!r} has no finished epoch yet")
    return chosen
