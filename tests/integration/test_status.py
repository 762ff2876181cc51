"""What `status` and `logs` say of a study, as `atelier` prints it."""

import json
import os
import re
import time
from types import SimpleNamespace

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import make_url
from typer.testing import CliRunner

import search.cli.watching
from search.cli import app
from storage import database, studies
from storage.paths import RunFolder
from storage.prune import superfluous
from storage.url import DatabaseError
from tests.integration.test_ledger import RESULT, make_study, make_worker
from tests.studies import fill

runner = CliRunner()
SETTINGS = {"train": {"epochs": 4}, "space": {}}


def atelier(*words):
    result = runner.invoke(app, words)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_time_left_follows_from_what_a_trial_took_and_who_is_at_work(engine):
    study = make_study(engine, max_trials=5, settings=SETTINGS)
    first, second = make_worker(engine, study), make_worker(engine, study)
    assert json.loads(atelier("status", "s", "--json"))["seconds_left"] is None
    claim = first.claim()
    first.record(claim, RESULT | {"epoch": 0}, 0.5)
    first.finish(claim, "pruned", 0.5)
    assert json.loads(atelier("status", "s", "--json"))["seconds_left"] is None  # nobody at work
    first.claim()
    one = json.loads(atelier("status", "s", "--json"))
    second.claim()
    two = json.loads(atelier("status", "s", "--json"))
    # 4 trials are left; each takes what has been used per finished trial; workers share them.
    assert one["seconds_left"] == pytest.approx(one["gpu_hours"] * 3600 * 4 / 1)
    assert two["seconds_left"] == pytest.approx(two["gpu_hours"] * 3600 * 4 / 2)
    assert one["gpu_hours_saved"] == pytest.approx((4 - 1) * RESULT["seconds"] / 3600)
    assert "1 worker," not in atelier("status", "s")
    assert "2 workers," in atelier("status", "s")


def test_a_released_trial_waits_and_is_not_failed(engine):
    study = make_study(engine, settings=SETTINGS)
    worker = make_worker(engine, study)
    worker.release(worker.claim(), reason="wall time")
    status = json.loads(atelier("status", "s", "--json"))
    assert status["counts"] == {
        "running": 0,
        "waiting": 1,
        "paused": 0,
        "complete": 0,
        "pruned": 0,
        "failed": 0,
    }
    assert status["trials"][0]["reason"] == "wall time"
    assert "waiting" in atelier("status", "s")
    worker.claim()
    assert "resumed" in atelier("status", "s")


def test_slurm_that_does_not_answer_is_said_and_costs_nothing_else(engine, monkeypatch):
    study = make_study(engine, settings=SETTINGS)
    studies.enter_array_job(engine, study._study_id, "17", "0-3")
    monkeypatch.setenv("PATH", "/nowhere")
    assert "SLURM 17: its tasks are not known: no squeue on this machine" in atelier("status", "s")
    status = json.loads(atelier("status", "s", "--json"))
    assert (status["array_jobs"], status["tasks"]) == (["17"], None)


def test_the_log_of_tasks_that_never_claimed_a_trial_is_found(engine, home):
    study = make_study(engine, settings=SETTINGS)
    missing = runner.invoke(app, ["logs", "s"])
    assert (missing.exit_code, len(missing.output.splitlines())) == (2, 1)
    assert "no log of an array task" in missing.output
    studies.enter_array_job(engine, study._study_id, "17", "0-3")
    (home / "slurm").mkdir()
    (home / "slurm" / "17_0.log").write_text("module: command not found\n")
    (home / "slurm" / "18_0.log").write_text("another study's\n")
    shown = atelier("logs", "s")
    assert "module: command not found" in shown
    assert "another study's" not in shown


def test_all_studies_are_listed_without_a_name(engine):
    none = runner.invoke(app, ["status"])
    assert (none.exit_code, none.stdout) == (0, "")
    assert none.stderr == "the database has no study yet; start one with: atelier search STUDY.toml\n"
    fill(engine, ["complete", "failed"], name="erste Suche")
    fill(engine, ["running", "complete", "pruned"], name="second", max_trials=5)
    heading, newest, oldest = [re.split(" {2,}", line) for line in atelier("status").splitlines()]
    assert heading == ["study", "trials", "failed", "best", "at work", "since"]
    assert (newest[:3], newest[4]) == (["second", "2/5", "0"], "1")
    assert (oldest[:3], oldest[4]) == (["erste Suche", "2/2", "1"], "0")
    listed = json.loads(atelier("status", "--json"))["studies"]
    assert [(row["name"], f"{row['best']:.4f}") for row in listed] == [
        ("second", newest[3]),
        ("erste Suche", oldest[3]),
    ]
    wrong = runner.invoke(app, ["status", "--watch"])
    assert (wrong.exit_code, len(wrong.output.splitlines())) == (2, 1)


def test_many_studies_are_not_all_named_in_an_error(engine):
    for number in range(21):
        make_study(engine, name=f"study {number}")
    wrong = runner.invoke(app, ["trials", "study"]).output
    assert wrong == (
        "error: no study 'study' in the database, which has 21; they are listed by: atelier status\n"
    )


def test_the_last_screen_of_a_watch_asks_slurm_again(engine, tmp_path, monkeypatch):
    study = make_study(engine, max_trials=1, settings=SETTINGS)
    studies.enter_array_job(engine, study._study_id, "17", "0-0")
    worker = make_worker(engine, study)
    claim = worker.claim()
    asked, squeue = tmp_path / "asked", tmp_path / "squeue"
    state = f"[ -e {asked} ] && state=COMPLETED || state=RUNNING; touch {asked}"
    squeue.write_text(f'#!/bin/sh\n{state}\necho "17|$state|0:0|0|N/A|17|0|None|"\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def sleep(_):  # between two looks the trial ends, and its task with it
        assert asked.exists()
        worker.finish(claim, "failed", None)

    clock = SimpleNamespace(sleep=sleep, monotonic=time.monotonic)
    monkeypatch.setattr(search.cli.watching, "time", clock)
    assert "SLURM 17: 1 completed" in atelier("status", "s", "--watch")


def test_a_password_in_the_urls_query_is_shown_nowhere(engine, monkeypatch):
    url = make_url(str(engine.url)).update_query_dict({"password": "s3cret"})
    monkeypatch.setenv("ATELIER_DATABASE_URL", url.render_as_string(hide_password=False))
    assert "s3cret" not in atelier("db", "status")
    gone = url.update_query_dict({"host": "/nowhere"})
    monkeypatch.setenv("ATELIER_DATABASE_URL", gone.render_as_string(hide_password=False))
    with pytest.raises(DatabaseError) as caught:
        database.connect()
    assert "s3cret" not in str(caught.value)


def test_disk_use_and_the_oldest_lease_that_nobody_has_taken_over(engine, home):
    study = make_study(engine, settings=SETTINGS)
    worker = make_worker(engine, study)
    worker.claim()
    status = json.loads(atelier("status", "s", "--json"))
    assert (status["overdue_seconds"], status["disk_bytes"]) == (None, 0)
    with engine.begin() as connection:
        late = "UPDATE atelier.attempt SET lease_until = clock_timestamp() - interval '200 s'"
        connection.execute(sa.text(late))
    folder = RunFolder("s", studies.study_entry(engine, "s").created).checkpoints(0)
    folder.mkdir(parents=True)
    (folder / "x.pt").write_bytes(bytes(2_000_000))
    status = json.loads(atelier("status", "s", "--json"))
    assert status["overdue_seconds"] == pytest.approx(200, abs=100)
    assert status["disk_bytes"] == 2_000_000
    shown = " ".join(atelier("status", "s").split())
    assert "a lease ended 3 min" in shown
    assert "2 MB on disk" in shown


def test_prune_removes_what_no_longer_matters_and_nothing_else(engine, home):
    states = ["complete", "complete", "pruned", "running", "complete"]
    fill(engine, states, epochs=5, name="s")
    runs = RunFolder("s", studies.study_entry(engine, "s").created)
    best = max((0, 1, 4), key=lambda number: studies.curve(engine, 1, number)[-1])
    worse = [number for number in (0, 1, 4) if number != best]
    keep = [
        runs.checkpoints(3) / "attempt-0001-epoch-0001-step-00000001.pt",
        runs.checkpoints(3) / ".being-written",
        runs.predictions(best),
        runs.predictions(3),  # its worker is about to finish it
        runs.logs / "1.log",
        runs.path / "notes" / "mine.txt",
    ]
    remove = [
        runs.checkpoints(3) / "attempt-0001-epoch-0002-step-00000002.pt.damaged",
        runs.checkpoints(3) / ".abandoned",
        runs.checkpoints(2) / "attempt-0001-epoch-0001-step-00000001.pt",
        runs.checkpoints(7) / "attempt-0001-epoch-0001-step-00000001.pt",  # of no trial
        *map(runs.predictions, (*worse, 2)),
    ]
    for path in (*keep, *remove):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 1000)
    os.utime(runs.checkpoints(3) / ".abandoned", (0, 0))
    *listed, said = atelier("db", "prune", "s", "--keep", "1", "--dry-run").splitlines()
    assert listed == sorted(map(str, remove))
    assert said == "7 files, 0.0 MB: would be removed"
    assert all(path.exists() for path in (*keep, *remove))
    assert atelier("db", "prune", "s", "--keep", "1") == "7 files, 0.0 MB: removed\n"
    assert sorted(runs.files()) == sorted(keep)
    assert not runs.checkpoints(2).exists()
    assert atelier("db", "prune", "s", "--keep", "1") == "0 files, 0.0 MB: removed\n"
    assert [*superfluous(engine, 1, runs, 0, [best])] == []
    assert [*superfluous(engine, 1, runs, 0)] == [runs.predictions(best)]


def test_what_workers_used_says_what_to_ask_for_next_time(engine):
    study = make_study(engine, settings=SETTINGS)
    assert "no worker yet" in atelier("efficiency", "s")
    studies.enter_array_job(engine, study._study_id, "12", "0-2")
    job = {"slurm_job": "13", "slurm_array_job": "12", "slurm_array_task": "0"}
    worker = make_worker(engine, study, job=job | {"wall_seconds": 3600.0, "pack": 1, "memory": 8 << 30})
    make_worker(engine, study, job=job | {"slurm_array_task": "1"})  # that finds nothing to train
    make_worker(engine, make_study(engine, name="other"))
    claim = worker.claim()
    for epoch, busy in enumerate((0.2, 0.4)):
        extra = {"epoch": epoch, "busy": busy, "waited_for_disk": 0.25, "waited_for_images": 0.5}
        worker.record(claim, RESULT | extra, 0.5)
    with engine.begin() as connection:
        connection.execute(
            sa.text("UPDATE atelier.worker SET started = started - interval '40 min', peak_memory = 3e9")
        )
    first, idle = json.loads(atelier("efficiency", "s", "--json"))["workers"]
    assert (first["job"], idle["job"]) == ("12_0", "12_1")
    assert (first["trials"], first["epochs"], idle["epochs"]) == (1, 2, 0)
    assert first["busy"] == pytest.approx(0.3)
    assert first["waits"] == {"database": 0, "disk": 0.5, "trials": 0, "images": 1.0}
    # The images are waited for inside the epochs.
    assert first["seconds_lost"] == pytest.approx(2400 - 2 * RESULT["seconds"] - 0.5, abs=20)
    assert json.loads(atelier("efficiency", "s", "--json"))["advice"] == [
        'memory = "4G" (--mem) for each worker of a job: none used more than 2.8 GiB, with kept output',
        "no --pack, so that as many trials train at once as fit: it was 1, and the GPU was busy for 30% "
        "of the time",
        "--array 0-0: 1 of 2 tasks trained nothing",
    ]
    with engine.begin() as connection:  # as after a kill by SLURM, which has seen 8 GiB
        connection.execute(sa.text("UPDATE atelier.worker SET last_seen = now() - interval '10 min'"))
    [killed, _] = json.loads(atelier("efficiency", "s", "--json"))["advice"][:2]
    assert killed == (
        "memory of more than 8 GiB (--mem), if that was the reason: 1 of 1 workers were killed"
    )
    assert "killed" in atelier("efficiency", "s")
    worker.sign_off("nothing left to claim")
    assert 'time = "00:50:00" (--time): no worker took longer than 40 min' in atelier("efficiency", "s")
    worker.sign_off("wall time")
    text = atelier("efficiency", "s")
    assert "it ended 1 of 1 workers" in text
    assert "1 h 00 min" in text
