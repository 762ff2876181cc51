"""`atelier init` on real SLURMs: sbatch accepts what it writes, and `submit` queues it."""

import subprocess

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from search.cli import app
from search.toml_file import load_study_file
from tests.cluster.conftest import SLURM

# Several kinds of nodes, and of limits.
SITE = """
MaxArraySize=6
NodeName=a[1-4] CPUs=64 RealMemory=512000 Gres=gpu:a100:4
NodeName=m1 CPUs=64 RealMemory=512000 Gres=gpu:1g.10gb:28,gpu:a100:4
NodeName=v[1-2] CPUs=32 RealMemory=190000 Gres=gpu:v100:2
NodeName=s1 CPUs=2 RealMemory=8000 Gres=gpu:t4:1
NodeName=c[1-8] CPUs=48 RealMemory=96000
PartitionName=cpu Nodes=c[1-8] Default=YES MaxTime=2-00:00:00 DefMemPerCPU=2000
PartitionName=gpu Nodes=a[1-4],v[1-2] MaxTime=24:00:00 DefMemPerCPU=4000
PartitionName=thrifty Nodes=a[1-4] MaxTime=12:00:00 MaxMemPerCPU=1500
PartitionName=debug Nodes=s1 MaxTime=00:15:00
PartitionName=long Nodes=v[1-2] MaxTime=UNLIMITED AllowAccounts=rich,richer
PartitionName=slices Nodes=m1 MaxTime=10:00:00
PartitionName=closed Nodes=a[1-4] MaxTime=UNLIMITED State=INACTIVE
"""


@pytest.fixture(scope="module")
def controller(slurm, tmp_path_factory):
    """The folder of a SLURM whose nodes are on paper."""
    folder = tmp_path_factory.mktemp("site")
    folder.chmod(0o755)
    subprocess.run([SLURM, "site", folder], input=SITE, text=True, check=True)
    yield folder
    subprocess.run([SLURM, "down", folder], check=True)


@pytest.fixture
def site(controller, tmp_path, monkeypatch):
    """A user of that SLURM, in an empty folder."""
    monkeypatch.setenv("SLURM_CONF", str(controller / "slurm.conf"))
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def init(*words, code=0):
    result = CliRunner().invoke(app, ["init", *words])
    assert result.exit_code == code, result.output
    return result.output


def test_what_init_writes_is_accepted_and_queued(campaign, demo, tmp_path):
    study = campaign(trials=1, epochs=2, name="fashion")
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "weights.safetensors")
    words = ("--data", demo, "--weights", "weights.safetensors")
    said = study.atelier("init", "-o", "here.toml", *words)
    assert "q_amsai (the default): up to 8 h 00 min, 1 node, 4 GPUs" in said
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


@pytest.mark.parametrize(
    ("words", "partition", "cpus", "gpus", "memory", "time"),
    [
        ([], "gpu", 7, "a100:1", "12G", "08:00:00"),  # the default one has no GPU
        (["--partition", "cpu"], "cpu", 7, 0, "12G", "08:00:00"),
        (["--partition", "thrifty"], "thrifty", 7, 1, "10G", "08:00:00"),
        (["--partition", "debug"], "debug", 2, 1, "7G", "00:15:00"),
        (["--account", "rich"], "long", 7, 1, "12G", "08:00:00"),
        (["--partition", "slices"], "slices", 2, "a100:1", "12G", "08:00:00"),
    ],
)
def test_each_partition_gets_what_it_allows(site, words, partition, cpus, gpus, memory, time):
    said = init(*words)
    assert "--array 0-5%" in said  # of at most 6 tasks
    profile = load_study_file(site / "study.toml").slurm["tuning"]
    assert (profile.partition, profile.account) == (partition, "rich" if partition == "long" else None)
    assert (profile.cpus, profile.gpus) == (cpus, gpus)
    assert (profile.memory, profile.time) == (memory, time)


@pytest.mark.parametrize(
    ("partition", "said"),
    [("closed", "INACTIVE"), ("nope", "this site has cpu, gpu, thrifty"), ("long", "accounts rich")],
)
def test_what_the_site_refuses_is_said_and_nothing_is_written(site, partition, said):
    assert said in init("--partition", partition, code=2)
    assert not (site / "study.toml").exists()


def test_a_controller_that_is_silent_is_no_machine_without_slurm(site, controller, monkeypatch):
    text = (controller / "slurm.conf").read_text().replace("SlurmctldPort=", "SlurmctldPort=9 #")
    (site / "slurm.conf").write_text(f"{text}MessageTimeout=1\n")
    monkeypatch.setenv("SLURM_CONF", str(site / "slurm.conf"))
    assert "try again on a login node" in init(code=2)
    assert not (site / "study.toml").exists()
    init("--local")
    assert load_study_file(site / "study.toml").slurm == {}
