"""From the search to the long run on the cluster: reruns in an array, then a job past its wall time."""

import json
import math
import os
import subprocess
import sys

from storage.models import Epoch
from tests.cluster.conftest import task_states, wait_for

LONGER = 90  # seconds that the long run takes, with a minute of wall time


def test_confirmed_in_an_array_and_trained_across_wall_times(campaign, tmp_path):
    study = campaign(trials=2, epochs=3, time="1", warning=10)
    study.wait_for_the_end(study.submit("0-1"))
    words = ["--top", "2", "--seeds", "2", "--submit", "--array", "0-1"]
    said = study.atelier("confirm", study.name, *words)
    study.jobs.append(said.split()[1])
    study.wait_for_the_end(study.jobs[-1])
    known = json.loads(study.atelier("confirm", study.name, "--json"))
    assert known["finished"], study.logs
    assert [one["seeds"] for one in known["candidates"]] == [2, 2]

    study.atelier("export", study.name, "-o", "best.toml")
    seconds = min(seconds for (seconds,) in study.rows(Epoch.seconds))
    options = ["--epochs", str(math.ceil(LONGER / seconds)), "--profile", "tuning"]
    job = study.atelier("train", "best.toml", *options, "--submit").split()[1].rstrip(";")
    log = study.home / "slurm" / f"train-{job}.log"
    wait_for(lambda: (task_states(job) or {"?"}) <= {"COMPLETED"}, f"job {job}", study, 400)
    text = log.read_text()
    assert "requeued: the job goes on where it stopped" in text, text
    assert "goes on after" in text

    # The same in one go, with one thread as on the node.
    subprocess.run(
        [sys.executable, "-m", "search", "train", "best.toml", *options[:2], "--run", "whole"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    for name in ("best.safetensors", "last.safetensors"):
        assert (tmp_path / "best.run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
