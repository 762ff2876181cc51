"""Our pages and their tables as CSV: studies, study, curves, compare, trial.

- A page is plain HTML with its figures as JSON. It can be read without a script.
- A script draws the figures. Every few seconds it fetches the page again and updates what has changed.
- Filters are in the address. Each table can be downloaded as CSV, with all its rows and columns.
"""

import json
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import sqlalchemy as sa
from flask import Blueprint, Response, abort, current_app, g, render_template, request
from markupsafe import Markup

from dashboards import charts, csv_tables, render
from dashboards.arguments import read_choice
from dashboards.study_tables import duration, pace, share, waits
from dashboards.web.filters import Filters, choose_trials, in_states
from dashboards.web.scripts import Script
from storage import curves
from storage.database import retrying
from storage.optuna_tables import SYSTEM_ATTRIBUTES, TRIALS
from storage.paths import home
from storage.status import STATES, Status, TrialRow, parameter_names, read_status
from storage.studies import StudyEntry, StudyRow, read_studies, study_entry
from storage.words import counted
from storage.workers import AttemptRow, WorkerRow, read_attempts

blueprint = Blueprint("pages", __name__, url_prefix="/atelier")


class Confirmed(Protocol):
    """What a confirmation says of a study: a table of its leaders, and the verdict in sentences."""

    @property
    def columns(self) -> Sequence[str]: ...
    @property
    def rows(self) -> Sequence[Sequence[str]]: ...
    @property
    def verdict(self) -> Sequence[str]: ...


# Gives it for a study; None if the study is not confirmed. The application gets one of these.
ReadConfirmed = Callable[[sa.Engine, StudyEntry, Status], Confirmed | None]


ROWS, MOST_ROWS = 25, 4_000  # of the table of trials, which then has 2 MB
LOG_LINES = 40  # of the log on a trial's page


@blueprint.app_template_global()
def figure(name: str, drawn: charts.Figure, level: int = 2) -> Markup:
    """The HTML of a figure: its legend, and a place and the data for each panel.

    `level` is the level of the panels' headings on the page.
    """
    panels = map(render.plotly, drawn.panels)
    return Markup(render_template("figure.html", name=name, figure=drawn, panels=panels, level=level))


for in_words in (counted, duration, pace, share, waits):
    blueprint.add_app_template_filter(in_words)
blueprint.record(lambda setup: setup.app.jinja_env.globals.update(STATES=STATES))


@blueprint.app_template_filter()
def number(value: object) -> str:
    """A hyperparameter's value."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@blueprint.app_template_filter()
def moment(when: datetime) -> Markup:
    """A time in UTC, which names its zone."""
    utc = when.astimezone(UTC)
    return Markup('<time datetime="{}">{:%Y-%m-%d %H:%M} UTC</time>').format(utc.isoformat(), utc)


@blueprint.app_template_filter()
def percent(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.2%}"


@blueprint.after_request
def _revalidate(response: Response) -> Response:
    """A page that has not changed is not sent again."""
    if response.status_code == 200 and "ETag" not in response.headers:
        response.add_etag()
        response.make_conditional(request)
    return response


_plotly = Script(render.plotly_script)


@blueprint.get("/plotly.js")
def script() -> Response:
    return _plotly.response()


@blueprint.get("/")
def index() -> Any:
    return Filters().page("studies.html", studies=read_studies(g.engine))


@blueprint.get("/studies.csv")
def studies_table() -> Response:
    rows = [asdict(row) for row in read_studies(g.engine)]
    return Filters().table("studies", csv_tables.columns(StudyRow), rows)


def open_study(study_id: int) -> tuple[StudyEntry, Status]:
    """A study of ours and its status. Ends the request with 404 if there is none."""
    entry = find_entry(study_id)
    return entry, read_status(g.engine, study_id, entry.name)


def find_entry(study_id: int) -> StudyEntry:
    """A study of ours. Ends the request with 404 if there is none."""
    entry = study_entry(g.engine, study_id)
    if entry is None:
        abort(404, "There is no such study of Atelier's. It may have been deleted.")
    return entry


@blueprint.get("/studies/<int:study_id>")
def study(study_id: int) -> Any:
    filters = Filters("state", "rows")
    states, shown = filters.states(), filters.count("rows", ROWS, MOST_ROWS)
    entry, status = open_study(study_id)
    ends = curves.read_ends(g.engine, study_id)
    rows = in_states(status.ranked(), states)
    return filters.page(
        "study.html",
        study_id=study_id,
        status=status,
        states=states,
        rows=rows[:shown],
        hidden=max(len(rows) - shown, 0),
        most=MOST_ROWS,
        parameters=parameter_names(rows[:shown]),
        history=charts.history(ends) if ends else None,
        confirmed=current_app.config["READ_CONFIRMED"](g.engine, entry, status),
    )


@blueprint.get("/studies/<int:study_id>/trials.csv")
def trials_table(study_id: int) -> Response:
    filters = Filters("state")
    states = filters.states()
    _, status = open_study(study_id)
    return filters.table(
        f"{status.study} trials", *csv_tables.trial_table(in_states(status.trials, states))
    )


@blueprint.get("/studies/<int:study_id>/ends.csv")
def ends_table(study_id: int) -> Response:
    """The data of the figure of scores over time."""
    entry = find_entry(study_id)
    rows = [asdict(end) for end in curves.read_ends(g.engine, study_id)]
    return Filters().table(f"{entry.name} ends", csv_tables.columns(curves.EndPoint), rows)


@blueprint.get("/studies/<int:study_id>/workers.csv")
def workers_table(study_id: int) -> Response:
    _, status = open_study(study_id)
    rows = [asdict(row) for row in status.workers]
    return Filters().table(f"{status.study} workers", csv_tables.columns(WorkerRow), rows)


@blueprint.get("/studies/<int:study_id>/curves")
def curves_page(study_id: int) -> Any:
    filters = Filters("trials", "top", "smooth", "state")
    entry, status = open_study(study_id)
    choice = choose_trials(filters, status, curves.DRAWN, curves.MOST_DRAWN)
    smooth = filters.count("smooth", 0, 95, least=0)
    drawn = curves.read_curves(g.engine, study_id, choice.trials)
    return filters.page(
        "curves.html",
        study_id=study_id,
        status=status,
        choice=choice,
        smooth=smooth,
        chosen=drawn,
        default=curves.DRAWN,
        most=curves.MOST_DRAWN,
        drawn=charts.curves(drawn, curves.category_names(entry.attributes, drawn), smooth / 100),
    )


@blueprint.get("/studies/<int:study_id>/compare")
def compare(study_id: int) -> Any:
    filters = Filters("by", "trials", "top", "state")
    entry, status = open_study(study_id)
    choice = choose_trials(filters, status, curves.COMPARED, curves.COMPARED)
    names = parameter_names(status.trials) or sorted(entry.settings["space"])
    by = filters.one("by", partial(read_choice, allowed=names), next(iter(names), ""))
    return filters.page(
        "compare.html",
        study_id=study_id,
        status=status,
        choice=choice,
        names=names,
        by=by,
        default=curves.COMPARED,
        drawn=charts.compare(curves.read_curves(g.engine, study_id, choice.trials), by),
    )


@blueprint.get("/studies/<int:study_id>/epochs.csv")
def epochs_table(study_id: int) -> Response:
    """The data of the curves, of all trials that the address names."""
    filters = Filters("trials", "top", "state")
    entry, status = open_study(study_id)
    choice = choose_trials(filters, status, curves.DRAWN, MOST_ROWS)
    filters.problems += choice.left_out
    drawn = curves.read_curves(g.engine, study_id, choice.trials)
    names = [f"{name} accuracy" for name in curves.category_names(entry.attributes, drawn)]
    rows = [
        {
            "trial": curve.trial.number,
            "epoch": epoch + 1,
            **{metric: values[place] for metric, values in curve.metrics.items()},
            **dict(zip(names, curve.categories[place], strict=True)),
        }
        for curve in drawn
        for place, epoch in enumerate(curve.epochs)
    ]
    return filters.table(f"{status.study} epochs", ["trial", "epoch", *curves.METRICS, *names], rows)


def _open_trial(study_id: int, trial: int) -> tuple[StudyEntry, Status, TrialRow]:
    entry, status = open_study(study_id)
    row = next((row for row in status.trials if row.number == trial), None)
    if row is None:
        abort(404, f"Study {entry.name} has no trial {trial}; it has {len(status.trials)}, from 0.")
    return entry, status, row


def _curve(entry: StudyEntry, row: TrialRow) -> tuple[curves.Curve, Sequence[int]]:
    """A trial's curve, and its hits in each attribute, if these are recorded for all attributes."""
    [curve] = curves.read_curves(g.engine, entry.study_id, [row])
    hits = curve.hits or []
    return curve, hits if len(hits) == len(entry.attributes) else []


def _judged_by(entry: StudyEntry, row: TrialRow) -> list[dict[str, Any]]:
    """The study's attributes, with as many images as the trial was validated on."""
    fold = row.params.get("fold")
    if fold is None:
        return entry.attributes
    return [{**attribute, "images": attribute["folds"][fold]} for attribute in entry.attributes]


def settings(entry: StudyEntry) -> dict[str, Any]:
    return {**entry.settings.get("train", {}), **entry.places}


@blueprint.get("/studies/<int:study_id>/trials/<int:trial>")
def trial(study_id: int, trial: int) -> Any:
    entry, status, row = _open_trial(study_id, trial)
    curve, hits = _curve(entry, row)
    attempts = read_attempts(g.engine, study_id, trial)
    log = attempts[-1].log if attempts else None
    return Filters().page(
        "trial.html",
        study_id=study_id,
        status=status,
        row=row,
        curve=curve,
        settings=settings(entry),
        drawn=charts.curves([curve], curves.category_names(entry.attributes, [curve])),
        bars=charts.attributes(hits, _judged_by(entry, row)) if hits else None,
        attempts=attempts,
        log=log,
        tail=log_tail(log),
        artifacts=_artifacts(g.engine, study_id, trial),
        command=shlex.join(["atelier", "export", entry.name, "--trial", str(trial), "-o", "trial.toml"]),
    )


@blueprint.get("/studies/<int:study_id>/trials/<int:trial>/settings.csv")
def settings_table(study_id: int, trial: int) -> Response:
    entry, _, row = _open_trial(study_id, trial)
    parts = {"configuration": row.params, "setting": settings(entry)}
    rows = [
        {"part": part, "name": name, "value": value}
        for part, values in parts.items()
        for name, value in sorted(values.items())
    ]
    return Filters().table(f"{entry.name} trial {trial} settings", ["part", "name", "value"], rows)


@blueprint.get("/studies/<int:study_id>/trials/<int:trial>/attributes.csv")
def attributes_table(study_id: int, trial: int) -> Response:
    entry, _, row = _open_trial(study_id, trial)
    _, hits = _curve(entry, row)
    table = charts.attribute_rows(hits, _judged_by(entry, row)) if hits else []
    rows = [asdict(one) for one in table]
    return Filters().table(
        f"{entry.name} trial {trial} attributes", csv_tables.columns(charts.AttributeRow), rows
    )


@blueprint.get("/studies/<int:study_id>/trials/<int:trial>/attempts.csv")
def attempts_table(study_id: int, trial: int) -> Response:
    entry, _, _ = _open_trial(study_id, trial)
    rows = [asdict(row) for row in read_attempts(g.engine, study_id, trial)]
    return Filters().table(f"{entry.name} trial {trial} attempts", csv_tables.columns(AttemptRow), rows)


def log_tail(log: str | None) -> str | None:
    """The end of a worker's log. None if it is outside our home: the path comes from the database."""
    if log is None:
        return None
    path = Path(log).resolve()
    if not path.is_relative_to(home().resolve()) or path.suffix != ".log":
        return None
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - 64 * 1024, 0))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    return "\n".join(lines[-LOG_LINES:])


@retrying
def _artifacts(engine: sa.Engine, study_id: int, trial: int) -> list[dict[str, Any]]:
    """The metadata of a trial's artifacts, as optuna.artifacts has it, with Optuna's id of the trial."""
    query = (
        sa.select(TRIALS.c.trial_id, SYSTEM_ATTRIBUTES.c.value_json)
        .join(TRIALS, TRIALS.c.trial_id == SYSTEM_ATTRIBUTES.c.trial_id)
        .where(TRIALS.c.study_id == study_id, TRIALS.c.number == trial)
        .where(SYSTEM_ATTRIBUTES.c.key.startswith("artifacts:"))
        .order_by(SYSTEM_ATTRIBUTES.c.key)
    )
    with engine.connect() as connection:
        # A deleted artifact is null. Optuna stores its JSON text as a JSON string.
        rows = [(trial_id, json.loads(json.loads(text))) for trial_id, text in connection.execute(query)]
    return [{**row, "trial_id": trial_id} for trial_id, row in rows if row is not None]
