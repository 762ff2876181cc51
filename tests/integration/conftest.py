"""The command as a user types it, in a folder of the test's own; and a worker inside the test."""

import os
import subprocess
import sys

import pytest

from search.study import load_study_file, open_study
from search.worker import Worker
from storage import database, ledger
from storage.runs import RunFolder
from trainer.workspace import Workspace


@pytest.fixture
def atelier(tmp_path, study_text, database_url, home):
    """Runs `atelier WORDS` beside a study.toml, and checks the exit code."""
    (tmp_path / "study.toml").write_text(study_text)

    def run(*words, code=0):
        result = subprocess.run(
            [sys.executable, "-m", "search", *map(str, words)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": os.getcwd()},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == code, result.stderr + result.stdout
        return result

    return run


@pytest.fixture(scope="session")
def workspaces(tmp_path_factory):
    """Workspaces by training settings: to make one takes a second."""
    made, cache = {}, tmp_path_factory.mktemp("cache")

    def workspace(config):
        key = config.model_dump_json()
        made[key] = made.get(key) or Workspace(config, cache)
        return made[key]

    return workspace


@pytest.fixture
def make_worker(engine, study_text, tmp_path, monkeypatch, workspaces):
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "home"))
    path = tmp_path / "study.toml"
    path.write_text(study_text)

    def worker(*settings, wall_end=None, pack=1):
        file = load_study_file(path, list(settings))
        storage = database.optuna_storage(engine)
        workspace = workspaces(file.shared)
        study, entry = open_study(file, engine, storage, workspace.dataset, lead=True)
        runs = RunFolder(entry.name, entry.created)
        trials = ledger.Ledger(engine, storage, entry.study_id)
        return Worker(file, study, trials, workspace, runs, wall_end, pack)

    return worker
