"""What a cluster does to jobs, done to real ones: afterwards it must be as if nothing had happened."""

import math
import os
import signal
import subprocess
import time

import psutil
import pytest
import sqlalchemy as sa

from storage.ledger import LEASE_SECONDS
from storage.models import Attempt, Epoch, Worker
from tests.cluster.conftest import SLURM, task_states, wait_for
from trainer.demo import write_demo


def pid_of(campaign, job, task):
    """The worker of an array task, from what `status` says; it may hold the next trial too."""
    [pid] = {w["pid"] for w in campaign.status["workers"] if w["job"] == f"{job}_{task}"}
    return pid


def of_one_pace(text):
    """The study file with one batch size, which one compiled program serves at one speed."""
    return text.replace("[32, 64]", "[32]")


@pytest.fixture
def seconds_per_epoch(campaign, request):
    """How long an epoch takes here at best, so that a drill can choose how many make a minute."""
    pace = campaign(trials=1, epochs=4, name=f"pace for {request.node.name}", change=of_one_pace)
    pace.wait_for_the_end(pace.submit("0"))
    return min(seconds for (seconds,) in pace.rows(Epoch.seconds))


def test_wall_time_in_the_middle_of_a_trial(campaign, seconds_per_epoch):
    """The task stops by itself in time, goes back to the queue, and goes on where it was."""
    epochs = math.ceil(90 / seconds_per_epoch)
    study = campaign(trials=1, epochs=epochs, time="1", warning=10, change=of_one_pace)
    job = study.submit("0")
    study.wait_for_the_end(job)
    assert "released" in study.outcomes, study.logs
    assert "requeued: another run of this task goes on" in study.logs
    study.assert_as_if_nothing_had_happened(trials=1, epochs=epochs)


def test_an_epoch_longer_than_the_wall_time(campaign, seconds_per_epoch, tmp_path):
    """No warning and no epoch's end comes in time: the epoch is cut, again and again."""
    data = tmp_path / "data"
    write_demo(data, train=math.ceil(300 * 80 / seconds_per_epoch), val=80, test=0)
    study = campaign(trials=1, epochs=1, time="1", warning=0, data=data, change=of_one_pace)
    job = study.submit("0")
    study.wait_for_the_end(job)
    longest = max(seconds for (seconds,) in study.rows(Epoch.seconds))
    assert longest > 60, "the epochs fitted: the drill proves nothing"
    assert "released" in study.outcomes
    study.assert_as_if_nothing_had_happened(trials=1, epochs=1)


def promoting(text):
    """The study file with trials that wait at a rung, and go on if they are among the best."""
    return text.replace('strategy = "none"', 'strategy = "promote"\nrungs = [1]')


def test_requeue_of_a_running_task(campaign):
    study = campaign(trials=6, epochs=6, change=promoting)
    job = study.submit("0-1")
    study.wait_for_epochs(3)
    subprocess.run(["scontrol", "requeue", f"{job}_1"], check=True)
    study.wait_for_the_end(job)
    assert "released" in study.outcomes, study.logs
    study.assert_as_if_nothing_had_happened(trials=6, epochs=6, rung=1)


def test_preemption_by_a_job_of_more_weight(campaign, seconds_per_epoch):
    epochs = math.ceil(25 / seconds_per_epoch)
    study = campaign(trials=2, epochs=epochs, change=of_one_pace)
    job = study.submit("0-1")
    study.wait_for_epochs(2)
    urgent = ["sbatch", "--wait", "--partition=urgent", "--cpus-per-task=16", "--output=/dev/null"]
    subprocess.run([*urgent, "--wrap=true"], check=True, timeout=300)
    study.wait_for_the_end(job)
    assert study.outcomes == ["released", "released", "complete", "complete"], study.logs
    assert [restarts for (restarts,) in workers(study)].count(1) == 2
    study.assert_as_if_nothing_had_happened(trials=2, epochs=epochs)


def test_cancelled_tasks_and_then_a_new_array(campaign):
    study = campaign(trials=4, epochs=6)
    job = study.submit("0-1")
    study.wait_for_epochs(3)
    subprocess.run(["scancel", job], check=True)
    study.wait_for_the_end(job)
    assert study.outcomes == ["released", "released"]
    again = study.submit("0-1")
    study.wait_for_the_end(again)
    study.assert_as_if_nothing_had_happened(trials=4, epochs=6)


def test_a_killed_worker_is_replaced_at_once(campaign):
    study = campaign(trials=6, epochs=6, change=promoting)
    job = study.submit("0-1")
    study.wait_for_epochs(3)
    os.kill(pid_of(study, job, 1), signal.SIGKILL)
    killed = time.time()
    study.wait_for_the_end(job)
    attempts = study.rows(Attempt.trial_id, Attempt.number, Attempt.outcome, Attempt.claimed)
    lost = [row for row in attempts if row.outcome == "lost"]
    assert lost
    for attempt in lost:
        [successor] = [row for row in attempts if row[:2] == (attempt.trial_id, attempt.number + 1)]
        assert successor.claimed.timestamp() - killed < LEASE_SECONDS, "it was the lease that ran out"
    study.assert_as_if_nothing_had_happened(trials=6, epochs=6, rung=1)


def test_a_node_that_goes_down_and_comes_back(slurm, campaign, seconds_per_epoch):
    epochs = math.ceil(45 / seconds_per_epoch)  # more than the workers do before the node is down
    study = campaign(trials=2, epochs=epochs, change=of_one_pace)
    job = study.submit("0-1")
    study.wait_for_epochs(2)
    pid = int((slurm / "slurmd.pid").read_text())
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: "down" in sinfo(), "the node to be down", study)
    wait_for(lambda: task_states(job) == {"PENDING"}, "requeue", study)
    subprocess.run([SLURM, "node", slurm], check=True)
    study.wait_for_the_end(job)
    assert any(restarts for (restarts,) in workers(study)), study.logs
    study.assert_as_if_nothing_had_happened(trials=2, epochs=epochs)


def sinfo():
    command = ["sinfo", "--noheader", "--format=%t"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def workers(study):
    with study.engine.connect() as connection:
        ids = {worker for (worker,) in study.rows(Attempt.worker_id)}
        return connection.execute(sa.select(Worker.slurm_restarts).where(Worker.id.in_(ids))).all()


def test_the_database_is_away_for_a_minute(campaign, server):
    study = campaign(trials=2, epochs=6)
    job = study.submit("0-1")
    study.wait_for_epochs(2)
    study.engine.dispose()
    server.stop()
    time.sleep(60)
    server.start()
    study.wait_for_the_end(job)
    assert study.outcomes == ["complete", "complete"]  # nobody stole, nobody gave up
    study.assert_as_if_nothing_had_happened(trials=2, epochs=6)


def test_stop_reaches_the_tasks_that_run_and_those_that_wait(campaign):
    study = campaign(trials=9, epochs=6)
    job = study.submit("0-3%2")
    study.wait_for_epochs(2)
    study.atelier("stop", study.name)
    study.wait_for_the_end(job)
    assert study.outcomes == ["released", "released"]
    status = study.status
    assert status["stopping"]
    assert set(status["tasks"]) <= {"RELEASED", "COMPLETED"}
    assert status["counts"]["waiting"] == 2
    assert "stopped by: atelier stop" in study.atelier("status", study.name)
    again = study.submit("0-1")  # takes the stop back
    study.wait_for_epochs(study.epochs + 1)
    study.atelier("stop", study.name)
    study.wait_for_the_end(again)


def test_no_process_is_left(slurm):
    """After all drills: nobody trains on without a job."""
    leftovers = [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if "worker" in (process.info["cmdline"] or []) and "study.toml" in process.info["cmdline"][-1]
    ]
    assert leftovers == []
