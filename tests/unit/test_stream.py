"""The blocks that reach the network depend on (seed, epoch, image) alone, wherever they are made."""

import numpy as np
import pytest
import torch

from trainer.augment import Augmentation
from trainer.dataset import read_dataset
from trainer.stream import Stream, prepared_images

CPU = torch.device("cpu")
ALL = np.arange(100)


@pytest.fixture
def make_stream(demo, tmp_path):
    dataset = read_dataset(demo)
    path = prepared_images(dataset, dataset.splits["train"], 32, tmp_path)
    return lambda: Stream(path, Augmentation(compiled=False), CPU)


def shown(stream, seed, epoch, block=256, images=ALL):
    """An epoch's images and their indices, in its order."""
    parts = stream.parts(images, seed, epoch, block)
    return torch.cat([stream.images(seed, epoch, part) for part in parts]), np.concatenate(parts)


def test_an_epoch_is_the_same_again_and_other_epochs_differ(make_stream):
    stream = make_stream()
    assert [len(part) for part in stream.parts(ALL, 0, 3, 64)] == [64, 36]
    images, indices = shown(stream, 0, 3, 64)
    assert sorted(indices) == list(range(100))
    # From another stream, in other blocks, from a block in the middle on.
    again = shown(make_stream(), 0, 3, 10)
    assert torch.equal(again[0], images)
    assert np.array_equal(again[1], indices)
    assert torch.equal(stream.images(0, 3, indices[64:]), images[64:])
    for other in ((0, 4), (1, 3)):
        others, order = shown(stream, *other)
        assert not np.array_equal(order, indices)
        # Nor do the images look the same as before.
        assert not torch.equal(others[order.argsort()], images[indices.argsort()])


def test_an_image_looks_the_same_whichever_others_are_used(make_stream):
    images, indices = shown(make_stream(), 0, 3)
    for image, index in zip(*shown(make_stream(), 0, 3, images=np.arange(50, 60)), strict=True):
        assert torch.equal(image, images[indices == index][0])


def test_prepared_images_are_built_once_and_shared(demo, tmp_path):
    dataset = read_dataset(demo)
    val = dataset.splits["val"]
    first = prepared_images(dataset, val, 48, tmp_path)
    [path] = tmp_path.glob("*.npy")
    stamp = path.stat().st_mtime_ns
    again = prepared_images(dataset, val, 48, tmp_path)
    assert path.stat().st_mtime_ns == stamp
    assert again == first == path
    assert np.load(path).shape == (80, 3, 48, 48)
