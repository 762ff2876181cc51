"""`atelier report`: writes what a study found as one page, in Markdown and in HTML, with its figures."""

from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import sqlalchemy as sa
from markdown_it import MarkdownIt

from dashboards import charts
from dashboards.outputs import check_folder, mark
from dashboards.plot import judged, save_figure
from dashboards.predictions import Judgement, PredictionsError
from dashboards.study_tables import audit_line, pace, share
from search.confirm.evidence import Confirmation, read_confirmation
from search.confirm.table import COLUMNS, cells, verdict
from search.efficiency import advice
from search.export import Choice, choose, in_words, known_accuracy
from search.study_config import StudyConfig
from storage import curves
from storage.database import one_moment, retrying
from storage.efficiency import WorkerUse, read_uses
from storage.status import Status, parameter_names, read_status
from storage.studies import StudyEntry
from storage.words import counted
from storage.workers import Machine, read_machines
from trainer.config import TrainConfig
from trainer.division import absent_attributes
from trainer.files import write_atomically
from trainer.model import HEAD, stage_table

DRAWN = 5  # trials whose learning curves are drawn, the best ones
COMPARED = ("batch_size", "weight_decay", "dropout")  # what the seed report compares
NAMES = {"lr": "learning rate", "epsilon": "label smoothing"}


def write_report(engine: sa.Engine, entry: StudyEntry, folder: Path) -> Path:
    """Write report.md, report.html and figures into a folder, which is made. Returns the HTML page.

    Raises InputError if no trial is complete, OutputError if the folder has other files, OSError.
    """
    check_folder(folder, mark(entry.name), f"a report of study {entry.name!r}")
    reading = _read(engine, entry)
    best = reading.best
    choice = choose(reading.status, reading.confirmation, None)
    compared = _compared(best)
    figures = {
        "history.png": charts.history(reading.ends),
        "curves.png": charts.curves(best[:DRAWN], curves.category_names(entry.attributes, best)),
        **{f"compare-{name}.png": charts.compare(best, name) for name in compared},
        **(judgements := _judged(entry, choice.row.number)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        save_figure(figure, folder / name, entry.name)
    text = (
        _templates()
        .get_template("report.md")
        .render(
            _facts(entry, reading.status, choice, reading.confirmation),
            compared=compared,
            judged=judgements,
            machines=reading.machines,
            advice=advice(reading.uses),
        )
    )
    write_atomically(folder / "report.md", text.encode())
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    page = (
        _templates()
        .get_template("report.html")
        .render(title=f"Study {entry.name}", source=mark(entry.name), body=body)
    )
    write_atomically(folder / "report.html", page.encode())
    return folder / "report.html"


class _Reading(NamedTuple):
    """All that a report says of a study, as of one moment."""

    status: Status
    confirmation: Confirmation | None
    best: list[curves.Curve]
    ends: list[curves.EndPoint]
    machines: list[Machine]
    uses: list[WorkerUse]


@retrying
def _read(engine: sa.Engine, entry: StudyEntry) -> _Reading:
    with one_moment(engine) as connection:
        status = read_status(connection, entry.study_id, entry.name)
        best = curves.top(status.trials, curves.COMPARED)
        return _Reading(
            status,
            read_confirmation(connection, entry, status),
            curves.read_curves(connection, entry.study_id, best),
            curves.read_ends(connection, entry.study_id),
            read_machines(connection, entry.study_id),
            read_uses(connection, entry.study_id),
        )


def _compared(best: list[curves.Curve]) -> list[str]:
    """The hyperparameters of the comparisons: those of COMPARED that the drawn trials have."""
    present = parameter_names([curve.trial for curve in best])
    return [name for name in COMPARED if name in present]


def _judged(entry: StudyEntry, trial: int) -> dict[str, charts.Figure]:
    """What a trial gets wrong, as far as its predictions and the pictures are on this machine."""
    try:
        return judged(Judgement.of_trial(entry, trial), entry.places.get("data", ""))
    except PredictionsError:
        return {}


def _templates() -> jinja2.Environment:
    loader = jinja2.PackageLoader("search")
    templates = jinja2.Environment(loader=loader, autoescape=jinja2.select_autoescape(["html"]))
    templates.filters.update(counted=counted, pace=pace, share=share)
    return templates


def _facts(
    entry: StudyEntry, status: Status, choice: Choice, confirmation: Confirmation | None
) -> dict[str, Any]:
    """What the text of the report says of the study."""
    config = StudyConfig.from_record(entry)
    train = config.shared
    stages = stage_table(train, len(entry.attributes))
    accuracy = known_accuracy(entry, choice.row, confirmation)
    return {
        "study": entry.name,
        "source": mark(entry.name),
        "verdict": f"Trial {choice.row.number} is {choice.words}.",
        "accuracy": in_words(accuracy) if accuracy else "",
        "winner": _winning(choice, train),
        "winner_number": choice.row.number,
        "confirmation": confirmation,
        "columns": COLUMNS,
        "rows": [cells(candidate) for candidate in confirmation.candidates] if confirmation else [],
        "verdicts": verdict(confirmation) if confirmation else [],
        "counts": ", ".join(f"{n} {state}" for state, n in status.counts.items() if n),
        "gpu_hours": status.gpu_hours,
        "audit": audit_line(status),
        "score": config.study.score,
        "train": train,
        "head": f"{HEAD[0]}-{HEAD[1]}-{len(entry.attributes)}",
        "trained": sum(row.parameters for row in stages if row.trained),
        "stages": stages,
        "absent": absent_attributes(entry.attributes),
        "categories": list(dict.fromkeys(row["category"] for row in entry.attributes)),
        "slurm": config.slurm,
    }


def _winning(choice: Choice, train: TrainConfig) -> list[tuple[str, Any]]:
    """The table of winning parameters, in the order of the seed report."""
    tuned = [(NAMES.get(k, k.replace("_", " ")), _short(v)) for k, v in choice.row.params.items()]
    return [
        ("epochs", train.epochs),
        ("cosine annealing", True),
        ("learning rate warm-up", counted(train.warmup_epochs, "epoch")),
        *tuned,
        ("data augmentation", train.augment != "none"),
    ]


def _short(value: object) -> object:
    return f"{value:.3g}" if isinstance(value, float) else value
