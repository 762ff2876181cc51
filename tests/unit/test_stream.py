"""The images that reach the network are the report's, and depend on (seed, epoch, image) alone."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from contextlib import suppress

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional

from trainer.dataset import load_image, read_dataset
from trainer.loop import Workspace
from trainer.stream import (
    AugmentedImages,
    LoaderError,
    Stream,
    epoch_order,
    prepared_images,
    random_transform,
)

# As printed in the report, Fig. 7.
REPORT = transforms.Compose(
    [
        transforms.Resize([224, 224]),
        transforms.CenterCrop([200, 160]),
        transforms.Resize([224, 224]),
        transforms.RandomHorizontalFlip(p=0.5),
        transforms.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.3),
        transforms.RandomAffine(degrees=15, translate=(0.1, 0.1), scale=(0.5, 1.5), shear=15),
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
)


def test_training_images_equal_the_reports_transform(demo, tiny, tmp_path):
    dataset = read_dataset(demo)
    train = dataset.splits["train"]
    images = prepared_images(dataset, train, 224, tmp_path)
    augmented = AugmentedImages(images, augment=True)
    workspace = Workspace(tiny, tmp_path)  # resnet10t is normalised as ImageNet is
    for index in range(6):
        seed = int(np.random.SeedSequence([5, 2, index]).generate_state(1)[0])
        ours, _ = augmented[(5, 2, index)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            theirs = REPORT(load_image(demo / train.paths[index]))
        assert torch.allclose(workspace.normalise(ours[None])[0], theirs, atol=1e-5)


def test_augmentation_leaves_the_global_generator_alone(demo, tmp_path):
    dataset = read_dataset(demo)
    images = prepared_images(dataset, dataset.splits["train"], 32, tmp_path)
    before = torch.random.get_rng_state()
    AugmentedImages(images, True)[(0, 0, 0)]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_epoch_is_the_same_again_and_other_epochs_differ(demo, tmp_path):
    dataset = read_dataset(demo)
    images = prepared_images(dataset, dataset.splits["train"], 32, tmp_path)

    def epoch(number, processes=0, seed=0, stream=None):
        stream = stream or Stream(images, np.arange(100), True, 64, processes)
        blocks = list(stream.epoch(seed, number))
        assert [len(block) for block, _ in blocks] == [64, 36]
        return torch.cat([b for b, _ in blocks]), torch.cat([i for _, i in blocks])

    first = epoch(3)
    for same in (epoch(3), epoch(3, processes=2)):
        assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    # Loader processes live on from epoch to epoch; an epoch may also begin in its middle.
    lasting = Stream(images, np.arange(100), True, 64, 2)
    for number in (3, 4, 3):
        pairs = zip(epoch(number, stream=lasting), epoch(number), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    [(images_left, indices_left)] = lasting.epoch(0, 3, first=1)
    assert torch.equal(images_left, first[0][64:])
    assert torch.equal(indices_left, first[1][64:])
    assert sorted(first[1].tolist()) == list(range(100))
    assert not torch.equal(first[1], epoch(4)[1])
    assert not torch.equal(first[1], epoch(3, seed=1)[1])


def test_order_visits_every_image_once():
    assert sorted(epoch_order(np.arange(1000), 1, 2).tolist()) == list(range(1000))


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


def test_loader_processes_are_sent_the_images_path_not_the_images(demo, tmp_path):
    dataset = read_dataset(demo)
    path = prepared_images(dataset, dataset.splits["train"], 64, tmp_path)
    assert path.stat().st_size > 3_000_000
    assert len(pickle.dumps(AugmentedImages(path, True))) < 10_000


LOADING = """
import os, signal, sys, time
import numpy as np
from contextlib import suppress
from pathlib import Path
from trainer.config import TrainConfig
from trainer.stream import Stream

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: None)
    stream = Stream(Path(sys.argv[1]), np.arange(300), True, 16, 2)
    blocks = iter(stream.epoch(0, 0))
    print(len(next(blocks)[1]), flush=True)
    sys.stdin.readline()  # SIGTERM has reached all processes
    print(sum(len(indices) for _, indices in blocks), flush=True)
    next(iter(stream.epoch(0, 1)))  # and exit in the middle of an epoch
"""


@pytest.fixture
def loading(demo, tmp_path):
    """A process that loads with two others."""
    dataset = read_dataset(demo)
    path = prepared_images(dataset, dataset.splits["train"], 32, tmp_path)
    script = tmp_path / "loading.py"
    script.write_text(LOADING)
    return subprocess.Popen(
        [sys.executable, str(script), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )


def test_loader_processes_survive_a_signal_to_the_whole_job_and_end_with_it(loading):
    assert loading.stdout.readline() == "16\n"
    os.killpg(loading.pid, signal.SIGTERM)
    output, _ = loading.communicate("go\n", timeout=120)
    assert (output, loading.returncode) == ("284\n", 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_loader_processes_survive_a_signal_as_soon_as_they_exist(loading, number):
    hit = set()
    while len(hit) < 2:
        assert loading.poll() is None
        for child in psutil.Process(loading.pid).children():
            with suppress(psutil.Error):  # other children come and go
                if child.pid not in hit and any("spawn_main" in word for word in child.cmdline()):
                    child.send_signal(number)  # Python has not even started in it
                    hit.add(child.pid)
    output, _ = loading.communicate("go\n", timeout=120)
    assert (output, loading.returncode) == ("16\n284\n", 0)


def test_random_transform_keeps_size_and_type():
    image = Image.new("RGB", (40, 40), (10, 200, 30))
    assert functional.pil_to_tensor(random_transform()(image)).shape == (3, 40, 40)


def test_a_loader_process_that_was_killed_is_no_fault_of_the_run(demo, tmp_path):
    dataset = read_dataset(demo)
    path = prepared_images(dataset, dataset.splits["train"], 32, tmp_path)
    stream = Stream(path, np.arange(300), True, 16, 1)
    before = set(multiprocessing.active_children())
    blocks = iter(stream.epoch(0, 0))
    next(blocks)
    [loader] = set(multiprocessing.active_children()) - before
    loader.kill()
    with pytest.raises(LoaderError, match="the node may be out of memory"):
        list(blocks)
