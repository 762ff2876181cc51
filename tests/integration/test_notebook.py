"""`import atelier` and `atelier trials --format`: the same frames, documented, read only."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError
from typer.testing import CliRunner

import atelier as notebook
from dashboards.plot import figure_of
from search.cli import app
from storage import studies
from storage.curves import METRICS
from storage.paths import RunFolder
from storage.status import read_status
from tests.studies import ATTRIBUTES, CATEGORIES, SPACE, fill, predict
from trainer.dataset import read_dataset
from trainer.demo import write_demo

ROOT = Path(__file__).parents[2]
PAGE, EXAMPLE = ROOT / "docs/notebook.md", ROOT / "docs/notebook.ipynb"
MOST_BYTES = 300_000
STATES = ["complete", "pruned", "running", "waiting", "failed", "complete"]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "drawn"
    write_demo(folder, train=4, val=30, test=2)
    return folder


@pytest.fixture
def study(engine, home, data):
    """A study of every state, named as in the example."""
    fill(engine, STATES, epochs=5, name="demo", data=data)
    entry = studies.study_entry(engine, "demo")
    for number in (0, 5):
        predict(entry, number, read_dataset(data), seed=number)
    return notebook.open("demo")


KINDS = {
    "integer": "Int64",
    "number": "float64",
    "text": "str",
    "time": "datetime64[ns, UTC]",
    "category": "category",
    "yes or no": "bool",
}


def documented(table):
    """The columns of a table and their dtypes, as the page says."""
    section = re.search(rf"^### {table}\n(.*?)(?=^### |\Z)", PAGE.read_text(), re.M | re.S)[1]
    return {name: KINDS[kind] for name, kind in re.findall(r"^\| `(.+?)` \| (.+?) \|", section, re.M)}


def dtypes(frame):
    return {name: str(kind) for name, kind in frame.dtypes.items()}


def frames(study):
    named = {name: getattr(study, name) for name in ("trials", "epochs", "attempts")}
    return named | {"predictions": study.predictions()}


def test_the_page_has_all_columns_and_their_types_in_their_order(study):
    found = {name: dtypes(frame) for name, frame in frames(study).items()}
    params = {name: found["trials"].pop(name) for name in SPACE}
    assert params == dict.fromkeys(SPACE, "float64") | {"batch_size": "Int64"}
    for category in [*CATEGORIES][1:]:  # the first stands for all
        assert found["epochs"].pop(f"{category} accuracy") == "float64"
    for table, columns in found.items():
        assert [*columns.items()] == [*documented(table).items()], table


def test_a_study_without_trials_has_the_same_columns(engine, home, study):
    fill(engine, [], name="empty")
    for table in ("trials", "epochs", "attempts"):
        frame = getattr(notebook.open("empty"), table)
        assert frame.empty
        few = dtypes(getattr(study, table))
        few = {name: few[name] for name in few if name not in SPACE or table == "epochs"}
        assert dtypes(frame) == {n: k for n, k in few.items() if not n.endswith(" accuracy")}


def test_the_trials_are_those_of_the_status(study, engine):
    status = read_status(engine, studies.study_entry(engine, "demo").study_id, "demo")
    trials = study.trials.set_index("number")
    assert [*trials["state"]] == STATES
    for row in status.trials:
        for name in ("epochs", "seconds", "accuracy", "value", "worker", "reason", *SPACE):
            expected = row.params[name] if name in SPACE else getattr(row, name)
            found = trials.at[row.number, name]
            assert pd.isna(found) if expected is None else found == expected, name
    with engine.connect() as connection:
        for number, first, last in connection.execute(
            sa.text(
                "SELECT t.number, min(claimed), CASE WHEN bool_and(released IS NOT NULL) THEN "
                "max(released) END FROM atelier.attempt JOIN trials t USING (trial_id) GROUP BY 1"
            )
        ):
            assert trials.at[number, "claimed"] == first
            end = trials.at[number, "released"]
            assert pd.isna(end) if last is None else end == last


def test_the_epochs_are_those_on_record(study, engine):
    entry = studies.study_entry(engine, "demo")
    epochs = study.epochs.set_index(["trial", "epoch"])
    for number in range(len(STATES)):
        recorded = studies.epochs_of(engine, entry.study_id, number)
        assert len(epochs.loc[number]) == len(recorded)
        for row in recorded:
            found = epochs.loc[(number, row["epoch"] + 1)]  # people count from 1
            assert [found[name] for name in METRICS] == [row[name] for name in METRICS]
            assert [found[f"{name} accuracy"] for name in CATEGORIES] == row["val_category"]
            assert found["recorded"] == row["recorded"]


def test_the_predictions_are_those_of_the_files(study, data, engine):
    dataset, entry = read_dataset(data), studies.study_entry(engine, "demo")
    names = [[row["name"] for row in ATTRIBUTES if row["category"] == name] for name in CATEGORIES]
    for number in (0, 5):
        predicted = predict(entry, number, dataset, seed=number)
        frame = study.predictions(number)
        assert len(frame) == predicted.labels.size
        for column, (category, some) in enumerate(zip(CATEGORIES, names, strict=True)):
            rows = frame[frame["category"] == category]
            assert [*rows["image"]] == [*range(len(predicted.labels))]
            assert [*rows["file"]] == [str(path) for path in dataset.split("val").paths]
            assert [*rows["true"]] == [some[label] for label in predicted.labels[:, column]]
            assert [*rows["predicted"]] == [some[label] for label in predicted.classes[-1][:, column]]
            np.testing.assert_allclose(
                rows["probability_of_true"], np.exp(predicted.log_probs[-1][:, column].astype(float))
            )
    assert [*study.predictions()["trial"].unique()] == [0, 5]


def test_an_unknown_label_is_missing(study, data, engine):
    entry = studies.study_entry(engine, "demo")
    predictions = predict(entry, 0, read_dataset(data), seed=0)
    predictions.labels[3, 1] = 255
    predictions.save(RunFolder(entry.name, entry.created).predictions(0))
    frame = study.predictions(0)
    unknown = frame[frame["true"].isna()]
    assert unknown[["image", "category"]].to_numpy().tolist() == [[3, "sleeve"]]
    assert unknown["probability_of_true"].isna().all()
    assert frame["probability_of_true"].notna().sum() == len(frame) - 1
    assert frame["file"].isna().all()  # the data folder has other labels than the trial was judged by


def test_the_figures_are_those_of_the_pages(study, engine):
    entry = studies.study_entry(engine, "demo")
    calls = {"curves": study.curves(), "compare": study.compare("dropout"), "history": study.history()}
    calls |= {"confusion": study.confusion(5), "errors": study.errors(5)}
    for kind, figure in calls.items():
        by = "dropout" if kind == "compare" else None
        trials = "5" if kind in ("confusion", "errors") else None
        drawn, title = figure_of(engine, entry, kind, trials, by=by)
        assert figure.layout.title.text == title
        titles = [text.text.partition("<br>")[0] for text in figure.layout.annotations]
        assert titles == [panel.title for panel in drawn.panels]
        series = [line for panel in drawn.panels for line in panel.series]
        lines = [trace for trace in figure.data if trace.type == "scatter"]
        assert [[*trace.x] for trace in lines if trace.showlegend is False] == [
            line.x for line in series
        ]
        labels = [trace.name for trace in lines if trace.showlegend is not False]
        assert labels == [label for label, _ in drawn.legend]
        counts = [panel.matrix.counts for panel in drawn.panels if panel.matrix]
        matrices = [trace for trace in figure.data if trace.type == "heatmap"]
        assert [[[*row] for row in trace.text] for trace in matrices] == counts
        json.loads(figure.to_json())


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (
            lambda study: notebook.open("nobody"),
            "no study 'nobody' in the database, which has: demo; name one of these",
        ),
        (lambda study: study.curves([3, 99]), "no epoch on record of trial 99; leave them out"),
        (lambda study: study.curves("9-3"), "the smaller number comes first, as in 3,5-9"),
        (lambda study: study.curves(0, top=3), "--trials and --top both choose trials"),
        (lambda study: study.curves(smooth=1), "--smooth is at least 0 and below 1"),
        (lambda study: study.curves(top=-1), "--top at least 1"),
        (lambda study: study.compare("weight"), "'weight': allowed are batch_size, dropout"),
        (lambda study: study.predictions([0, 1]), "no predictions of trial 1"),
        (lambda study: study.confusion("0,5"), "give one trial, as each has a figure of its own"),
    ],
)
def test_an_error_is_the_line_of_the_command(study, ask, words):
    with pytest.raises(notebook.AtelierError, match=re.escape(words)) as error:
        ask(study)
    assert "\n" not in str(error.value)


def test_without_a_database_the_error_says_so(home, monkeypatch):
    monkeypatch.delenv("ATELIER_DATABASE_URL", raising=False)
    with pytest.raises(notebook.AtelierError, match=f"no database in {home}"):
        notebook.studies()


def test_no_session_can_write(study):
    with study._engine.connect() as connection, pytest.raises(SQLAlchemyError, match="read-only"):
        connection.execute(sa.text("UPDATE atelier.study SET max_trials = 0"))


def test_it_is_used_without_torch(study):
    code = (
        "import sys, atelier\n"
        "assert not {'pandas', 'sqlalchemy', 'optuna'} & sys.modules.keys(), 'late enough'\n"
        "study = atelier.open('demo')\n"
        "study.trials, study.epochs, study.attempts, study.predictions()\n"
        "study.curves(), study.compare(), study.history(), study.confusion(), study.errors()\n"
        "assert not {'torch', 'timm', 'torchvision'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def test_the_example_runs_and_shows_what_is_in_its_file(study, tmp_path):
    command = [sys.executable, "-m", "tests.run_notebook", str(EXAMPLE)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cells = [cell for cell in json.loads(EXAMPLE.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        [sorted(one.get("data", {"stdout": 0})) for one in cell["outputs"]] for cell in cells
    ]


def test_the_example_is_small_valid_and_of_no_machine():
    text = EXAMPLE.read_text()
    assert len(text) < MOST_BYTES
    assert not re.search(r"/(home|root|tmp|work|dev)/", text)
    example = json.loads(text)
    assert (example["nbformat"], example["nbformat_minor"]) == (4, 4)
    for cell in example["cells"]:
        keys = {"cell_type", "metadata", "source"}
        if cell["cell_type"] == "code":
            keys |= {"execution_count", "outputs"}
            assert cell["outputs"]
        assert cell.keys() == keys


def typed(*words, code=0):
    result = CliRunner().invoke(app, ["trials", "demo", *map(str, words)])
    assert result.exit_code == code, result.output
    return result


def read_csv(text):
    return [*csv.DictReader(io.StringIO(text))]


@pytest.mark.parametrize("table", ["trials", "epochs"])
def test_a_file_of_every_format_has_the_rows_of_the_frame(study, table, tmp_path, monkeypatch):
    monkeypatch.setattr("dashboards.frame_files.ROWS", 2)  # there are parts to join
    monkeypatch.setattr("dashboards.frames.ROWS", 7)
    words = ["--epochs"] if table == "epochs" else []
    written, frame = {}, getattr(study, table)
    for kind in ("csv", "json", "parquet"):
        written[kind] = tmp_path / f"{table}.{kind}"
        for _ in range(2):  # the second time over the first one's
            typed("--format", kind, "-o", written[kind], *words)
    aside = ["renewed"] if table == "trials" else []  # seconds since: it has gone on
    frame = frame.drop(columns=aside)
    parquet = pd.read_parquet(written["parquet"]).drop(columns=aside)
    pd.testing.assert_frame_equal(parquet, frame)
    for text, missing in ((written["csv"], ""), (written["json"], None)):
        rows = json.loads(text.read_text()) if missing is None else read_csv(text.read_text())
        assert len(rows) == len(frame)
        for row, (_, expected) in zip(rows, frame.iterrows(), strict=True):
            for name, value in expected.items():
                found = row[name]
                if pd.isna(value):
                    assert found == missing
                elif isinstance(value, pd.Timestamp):
                    assert pd.Timestamp(found) == value
                else:
                    assert found == (str(value) if missing == "" else value), name
    for kind in ("csv", "json"):
        shown = typed("--format", kind, *words).stdout
        assert len(shown.splitlines()) == len(written[kind].read_text().splitlines())


def test_csv_files_have_the_columns_of_the_earlier_ones(study, tmp_path):
    typed("--csv", tmp_path / "t.csv")
    [head, *_] = csv.reader(io.StringIO((tmp_path / "t.csv").read_text()))
    assert head[:4] == ["number", "state", "epochs", "seconds"]
    assert (tmp_path / "t.csv").read_text().startswith(",".join(head))


def test_json_has_no_nan_and_no_infinity(study, engine):
    with engine.begin() as connection:
        connection.execute(
            sa.text("UPDATE atelier.epoch SET val_loss = 'Infinity', train_loss = 'NaN' WHERE epoch = 1")
        )
    rows = json.loads(
        typed("--format", "json", "--epochs").stdout,
        parse_constant=lambda word: pytest.fail(f"{word} is no JSON"),
    )
    assert {(row["val_loss"], row["train_loss"]) for row in rows if row["epoch"] == 2} == {(None, None)}
    assert all(row["val_loss"] for row in rows if row["epoch"] != 2)
    second = [
        row for row in read_csv(typed("--format", "csv", "--epochs").stdout) if row["epoch"] == "2"
    ]
    assert {(row["val_loss"], row["train_loss"]) for row in second} == {("inf", "")}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--format", "xlsx"], "--format 'xlsx': allowed are csv, json, parquet"),
        (["--format", "parquet"], "--format parquet writes a file; name it with -o FILE"),
        (["-o", "t.csv"], "-o and --epochs go with --format; add --format csv, json or parquet"),
        (["--epochs"], "-o and --epochs go with --format; add --format csv, json or parquet"),
        (["--csv", "t.csv", "--format", "csv"], "--csv FILE stands for --format csv -o FILE"),
        *(
            (["--format", kind, "-o", "notes.txt"], "notes.txt: there is a file that is not a table of")
            for kind in ("csv", "json", "parquet")
        ),
    ],
)
def test_wrong_options_are_refused_and_nothing_is_written(study, words, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("mine")
    before = sorted(Path().iterdir())
    assert line in typed(*words, code=2).stderr
    assert sorted(Path().iterdir()) == before
    assert Path("notes.txt").read_text() == "mine"


def test_without_pyarrow_it_says_what_to_install(study, tmp_path):
    code = (
        "import sys\n"
        "sys.modules['pyarrow'] = None\n"  # as if it were absent
        "from search.cli import main\n"
        "main(['trials', 'demo', '--format', sys.argv[1], '-o', sys.argv[2]])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for kind, expected in (("parquet", 2), ("csv", 0)):
        command = [sys.executable, "-c", code, kind, str(tmp_path / f"t.{kind}")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == expected, done.stderr
        assert ("pip install pyarrow" in done.stderr) == (kind == "parquet")
        assert (tmp_path / f"t.{kind}").exists() == (kind == "csv")


def test_an_empty_study_is_a_head_or_an_empty_list(engine, home):
    fill(engine, [], name="demo")
    assert json.loads(typed("--format", "json").stdout) == []
    assert typed("--format", "csv").stdout.startswith("number,state,")
    assert "has no trials yet" in typed("--format", "csv", "-o", "t.csv").stderr


def test_a_file_with_the_name_of_a_package_is_named(tmp_path, home):
    (tmp_path / "search.py").write_text("")
    result = subprocess.run(
        [sys.executable, "-c", "import sys, atelier; sys.path.insert(0, ''); atelier.studies()"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"atelier.AtelierError: {tmp_path}/search.py was found instead of")
