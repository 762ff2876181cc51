"""Hostile names of studies, folders and files: SLURM takes the script, and nothing in it is run."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from search.profile import SlurmProfile
from search.slurm.script import TASK_LOG, log_pattern, render_script
from search.slurm.submit import submit_script

NAMES = [
    "a b",
    "two  blanks",
    "a'b",
    'a"b',
    'a"; touch injected; "',
    "$(touch injected)",
    "`touch injected`",
    "a;touch injected",
    "-rf",
    "--wrap=touch injected",
    "é ☃ 裙子",
    "~root",
    "a%Ab%%c",
    "#SBATCH --wrap",
    "a&b|c>d",
    "*?[x]",
]
PLACES = ["study", "folder"]


@pytest.fixture
def place(campaign, tmp_path, monkeypatch):
    """A study of this name, or in a folder of this name which is also the home's parent."""

    def make(name, where):
        study = campaign(trials=1, epochs=2, name=name if where == "study" else "s")
        if where == "folder":
            folder = tmp_path / name
            folder.mkdir()
            (tmp_path / "study.toml").rename(folder / "study.toml")
            study.folder = folder
            home = folder / "home"
            monkeypatch.setenv("ATELIER_DATABASE_URL", study.engine.url.render_as_string())
            monkeypatch.setenv("ATELIER_HOME", str(home))
        return study

    return make


def toml(name):
    return name.replace("\\", "\\\\").replace('"', '\\"')


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("name", NAMES)
def test_sbatch_accepts_the_script_and_runs_no_name(place, name, where, tmp_path):
    study = place(toml(name) if where == "study" else name, where)
    script = study.atelier("submit", "study.toml", "--array", "0-7%4", "--dry-run")
    result = subprocess.run(
        ["sbatch", "--test-only"], input=script, capture_output=True, text=True, cwd=study.folder
    )
    assert result.returncode == 0, result.stderr
    # Run it for real, with a worker that only says what it was given.
    lines = script.splitlines()
    shown = [sys.executable, "-c", "import os, sys; print([os.getcwd(), *sys.argv[1:]])"]
    assert lines[-1].startswith(f"exec {sys.executable} -P -m atelier_command worker ")
    lines[-1] = lines[-1].replace(
        f"{sys.executable} -P -m atelier_command", f"{shown[0]} -c '{shown[2]}'", 1
    )
    run = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == repr([str(study.folder), "worker", str(study.folder / "study.toml")])
    assert not list(tmp_path.rglob("injected"))


@pytest.mark.parametrize("name", ["a b", 'q"q', "é ☃", "50%A", "-rf", "'"])
def test_the_log_lies_where_it_was_wanted(slurm, name, tmp_path):
    """SLURM has its own rules for names of log files: quotes, % and backslashes."""
    folder = tmp_path / name
    folder.mkdir()
    script = render_script(
        SlurmProfile(gpus=0, memory="100M", time="1", warning=0),
        "0",
        ["echo", "said"],
        folder,
        {},
        log_pattern(folder, TASK_LOG),
    )
    job = submit_script(script)
    log = Path(folder) / f"{job}_0.log"
    deadline = time.monotonic() + 60
    while not log.exists() or not log.read_text():
        assert time.monotonic() < deadline, os.listdir(folder)
        time.sleep(0.2)
    assert log.read_text() == "said\n"


def test_a_backslash_is_refused_where_slurm_would_lose_the_log(place):
    study = place("a\\b", "folder")
    study.atelier("submit", "study.toml", "--dry-run", code=2)


@pytest.mark.parametrize("profile", ["tuning", "final"])
def test_sbatch_accepts_the_profiles_of_the_report(campaign, profile, tmp_path):
    study = campaign(trials=1, epochs=2)
    fashion = os.path.join(os.getcwd(), "studies", "fashion.toml")
    script = study.atelier("submit", fashion, "--profile", profile, "--array", "0-7%4", "--dry-run")
    result = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "to start at" in result.stderr
