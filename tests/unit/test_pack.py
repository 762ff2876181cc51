"""Runs side by side: each gets, bit for bit, what it gets alone with the same epochs of the stream."""

import itertools
import weakref

import pytest
import torch

from tests.unit.test_train import curve
from trainer.checkpoint import Checkpoints
from trainer.feature_places import Places
from trainer.loop import train, train_epoch
from trainer.pack import pack_that_fits
from trainer.run import Run
from trainer.saving import Snapshots
from trainer.workspace import Workspace

SETTINGS = [
    {"batch_size": 64, "lr": 1e-3, "dropout": 0.5},
    {"batch_size": 128, "lr": 3e-3, "epsilon": 0.02},
    {"batch_size": 256, "lr": 2e-3, "weight_decay": 0.005},
    {"batch_size": 32, "lr": 5e-4},
    {"batch_size": 64, "lr": 4e-3},
]


@pytest.fixture
def configs(tiny):
    return [tiny.model_copy(update={"epochs": 4, **settings}) for settings in SETTINGS]


@pytest.fixture(scope="module")
def workspaces(tmp_path_factory):
    """One workspace for each dataset and network."""
    made, cache = {}, tmp_path_factory.mktemp("cache")

    def workspace(config):
        key = config.data, config.frozen_batchnorm
        made[key] = made.get(key) or Workspace(config, cache)
        return made[key]

    return workspace


@pytest.fixture
def shared(configs, workspaces):
    return workspaces(configs[0])


ALONE = {}


def alone(config, workspace, stream_epochs):
    """The curve of a run by itself through these epochs of the stream; each is trained once."""
    key = config.model_dump_json(), id(workspace), *stream_epochs
    if key not in ALONE:
        results = train(config, workspace, stream_epochs=stream_epochs)
        ALONE[key] = curve(itertools.islice(results, len(stream_epochs)))
    return ALONE[key]


def go_round(runs):
    assert all(outcome is run.history[-1] for run, outcome in train_epoch(runs))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_run_in_a_pack_is_as_alone(size, configs, shared):
    runs = [Run(config, shared) for config in configs[:size]]
    for _ in range(4):
        go_round(runs)
    for run in runs:
        assert [result.stream_epoch for result in run.history] == [0, 1, 2, 3]
        assert curve(run.history) == alone(run.config, shared, [0, 1, 2, 3])


def test_runs_that_leave_and_join_change_nothing_for_the_others(configs, shared):
    staying, pruned, third, fourth, late = configs
    runs = [Run(config, shared) for config in (staying, pruned, third, fourth)]
    go_round(runs)
    go_round(runs)
    left = runs.pop(1)
    runs.append(Run(late, shared))
    go_round(runs)
    go_round(runs)
    joined = runs.pop()
    assert all(len(run.history) == 4 for run in runs)
    runs = [joined]
    go_round(runs)  # goes on by itself
    runs.append(Run(pruned, shared))
    go_round(runs)
    every = [left, *runs, joined]
    assert [one.stream_epoch for one in joined.history] == [2, 3, 4, 5]
    assert [one.stream_epoch for one in left.history] == [0, 1]
    assert [one.stream_epoch for one in runs[-1].history] == [5]
    for run in every:
        stream_epochs = [result.stream_epoch for result in run.history]
        assert curve(run.history) == alone(run.config, shared, stream_epochs)
    # It matters which epochs of the stream a run goes through.
    assert curve(joined.history) != alone(late, shared, [0, 1, 2, 3])


@pytest.mark.parametrize("steps", [1, 6, 9, 14])
def test_a_pack_that_was_interrupted_anywhere_goes_on_as_if_it_had_not(steps, configs, shared, tmp_path):
    chosen = configs[:2] + configs[3:4]
    places = [Checkpoints(tmp_path / str(number)) for number in range(3)]
    runs = [Run(*one) for one in zip(chosen, [shared] * 3, places, strict=True)]
    go_round(runs)
    counter = itertools.count(1)
    outcomes = dict(train_epoch(runs, lambda *_: next(counter) == steps))
    assert set(outcomes.values()) == {None}
    for run, place in zip(runs, places, strict=True):
        Snapshots().take(run).save(place)
    # Two go on together; the third alone, elsewhere.
    first, second, third = (Run(*one) for one in zip(chosen, [shared] * 3, places, strict=True))
    go_round([first, second])
    go_round([third])
    for run in (first, second, third):
        assert [result.stream_epoch for result in run.history] == [0, 1]
        assert curve(run.history) == alone(run.config, shared, [0, 1])


def test_seeds_and_own_trunks_have_passes_of_their_own(configs, tiny, tmp_path):
    base = {"epochs": 2, "frozen_batchnorm": "train"}
    config = tiny.model_copy(update=base)
    other = tiny.model_copy(update={**base, "seed": 7, "batch_size": 32})
    workspace = Workspace(config, tmp_path)
    runs = [Run(config, workspace), Run(other, workspace), Run(config, workspace)]
    for _ in range(2):
        go_round(runs)
    for run in runs:
        assert curve(run.history) == curve(train(run.config, workspace))
    assert curve(runs[0].history) == curve(runs[2].history) != curve(runs[1].history)


def test_one_runs_error_is_not_the_others(configs, shared):
    runs = [Run(config, shared) for config in configs[:3]]
    runs[1].train_step = broken
    outcomes = dict(train_epoch(runs))
    assert isinstance(outcomes[runs[1]], ZeroDivisionError)
    for run in (runs[0], runs[2]):
        assert curve([outcomes[run]]) == alone(run.config, shared, [0])


def broken(*_):
    raise ZeroDivisionError


def test_when_memory_runs_out_in_the_trunk_only_the_newest_leaves(configs, shared, monkeypatch):
    runs = [Run(config, shared) for config in configs[:3]]
    blocks = shared.train_blocks

    def full(*arguments):
        yield next(blocks(*arguments))
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(shared, "train_blocks", full)
    [(run, error)] = train_epoch(runs)
    assert run is runs[2]
    assert isinstance(error, torch.cuda.OutOfMemoryError)
    monkeypatch.setattr(shared, "train_blocks", blocks)
    go_round(runs[:2])  # from where they were
    for run in runs[:2]:
        assert curve(run.history) == alone(run.config, shared, [0])


def test_a_trunk_that_fails_as_it_is_first_tried_is_every_runs_error(configs, tmp_path):
    workspace = Workspace(configs[0], tmp_path, places=lambda _: Places(device=0, memory=1e9))
    workspace.frozen.forward = broken
    runs = [Run(config, workspace) for config in configs[:2]]
    outcomes = dict(train_epoch(runs))
    assert [type(outcomes[run]) for run in runs] == [ZeroDivisionError] * 2


def test_the_time_of_a_pass_is_shared_out(configs, shared, monkeypatch):
    runs = [Run(config, shared) for config in configs[:4]]
    ticks = itertools.count()
    monkeypatch.setattr("trainer.pace.time.monotonic", lambda: float(next(ticks)))
    asked = []
    list(train_epoch(runs, lambda run, left: bool(asked.append(run))))
    assert len(asked) == sum(run.steps_per_epoch for run in runs) == 5 + 3 + 2 + 10
    seconds = [run.history[0].seconds for run in runs]
    assert len(set(seconds)) == 1  # equal parts, and an evaluation each
    assert sum(seconds) == pytest.approx(next(ticks), abs=20)


def test_a_run_that_has_left_is_not_in_memory(configs, shared):
    """Its last reference frees it. To wait for Python's collection of cycles would fill a GPU."""
    run = Run(configs[0], shared)
    go_round([run])
    left = weakref.ref(run)
    del run
    assert left() is None


def test_as_many_as_the_memory_holds(configs, shared, monkeypatch):
    largest = configs[2]
    tail = 3 * sum(one.nbytes for one in Run(largest, shared).tail.parameters())

    def fits(free):
        monkeypatch.setattr("trainer.pack.peak_memory", lambda _: 1 << 30)
        monkeypatch.setattr("trainer.pack.available_memory", lambda _: ((1 << 30) + free) / 0.9)
        return pack_that_fits(largest, shared)

    assert [fits(free) for free in (-5, 0.5 * tail, 2.5 * tail, 99 * tail)] == [1, 1, 3, 8]


def test_nothing_waits_for_the_device_inside_an_epoch(configs, shared):
    """A step must not ask for a value: the host runs ahead of a GPU."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Asked(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function in (
                torch.ops.aten._local_scalar_dense.default,
                torch.ops.aten.nonzero.default,
                torch.ops.aten.equal.default,
            )
            return function(*args, **(kwargs or {}))

    run = Run(configs[0], shared)
    run.begin(0)
    features, indices = next(run.stream_blocks(0, 0))
    with Asked() as asked:
        targets = shared.train_targets[indices]
        for rows in run.batches_left(0, len(targets)):
            run.train_step(features[rows], targets[rows])
    assert asked.count == 0
