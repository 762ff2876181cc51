"""The blocks that reach the network depend on (seed, epoch, image) alone, wherever they are made."""

import numpy as np
import pytest
import torch

from trainer.augment import Augmentation
from trainer.dataset import read_dataset
from trainer.stream import Stream, prepared_images

CPU = torch.device("cpu")


@pytest.fixture
def make_stream(demo, tmp_path):
    dataset = read_dataset(demo)
    path = prepared_images(dataset, dataset.splits["train"], 32, tmp_path)
    return lambda indices=np.arange(100): Stream(path, indices, Augmentation(compiled=False), CPU)


def joined(blocks):
    images, indices = zip(*blocks, strict=True)
    return torch.cat(images), torch.cat(indices)


def test_an_epoch_is_the_same_again_and_other_epochs_differ(make_stream):
    stream = make_stream()
    blocks = list(stream.epoch(0, 3, block=64))
    assert [len(indices) for _, indices in blocks] == [64, 36]
    images, indices = joined(blocks)
    assert sorted(indices.tolist()) == list(range(100))
    # From another stream, in other blocks, from a block in the middle on.
    again = joined(make_stream().epoch(0, 3, block=10))
    assert torch.equal(again[0], images)
    assert torch.equal(again[1], indices)
    [(images_left, indices_left)] = stream.epoch(0, 3, block=64, first=1)
    assert torch.equal(images_left, images[64:])
    assert torch.equal(indices_left, indices[64:])
    for other in (stream.epoch(0, 4), stream.epoch(1, 3)):
        others, order = joined(other)
        assert not torch.equal(order, indices)
        # Nor do the images look the same as before.
        assert not torch.equal(others[order.argsort()], images[indices.argsort()])


def test_an_image_looks_the_same_whichever_others_are_used(make_stream):
    images, indices = joined(make_stream().epoch(0, 3))
    fewer, some = joined(make_stream(np.arange(50, 60)).epoch(0, 3))
    for image, index in zip(fewer, some, strict=True):
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
