"""From the search to the long run on the cluster: reruns in an array, then a job past its wall time."""

import json
import os
import subprocess
import sys

from tests.cluster.conftest import BEFORE_OTHERS, ON_CPU, task_states, wait_for

FINAL = """
[slurm.final]
gpus = 1
memory = "1G"
warning = 0
setup = {setup}
"""


def with_final(text):
    """The study file with one batch size, and with a profile for the long run."""
    setup = json.dumps([ON_CPU, *BEFORE_OTHERS, "export STEP_SECONDS=2", "export WALL_SECONDS=35"])
    return text.replace("[8, 16]", "[16]") + FINAL.format(setup=setup)


def test_confirmed_in_an_array_and_trained_across_wall_times(campaign, slow_python, tmp_path):
    study = campaign(trials=2, epochs=3, change=with_final)
    study.wait_for_the_end(study.submit("0"))
    words = ["--top", "2", "--seeds", "2", "--submit", "--array", "0-1"]
    said = study.atelier("confirm", study.name, *words)
    study.jobs.append(said.split()[1])
    study.wait_for_the_end(study.jobs[-1])
    known = json.loads(study.atelier("confirm", study.name, "--json"))
    assert known["finished"], study.logs
    assert [one["seeds"] for one in known["candidates"]] == [2, 2]
    study.atelier("verify", f"{study.name}-confirm")

    study.atelier("export", study.name, "-o", "best.toml")
    study.python = str(slow_python)
    length = ["--epochs", "8"]  # of eight seconds: longer than a run of the job
    said = study.atelier("train", "best.toml", *length, "--profile", "final", "--submit")
    job = said.split()[1].rstrip(";")
    log = study.home / "slurm" / f"train-{job}.log"
    requeued = "requeued: the job goes on where it stopped"
    wait_for(lambda: log.exists() and requeued in log.read_text(), "its first wall time", study)
    study.hurry()
    wait_for(lambda: (task_states(job) or {"?"}) <= {"COMPLETED"}, f"job {job}", study)
    assert "goes on after" in log.read_text()

    # The same in one go, with one thread as on the node.
    subprocess.run(
        [sys.executable, "-m", "atelier_command", "train", "best.toml", *length, "--run", "whole"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    for name in ("best.safetensors", "last.safetensors"):
        assert (tmp_path / "best.run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
