"""What is left behind: files that a verb may write over, and run folders of studies that are gone."""

import os
import tomllib
import zipfile
from pathlib import Path

import optuna
import pytest
import tomli_w
from typer.testing import CliRunner

from dashboards.outputs import mark
from search.cli import app
from storage import optuna_storage, studies
from storage.paths import RunFolder
from storage.prune import forgotten
from tests.studies import fill

runner = CliRunner()
DAY = 86400


@pytest.fixture
def two(engine, home, tmp_path, monkeypatch):
    """Studies `one` and `another`, in an empty working folder."""
    for name in ("one", "another"):
        fill(engine, ["complete"] * 4 + ["pruned"], epochs=3, name=name)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def run(*words, code=0):
    result = runner.invoke(app, [*map(str, words)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def refused(*words):
    """The one line that a verb ends with, which leaves every file as it was."""
    before = contents()
    result = run(*words, code=2)
    assert contents() == before
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def contents():
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


VERBS = [
    (["export", "{}", "-o", "x.toml"], "x.toml"),
    (["plot", "{}", "-o", "x.png"], "x.png"),
    (["plot", "{}", "-o", "x.svg", "--kind", "history"], "x.svg"),
    (["plot", "{}", "-o", "x.html"], "x.html"),
    (["report", "{}", "-o", "x"], "x/report.md"),
    (["report", "{}", "-o", "x"], "x/report.html"),
    (["report", "{}", "-o", "x"], "x/curves.png"),
    (["trials", "{}", "--csv", "x.csv"], "x.csv"),
]


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(("words", "output"), VERBS)
def test_a_file_of_another_origin_is_not_written_over(words, output):
    Path(output).parent.mkdir(exist_ok=True)
    Path(output).write_bytes(b"written by hand: trial 7 of one\n")
    line = refused(*(word.format("one") for word in words))
    folder, _, name = output.rpartition("/")
    if folder:
        assert f"x: has {name}, which is not of a report of study 'one'; give another folder" in line
    else:
        assert output in line
        assert "another name" in line


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(("words", "output"), VERBS[:5])
def test_a_study_writes_over_its_own_only(words, output):
    first, other = ([word.format(name) for word in words] for name in ("one", "another"))
    run(*first)
    run(*first)
    line = refused(*other)
    assert Path(output).name.partition(".")[0] in line
    if words[0] != "report":  # whose folder has other files
        Path(output).unlink()
        run(*other)


@pytest.mark.usefixtures("two")
def test_a_name_that_begins_like_another_is_not_the_same(engine):
    fill(engine, ["complete"] * 4, epochs=3, name="on")
    run("plot", "one", "-o", "a.png")
    assert "'on'" in refused("plot", "on", "-o", "a.png")
    assert mark("a;b c") == "atelier:a%3Bb%20c;"


def test_a_search_looks_before_it_works(two, study_text, engine):
    (file := Path("s.toml")).write_text(study_text)
    run("export", "one", "-o", "best.toml")
    line = refused("search", file)
    assert "the export of study 'one', and this is 'tiny'; give another name with -o" in line
    assert studies.study_names(engine) == ["one", "another"]
    Path("best.toml").write_text(tomli_w.dumps({"train": {}, "origin": {}}))
    assert "best.toml" in refused("search", file)
    Path("best.toml").write_text('origin = "text"\n')
    assert "atelier export did not write" in refused("search", file)


@pytest.mark.usefixtures("two")
def test_an_export_says_that_it_has_no_interval():
    assert "note: its accuracy has no interval" in run("export", "one").stderr
    assert tomllib.loads(Path("best.toml").read_text())["origin"]["study"] == "one"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, train_one_epoch):
    """Run folders of two configurations."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        train_one_epoch(folder / f"{seed}.run", seed)
    return folder


def test_a_prediction_of_another_run_is_not_written_over(runs, tmp_path, home, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("predict", runs / "0.run")
    run("predict", runs / "0.run", "--tta", "flip")
    assert "is not a prediction of this run" in refused("predict", runs / "1.run")
    with zipfile.ZipFile("prediction.zip") as file:
        assert file.namelist() == ["prediction.txt"]
    Path("prediction.zip").write_bytes(b"a model")
    assert "is not a prediction of this run" in refused("predict", runs / "0.run")


def folder_of(engine, name, age):
    """A study's run folder with a checkpoint in it, last written to so long ago."""
    runs = RunFolder(name, studies.study_entry(engine, name).created).make()
    return aged(runs.path, age)


def aged(folder, age):
    file = folder / "trial-00000" / "attempt-0001.pt"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x" * 1000)
    then = file.stat().st_mtime - age
    for path in (file, file.parent, folder):
        os.utime(path, (then, then))
    return folder


def test_folders_of_studies_that_are_gone(two, engine, home):
    kept = [folder_of(engine, "one", 3 * DAY)]
    gone = folder_of(engine, "another", 3 * DAY)
    earlier = aged(home / "runs" / "one-20200101-000000", 3 * DAY)  # of the same name, made before
    kept += [
        aged(home / "runs" / "busy-20200101-000000", DAY / 2),  # maybe another database's
        aged(home / "runs" / "notes", 3 * DAY),  # a user's
    ]
    optuna.delete_study(study_name="another", storage=optuna_storage.optuna_storage(engine))
    lost = sorted([gone, earlier])
    assert forgotten(engine) == lost
    assert "run folders of no study here: 2; see: atelier db prune" in run("db", "status").stdout
    for words in ([], ["--dry-run"], ["--deleted", "--dry-run"]):
        *listed, said = run("db", "prune", *words).stdout.splitlines()
        assert listed == [str(path) for path in lost]
        assert said.endswith("0.0 MB: atelier db prune --deleted removes them")
        assert all(path.exists() for path in lost)
    assert "leave out STUDY" in run("db", "prune", "one", "--deleted", code=2).stderr
    assert run("db", "prune", "--deleted").stdout.endswith("0.0 MB: removed\n")
    assert sorted((home / "runs").iterdir()) == sorted(kept)
    assert "nothing to do" in run("db", "prune").stdout
    assert "run folders" not in run("db", "status").stdout


@pytest.mark.parametrize("written", [False, True])
def test_the_folder_of_an_old_study_may_go_as_soon_as_it_is_deleted(two, engine, home, written):
    gone = folder_of(engine, "another", 3 * DAY)
    RunFolder("another", studies.study_entry(engine, "another").created).mark_deleted()
    optuna.delete_study(study_name="another", storage=optuna_storage.optuna_storage(engine))
    if written:  # by a worker that has not noticed yet
        os.utime(gone / "trial-00000" / "attempt-0001.pt")
    run("db", "prune", "--deleted")
    assert gone.exists() == written


def test_a_folder_that_is_written_to_is_left(two, engine, home):
    gone = folder_of(engine, "another", 3 * DAY)
    (gone / "trial-00000" / "new").write_bytes(b"")  # whatever the folder's own time
    os.utime(gone / "trial-00000", (0, 0))
    optuna.delete_study(study_name="another", storage=optuna_storage.optuna_storage(engine))
    assert forgotten(engine) == []


def test_a_home_that_has_a_database_of_its_own_keeps_its_folders(two, engine, home):
    gone = folder_of(engine, "another", 3 * DAY)
    optuna.delete_study(study_name="another", storage=optuna_storage.optuna_storage(engine))
    (home / "postgres").mkdir()
    assert "which shares this home" in run("db", "prune", "--deleted", code=2).stderr
    assert str(gone) in run("db", "prune").stdout
    assert gone.exists()
