"""Our pages: studies, study, curves, compare, trial.

Each is plain HTML that can be read without a script, with its figures as JSON beside it. The script
draws them, fetches the same address again every few seconds and changes what has changed. Filters are
in the address. Each table can be had as CSV, with all its rows and columns.
"""

import gzip
import hashlib
import json
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import plotly
import sqlalchemy as sa
from flask import Blueprint, Response, abort, g, render_template, request
from markupsafe import Markup
from sqlalchemy.orm import Session

from dashboards import charts, render, tables
from dashboards.asked import AskedError, in_words, pick, read_choice, read_count, read_trials
from dashboards.study_tables import duration
from dashboards.tables import trial_table
from storage import curves
from storage.database import retrying
from storage.optuna_tables import TrialModel, TrialSystemAttributeModel
from storage.paths import home
from storage.status import STATES, Status, TrialRow, parameter_names, read_status
from storage.studies import StudyEntry, StudyRow, read_studies, study_entry
from storage.workers import AttemptRow, WorkerRow, read_attempts

blueprint = Blueprint("pages", __name__, url_prefix="/atelier")

ROWS, MOST_ROWS = 25, 4_000  # of the table of trials; more than 2 MB no page should have
LOG_LINES = 40
T = TypeVar("T")


@blueprint.app_template_global()
def figure(name: str, drawn: charts.Figure, level: int = 2) -> Markup:
    """The HTML of a figure: its legend, and a place and the data for each panel.

    `level` is that of the panels' headings on the page.
    """
    panels = map(render.plotly, drawn.panels)
    return Markup(render_template("figure.html", name=name, figure=drawn, panels=panels, level=level))


blueprint.add_app_template_filter(duration, "duration")
blueprint.record(lambda setup: setup.app.jinja_env.globals.update(STATES=STATES))


@blueprint.app_template_filter()
def number(value: object) -> str:
    """A hyperparameter's value."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@blueprint.app_template_filter()
def moment(when: datetime) -> Markup:
    """A time for people in any zone."""
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


class Script:
    """A large script: read, compressed and digested once, at the first request."""

    def __init__(self, read: Callable[[], bytes]) -> None:
        self._read = read

    @cached_property
    def _plain(self) -> bytes:
        return self._read()

    @cached_property
    def _packed(self) -> bytes:
        return gzip.compress(self._plain)

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(self._plain).hexdigest()[:16]

    def response(self) -> Response:
        packed = "gzip" in request.headers.get("Accept-Encoding", "")
        response = Response(self._packed if packed else self._plain, mimetype="text/javascript")
        if packed:
            response.headers["Content-Encoding"] = "gzip"
        response.headers.update({"Cache-Control": "max-age=86400", "Vary": "Accept-Encoding"})
        response.set_etag(self._digest + ("-gzip" if packed else ""))
        response.make_conditional(request)
        return response


_plotly = Script(lambda: (Path(plotly.__file__).parent / "package_data/plotly.min.js").read_bytes())


@blueprint.get("/plotly.js")
def script() -> Response:
    return _plotly.response()


class Asked:
    """What the address asks for, of the filters that a page has."""

    def __init__(self, *filters: str) -> None:
        self.problems: list[str] = []  # a line for each thing that is not understood
        for name in (name for name in request.args if name not in filters):
            allowed = f"allowed are {', '.join(filters)}" if filters else "this page has none"
            self.problems.append(f"{name!r}: no such filter; {allowed}")

    def one(self, name: str, read: Callable[[str], T], default: T) -> T:
        """A filter's value, or the default if it is absent or blank, as a form sends it."""
        given = self.all(name, read)
        if len(given) > 1:
            self.problems.append(f"{name}: given {len(given)} times; give it once")
        return given[0] if given else default

    def all(self, name: str, read: Callable[[str], T]) -> list[T]:
        """The values of a filter that may be repeated."""
        values = []
        for text in filter(None, map(str.strip, request.args.getlist(name))):
            try:
                values.append(read(text))
            except AskedError as error:
                self.problems.append(f"{name}: {error}")
        return values

    def count(self, name: str, default: int, most: int, least: int = 1) -> int:
        """A whole number."""
        return self.one(name, partial(read_count, least=least, most=most), default)

    def states(self) -> set[str]:
        """Of trials; empty for all."""
        return set(self.all("state", partial(read_choice, allowed=STATES)))

    def page(self, template: str, **values: Any) -> tuple[str, int]:
        """The page and its status. What is not understood is on it in place of what was asked for."""
        status = 400 if self.problems else 200
        return render_template(template, problems=self.problems, status_code=status, **values), status

    def table(self, name: str, columns: list[str], rows: list[dict[str, Any]]) -> Response:
        """A table as a file. What is not understood is an error here."""
        if self.problems:
            abort(400, "; ".join(self.problems))
        response = Response(tables.csv_text(columns, rows), mimetype="text/csv")
        response.headers["Content-Disposition"] = tables.attachment(name)
        return response


@blueprint.get("/")
def index() -> Any:
    return Asked().page("studies.html", studies=read_studies(g.engine))


@blueprint.get("/studies.csv")
def studies_table() -> Response:
    rows = [asdict(row) for row in read_studies(g.engine)]
    return Asked().table("studies", tables.columns(StudyRow), rows)


def _open(study_id: int) -> tuple[StudyEntry, Status]:
    entry = study_entry(g.engine, study_id)
    if entry is None:
        abort(404, "There is no such study of Atelier's, or not any more.")
    return entry, read_status(g.engine, study_id, entry.name)


@blueprint.get("/studies/<int:study_id>")
def study(study_id: int) -> Any:
    asked = Asked("state", "rows")
    states, shown = asked.states(), asked.count("rows", ROWS, MOST_ROWS)
    _, status = _open(study_id)
    ends = curves.read_ends(g.engine, study_id)
    rows = _in_states(status.ranked(), states)
    return asked.page(
        "study.html",
        study_id=study_id,
        status=status,
        states=states,
        rows=rows[:shown],
        hidden=max(len(rows) - shown, 0),
        most=MOST_ROWS,
        parameters=parameter_names(rows[:shown]),
        history=charts.history(ends) if ends else None,
    )


def _in_states(rows: list[TrialRow], states: set[str]) -> list[TrialRow]:
    return [row for row in rows if not states or row.state in states]


@blueprint.get("/studies/<int:study_id>/trials.csv")
def trials_table(study_id: int) -> Response:
    asked = Asked("state")
    states = asked.states()
    _, status = _open(study_id)
    return asked.table(f"{status.study} trials", *trial_table(_in_states(status.trials, states)))


@blueprint.get("/studies/<int:study_id>/ends.csv")
def ends_table(study_id: int) -> Response:
    """What the scores over time are drawn of."""
    entry, _ = _open(study_id)
    rows = [asdict(end) for end in curves.read_ends(g.engine, study_id)]
    return Asked().table(f"{entry.name} ends", tables.columns(curves.EndPoint), rows)


@blueprint.get("/studies/<int:study_id>/workers.csv")
def workers_table(study_id: int) -> Response:
    _, status = _open(study_id)
    rows = [asdict(row) for row in status.workers]
    return Asked().table(f"{status.study} workers", tables.columns(WorkerRow), rows)


@dataclass
class Choice:
    """Trials that a page draws."""

    trials: list[TrialRow]
    named: str  # as the address names them
    states: set[str]
    left_out: list[str]  # a line for each reason why some that were named are not drawn

    @property
    def numbers(self) -> str:
        """The trials in the address's words."""
        return ",".join(str(row.number) for row in self.trials)


def _choose(asked: Asked, status: Status, default: int, most: int) -> Choice:
    """The trials that the address names, else the best of the states that it names."""
    named: list[range] = asked.one("trials", read_trials, [])
    count = asked.count("top", default, most)
    states, text = asked.states(), request.args.get("trials", "")
    able = _in_states([row for row in status.trials if row.epochs], states)
    if not named:
        return Choice(curves.top(able, count), text, states, [])
    left_out = []
    chosen, absent = pick(able, named)
    if absent:
        where = " in these states" if states else ""
        left_out.append(f"No epoch on record{where} of {in_words(absent)}.")
    if len(chosen) > most:
        left_out.append(f"The first {most} of these {len(chosen)} trials are drawn.")
    return Choice(chosen[:most], text, states, left_out)


@blueprint.get("/studies/<int:study_id>/curves")
def curves_page(study_id: int) -> Any:
    asked = Asked("trials", "top", "smooth", "state")
    entry, status = _open(study_id)
    choice = _choose(asked, status, curves.DRAWN, curves.MOST_DRAWN)
    smooth = asked.count("smooth", 0, 95, least=0)
    some = curves.read_curves(g.engine, study_id, choice.trials)
    return asked.page(
        "curves.html",
        study_id=study_id,
        status=status,
        choice=choice,
        smooth=smooth,
        chosen=some,
        default=curves.DRAWN,
        most=curves.MOST_DRAWN,
        drawn=charts.curves(some, curves.category_names(entry.attributes, some), smooth / 100),
    )


@blueprint.get("/studies/<int:study_id>/compare")
def compare(study_id: int) -> Any:
    asked = Asked("by", "trials", "top", "state")
    entry, status = _open(study_id)
    choice = _choose(asked, status, curves.COMPARED, curves.COMPARED)
    names = parameter_names(status.trials) or sorted(entry.settings["space"])
    by = asked.one("by", partial(read_choice, allowed=names), next(iter(names), ""))
    return asked.page(
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
    """What Curves and Compare draw, in numbers; and of as many trials as the address names."""
    asked = Asked("trials", "top", "state")
    entry, status = _open(study_id)
    choice = _choose(asked, status, curves.DRAWN, MOST_ROWS)
    asked.problems += choice.left_out
    some = curves.read_curves(g.engine, study_id, choice.trials)
    names = [f"{name} accuracy" for name in curves.category_names(entry.attributes, some)]
    rows = [
        {
            "trial": curve.trial.number,
            "epoch": epoch + 1,
            **{metric: values[place] for metric, values in curve.metrics.items()},
            **dict(zip(names, curve.categories[place], strict=True)),
        }
        for curve in some
        for place, epoch in enumerate(curve.epochs)
    ]
    return asked.table(f"{status.study} epochs", ["trial", "epoch", *curves.METRICS, *names], rows)


def _open_trial(study_id: int, trial: int) -> tuple[StudyEntry, Status, TrialRow]:
    entry, status = _open(study_id)
    row = next((row for row in status.trials if row.number == trial), None)
    if row is None:
        abort(404, f"Study {entry.name} has no trial {trial}; it has {len(status.trials)}, from 0.")
    return entry, status, row


def _curve(entry: StudyEntry, row: TrialRow) -> tuple[curves.Curve, Sequence[int]]:
    """A trial's curve, and the hits in each attribute; empty if not on record for these attributes."""
    [curve] = curves.read_curves(g.engine, entry.study_id, [row])
    hits = curve.hits or []
    return curve, hits if len(hits) == len(entry.attributes) else []


def settings(entry: StudyEntry) -> dict[str, Any]:
    return {**entry.settings.get("train", {}), **entry.places}


@blueprint.get("/studies/<int:study_id>/trials/<int:trial>")
def trial(study_id: int, trial: int) -> Any:
    entry, status, row = _open_trial(study_id, trial)
    curve, hits = _curve(entry, row)
    attempts = read_attempts(g.engine, study_id, trial)
    log = attempts[-1].log if attempts else None
    return Asked().page(
        "trial.html",
        study_id=study_id,
        status=status,
        row=row,
        curve=curve,
        settings=settings(entry),
        drawn=charts.curves([curve], curves.category_names(entry.attributes, [curve])),
        bars=charts.attributes(hits, entry.attributes) if hits else None,
        attempts=attempts,
        log=log,
        tail=_tail(log),
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
    return Asked().table(f"{entry.name} trial {trial} settings", ["part", "name", "value"], rows)


@blueprint.get("/studies/<int:study_id>/trials/<int:trial>/attributes.csv")
def attributes_table(study_id: int, trial: int) -> Response:
    entry, _, row = _open_trial(study_id, trial)
    _, hits = _curve(entry, row)
    rows = [asdict(one) for one in charts.attribute_rows(hits, entry.attributes)] if hits else []
    return Asked().table(
        f"{entry.name} trial {trial} attributes", tables.columns(charts.AttributeRow), rows
    )


@blueprint.get("/studies/<int:study_id>/trials/<int:trial>/attempts.csv")
def attempts_table(study_id: int, trial: int) -> Response:
    entry, _, _ = _open_trial(study_id, trial)
    rows = [asdict(row) for row in read_attempts(g.engine, study_id, trial)]
    return Asked().table(f"{entry.name} trial {trial} attempts", tables.columns(AttemptRow), rows)


def _tail(log: str | None) -> str | None:
    """The end of a worker's log, if it is in our home: the path comes from the database."""
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
    """What is attached to a trial, in optuna.artifacts' form, with Optuna's id of the trial."""
    query = (
        sa.select(TrialModel.trial_id, TrialSystemAttributeModel.value_json)
        .join(TrialModel, TrialModel.trial_id == TrialSystemAttributeModel.trial_id)
        .where(TrialModel.study_id == study_id, TrialModel.number == trial)
        .where(TrialSystemAttributeModel.key.startswith("artifacts:"))
        .order_by(TrialSystemAttributeModel.key)
    )
    with Session(engine) as session:
        # An artifact that was deleted is null. Optuna keeps JSON text as a JSON string.
        rows = [(trial_id, json.loads(json.loads(text))) for trial_id, text in session.execute(query)]
    return [{**row, "trial_id": trial_id} for trial_id, row in rows if row is not None]
