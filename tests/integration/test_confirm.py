"""Leaders on fresh seeds, as a user confirms them: real trials, workers and predictions."""

import csv
import html
import os
import re
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

import search.local
from dashboards.predictions import Judgement
from dashboards.thumbnails import find_pictures
from dashboards.web.app import make_app
from dashboards.web.server import connect_roles
from search.cli import app
from search.confirm.page import confirmed_reader
from storage.paths import RunFolder
from storage.studies import study_entry, update_study
from tests.conftest import PASSWORD, STUDY, copied_database
from tests.json_page import assert_documented
from trainer.dataset import read_dataset
from trainer.predictions import Predictions


class Stage(NamedTuple):
    """What a command has left: the name of the database, the folder, and what it said."""

    database: str
    folder: Path
    said: str


@pytest.fixture(scope="module")
def after(server, template, tmp_path_factory):
    """Runs a command in a new folder, or in a copy of what another command has left."""

    def run(before, name, *words, study=""):
        folder = tmp_path_factory.mktemp(name)
        if before is None:
            (folder / "study.toml").write_text(study)
        else:
            shutil.copytree(before.folder, folder, dirs_exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            original = before.database if before else template
            patch.setenv("ATELIER_DATABASE_URL", copied_database(server, name, original))
            patch.setenv("ATELIER_HOME", str(folder / "home"))
            patch.setattr(search.local, "POLL_SECONDS", 0.1)
            patch.chdir(folder)
            result = CliRunner().invoke(app, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return Stage(name, folder, result.output)

    return run


@pytest.fixture(scope="module")
def search_stage(after, demo):
    study = STUDY.format(name="tiny", trials=3, size=32, epochs=2, data=demo)
    study += "\n[slurm.tuning]\nmemory = '1G'\n"
    return after(None, "searched", "search", "study.toml", study=study)


@pytest.fixture(scope="module")
def confirm_stage(after, search_stage):
    words = ("confirm", "study.toml", "--top", "2", "--seeds", "2")
    return after(search_stage, "confirmed", *words)


@pytest.fixture
def take_over(atelier, server, database_name, tmp_path):
    """Gives this test a copy of what a stage has left. Returns the command."""

    def take(stage):
        copied_database(server, database_name, stage.database)
        shutil.copytree(stage.folder, tmp_path, dirs_exist_ok=True)
        return atelier

    return take


@pytest.fixture
def searched(take_over, search_stage):
    """The command beside a study with three complete trials."""
    return take_over(search_stage)


@pytest.fixture
def confirmed(take_over, confirm_stage):
    """The command beside a study whose best two trials ran again with two seeds."""
    return take_over(confirm_stage)


def confirmation(atelier):
    return assert_documented("confirm STUDY", atelier("confirm", "tiny", "--json").stdout)


def trials(atelier, tmp_path, name):
    atelier("trials", name, "--csv", tmp_path / "t.csv")
    with (tmp_path / "t.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_script_of_its_array_is_shown_and_nothing_is_begun(searched, tmp_path, monkeypatch):
    sinfo = tmp_path / "programs" / "sinfo"  # of a cluster that is this machine
    sinfo.parent.mkdir()
    sinfo.write_text("#!/bin/sh\nhostname -s\n")
    sinfo.chmod(0o755)
    monkeypatch.setenv("PATH", str(sinfo.parent), prepend=os.pathsep)
    script = searched("confirm", "tiny", "--top", "2", "--dry-run", "--array", "0-1").stdout
    assert "#SBATCH --array=0-1" in script
    assert " worker -- tiny-confirm\n" in script
    assert "nothing of study" in searched("confirm", "tiny", "--show", code=2).stderr


def test_a_rerun_that_is_not_as_planned_is_found(confirmed, engine):
    assert "all " in confirmed("verify", "tiny-confirm").stdout
    with engine.begin() as connection:
        other = "UPDATE public.trial_params SET param_value = param_value + 1 WHERE param_name = 'seed'"
        connection.execute(sa.text(other))
    for line in confirmed("verify", "tiny-confirm", code=1).stdout.splitlines():
        assert " was trained with another seed than planned; " in line


def test_the_leaders_run_again_with_the_same_fresh_seeds(
    confirmed, confirm_stage, tmp_path, monkeypatch
):
    atelier = confirmed
    ranked = sorted(trials(atelier, tmp_path, "tiny"), key=lambda row: -float(row["value"]))
    leaders = [int(row["number"]) for row in ranked[:2]]
    assert "is expected to be too " in confirm_stage.said
    reruns = trials(atelier, tmp_path, "tiny-confirm")
    assert [row["state"] for row in reruns] == ["complete"] * 4
    pairs = [(int(row["candidate"]), int(row["seed"])) for row in reruns]
    assert pairs == [(leaders[0], 1), (leaders[1], 1), (leaders[0], 2), (leaders[1], 2)]
    for rerun in reruns:
        [original] = [row for row in ranked if row["number"] == rerun["candidate"]]
        assert [rerun[name] for name in ("lr", "batch_size")] == [
            original[name] for name in ("lr", "batch_size")
        ]
    known = confirmation(atelier)
    assert (known["finished"], known["seeds"], known["overtaken"]) == (True, 2, [])
    assert {one["number"] for one in known["candidates"]} == set(leaders)
    for one in known["candidates"]:
        values = [float(row["value"]) for row in reruns if int(row["candidate"]) == one["number"]]
        score = one["estimate"]["score"]
        assert score["value"] == pytest.approx(np.mean(values))
        assert score["low"] < score["value"] < score["high"]
        [original] = [row for row in ranked if int(row["number"]) == one["number"]]
        assert one["searched"] == pytest.approx(float(original["value"]))
    assert sum(one["estimate"]["best"] for one in known["candidates"]) == pytest.approx(1)

    # A rerun is what `train` makes of the candidate with that seed.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    atelier("export", "tiny", "--trial", leaders[0], "-o", "one.toml")
    text = (tmp_path / "one.toml").read_text()
    (tmp_path / "one.toml").write_text(text.replace("\nseed = 0", "\nseed = 2", 1))
    trained = atelier("train", "one.toml").stdout.splitlines()
    last = [float(line.split("val loss")[1].split()[2]) for line in trained]
    assert np.mean(last) == pytest.approx(float(reruns[2]["value"]), abs=1e-4)

    # More seeds are only the missing ones; other candidates would be another confirmation.
    atelier("confirm", "tiny", "--seeds", "3", "--workers", "1")
    assert len(trials(atelier, tmp_path, "tiny-confirm")) == 6
    assert "was begun with 2" in atelier("confirm", "tiny", "--top", "3", code=2).stderr
    assert "allowed are more" in atelier("confirm", "tiny", "--seeds", "2", code=2).stderr
    for command in ("confirm", "export", "report"):
        assert "name that: tiny" in atelier(command, "tiny-confirm", code=2).stderr
    other = (tmp_path / "study.toml").read_text().replace('"tiny"', '"tiny-confirm"')
    (tmp_path / "other.toml").write_text(other)
    assert "confirms." in atelier("search", "other.toml", "-o", "other-best.toml", code=2).stderr


def test_the_leaders_run_again_on_folds(searched, engine, tmp_path, demo):
    atelier = searched
    said = atelier("confirm", "tiny", "--top", "2", "--folds", "3", "--workers", "1").stdout
    assert "points behind the best of these 2 candidates, each trained on 2/3 of train and val\n" in said
    reruns = trials(atelier, tmp_path, "tiny-confirm")
    assert [row["seed"] + row["fold"] for row in reruns] == ["10", "10", "21", "21", "32", "32"]
    known = confirmation(atelier)
    assert (known["folds"], known["seeds"], known["finished"]) == (3, 1, True)
    assert [one["seeds"] for one in known["candidates"]] == [3, 3]

    # Each image is judged once, and the score is that of all of them together.
    dataset, entry = read_dataset(demo), study_entry(engine, "tiny-confirm")
    split, folder = dataset.split("train+val"), RunFolder(entry.name, entry.created)
    [one] = [one for one in known["candidates"] if str(one["number"]) == reruns[0]["candidate"]]
    right = np.full(split.labels.shape, np.nan)
    for row in reruns[::2]:
        found = Predictions.load(folder.predictions(int(row["number"])))
        assert np.isnan(right[found.images]).all()
        assert np.array_equal(split.labels[found.images], found.labels)
        right[found.images] = (found.classes == found.labels).mean(0)
        pictures = find_pictures(str(demo), Judgement.of_trial(entry, int(row["number"])))
        assert pictures == [dataset.folder / split.paths[image] for image in found.images]
    columns = zip(right.T, split.labels.T, dataset.sizes, strict=True)
    means = [hit[label == k].mean() for hit, label, size in columns for k in range(size)]
    assert one["estimate"]["score"]["value"] == pytest.approx(np.mean(means))
    for attribute, count in zip(entry.attributes, dataset.counts(split), strict=True):
        assert attribute["images"] == sum(attribute["folds"]) == count

    assert "all " in atelier("verify", "tiny-confirm").stdout
    replayed = atelier("replay", "tiny-confirm", "--trial", "3").stdout
    assert replayed.count("  equal\n") == 2
    facts = atelier("replay", "tiny-confirm", "--trial", "0", "--json").stdout
    facts = assert_documented("replay STUDY --trial N", facts)
    assert [epoch["differing"] for epoch in facts["epochs"]] == [[], []]
    atelier("export", "tiny", "-o", "best.toml")
    best = tomllib.loads((tmp_path / "best.toml").read_text())
    assert best["origin"]["accuracy"]["noise"] == "images, seeds and folds"
    assert best["train"].get("folds") is None  # the long run has a validation split again
    refused = atelier("confirm", "tiny", "--folds", "4", code=2).stderr
    assert "--folds 4: the confirmation was begun with 3" in refused


def turn_wrong(*paths):
    for path in paths:
        predictions = Predictions.load(path)
        wrong = np.where(predictions.labels == 0, 1, 0).astype(np.uint8)
        classes = np.broadcast_to(wrong, predictions.classes.shape)
        replace(predictions, classes=classes).save(path)


def test_who_cannot_win_gets_no_further_seeds_and_the_winner_is_exported(confirmed, engine, tmp_path):
    atelier = confirmed
    entry = study_entry(engine, "tiny-confirm")
    folder = RunFolder(entry.name, entry.created)
    [loser, winner] = (one["number"] for one in entry.settings["confirms"]["candidates"])
    turn_wrong(folder.predictions(0), folder.predictions(2))  # the reruns of the search's leader
    # Two seeds that agree, else Student's t with its one degree of freedom leaves the loser a chance.
    Predictions.load(folder.predictions(1)).save(folder.predictions(3))
    shown = atelier("confirm", "tiny", "--seeds", "3").stdout
    assert f"take trial {winner}: with 95 % it is at most 0.00 points behind the best" in shown
    shown = atelier("confirm", "tiny", "--seeds", "5").stdout
    assert "with 5 images of an attribute none can be declared the best; that takes 10 or more" in shown
    update_study(engine, entry.study_id, attributes=[{**row, "images": 10} for row in entry.attributes])
    assert re.search(
        rf"take trial {winner}: with \d+ % it is the best of these 2 candidates$",
        atelier("confirm", "tiny", "--show").stdout,
        re.M,
    )
    rows = trials(atelier, tmp_path, "tiny-confirm")
    assert [row["state"] for row in rows] == ["complete"] * 4 + ["pruned", "complete"] * 3
    assert rows[4]["reason"] == rows[8]["reason"] == "cannot win any more"
    assert rows[4]["epochs"] == "0"
    known = confirmation(atelier)
    assert known["winner"] == winner
    assert known["finished"]
    [out] = [one for one in known["candidates"] if one["passed_over"]]
    assert (out["number"], out["seeds"]) == (loser, 2)

    said = atelier("export", "tiny", "-o", "best.toml").stderr
    assert f"trial {winner}" in said
    assert re.search(r"is confirmed with \d+ % to be the best of these 2 candidates", said)
    best = tomllib.loads((tmp_path / "best.toml").read_text())
    assert best["origin"]["trial"] == winner
    assert best["origin"]["standing"] == "confirmed"
    accuracy = best["origin"]["accuracy"]
    assert accuracy["low"] < accuracy["value"] < accuracy["high"]
    assert (accuracy["seeds"], accuracy["noise"]) == (5, "images and seeds")
    assert accuracy["optimism"] == pytest.approx(known["optimism"])
    assert "is confirmed" in atelier("export", "tiny", "--trial", winner, "-o", "best.toml").stderr
    (tmp_path / "mine.toml").write_text("[study]\n")
    refused = atelier("export", "tiny", "-o", "mine.toml", code=2).stderr
    assert "there is a file that atelier export did not write" in refused
    assert (tmp_path / "mine.toml").read_text() == "[study]\n"

    assert "report.html" in atelier("report", "tiny", "-o", "pages").stderr
    text = (tmp_path / "pages" / "report.md").read_text()
    for word in (f"Trial {winner}", "Confirmation", "| 5 |", "2 (out)", "class weights", "resnet10t"):
        assert word in text
    for image in ("history", "curves", "compare-batch_size", "confusion", "errors"):
        assert (tmp_path / "pages" / f"{image}.png").stat().st_size > 10_000
        assert f"{image}.png" in text

    # Without the run folder there is nothing to compare, and that is said.
    kept = folder.predictions(0).read_bytes()
    folder.predictions(0).write_bytes(kept[:-99])
    for command in (["confirm", "tiny", "--show"], ["export", "tiny"]):
        assert "use the ATELIER_HOME that the workers used" in atelier(*command, code=2).stderr
    atelier("export", "tiny", "--trial", loser, "-o", "best.toml")
    # It is not the fault of reruns to come: they are trained.
    error = atelier("confirm", "tiny", "--seeds", "6", code=2).stderr
    assert "use the ATELIER_HOME" in error
    folder.predictions(0).write_bytes(kept)
    rows = trials(atelier, tmp_path, "tiny-confirm")[-2:]
    assert [row["state"] for row in rows] == ["pruned", "complete"]


def test_no_more_is_trained_once_a_candidate_is_near_enough_to_the_best(confirmed, tmp_path):
    atelier = confirmed
    assert confirmation(atelier)["choice"] is not None  # there is one at each end
    shown = atelier("confirm", "tiny", "--seeds", "4", "--within", "99").stdout
    rows = trials(atelier, tmp_path, "tiny-confirm")
    assert [(row["state"], row["epochs"]) for row in rows[4:]] == [("pruned", "0")] * 4
    known = confirmation(atelier)
    assert known["finished"]
    assert [(one["failed"], one["passed_over"]) for one in known["candidates"]] == [(0, False)] * 2
    [named] = [one for one in known["candidates"] if one["number"] == known["choice"]]
    within = named["estimate"]["within"]
    assert within == min(one["estimate"]["within"] for one in known["candidates"])
    assert f"take trial {known['choice']}: with 95 % it is at most {100 * within:.2f} points" in shown
    atelier("export", "tiny", "-o", "near.toml")
    origin = tomllib.loads((tmp_path / "near.toml").read_text())["origin"]
    assert (origin["trial"], origin["standing"]) == (known["choice"], "near the best")
    assert origin["accuracy"]["within"] == pytest.approx(within)
    # With 0 it goes on to the end of the further seeds.
    atelier("confirm", "tiny", "--seeds", "5", "--within", "0")
    rows = trials(atelier, tmp_path, "tiny-confirm")
    assert [row["state"] for row in rows[8:]] == ["complete"] * 2


def test_the_dashboard_shows_it_on_the_page_of_the_search(confirmed, engine, accounts):
    connections = connect_roles()
    app = make_app(connections, accounts, b"k" * 32, read_confirmed=confirmed_reader())
    client = app.test_client()
    client.post("/login", data={"name": "vera", "password": PASSWORD})
    search, linked = (study_entry(engine, name) for name in ("tiny", "tiny-confirm"))

    def said():
        page = client.get(f"/atelier/studies/{search.study_id}", headers={"Accept": "text/html"})
        section = page.text.partition('<section id="confirmation">')[2].partition("</section>")[0]
        return " ".join(html.unescape(re.sub("<[^>]*>", " ", section)).split())

    shown = confirmed("confirm", "tiny", "--show").stdout.splitlines()
    for line in shown:
        assert " ".join(line.split()) in said()
    page = client.get(f"/atelier/studies/{linked.study_id}", headers={"Accept": "text/html"})
    assert 'id="confirmation"' not in page.text
    folder = RunFolder(linked.name, linked.created)
    folder.predictions(3).unlink()
    assert shown[-1] in said()  # nothing has ended, so nothing is read again
    update_study(engine, linked.study_id, max_trials=6)
    assert said().endswith("use the ATELIER_HOME that the workers used")
    for role in connections.values():
        role.engine.dispose()


def test_reruns_that_fail_bar_a_win(confirmed, engine, tmp_path):
    """Whose reruns diverge must not win by the seeds that are left, nor by having no rivals left."""
    atelier = confirmed
    entry = study_entry(engine, "tiny-confirm")
    [first, second] = (one["number"] for one in entry.settings["confirms"]["candidates"])
    with engine.begin() as connection:  # the second's last rerun diverged
        connection.execute(
            sa.text("UPDATE trials SET state = 'PRUNED' WHERE study_id = :study AND number = 3"),
            {"study": entry.study_id},
        )
    known = confirmation(atelier)
    failed = {one["number"]: one["failed"] for one in known["candidates"]}
    assert failed == {first: 0, second: 1}
    assert known["winner"] is None
    shown = atelier("confirm", "tiny", "--show").stdout
    assert "1 (1 failed)" in shown
    assert (known["choice"], f"too few reruns of {second} have ended well" in shown) == (None, True)
    assert "unconfirmed" in atelier("export", "tiny").stderr


def test_an_unconfirmed_export_says_so(searched, tmp_path):
    error = searched("confirm", "tiny", "--show", code=2).stderr
    assert "nothing of study 'tiny' is confirmed yet" in error
    assert "only 3 complete trials" in searched("confirm", "tiny", "--top", "4", code=2).stderr
    said = searched("export", "tiny").stderr
    assert said.startswith("warning: ")
    assert "unconfirmed" in said
    best = tomllib.loads(Path(tmp_path / "best.toml").read_text())["origin"]
    assert best["standing"] == "unconfirmed"
    assert best["accuracy"]["noise"] == "images"
    assert best["accuracy"]["value"] == pytest.approx(best["score"], abs=1e-6)
    assert best["accuracy"]["error"] > 0.001
