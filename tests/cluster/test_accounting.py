"""A site that keeps accounts: what `init` writes starts there, and `efficiency` tells what sacct tells.

The SLURM of these drills has a slurmdbd of its own, and holds jobs to accounts, QOS and limits.
"""

import json
import os
import subprocess
from datetime import datetime

import pytest
from typer.testing import CliRunner

from search.cli import app
from search.toml_file import load_study_file
from tests.cluster.conftest import ON_CPU, running_slurm

MIB = 1 << 20
ACCOUNTS = """\
add account lab
add account vision parent=lab
add account guests
add qos gpu set MaxWall=03:00:00 MaxTRESPerUser=gres/gpu=2 MaxSubmitJobsPerUser=5
add qos idle set GrpTRES=gres/gpu=0
add user root account=vision,guests defaultaccount=vision
modify account name=lab set GrpTRES=cpu=5
modify account name=vision set qos=gpu,idle MaxWall=02:00:00 MaxTRESPerJob=cpu=1,mem=1500M
modify account name=guests set qos=idle
modify user root where account=vision set defaultqos=idle
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """In place of a SLURM without accounting."""
    with running_slurm(tmp_path_factory.mktemp("accounts"), ACCOUNTS) as folder:
        yield folder


def printed(*command):
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def greedy(text):
    """A study that asks for more than the account is allowed."""
    return text.replace("cpus = 1", "cpus = 7").replace('memory = "1G"', 'memory = "12G"')


def test_what_init_writes_starts_and_efficiency_agrees_with_sacct(campaign, tmp_path):
    study = campaign(trials=1, epochs=1, time="08:00:00", change=greedy)
    # sbatch takes a job that is beyond a limit, and then it waits for ever. It counts as submitted.
    options = ("--account=vision", "--qos=gpu", "--cpus-per-task=2", "--mem=100M", "--wrap=true")
    [beyond] = printed("sbatch", "--parsable", *options)
    said = study.atelier("init", "study.toml", "-o", "here.toml")
    profile = load_study_file(tmp_path / "here.toml").slurm["tuning"]
    # The GPUs are not for the default QOS. The QOS's time comes before the account's.
    assert (profile.account, profile.qos, profile.time) == ("vision", "gpu", "03:00:00")
    assert (profile.cpus, profile.memory) == (1, "1G")
    assert "--array 0-4%2" in said

    text = (
        (tmp_path / "here.toml")
        .read_text()
        .replace("[slurm.tuning]", f"[slurm.tuning]\nsetup = {json.dumps([ON_CPU])}")
    )
    (tmp_path / "study.toml").write_text(text)
    job = study.submit("0")
    [allocated] = set(printed("squeue", "--noheader", "--format=%a/%q", f"--jobs={job}"))
    assert allocated == "vision/gpu"
    study.wait_for_the_end(job)
    assert study.status["finished"] == 1
    assert printed("squeue", "--noheader", "--format=%r", f"--jobs={beyond}") == [
        "AssocMaxCpuPerJobLimit"
    ]
    assert "figures: sacct of " in study.atelier("efficiency", study.name)

    found = json.loads(study.atelier("efficiency", study.name, "--json"))
    fields = "JobID,ElapsedRaw,Submit,Start,State,ReqMem,MaxRSS"
    ours = {worker["job"]: worker for worker in found["workers"]}
    rows = printed(
        "sacct", "--parsable2", "--noheader", "--units=M", f"--format={fields}", f"--jobs={job}"
    )
    assert ours.keys() == {f"{job}_0"}
    peak = {}
    for row in rows:
        name, elapsed, submitted, started, state, memory, used = row.split("|")
        task, _, step = name.partition(".")
        if step:
            peak[task] = float(used.rstrip("M")) * MIB
            continue
        assert ours[task]["seconds"] == float(elapsed)
        queued = datetime.fromisoformat(started) - datetime.fromisoformat(submitted)
        assert ours[task]["queued"] == queued.total_seconds()
        assert ours[task]["wall_seconds"] == 10800
        assert ours[task]["memory"] == float(memory.rstrip("M")) * MIB == 1 << 30
        assert state == "COMPLETED"
    assert peak
    assert all(ours[task]["peak_memory"] >= used > 0 for task, used in peak.items())


def test_a_user_without_an_account_is_told_what_to_do(slurm, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    output = tmp_path / "study.toml"
    result = CliRunner().invoke(app, ["init", "-o", str(output)])
    assert result.exit_code == 2
    assert "SLURM has no account for nobody" in result.stderr
    assert "sacctmgr add user nobody account=NAME" in result.stderr
    assert not output.exists()
