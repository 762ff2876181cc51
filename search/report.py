"""`atelier report`: a study as one page to hand in, in Markdown and in HTML, with its figures beside."""

from pathlib import Path
from typing import Any

import jinja2
import sqlalchemy as sa
from markdown_it import MarkdownIt

from dashboards.outputs import check_overwritable, mark
from dashboards.plot import check_figure, plot_study
from dashboards.study_tables import audit_line
from search.confirm.evidence import read_confirmation
from search.confirm.table import COLUMNS, cells, verdict
from search.errors import InputError
from search.export import Choice, choose, in_words, known_accuracy
from search.study_config import StudyConfig
from storage.status import parameter_names, read_status
from storage.studies import StudyEntry
from storage.workers import read_machines
from trainer.config import TrainConfig
from trainer.dataset import absent_attributes
from trainer.model import HEAD, stage_table

COMPARED = ("batch_size", "weight_decay", "dropout")  # what the seed report compares
NAMES = {"lr": "learning rate", "epsilon": "label smoothing"}


def write_report(engine: sa.Engine, entry: StudyEntry, folder: Path) -> Path:
    """Write report.md, report.html and figures into a folder, which is made. Returns the HTML page.

    Raises InputError if no trial is complete, OutputError if the folder has another origin's, OSError.
    """
    status = read_status(engine, entry.study_id, entry.name)
    confirmation = read_confirmation(engine, entry)
    choice = choose(status, confirmation, None)
    accuracy = known_accuracy(entry, choice.row, confirmation)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder")
    compared = [name for name in COMPARED if name in parameter_names(status.trials)]
    for name in ("report.md", "report.html"):
        check_overwritable(folder / name, mark(entry.name), f"a report of study {entry.name!r}")
    for name in ("history.png", "curves.png", *(f"compare-{name}.png" for name in compared)):
        check_figure(folder / name, entry.name)
    folder.mkdir(parents=True, exist_ok=True)
    file = StudyConfig.from_record(entry)
    train = file.shared
    stages = stage_table(train, len(entry.attributes))
    plot_study(engine, entry, "history", folder / "history.png")
    plot_study(engine, entry, "curves", folder / "curves.png", top=5)
    for name in compared:
        plot_study(engine, entry, "compare", folder / f"compare-{name}.png", by=name)
    loader = jinja2.PackageLoader("search")
    templates = jinja2.Environment(loader=loader, autoescape=jinja2.select_autoescape(["html"]))
    text = templates.get_template("report.md").render(
        study=entry.name,
        source=mark(entry.name),
        verdict=f"Trial {choice.row.number} is {choice.words}.",
        accuracy=in_words(accuracy) if accuracy else "",
        winner=_winning(choice, train),
        confirmation=confirmation,
        columns=COLUMNS,
        rows=[cells(one) for one in confirmation.candidates] if confirmation else [],
        verdicts=verdict(confirmation) if confirmation else [],
        counts=", ".join(f"{n} {state}" for state, n in status.counts.items() if n),
        gpu_hours=status.gpu_hours,
        audit=audit_line(status),
        score=file.study.score,
        compared=compared,
        train=train,
        head=f"{HEAD[0]}-{HEAD[1]}-{len(entry.attributes)}",
        trained=sum(row.parameters for row in stages if row.trained),
        stages=stages,
        absent=absent_attributes(entry.attributes),
        categories=list(dict.fromkeys(row["category"] for row in entry.attributes)),
        machines=read_machines(engine, entry.study_id),
        slurm=file.slurm,
    )
    (folder / "report.md").write_text(text, encoding="utf-8")
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    page = templates.get_template("report.html").render(
        title=f"Study {entry.name}", source=mark(entry.name), body=body
    )
    (folder / "report.html").write_text(page, encoding="utf-8")
    return folder / "report.html"


def _winning(choice: Choice, train: TrainConfig) -> list[tuple[str, Any]]:
    """The table of winning parameters, as the seed report has it."""
    tuned = [(NAMES.get(k, k.replace("_", " ")), _short(v)) for k, v in choice.row.params.items()]
    return [
        ("epochs", train.epochs),
        ("cosine annealing", True),
        ("learning rate warm-up", f"{train.warmup_epochs} epochs"),
        *tuned,
        ("data augmentation", train.augment != "none"),
    ]


def _short(value: object) -> object:
    return f"{value:.3g}" if isinstance(value, float) else value
