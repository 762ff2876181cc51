"""The commands as a user types them: search, status, trials, export, train."""

import csv
import json
import stat
import tomllib

import pytest


@pytest.fixture
def prepared_url(database_url):
    """The search makes its tables itself."""
    return database_url


def test_from_search_to_a_trained_winner(atelier, tmp_path, home, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # else workers share the CPUs, which `train` has alone
    first = atelier("search", "study.toml", "--workers", "2")
    assert "2/2 trials (2 complete)" in first.stdout
    best = tomllib.loads((tmp_path / "best.toml").read_text())
    assert best["train"]["epochs"] == 3
    assert best["origin"]["score"] == pytest.approx(sum(best["origin"]["curve"]) / 3)
    assert best["origin"]["packages"].keys() >= {"torch", "optuna", "timm"}
    assert len(best["origin"]["dataset"]) == 64

    [runs] = (home / "runs").iterdir()
    assert stat.S_IMODE(runs.stat().st_mode) == 0o700

    status = json.loads(atelier("status", "tiny", "--json").stdout)
    assert status["counts"]["complete"] == 2
    assert status["best"]["number"] == best["origin"]["trial"]
    assert status["gpu_hours"] > 0
    assert "2/2 trials" in atelier("status", "study.toml").stdout
    atelier("trials", "tiny", "--csv", "t.csv")
    with (tmp_path / "t.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["complete", "complete"]
    assert {"lr", "batch_size"} <= rows[0].keys()

    # The exported file runs unchanged and gives the very curve of the search.
    trained = atelier("train", "best.toml")
    shown = [float(line.split("val loss")[1].split()[2]) for line in trained.stdout.splitlines()]
    assert shown == pytest.approx(best["origin"]["curve"], abs=5e-5)
    again = atelier("train", "best.toml")  # finished: shows the same without training
    assert again.stdout == trained.stdout

    atelier("export", "tiny", "--trial", "0", "-o", "zero.toml")
    assert tomllib.loads((tmp_path / "zero.toml").read_text())["origin"]["trial"] == 0
    more = atelier("search", "study.toml", "--set", "study.max_trials=3")
    assert "3/3 trials" in more.stdout
    assert "OK  schema" in atelier("db", "check").stdout
