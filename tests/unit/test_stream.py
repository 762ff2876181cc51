"""The images that reach the network are the report's, and depend on (seed, epoch, image) alone."""

import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional

from trainer.dataset import load_image, read_dataset
from trainer.loop import Workspace
from trainer.stream import AugmentedImages, Stream, epoch_order, prepared_images, random_transform

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
    augmented = AugmentedImages(images, seed=5, augment=True)
    workspace = Workspace(tiny, tmp_path)  # resnet10t is normalised as ImageNet is
    for index in range(6):
        seed = int(np.random.SeedSequence([5, 2, index]).generate_state(1)[0])
        ours, _ = augmented[(2, index)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            theirs = REPORT(load_image(demo / train.paths[index]))
        assert torch.allclose(workspace.normalise(ours[None])[0], theirs, atol=1e-5)


def test_augmentation_leaves_the_global_generator_alone(demo, tmp_path):
    dataset = read_dataset(demo)
    images = prepared_images(dataset, dataset.splits["train"], 32, tmp_path)
    before = torch.random.get_rng_state()
    AugmentedImages(images, 0, True)[(0, 0)]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_epoch_is_the_same_again_and_other_epochs_differ(demo, tmp_path):
    dataset = read_dataset(demo)
    images = prepared_images(dataset, dataset.splits["train"], 32, tmp_path)

    def epoch(number, processes=0, seed=0):
        stream = Stream(images, np.arange(100), seed, 64, True, processes)
        blocks = list(stream.epoch(number))
        assert [len(block) for block, _ in blocks] == [64, 36]
        return torch.cat([b for b, _ in blocks]), torch.cat([i for _, i in blocks])

    first = epoch(3)
    for same in (epoch(3), epoch(3, processes=2)):
        assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert sorted(first[1].tolist()) == list(range(100))
    assert not torch.equal(first[1], epoch(4)[1])
    assert not torch.equal(first[1], epoch(3, seed=1)[1])


def test_order_visits_every_image_once():
    assert sorted(epoch_order(1000, 1, 2).tolist()) == list(range(1000))


def test_prepared_images_are_built_once_and_shared(demo, tmp_path):
    dataset = read_dataset(demo)
    val = dataset.splits["val"]
    first = prepared_images(dataset, val, 48, tmp_path)
    [path] = tmp_path.glob("*.npy")
    stamp = path.stat().st_mtime_ns
    again = prepared_images(dataset, val, 48, tmp_path)
    assert path.stat().st_mtime_ns == stamp
    assert np.array_equal(first, again)
    assert first.shape == (80, 3, 48, 48)


def test_random_transform_keeps_size_and_type():
    image = Image.new("RGB", (40, 40), (10, 200, 30))
    assert functional.pil_to_tensor(random_transform()(image)).shape == (3, 40, 40)
