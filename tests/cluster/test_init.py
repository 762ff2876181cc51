"""`atelier init` on a real SLURM: sbatch accepts what it writes, and `submit` queues it."""

import subprocess

import numpy as np
from safetensors.numpy import save_file

from search.toml_file import load_study_file


def test_what_init_writes_is_accepted_and_queued(campaign, demo, tmp_path):
    study = campaign(trials=1, epochs=2, name="fashion")
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "weights.safetensors")
    words = ("--data", demo, "--weights", "weights.safetensors")
    said = study.atelier("init", "-o", "here.toml", *words)
    assert "q_amsai (the default): 8 h 00 min, 1 node, 4 GPUs" in said
    assert "accepted, and nothing is submitted: sbatch: Job " in said
    [submit] = [line.split()[1:] for line in said.splitlines() if line.endswith("--array 0-7%4")]

    written = load_study_file(tmp_path / "here.toml")
    assert written.slurm.keys() == {"tuning", "final"}
    for profile in written.slurm.values():
        assert (profile.partition, profile.cpus, profile.time) == ("q_amsai", 4, "08:00:00")
    for words in (submit, [*submit, "--profile", "final"]):
        script = study.atelier(*words, "--dry-run")
        subprocess.run(["sbatch", "--test-only"], input=script, text=True, check=True)

    study.jobs.append(study.atelier(*submit).split()[1])
    subprocess.run(["scancel", study.jobs[0]], check=True)
    study.wait_for_the_end(study.jobs[0])
    assert study.status["max_trials"] == 100
    study.atelier("init", "-o", "here.toml", code=2)  # it overwrites nothing
