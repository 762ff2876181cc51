"""Saves figures of a study: for `atelier plot`, for reports and for optuna-dashboard."""

import uuid
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from dashboards import charts, render
from dashboards.arguments import ArgumentError, in_words, pick, read_choice, read_trials
from dashboards.outputs import check_overwritable, mark
from dashboards.predictions import SURE, Judgement
from dashboards.thumbnails import PicturesError, find_pictures, thumbnail
from storage import curves
from storage.paths import artifacts, make_private
from storage.status import Status, TrialRow, parameter_names, read_status
from storage.studies import StudyEntry

KINDS = ("curves", "compare", "history", "confusion", "errors")
ERRORS = 24  # images that are drawn, those that are most surely wrong


class PlotError(ValueError):
    """The figure cannot be drawn. The message is one line and says what to do next."""


def plot_study(
    engine: sa.Engine,
    entry: StudyEntry,
    kind: str,
    output: Path,
    trials: str | None = None,
    top: int | None = None,
    by: str | None = None,
    smooth: float = 0.0,
) -> None:
    """Draw a figure, as the pages show it, into a file. Raises PlotError, OutputError, OSError."""
    if output.suffix not in render.FORMATS:
        raise PlotError(f"{output}: allowed are files that end in {', '.join(render.FORMATS)}")
    check_overwritable(output, mark(entry.name), f"a figure of study {entry.name!r}")
    figure, title = figure_of(engine, entry, kind, trials, top, by, smooth)
    save_figure(figure, output, entry.name, title)


def figure_of(
    engine: sa.Engine,
    entry: StudyEntry,
    kind: str,
    trials: str | None = None,
    top: int | None = None,
    by: str | None = None,
    smooth: float = 0.0,
) -> tuple[charts.Figure, str]:
    """A figure, as the pages show it, and its title.

    Raises PlotError, PredictionsError, PicturesError.
    """
    _check_options(kind, trials, top, by, smooth)
    if kind == "history":
        return _history(engine, entry), entry.name
    status = read_status(engine, entry.study_id, entry.name)
    if kind in ("confusion", "errors"):
        [number] = complete_trials(status, trials, 1)
        judgement, title = Judgement.of_trial(entry, number), f"{entry.name}, trial {number}"
        if kind == "confusion":
            return charts.confusion(judgement), title
        return surest_errors(entry.places.get("data", ""), judgement), title
    chosen = _choose(status, trials, top or (curves.DRAWN if kind == "curves" else curves.COMPARED))
    drawn = curves.read_curves(engine, entry.study_id, chosen)
    if kind == "curves":
        names = curves.category_names(entry.attributes, drawn)
        return charts.curves(drawn, names, smooth), entry.name
    names = parameter_names(chosen)
    by = next(iter(names), "") if by is None else _read("by", by, names)
    return charts.compare(drawn, by), entry.name


def _history(engine: sa.Engine, entry: StudyEntry) -> charts.Figure:
    ends = curves.read_ends(engine, entry.study_id)
    if not ends:
        raise PlotError(f"study {entry.name!r} has no finished trial yet")
    return charts.history(ends)


def _check_options(
    kind: str, trials: str | None, top: int | None, by: str | None, smooth: float
) -> None:
    """Check that every given option applies to this kind of figure, so that none is ignored silently."""
    _read("kind", kind, KINDS)
    for option, given, kinds in (
        ("trials", trials is not None, ("curves", "compare", "confusion", "errors")),
        ("top", top, ("curves", "compare")),
        ("by", by is not None, ("compare",)),
        ("smooth", smooth, ("curves",)),
    ):
        if given and kind not in kinds:
            raise PlotError(f"--{option} has no meaning with --kind {kind}; leave it out")
    if trials is not None and top:
        raise PlotError("--trials and --top both choose trials; give one of them")
    if not (0 <= smooth < 1 and (top is None or top > 0)):
        raise PlotError("--smooth is at least 0 and below 1, and --top at least 1")


def _read(option: str, text: str, allowed: Collection[str]) -> str:
    try:
        return read_choice(text, allowed)
    except ArgumentError as error:
        raise PlotError(f"--{option} {error}") from None


def complete_trials(status: Status, trials: str | None, most: int | None = None) -> list[int]:
    """The numbers of the trials that the text names, which must be complete; else of the best ones.

    Raises PlotError.
    """
    complete = status.completed()
    if not complete:
        raise PlotError(f"study {status.study!r} has no complete trial yet; these keep predictions")
    if trials is None:
        return [row.number for row in complete[:most]]
    chosen = _chosen(sorted(complete, key=lambda row: row.number), trials, "no predictions")
    if most and len(chosen) > most:
        raise PlotError(f"--trials {trials}: give one trial, as each has a figure of its own")
    return [row.number for row in chosen]


def surest_errors(folder: str, judgement: Judgement) -> charts.Figure:
    """The images of a data folder that were most surely wrong. Raises PicturesError if there is none."""
    pictures = find_pictures(folder, judgement)
    images = judgement.choose(SURE)[:ERRORS].tolist()
    if not images:
        raise PicturesError("no image is wrong, so there is none to draw")
    return charts.errors(judgement, {image: thumbnail(folder, pictures[image]) for image in images})


def judged(judgement: Judgement, folder: str) -> dict[str, charts.Figure]:
    """What was right and wrong, by the name of the file: without pictures if none can be drawn."""
    figures = {"confusion.png": charts.confusion(judgement)}
    with suppress(PicturesError):
        figures["errors.png"] = surest_errors(folder, judgement)
    return figures


def save_figure(figure: charts.Figure, output: Path, study: str, title: str = "") -> None:
    """Draw a figure of the study into a file that is marked as the study's. Raises OSError."""
    render.save(figure, title or study, output, mark(study))


def attach_curve(folder: str, trial: TrialRow, epochs: list[dict[str, Any]]) -> dict[str, Any]:
    """Draw a trial's curve for optuna-dashboard. Returns its metadata in the form of optuna.artifacts.

    `folder` identifies the study. `epochs` have the columns of the table `epoch`. The name of the file
    depends on the trial only, so drawing it again replaces the file. Raises OSError.
    """
    name = f"trial-{trial.number}.png"
    curve = curves.Curve(trial)
    for epoch in epochs:
        curve.add(epoch)
    make_private(artifacts())
    identity = str(uuid.uuid5(uuid.NAMESPACE_OID, f"{folder}/{trial.number}"))
    title = f"trial {trial.number}, {trial.state}"
    render.save(charts.curves([curve], []), title, artifacts() / identity, suffix=".png")
    return {"artifact_id": identity, "filename": name, "mimetype": "image/png", "encoding": None}


def _choose(status: Status, trials: str | None, top: int) -> list[TrialRow]:
    drawable = [row for row in status.trials if row.epochs]
    if not drawable:
        raise PlotError(f"study {status.study!r} has no finished epoch yet")
    if trials is None:
        return curves.top(drawable, top)
    return _chosen(drawable, trials, "no epoch on record")


def _chosen(rows: list[TrialRow], trials: str, lacking: str) -> list[TrialRow]:
    """The trials that the text names. `rows` ascend by number."""
    try:
        chosen, absent = pick(rows, read_trials(trials))
    except ArgumentError as error:
        raise PlotError(f"--trials {error}") from None
    if absent:
        raise PlotError(f"--trials: {lacking} of {in_words(absent)}; leave them out")
    return chosen
