"""Folds: fair to every attribute, the same everywhere, and trained as their images alone would be."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.model_selection import KFold

from tests.unit.test_train import curve
from trainer.checkpoint import Checkpoints
from trainer.config import TrainConfig
from trainer.dataset import DatasetError, read_dataset
from trainer.division import attribute_table, divide, stratified_folds
from trainer.feature_places import Places
from trainer.loop import finish, train, train_epoch
from trainer.run import Run
from trainer.workspace import Workspace

ROOT = Path(__file__).parents[2]
FOLDS = 3


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def folded(tiny):
    return tiny.model_copy(update={"folds": FOLDS, "epochs": 2})


def of_fold(config, fold, **changes):
    return config.model_copy(update={"fold": fold, **changes})


def workspace(config, cache, memory=0.0):
    return Workspace(config, cache, places=lambda _: Places(device=0, memory=memory))


def test_each_fold_has_as_many_images_of_each_attribute(real_data):
    dataset = read_dataset(real_data)
    split = dataset.split("train+val")
    fold_of = stratified_folds(split.labels, dataset.image_digests(split), 6)
    counts = np.array([dataset.counts(split, np.flatnonzero(fold_of == fold)) for fold in range(6)])
    assert np.ptp(counts, axis=0).max() <= 5
    assert np.ptp(np.bincount(fold_of)) <= 2
    by_chance = [dataset.counts(split, rows) for _, rows in KFold(6, shuffle=True).split(split.labels)]
    assert np.ptp(by_chance, axis=0).sum() > 5 * np.ptp(counts, axis=0).sum()
    by_image = {}
    for digest, fold in zip(dataset.image_digests(split), fold_of, strict=True):
        assert by_image.setdefault(digest, fold) == fold
    assert len(by_image) < len(split)  # some images are there twice


def test_copies_and_unknown_labels():
    labels = np.array([[0], [1], [-1], [0], [1], [-1]])
    fold_of = stratified_folds(labels, ["a", "b", "c", "a", "d", "e"], 2)
    assert fold_of[0] == fold_of[3]
    assert fold_of[1] != fold_of[4]
    assert np.bincount(fold_of).tolist() == [3, 3]


def test_every_image_is_judged_once_and_never_learned_by_its_judge(folded, demo):
    dataset = read_dataset(demo)
    parts = [divide(dataset, of_fold(folded, fold)) for fold in range(FOLDS)]
    images = len(dataset.split("train+val"))
    assert sorted(np.concatenate([part.val for part in parts])) == [*range(images)]
    for part in parts:
        assert sorted(np.concatenate(part)) == [*range(images)]
    tables = [attribute_table(dataset, of_fold(folded, fold)) for fold in range(FOLDS)]
    for rows in zip(*tables, strict=True):
        assert all(
            sum(row["images"] for row in rows) == row["images"] + row["train_images"] for row in rows
        )


def test_too_many_folds(folded, demo):
    with pytest.raises(DatasetError, match=r"folds = 999: the dataset has \d+ different images"):
        divide(read_dataset(demo), folded.model_copy(update={"folds": 999}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"folds": 3, "fold": 3}, "fold = 3 of folds = 3; allowed is 0 to 2"),
        ({"fold": 1}, "fold = 1 of folds = None; give folds too"),
        ({"folds": 3, "train_images": 9}, "leave out train_on and train_images"),
        ({"folds": 3, "train_on": "train+val"}, "leave out train_on and train_images"),
    ],
)
def test_folds_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(data="x", **settings)


@pytest.fixture
def alone(demo, folded, tmp_path):
    """A dataset folder that has the images of a fold, as if there were no others."""

    def make(fold):
        dataset = read_dataset(demo)
        part, split = divide(dataset, of_fold(folded, fold)), dataset.split("train+val")
        folder = tmp_path / f"fold-{fold}"
        shutil.copytree(demo, folder)
        for name, rows in zip(("train", "val"), part, strict=True):
            lists = {"": [split.paths[row] for row in rows], "_attr": []}
            lists["_attr"] = [
                " ".join(str(label) for label in split.labels[row].tolist()) for row in rows
            ]
            for suffix, lines in lists.items():
                (folder / "split" / f"{name}{suffix}.txt").write_text("\n".join(lines) + "\n")
        return folder

    return make


@pytest.mark.parametrize("fold", range(FOLDS))
def test_a_fold_equals_a_dataset_of_its_images(fold, folded, alone, cache):
    """Where images are not augmented: else the draw for an image depends on its place in the list."""
    config = of_fold(folded, fold, augment="none")
    its_images = {"data": str(alone(fold)), "folds": None, "fold": 0}
    here, there = (workspace(one, cache, 1e9) for one in (config, config.model_copy(update=its_images)))
    runs = [Run(one.config, one) for one in (here, there)]
    for _ in range(config.epochs):
        for run in runs:
            list(train_epoch([run]))
    assert curve(runs[0].history) == curve(runs[1].history)
    for one, other in zip(*(run.tail.state_dict().values() for run in runs), strict=True):
        assert torch.equal(one, other)
    judged = runs[0].history[-1].predictions
    assert np.array_equal(judged.images, divide(here.dataset, config).val)
    assert np.array_equal(judged.classes, runs[1].history[-1].predictions.classes)


@pytest.mark.parametrize("augment", ["report", "none"])
def test_folds_beside_each_other_equal_each_alone_and_share_the_trunk(folded, cache, augment):
    config = folded.model_copy(update={"augment": augment})
    expected = {
        (fold, lr): curve(train(one, workspace(one, cache)))
        for fold in range(FOLDS)
        for lr in (0.001, 0.003)
        for one in [of_fold(config, fold, lr=lr)]
    }
    shared = workspace(config, cache, memory=1e9)
    seen, features = [], shared.runtime.features

    def counted(trunk, images):
        seen.append(len(images))
        return features(trunk, images)

    _ = shared._tried
    shared.runtime.features = counted
    runs = {key: Run(of_fold(config, key[0], lr=key[1]), shared) for key in expected}
    for _ in range(config.epochs):
        assert all(outcome is run.history[-1] for run, outcome in train_epoch([*runs.values()]))
    for key, run in runs.items():
        assert curve(run.history) == expected[key]
    images = len(shared.train_labels)
    # Without augmentation once. Else each looks different in each epoch, and when it is judged.
    assert sum(seen) == (images if augment == "none" else images * (config.epochs + 1))


@pytest.mark.parametrize("how", ["interrupted", "killed"])
def test_a_fold_that_is_cut_short_goes_on_as_if_it_were_not(folded, cache, tmp_path, how):
    config = of_fold(folded, 1)
    expected = curve(train(config, workspace(config, cache)))
    code = "import sys; from tests.unit.test_folds import cut_short; cut_short(*sys.argv[1:])"
    words = [sys.executable, "-c", code, config.model_dump_json(), str(cache), str(tmp_path), how]
    ended = subprocess.run(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert ended.returncode == (-signal.SIGKILL if how == "killed" else 0)
    again = workspace(of_fold(folded, 0), cache)  # a worker whose own configuration has another fold
    resumed = Run(config, again, Checkpoints(tmp_path, 2))
    assert len(resumed.history) == 1
    assert curve(finish(resumed, None)) == expected


def cut_short(config, cache, folder, how):
    """Train until the middle of the second epoch, in a process of its own."""
    config, cache = TrainConfig.model_validate_json(config), Path(cache)

    def interrupt(run, _):
        if len(run.history) < 1 or run.steps_left > 1:
            return False
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return True

    epochs = train(
        config, workspace(config, cache), Checkpoints(Path(folder), 1), interrupt, checkpoint_seconds=0
    )
    assert len(list(epochs)) == 1
