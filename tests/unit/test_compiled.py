"""The compiled trunk, a machine that cannot compile, and what the workers of a study agree on."""

import os
import subprocess
import sys

import pytest
import torch

from trainer.loop import train
from trainer.runtime import Runtime
from trainer.workspace import TrunkError, Workspace


@pytest.fixture(autouse=True)
def _compiles(monkeypatch):
    """Compile on whatever device there is, as a GPU does."""
    monkeypatch.setattr(Runtime, "_compiles", True)


@pytest.fixture
def compiled(tiny, tmp_path, compiler):
    workspace = Workspace(tiny, tmp_path / "cache")
    assert workspace.frozen is not workspace._eager
    return workspace


def features(workspace, trunk):
    images = torch.arange(3 * 3 * 32 * 32).view(3, 3, 32, 32).byte()
    return workspace.runtime.features(trunk, images)


def test_a_compiled_trunk_says_the_same_and_trains(tiny, compiled):
    eager = features(compiled, compiled._eager)
    assert (features(compiled, compiled.frozen) - eager).abs().max() < 1e-4 * eager.abs().max()
    results = list(train(tiny, compiled))
    assert len(results) == tiny.epochs
    assert all(result.finite for result in results)


WITHOUT = """
import logging, sys
from pathlib import Path
from trainer.config import TrainConfig
from trainer.runtime import Runtime
from trainer.workspace import Workspace

logging.basicConfig(level=logging.INFO)
Runtime._compiles = True
workspace = Workspace(TrainConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]))
assert workspace.frozen is workspace._eager
"""


def test_without_a_compiler_the_trunk_runs_as_it_is(tiny, tmp_path):
    command = [sys.executable, "-c", WITHOUT, tiny.model_dump_json(), str(tmp_path)]
    environment = os.environ | {"CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    [line] = [line for line in result.stderr.splitlines() if "the trunk is not compiled: " in line]
    assert len(line) < 400


def test_the_first_worker_decides_for_all(tiny, compiled, tmp_path, monkeypatch):
    record = {}
    compiled.agree(record.setdefault)
    [(device, digest)] = record.items()
    assert torch.__version__ in device
    compiled.agree(record.setdefault)  # another worker like it
    assert record == {device: digest}

    compiled.frozen = compiled._eager
    del compiled._digest
    eager_first = {}
    compiled.agree(eager_first.setdefault)
    compiled.frozen, other = compiled.runtime.compiled(compiled._eager), dict(eager_first)
    del compiled._digest
    compiled.agree(other.setdefault)
    assert other == eager_first
    same_bits = digest == eager_first[device]
    assert (compiled.frozen is compiled._eager) is not same_bits


def test_a_machine_that_computes_something_else_is_left(compiled):
    with pytest.raises(TrunkError, match=r"computes other bits on .*: mend that, or use another node"):
        compiled.agree(lambda device, digest: "0" * 32)
