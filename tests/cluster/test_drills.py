"""What a cluster does to jobs, done to real ones: afterwards it must be as if nothing had happened."""

import os
import re
import signal
import subprocess
import time
from contextlib import contextmanager

import sqlalchemy as sa

from storage.ledger import LEASE_SECONDS
from storage.tables import ATTEMPTS, WORKERS
from tests.cluster.conftest import BEFORE_OTHERS, SLURM, task_states, wait_for


def pid_of(campaign, job, task):
    """The worker of an array task, from what `status` says; it may hold the next trial too."""
    [pid] = {w["pid"] for w in campaign.status["workers"] if w["job"] == f"{job}_{task}"}
    return pid


def of_one_pace(text):
    """The study file with one batch size: each epoch has four steps."""
    return text.replace("[8, 16]", "[16]")


def test_wall_time_in_the_middle_of_a_trial(campaign):
    """On SLURM's warning the task stops by itself, goes back to the queue, and goes on where it was."""
    study = campaign(
        trials=1,
        epochs=30,
        time="1",
        warning=18,
        setup=BEFORE_OTHERS,
        step_seconds=1,
        change=of_one_pace,
    )
    job = study.submit("0")
    # SLURM looks twice a minute, and warns up to half a minute early. A worker that is still starting
    # then stops later, by its own clock, and the next run of the task is warned.
    wait_for(lambda: "SIGUSR2" in study.reasons, "a warning that was heard", study)
    study.hurry()
    study.wait_for_the_end(job)
    assert study.outcomes.count("released") == len(study.outcomes) - 1, study.logs
    assert "requeued: another run of this task goes on" in study.logs
    study.assert_as_if_nothing_had_happened(trials=1, epochs=30)


def test_an_epoch_longer_than_the_wall_time(campaign):
    """No warning and no epoch's end comes in time: the epoch is cut, again and again."""
    setup = [*BEFORE_OTHERS, "export WALL_SECONDS=40"]  # of each run of the task
    study = campaign(trials=1, epochs=1, setup=setup, warning=0, step_seconds=2, change=long)
    job = study.submit("0")
    study.wait_for_outcomes("released", 2)
    study.hurry()
    study.wait_for_the_end(job)
    assert set(study.reasons[:2]) == {"wall time"}
    steps = [int(text) for text in re.findall(r"goes on after epoch 0, step (\d+)", study.logs)]
    assert len(steps) >= 2
    assert 0 < steps[0] < steps[1] < 32, "each run was to take a part of the epoch"
    study.assert_as_if_nothing_had_happened(trials=1, epochs=1)


def long(text):
    """The study file with epochs of 32 steps."""
    return text.replace("[8, 16]", "[2]")


def promoting(text):
    """The study file with trials that wait at a rung, and go on if they are among the best."""
    return text.replace('strategy = "none"', 'strategy = "promote"\nrungs = [1]')


def test_requeue_of_a_running_task(campaign):
    study = campaign(trials=6, epochs=6, step_seconds=1, change=promoting)
    job = study.submit("0-1")
    study.wait_for_epochs(3)
    subprocess.run(["scontrol", "requeue", f"{job}_1"], check=True)
    study.wait_for_outcomes("released")
    study.hurry()
    study.wait_for_the_end(job)
    study.assert_as_if_nothing_had_happened(trials=6, epochs=6, rung=1)


def test_preemption_by_a_job_of_more_weight(campaign):
    study = campaign(trials=2, epochs=6, step_seconds=3, change=of_one_pace)
    job = study.submit("0-1")
    study.wait_for_epochs(2)
    urgent = ["sbatch", "--wait", "--partition=urgent", "--cpus-per-task=16", "--output=/dev/null"]
    subprocess.run([*urgent, "--wrap=true"], check=True, timeout=300)
    # Before it hurries: else the first task that begins anew may end both trials.
    wait_for(lambda: len(study.rows(ATTEMPTS.c.number)) == 4, "both trials to go on", study)
    study.hurry()
    study.wait_for_the_end(job)
    assert study.outcomes == ["released", "released", "complete", "complete"], study.logs
    assert [restarts for (restarts,) in workers(study)].count(1) == 2
    study.assert_as_if_nothing_had_happened(trials=2, epochs=6)


def test_cancelled_tasks_and_then_a_new_array(campaign):
    study = campaign(trials=3, epochs=6, step_seconds=2)
    job = study.submit("0-1")
    study.wait_for_epochs(3)
    subprocess.run(["scancel", job], check=True)
    study.wait_for_the_end(job)
    assert study.outcomes == ["released", "released"]
    study.hurry()
    again = study.submit("0-1")
    study.wait_for_the_end(again)
    study.assert_as_if_nothing_had_happened(trials=3, epochs=6)


def test_a_killed_worker_is_replaced_at_once(campaign):
    study = campaign(trials=6, epochs=6, step_seconds=1, change=promoting)
    job = study.submit("0-1")
    study.wait_for_epochs(3)
    os.kill(pid_of(study, job, 1), signal.SIGKILL)
    killed = time.time()
    study.hurry()
    study.wait_for_the_end(job)
    attempts = study.rows(ATTEMPTS.c.trial_id, ATTEMPTS.c.number, ATTEMPTS.c.outcome, ATTEMPTS.c.claimed)
    lost = [row for row in attempts if row.outcome == "lost"]
    assert lost
    for attempt in lost:
        [successor] = [row for row in attempts if row[:2] == (attempt.trial_id, attempt.number + 1)]
        assert successor.claimed.timestamp() - killed < LEASE_SECONDS, "it was the lease that ran out"
    study.assert_as_if_nothing_had_happened(trials=6, epochs=6, rung=1)


def test_a_node_that_goes_down_and_comes_back(slurm, campaign):
    """The workers train on meanwhile: nobody is left to end them."""
    study = campaign(trials=2, epochs=10, step_seconds=4, change=of_one_pace)
    job = study.submit("0-1")
    study.wait_for_epochs(2)
    with dead_node(slurm):
        wait_for(lambda: "down" in sinfo(), "the node to be down", study)
        wait_for(lambda: task_states(job) == {"PENDING"}, "requeue", study)
    wait_for(lambda: any(r for (r,) in workers(study)), "a task's second run", study)
    study.hurry()
    study.wait_for_the_end(job)
    study.assert_as_if_nothing_had_happened(trials=2, epochs=10)


@contextmanager
def dead_node(slurm):
    os.kill(int((slurm / "slurmd.pid").read_text()), signal.SIGKILL)
    try:
        yield
    finally:
        subprocess.run([SLURM, "node", slurm], check=True)


def sinfo():
    command = ["sinfo", "--noheader", "--format=%t"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def workers(study):
    with study.engine.connect() as connection:
        ids = {worker for (worker,) in study.rows(ATTEMPTS.c.worker_id)}
        return connection.execute(sa.select(WORKERS.c.slurm_restarts).where(WORKERS.c.id.in_(ids))).all()


def test_the_database_is_away_for_a_minute(campaign, server):
    study = campaign(trials=2, epochs=6, step_seconds=2)
    job = study.submit("0-1")
    study.wait_for_epochs(2)
    study.engine.dispose()
    server.stop()
    time.sleep(60)
    server.start()
    study.hurry()
    study.wait_for_the_end(job)
    assert study.outcomes == ["complete", "complete"]  # nobody stole, nobody gave up
    study.assert_as_if_nothing_had_happened(trials=2, epochs=6)


def test_stop_reaches_the_tasks_that_run_and_those_that_wait(campaign):
    study = campaign(trials=9, epochs=12, step_seconds=1.5)
    job = study.submit("0-2%2")
    study.wait_for_epochs(2)
    study.atelier("stop", study.name)
    study.wait_for_the_end(job)
    assert study.outcomes == ["released", "released"]
    status = study.status
    assert status["stopping"]
    assert set(status["tasks"]) <= {"RELEASED", "COMPLETED"}
    assert status["counts"]["waiting"] == 2
    study.atelier("verify", study.name)
    assert "stopped by: atelier stop" in study.atelier("status", study.name)
    again = study.submit("0")  # takes the stop back
    study.wait_for_epochs(study.epochs + 1)
    study.atelier("stop", study.name)
    study.wait_for_the_end(again)
