"""A whole search as a SLURM array, as a user runs it, and what `status` says of it."""

import subprocess
from pathlib import Path

import pytest
import sqlalchemy as sa

from storage.tables import ATTEMPTS, WORKERS
from tests.cluster.conftest import BEFORE_OTHERS


def pruned(text):
    return text.replace('strategy = "none"', 'strategy = "asha"\nrungs = [1, 2]')


def consistent(status):
    """What must hold at any moment."""
    counts = status["counts"]
    assert sum(counts.values()) == len(status["trials"]) <= status["max_trials"]
    assert counts["running"] == len(status["workers"])
    assert status["finished"] == counts["complete"] + counts["pruned"] + counts["failed"]
    return status


def test_an_array_of_eight_finishes_a_study_of_24_trials(campaign, server):
    study = campaign(trials=24, epochs=4, change=pruned)
    job = study.command("submit", "study.toml", "--array", "0-7%4").split()[1]
    study.jobs.append(job)
    queued = consistent(study.status)
    assert queued["max_trials"] == 24
    assert queued["array_jobs"] == [job]
    assert sum(queued["tasks"].values()) == 8
    assert queued["tasks"].keys() <= {"PENDING", "RUNNING"}

    study.wait_for_epochs(6)
    during = consistent(study.status)
    assert 1 <= during["counts"]["running"] <= 8  # a task may have claimed its next trial already
    assert 1 <= during["tasks"]["RUNNING"] <= 4
    assert during["tasks"]["PENDING"] >= 4
    for worker in during["workers"]:
        assert worker["job"].startswith(f"{job}_")
        assert worker["renewed"] < 60
        assert Path(worker["log"]).parent == server.home / "slurm"
    assert nowhere_the_password(study, job, server.home)

    study.wait_for_the_end(job)
    after = consistent(study.status)
    assert after["finished"] == 24
    study.atelier("verify", study.name)
    assert after["counts"]["pruned"] >= 4
    assert after["counts"]["failed"] == 0
    assert after["workers"] == []
    assert after["tasks"] == {"COMPLETED": 8}
    assert after["gpu_hours"] > 0
    assert after["gpu_hours_saved"] > 0
    assert after["best"]["value"] == max(
        row["value"] for row in after["trials"] if row["state"] == "complete"
    )
    # No trial was held twice at once, and nobody overshot the budget.
    assert [row["number"] for row in after["trials"]] == list(range(24))
    assert all(row["attempts"] == 1 for row in after["trials"])
    assert nowhere_the_password(study, job, server.home)
    study.atelier("submit", "study.toml", code=2)  # nothing is left to do
    assert "24/24 trials" in study.command("status", study.name)
    shown = study.command("logs", study.name, "--trial", "3")
    assert f"{job}_" in shown
    assert str(server.home / "slurm") in shown
    # This SLURM keeps no accounts. So it is said that the figures are ours.
    used = study.command("efficiency", study.name)
    assert "figures: Atelier's own records, since sacct" in used
    assert "Slurm accounting storage is disabled" in used
    assert used.count(f"{job}_") == 8


def nowhere_the_password(study, job, home):
    """Looks where others may look: SLURM's records, process lists, the script, the logs."""
    password = (home / "database.pass").read_text().strip().rpartition(":")[2]
    places = [
        subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout,
        subprocess.run(
            ["scontrol", "write", "batch_script", job, "-"], capture_output=True, text=True
        ).stdout,
        study.atelier("submit", "study.toml", "--dry-run"),
        study.atelier("status", study.name),
        study.logs,
    ]
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            places.append(path.read_text(errors="replace"))
        except OSError:
            continue  # it has just ended
    assert "exec" in places[2]
    return not any(password in place for place in places)


def test_nothing_of_another_job_reaches_the_new_one(campaign, monkeypatch):
    """Submitted from a shell inside a job, with a user's habits for sbatch."""
    given = {
        "SLURM_RESTART_COUNT": "1",
        "SLURM_ARRAY_JOB_ID": "99",
        "SLURM_ARRAY_TASK_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_MEM_PER_CPU": "1",
        "SBATCH_TIMELIMIT": "00:01:00",
        "SBATCH_SIGNAL": "USR1@30",
        "SBATCH_NO_REQUEUE": "1",
        "SBATCH_ARRAY_INX": "0-9",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    study = campaign(trials=2, epochs=2)
    job = study.submit("0-1")
    command = ["scontrol", "show", "job", job]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "TimeLimit=00:30:00" in shown
    assert "Requeue=1" in shown
    study.wait_for_the_end(job)
    assert study.outcomes == ["complete", "complete"], study.logs
    known = study.rows(ATTEMPTS.c.worker_id)
    with study.engine.connect() as connection:
        query = sa.select(WORKERS.c.slurm_restarts, WORKERS.c.slurm_array_job, WORKERS.c.slurm_cluster)
        rows = connection.execute(query.where(WORKERS.c.id.in_([one for (one,) in known]))).all()
    assert {*rows} == {(0, job, "atelier")}


@pytest.mark.parametrize("unreachable", ["data", "database"])
def test_what_would_fail_in_the_queue_fails_at_once(campaign, unreachable, monkeypatch):
    study = campaign(trials=1, epochs=2)
    if unreachable == "database":
        monkeypatch.setenv("ATELIER_DATABASE_URL", "postgresql://atelier@127.0.0.1:9/atelier")
        words = ()
    else:
        words = ("--data", "/nowhere")
    before = all_jobs()
    study.atelier("submit", "study.toml", *words, code=2)
    assert all_jobs() <= before
    monkeypatch.delenv("ATELIER_DATABASE_URL", raising=False)
    assert study.name not in study.atelier("db", "status")


def all_jobs():
    command = ["squeue", "--noheader", "--states=all", "--format=%A"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_a_warning_that_comes_while_the_worker_starts_does_not_end_it(campaign):
    """SLURM may warn a minute early: here in the first half minute, which may be too late for this."""
    # So two more come for certain: while the script runs, and while Python imports.
    warnings = ["kill -USR2 $$", "(sleep 1; kill -USR2 $$) &"]
    study = campaign(trials=1, epochs=2, time="1", warning=59, setup=BEFORE_OTHERS + warnings)
    study.wait_for_the_end(study.submit("0"))
    assert study.status["counts"]["complete"] == 1
