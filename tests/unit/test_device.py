"""Which device is taken, and that a GPU that was granted is never passed over in silence."""

import logging
import os
import socket

import pytest
import torch
from typer.testing import CliRunner

from search.cli import app
from search.slurm.granted import take_granted
from trainer import allocation, device
from trainer.device import DeviceError, UnknownDeviceError, pick_device

# Real: on a machine where torch can use a GPU, there is none that it cannot.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")

VARIABLES = (
    *(*allocation.NAMING_GPUS, "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE", device.DEVICE, "ATELIER_CPUS"),
    *("SLURM_CPUS_PER_TASK", "SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU"),
)


@pytest.fixture
def given(monkeypatch, tmp_path):
    """Sets the environment, and nothing else that speaks of devices; a file may be in /dev."""

    def give(words, file=None):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, _, value in (word.partition("=") for word in words):
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(allocation, "GPU_FILES", () if file is None else (file,))
        monkeypatch.setattr(allocation, "_granted", allocation.Allocation())  # to be put back
        take_granted()
        device.note_cpu.cache_clear()

    return give


@pytest.mark.parametrize(
    ("words", "file", "sign"),
    [
        (["ATELIER_DEVICE=cuda"], None, "ATELIER_DEVICE=cuda"),
        (["ATELIER_DEVICE=cuda", "CUDA_VISIBLE_DEVICES="], None, "ATELIER_DEVICE=cuda"),
        (["CUDA_VISIBLE_DEVICES=0"], None, "CUDA_VISIBLE_DEVICES=0"),
        (["CUDA_VISIBLE_DEVICES=GPU-8932f937"], None, "CUDA_VISIBLE_DEVICES=GPU-8932f937"),
        (["HIP_VISIBLE_DEVICES=1"], None, "HIP_VISIBLE_DEVICES=1"),
        (["ROCR_VISIBLE_DEVICES=1"], None, "ROCR_VISIBLE_DEVICES=1"),
        (["SLURM_JOB_GPUS=0"], None, "SLURM_JOB_GPUS=0"),
        (["SLURM_GPUS_ON_NODE=1", "CUDA_VISIBLE_DEVICES="], None, "SLURM_GPUS_ON_NODE=1"),
        ([], "nul[l]", "/dev/null is there"),
        (["ATELIER_DEVICE="], "nul[l]", "/dev/null is there"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_an_error(given, words, file, sign):
    given(words, file)
    with pytest.raises(DeviceError) as raised:
        pick_device()
    said = str(raised.value)
    assert len(said.splitlines()) == 1
    assert said.startswith(f"{socket.gethostname()} has no GPU that torch can use: ")
    # In torch's own words.
    assert "Found no NVIDIA driver" in said or "not compiled with CUDA" in said or "No CUDA GPUs" in said
    assert f"({sign})" in said
    assert "ATELIER_DEVICE=cpu" in said


@pytest.mark.parametrize(
    ("words", "file", "why"),
    [
        ([], None, "no GPU here"),
        (["CUDA_VISIBLE_DEVICES=-1"], "nul[l]", "no GPU here"),
        (["CUDA_VISIBLE_DEVICES=NoDevFiles"], "nul[l]", "no GPU here"),
        (["CUDA_VISIBLE_DEVICES="], "nul[l]", "no GPU here"),
        (["SLURM_GPUS_ON_NODE=0"], None, "no GPU here"),
        (["ATELIER_DEVICE=cpu"], "nul[l]", "ATELIER_DEVICE=cpu"),
        (["ATELIER_DEVICE=cpu", "SLURM_JOB_GPUS=0"], None, "ATELIER_DEVICE=cpu"),
    ],
)
def test_the_cpu_is_taken_and_that_is_said_once(given, words, file, why, caplog):
    given(words, file)
    with caplog.at_level(logging.INFO):
        assert {pick_device(), pick_device()} == {torch.device("cpu")}
    assert caplog.messages == [f"computing on the CPU of {socket.gethostname()}: {why}"]


@pytest.mark.parametrize(
    ("words", "cpus", "memory"),
    [
        (["SLURM_CPUS_PER_TASK=3"], 3, None),
        (["SLURM_CPUS_PER_TASK=4", "ATELIER_CPUS=2"], 2, None),
        (["SLURM_CPUS_PER_TASK=4", "SLURM_MEM_PER_NODE=100"], 4, 100 << 20),
        (["SLURM_CPUS_PER_TASK=4", "SLURM_MEM_PER_CPU=10"], 4, 40 << 20),
        (["SLURM_CPUS_PER_TASK=4", "ATELIER_CPUS=2", "SLURM_MEM_PER_CPU=10"], 2, 20 << 20),
        (["SLURM_MEM_PER_NODE=0"], len(os.sched_getaffinity(0)), None),
    ],
)
def test_what_slurm_granted_is_used(given, words, cpus, memory):
    given(words)
    assert (allocation.cpu_count(), allocation.memory_limit()) == (cpus, memory)


@pytest.mark.parametrize("word", ["gpu", "CUDA", "cuda:1", "cpu ", "mps"])
def test_another_device_is_wrong_input(given, word):
    given([f"ATELIER_DEVICE={word}"])
    with pytest.raises(UnknownDeviceError, match="allowed are cuda and cpu"):
        pick_device()


@pytest.mark.parametrize(("word", "code"), [("cuda", 1), ("gpu", 2)])
@pytest.mark.parametrize("verb", ["search", "worker", "train"])
def test_a_verb_ends_before_anything_is_written(
    given, word, code, verb, study_text, demo, tmp_path, monkeypatch
):
    given([f"ATELIER_DEVICE={word}"])
    (tmp_path / "s.toml").write_text(study_text)
    settings = 'weights = "none"\nbackbone = "test_resnet"\nimage_size = 32\n'
    (tmp_path / "c.toml").write_text(f'[train]\ndata = "{demo}"\n{settings}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("ATELIER_DATABASE_URL", raising=False)
    result = CliRunner().invoke(app, [verb, "c.toml" if verb == "train" else "s.toml"])
    assert result.exit_code == code, result.output
    [line] = result.output.splitlines()
    assert line.startswith("error: ")
    assert "ATELIER_DEVICE" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.toml", "s.toml"]
