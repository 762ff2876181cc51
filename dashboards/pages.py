"""Our pages: studies, study, curves, compare, trial.

Each is plain HTML that can be read without a script, with its figures as JSON beside it. The script
draws them, fetches the same address again every few seconds and replaces what has changed. Filters are
in the address.
"""

import gzip
import hashlib
import json
import math
import shlex
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import plotly
import sqlalchemy as sa
from flask import Blueprint, Response, abort, g, render_template, request
from markupsafe import Markup
from optuna.storages._rdb.models import TrialModel, TrialSystemAttributeModel
from sqlalchemy.orm import Session

from dashboards import curves, drawing, figures
from dashboards.status import (
    STATES,
    Status,
    TrialRow,
    duration,
    parameter_names,
    read_attempts,
    read_status,
    read_studies,
)
from storage.database import home, retrying
from storage.ledger import StudyEntry, study_entry

blueprint = Blueprint("pages", __name__, url_prefix="/atelier")

ROWS = 25  # of the table of trials
LOG_LINES = 40


@blueprint.app_template_global()
def figure(name: str, drawn: figures.Figure) -> Markup:
    """The HTML of a figure: its legend, and a place and the data for each panel."""
    return Markup(
        render_template("figure.html", name=name, figure=drawn, panels=map(drawing.plotly, drawn.panels))
    )


blueprint.add_app_template_filter(duration, "duration")
blueprint.record(lambda setup: setup.app.jinja_env.globals.update(STATES=STATES))


@blueprint.app_template_filter()
def number(value: object) -> str:
    """A hyperparameter's value."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


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


@blueprint.get("/")
def index() -> str:
    return render_template("studies.html", studies=read_studies(g.engine))


def _open(study_id: int) -> tuple[StudyEntry, Status]:
    entry = study_entry(g.engine, study_id)
    if entry is None:
        abort(404, "There is no such study of Atelier's, or not any more.")
    return entry, read_status(g.engine, study_id, entry.name)


def _count(name: str, default: int, most: int) -> int:
    """A number from the address."""
    text = request.args.get(name, "")
    return min(int(text), most) if text.isascii() and text.isdecimal() and len(text) < 9 else default


def _states() -> set[str]:
    return set(request.args.getlist("state")) & set(STATES)


@blueprint.get("/studies/<int:study_id>")
def study(study_id: int) -> str:
    _, status = _open(study_id)
    chosen = _states()
    ends = curves.read_ends(g.engine, study_id)
    rows = [row for row in status.ranked() if not chosen or row.state in chosen]
    shown = _count("rows", ROWS, 10_000)
    return render_template(
        "study.html",
        study_id=study_id,
        status=status,
        states=chosen,
        rows=rows[:shown],
        hidden=max(len(rows) - shown, 0),
        parameters=parameter_names(rows[:shown]),
        history=figures.history(ends) if ends else None,
    )


def _chosen(status: Status, count: int) -> list[TrialRow]:
    """The trials that the address names, else the best of the states that it names."""
    named = request.args.get("trials", "").replace(",", " ").split()
    numbers = {int(word) for word in named if word.isascii() and word.isdecimal() and len(word) < 9}
    if numbers:
        return [row for row in status.trials if row.number in numbers][: curves.MOST_DRAWN]
    return curves.top(status.trials, count, _states())


@blueprint.get("/studies/<int:study_id>/curves")
def curves_page(study_id: int) -> str:
    entry, status = _open(study_id)
    smooth = _count("smooth", 0, 95)
    chosen = curves.read_curves(
        g.engine, study_id, _chosen(status, _count("top", curves.DRAWN, curves.MOST_DRAWN))
    )
    return render_template(
        "curves.html",
        study_id=study_id,
        status=status,
        states=_states(),
        smooth=smooth,
        chosen=chosen,
        default=curves.DRAWN,
        most=curves.MOST_DRAWN,
        drawn=figures.curves(chosen, curves.category_names(entry.attributes, chosen), smooth / 100),
    )


@blueprint.get("/studies/<int:study_id>/compare")
def compare(study_id: int) -> str:
    _, status = _open(study_id)
    names = parameter_names(status.trials)
    by = request.args.get("by", "")
    by = by if by in names else next(iter(names), "")
    some = _chosen(status, _count("top", curves.COMPARED, curves.COMPARED))
    return render_template(
        "compare.html",
        study_id=study_id,
        status=status,
        states=_states(),
        names=names,
        by=by,
        default=curves.COMPARED,
        drawn=figures.compare(curves.read_curves(g.engine, study_id, some), by),
    )


@blueprint.get("/studies/<int:study_id>/trials/<int:trial>")
def trial(study_id: int, trial: int) -> str:
    entry, status = _open(study_id)
    row = next((row for row in status.trials if row.number == trial), None)
    if row is None:
        abort(404, f"Study {entry.name} has no trial {trial}; it has {len(status.trials)}, from 0.")
    [curve] = curves.read_curves(g.engine, study_id, [row])
    attempts = read_attempts(g.engine, study_id, trial)
    log = attempts[-1].log if attempts else None
    able = curve.hits is not None and len(curve.hits) == len(entry.attributes)
    return render_template(
        "trial.html",
        study_id=study_id,
        status=status,
        row=row,
        curve=curve,
        settings={**entry.settings.get("train", {}), **entry.places},
        drawn=figures.curves([curve], curves.category_names(entry.attributes, [curve])),
        bars=figures.attributes(curve.hits or [], entry.attributes) if able else None,
        attempts=attempts,
        log=log,
        tail=_tail(log),
        artifacts=_artifacts(g.engine, study_id, trial),
        command=shlex.join(["atelier", "export", entry.name, "--trial", str(trial), "-o", "trial.toml"]),
    )


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
