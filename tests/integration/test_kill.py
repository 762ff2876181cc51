"""A worker killed in the middle of an epoch costs at most that epoch, and no bit of the curve."""

import os
import signal
import subprocess
import sys
import time

import optuna
import pytest
import sqlalchemy as sa

from storage.models import Attempt, Epoch

COLUMNS = [
    column
    for column in Epoch.__table__.columns
    if column.name not in ("trial_id", "study_id", "attempt", "recorded", "seconds", "peak_memory")
]


@pytest.fixture
def start(tmp_path, study_text, database_url):
    """Starts a real `atelier worker`; kills what is left at the end."""
    processes = []

    def start_worker(name):
        study = tmp_path / f"{name}.toml"
        text = study_text.replace('"tiny"', f'"{name}"').replace("max_trials = 2", "max_trials = 1")
        # One choice each, so that both studies train the same configuration; slow enough to hit.
        text = text.replace("{ low = 1e-3, high = 2e-3, log = true }", "[1e-3]").replace(
            "[32, 64]", "[32]"
        )
        study.write_text(text.replace("image_size = 32", "image_size = 96"))
        environment = os.environ | {"ATELIER_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "search", "worker", str(study)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start_worker
    for process in processes:
        process.kill()
        process.wait()
        process.stderr.close()


def rows(engine, *columns, study="killed"):
    query = sa.text("SELECT trial_id FROM trials JOIN studies USING (study_id) WHERE study_name = :s")
    with engine.connect() as connection:
        trials = [row[0] for row in connection.execute(query, {"s": study})]
        table = columns[0].table
        return connection.execute(
            sa.select(*columns).where(table.c.trial_id.in_(trials)).order_by(*table.primary_key.columns)
        ).all()


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_trial_killed_three_times_equals_one_that_was_not(engine, start):
    def attempts():
        return len(rows(engine, Attempt.__table__.c.number))

    def epochs():
        return len(rows(engine, Epoch.__table__.c.epoch))

    whole = start("whole")
    assert whole.wait(120) == 0, whole.stderr.read()
    # Killed inside epoch 1, then twice inside epoch 2.
    for number, recorded in enumerate((1, 2, 2), 1):
        worker = start("killed")
        wait_for(lambda n=number, r=recorded,: attempts() == n and epochs() == r, worker)
        time.sleep(0.3)  # into the epoch
        assert epochs() == recorded
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    last = start("killed")
    assert last.wait(120) == 0, last.stderr.read()

    assert rows(engine, *COLUMNS) == rows(engine, *COLUMNS, study="whole")
    assert len(rows(engine, *COLUMNS)) == 3
    history = rows(engine, Attempt.__table__.c.number, Attempt.__table__.c.outcome)
    assert history == [(1, "lost"), (2, "lost"), (3, "lost"), (4, "complete")]
    storage = optuna.storages.RDBStorage(engine.url.render_as_string(hide_password=False))
    trials = {
        name: optuna.load_study(study_name=name, storage=storage).trials for name in ("whole", "killed")
    }
    assert [trial.number for trial in trials["killed"]] == [0]
    assert trials["killed"][0].value == trials["whole"][0].value
    assert trials["killed"][0].intermediate_values == trials["whole"][0].intermediate_values


def test_sigterm_finishes_the_epoch_and_releases(engine, start):
    worker = start("killed")
    wait_for(lambda: len(rows(engine, Epoch.__table__.c.epoch)) == 1, worker)
    time.sleep(0.3)  # into the next epoch
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(60) == 3, worker.stderr.read()
    [attempt] = rows(engine, Attempt.__table__.c.outcome, Attempt.__table__.c.reason)
    assert attempt == ("released", "SIGTERM")
    assert len(rows(engine, Epoch.__table__.c.epoch)) == 2
