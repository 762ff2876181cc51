"""Snapshots, when they are due, and the thread that saves a run beside its training."""

import errno
import subprocess
import sys
import time

import pytest
import torch

from trainer.checkpoint import Checkpoints
from trainer.config import TrainConfig
from trainer.loop import train, train_epoch
from trainer.predictions import Predictions
from trainer.run import Run
from trainer.saving import Saver, Snapshots, Unsaved
from trainer.workspace import Workspace


@pytest.fixture(scope="module")
def config(demo):
    return TrainConfig(
        data=str(demo),
        backbone="test_resnet",
        weights="none",
        image_size=32,
        epochs=4,
        warmup_epochs=1,
        batch_size=64,
        dropout=0.5,
    )


@pytest.fixture(scope="module")
def workspace(config, tmp_path_factory):
    return Workspace(config, tmp_path_factory.mktemp("cache"))


def train_one_epoch(run):
    [(_, result)] = train_epoch([run])
    return result


def test_what_is_trained_after_a_snapshot_is_not_in_it(config, workspace, tmp_path):
    checkpoints, snapshots = Checkpoints(tmp_path), Snapshots()
    run = Run(config, workspace, checkpoints)
    train_one_epoch(run)
    snapshot = snapshots.take(run)
    second = train_one_epoch(run)
    snapshot.save(checkpoints)
    resumed = Run(config, workspace, Checkpoints(tmp_path, 2))
    assert resumed.position == (1, run.steps_per_epoch)
    assert train_one_epoch(resumed).differing(second.columns()) == {}


def test_the_memory_of_a_snapshot_is_used_again(config, workspace):
    run, snapshots = Run(config, workspace), Snapshots()
    train_one_epoch(run)
    first = snapshots.take(run)
    second = snapshots.take(run)  # the first one is not yet written
    where = {tensor.data_ptr() for tensor in first.tensors if tensor.numel()}
    assert where.isdisjoint(tensor.data_ptr() for tensor in second.tensors)
    snapshots.free(first)
    train_one_epoch(run)
    third = snapshots.take(run)
    assert {tensor.data_ptr() for tensor in third.tensors if tensor.numel()} == where
    assert torch.equal(third.state["tail"]["1.2.weight"], run.tail.state_dict()["1.2.weight"])


@pytest.mark.parametrize(
    ("most", "epochs", "due"),
    [
        (0, [1, 1, 1], [True, True, True]),
        (20, [30, 30], [True, True]),  # each epoch is longer
        (20, [5, 5, 5, 5], [False, False, False, True]),  # up to 20 s, not more
        (1e6, [30, 30, 30], [False, False, False]),
    ],
)
def test_at_most_so_much_work_or_an_epoch_is_unsaved(config, workspace, monkeypatch, most, epochs, due):
    now, run = 100.0, Run(config, workspace)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    unsaved, seen = Unsaved(run, most), []
    for seconds in epochs:
        now += seconds
        seen.append(unsaved.is_due())
        if seen[-1]:
            unsaved.reset()
    assert seen == due


def test_predictions_are_written_once_and_carry_their_attempt(config, workspace, tmp_path):
    for attempt, epochs in ((1, 2), (2, 1)):
        checkpoints = Checkpoints(tmp_path, attempt)
        run = Run(config, workspace, checkpoints)
        for _ in range(epochs):
            train_one_epoch(run)
            Snapshots().take(run).save(checkpoints)
    names = {path.name: Predictions.load(path).attempts.tolist() for path in tmp_path.glob("*.npz")}
    assert names == {
        "attempt-0001-predictions-0000-0000.npz": [1],
        "attempt-0001-predictions-0001-0001.npz": [1],
        "attempt-0002-predictions-0000-0002.npz": [1, 1, 2],
    }
    joined = Predictions.join([result.predictions for result in run.history])
    again = Run(config, workspace, Checkpoints(tmp_path, 3))
    assert [part.attempts.tolist() for part in joined.split()] == [[1], [1], [2]]
    for one, other in zip(run.history, again.history, strict=True):
        assert (one.predictions.log_probs == other.predictions.log_probs).all()


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"PK")])
def test_a_checkpoint_whose_predictions_are_spoilt_does_not_count(config, workspace, tmp_path, damage):
    checkpoints = Checkpoints(tmp_path)
    run = Run(config, workspace, checkpoints)
    results = []
    for _ in range(2):
        results.append(train_one_epoch(run))
        Snapshots().take(run).save(checkpoints)
    damage(tmp_path / "attempt-0001-predictions-0001-0001.npz")
    resumed = Run(config, workspace, Checkpoints(tmp_path, 2))
    assert len(resumed.history) == 1
    assert train_one_epoch(resumed).differing(results[1].columns()) == {}


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from trainer.checkpoint import Checkpoints

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    Checkpoints(Path(sys.argv[1])).save(1, 1, {"tail": torch.zeros(9999), "predictions": []})
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("room", [0, 500, 20_000])
def test_a_disk_that_is_full_anywhere_is_an_error_of_the_system(tmp_path, room):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "run"), str(room)]
    said = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "File too large" in said.stdout, said
    assert not list((tmp_path / "run").iterdir())


def test_a_run_that_is_left_early_is_saved(config, workspace, tmp_path):
    training = train(config, workspace, Checkpoints(tmp_path), checkpoint_seconds=1e6)
    next(training)
    assert not list(tmp_path.iterdir())
    training.close()
    assert len(Run(config, workspace, Checkpoints(tmp_path)).history) == 1


def test_the_error_of_a_thread_that_saves_is_raised(config, workspace, tmp_path):
    def fill_disk():
        raise OSError(errno.ENOSPC, "No space left on device")

    run = Run(config, workspace)
    train_one_epoch(run)
    saver = Saver(run, Checkpoints(tmp_path, before_save=fill_disk), 0)
    saver.end_epoch(None)
    with pytest.raises(OSError, match="No space left"):
        saver.__exit__(None)
