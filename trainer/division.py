"""Divide a dataset's images: which a run learns from, and which it is validated on."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from trainer.config import TrainConfig
from trainer.dataset import Dataset, DatasetError


class Division(NamedTuple):
    """Indices of images, ascending: into `TrainConfig.train_split` and `TrainConfig.val_split`."""

    train: np.ndarray
    val: np.ndarray


def divide(dataset: Dataset, config: TrainConfig) -> Division:
    """Which images a run learns from and is validated on, equal for every seed.

    Raises DatasetError for too few images.
    """
    return divide_all(dataset, config)[config.fold]


def divide_all(dataset: Dataset, config: TrainConfig) -> list[Division]:
    """The same for each fold, or once if there are none. Raises DatasetError for too few images."""
    if config.folds:
        fold_of = _folds(dataset, config)
        folds = range(config.folds)
        return [Division(np.flatnonzero(fold_of != k), np.flatnonzero(fold_of == k)) for k in folds]
    val = np.arange(len(dataset.split("val")) if config.validates else 0)
    images, limit = len(dataset.split(config.train_split)), config.train_images
    if limit is None:
        return [Division(np.arange(images), val)]
    if limit > images:
        raise DatasetError(
            f"train_images = {limit}: the dataset has {images} training images; allowed is 1 to {images}"
        )
    return [Division(np.sort(np.random.default_rng(0).permutation(images)[:limit]), val)]


def _folds(dataset: Dataset, config: TrainConfig) -> np.ndarray:
    """Which fold each image is in. Raises DatasetError if there are too few for so many folds."""
    assert config.folds is not None
    split = dataset.split(config.val_split)
    assert split.labels is not None
    # Copies of an image share a fold: who has learned one knows the answer for the other.
    digests = dataset.image_digests(split)
    if len({*digests}) < config.folds:
        raise DatasetError(
            f"folds = {config.folds}: the dataset has {len({*digests})} different images in train and "
            "val; allowed are at most as many folds"
        )
    return stratified_folds(split.labels, digests, config.folds)


def stratified_folds(labels: np.ndarray, groups: Sequence[Hashable], folds: int) -> np.ndarray:
    """Cut images into folds with as many of each attribute. Returns the fold of each: int64 [images].

    `labels` is int64 [images, categories], with -1 for unknown. Images of one group stay in one fold.
    This is iterative stratification (Sechidis, Tsoumakas and Vlahavas, "On the Stratification of
    Multi-Label Data", ECML PKDD 2011). The images of the rarest attribute go first, each to the fold
    that lacks the most of it. No kept library does that for groups of images.
    """
    numbers: dict[Hashable, int] = {}
    group_of = np.array([numbers.setdefault(group, len(numbers)) for group in groups])
    columns = [column[:, np.newaxis] == np.arange(column.max() + 1) for column in labels.T]
    has = np.hstack([*columns, np.ones((len(labels), 1), bool)])  # the last: to be an image at all
    counts = np.zeros((len(numbers), has.shape[1]), int)  # of each group's images
    np.add.at(counts, group_of, has)
    lacking = np.tile(counts.sum(0) / folds, (folds, 1))  # [folds, attributes]
    fold_of = np.full(len(numbers), -1)
    random = np.random.default_rng(0)
    order = random.permutation(len(numbers))
    while len(left := order[fold_of[order] < 0]):
        images = counts[left].sum(0)
        rarest = np.where(images > 0, images, len(labels) + 1).argmin()
        for group in left[counts[left, rarest] > 0]:
            by_chance = random.random(folds)
            fold = np.lexsort((by_chance, -lacking[:, -1], -lacking[:, rarest]))[0]
            fold_of[group] = fold
            lacking[fold] -= counts[group]
    folds_of_images: np.ndarray = fold_of[group_of]
    return folds_of_images


def attribute_table(
    dataset: Dataset, config: TrainConfig, division: Division | None = None
) -> list[dict[str, Any]]:
    """Name, category and number of images of every attribute, in the order of the network's outputs.

    `images` counts the validation images, `train_images` the images that a run learns from. A run that
    is not validated has those of the validation split. The division is the configuration's, unless it is
    given. Raises DatasetError for too few images.
    """
    categories = [
        name for name, size in zip(dataset.categories, dataset.sizes, strict=True) for _ in range(size)
    ]
    division = divide(dataset, config) if division is None else division
    val = dataset.counts(dataset.split(config.val_split), division.val if config.validates else None)
    train = dataset.counts(dataset.split(config.train_split), division.train)
    return [
        {"name": name, "category": category, "images": images, "train_images": train_images}
        for name, category, images, train_images in zip(
            dataset.attributes, categories, val, train, strict=True
        )
    ]


def absent_attributes(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each split in which attributes have no image. `table` is an attribute table."""
    lines = []
    for split, key, consequence in (
        ("training", "train_images", "no network can learn it"),
        ("validation", "images", "the score leaves it out"),
    ):
        # A study of an earlier version has no numbers of training images.
        if names := [str(row["name"]) for row in table if row.get(key) == 0]:
            lines.append(f"no {split} image has {', '.join(names)}: {consequence}")
    return lines
