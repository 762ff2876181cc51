"""A worker killed in the middle of an epoch costs at most that epoch, and no bit of the curve."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
import sqlalchemy as sa

from search.cli.searching import work
from storage.tables import ATTEMPTS, EPOCHS
from tests.integration.conftest import end_of, slow_steps
from tests.studies import MAY_DIFFER
from trainer.checkpoint import Checkpoints

COLUMNS = [
    column for column in EPOCHS.columns if column.name not in ("trial_id", "study_id", *MAY_DIFFER)
]


@pytest.fixture
def study_file(tmp_path, study_text):
    """Writes a study of one trial, the same under any name, and slow enough to hit."""

    def write(name, seconds=20):
        text = study_text.replace('"tiny"', f'"{name}"').replace("max_trials = 2", "max_trials = 1")
        text = text.replace("[space]", f"checkpoint_seconds = {seconds}\n[space]")
        text = text.replace("{ low = 1e-3, high = 2e-3, log = true }", "[1e-3]")
        text = text.replace("[32, 64]", "[32]").replace("image_size = 32", "image_size = 96")
        (tmp_path / f"{name}.toml").write_text(text)
        return str(tmp_path / f"{name}.toml")

    return write


@pytest.fixture
def environment(engine, tmp_path):
    return os.environ | {"ATELIER_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def start(study_file, environment, start_process):
    """Starts `atelier worker` in a process of its own, slowly: a kill meets an epoch before it ends."""
    return lambda *study: start_process(work_slowly, [study_file(*study)], environment)


def work_slowly(arguments):
    slow_steps(0.15)
    work(arguments)


def rows(engine, *columns, study="killed"):
    query = sa.text("SELECT trial_id FROM trials JOIN studies USING (study_id) WHERE study_name = :s")
    with engine.connect() as connection:
        trials = [row[0] for row in connection.execute(query, {"s": study})]
        table = columns[0].table
        return connection.execute(
            sa.select(*columns).where(table.c.trial_id.in_(trials)).order_by(*table.primary_key.columns)
        ).all()


def wait_for(condition, ended, log):
    deadline = time.monotonic() + 120
    while not condition():
        assert not ended(), log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Where each epoch is saved, and where none is. Killed inside the epoch after so many.
@pytest.mark.parametrize(("seconds", "kills"), [(0, (1, 2, 2)), (1e6, (2,))])
def test_a_trial_that_was_killed_equals_one_that_was_not(engine, start, seconds, kills):
    def attempts():
        return len(rows(engine, ATTEMPTS.c.number))

    def epochs():
        return len(rows(engine, EPOCHS.c.epoch))

    whole = start("whole")
    assert end_of(whole) == 0, whole.output.read_text()
    for number, recorded in enumerate(kills, 1):
        worker = start("killed", seconds)
        there = (number, recorded)
        wait_for(
            lambda there=there: (attempts(), epochs()) == there,
            lambda worker=worker: worker.exitcode is not None,
            worker.output,
        )
        time.sleep(0.3)  # into the epoch
        assert epochs() == recorded
        worker.kill()
        assert end_of(worker) == -signal.SIGKILL
    last = start("killed", seconds)
    assert end_of(last) == 0, last.output.read_text()
    again = re.findall("epoch . was trained again, and equals its record", last.output.read_text())
    assert len(again) == 2 if seconds else len(again) <= 1  # it may be killed before it has saved

    assert rows(engine, *COLUMNS) == rows(engine, *COLUMNS, study="whole")
    assert len(rows(engine, *COLUMNS)) == 3
    history = rows(engine, ATTEMPTS.c.number, ATTEMPTS.c.outcome)
    assert [outcome for _, outcome in history] == ["lost"] * len(kills) + ["complete"]
    storage = optuna.storages.RDBStorage(engine.url.render_as_string(hide_password=False))
    trials = {
        name: optuna.load_study(study_name=name, storage=storage).trials for name in ("whole", "killed")
    }
    assert [trial.number for trial in trials["killed"]] == [0]
    assert trials["killed"][0].value == trials["whole"][0].value
    assert trials["killed"][0].intermediate_values == trials["whole"][0].intermediate_values


def test_sigterm_finishes_the_epoch_and_releases(engine, study_file, environment, tmp_path):
    """The command that a SLURM array task runs, started as SLURM starts it."""
    log = tmp_path / "worker.log"
    path = Path(study_file("killed"))
    path.write_text(path.read_text().replace("epochs = 3", "epochs = 1000"))  # it cannot end before
    command = [sys.executable, "-m", "atelier_command", "worker", path]
    with log.open("w") as output:
        worker = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    epochs = lambda: len(rows(engine, EPOCHS.c.epoch))  # noqa: E731
    try:
        wait_for(epochs, lambda: worker.poll() is not None, log)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(60) == 3, log.read_text()
    finally:
        worker.kill()
        worker.wait()
    [attempt] = rows(engine, ATTEMPTS.c.outcome, ATTEMPTS.c.reason)
    assert attempt == ("released", "SIGTERM")
    [folder] = (tmp_path / "home" / "runs").glob("*/trial-00000")
    state = Checkpoints(folder).latest()
    assert len(state["history"]) == epochs()
    assert state["stream_epoch"] is None  # it is inside no epoch
