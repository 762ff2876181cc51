"""The batched augmentation gives the bytes of the report's own transforms, image by image."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision import transforms
from torchvision.transforms import functional

import trainer.augment
from trainer.augment import Augmentation, Draws, affine, draw, hue, saturation
from trainer.dataset import read_dataset
from trainer.images import load_image
from trainer.stream import prepared_images
from trainer.workspace import Workspace

JITTER = [
    functional.adjust_brightness,
    functional.adjust_contrast,
    functional.adjust_saturation,
    functional.adjust_hue,
]


class Parameters:
    """Parameters of n images as torchvision takes them, and the same as our `draws`."""

    def __init__(self, n, size, seed=0):
        generator = np.random.default_rng(seed)
        self.flip = generator.random(n) < 0.5
        self.order = np.argsort(generator.random((n, 4)), axis=1)
        self.factors = generator.uniform(0.7, 1.3, (n, 4)).astype(np.float32)
        self.factors[:, 3] = generator.uniform(-0.3, 0.3, n)
        self.angle, self.shear = generator.uniform(-15, 15, (2, n))
        self.scale = generator.uniform(0.5, 1.5, n)
        self.shift = np.rint(generator.uniform(-0.1 * size, 0.1 * size, (n, 2)))
        self.draws = Draws(
            self.order,
            np.hstack([self.factors[:, :3], np.trunc(255 * self.factors[:, 3:])]),
            self.flip,
            affine(self.angle, self.shear, self.scale, self.shift, size),
        )

    def by_torchvision(self, image, k):
        """The report's transforms on a PIL image, with the k-th parameters."""
        if self.flip[k]:
            image = functional.hflip(image)
        for step in self.order[k]:
            image = JITTER[step](image, float(self.factors[k, step]))
        shift = [int(value) for value in self.shift[k]]
        return functional.affine(
            image, float(self.angle[k]), shift, float(self.scale[k]), [float(self.shear[k]), 0.0]
        )


def expected(images, parameters):
    pictures = [
        functional.pil_to_tensor(parameters.by_torchvision(functional.to_pil_image(image), k))
        for k, image in enumerate(images)
    ]
    return torch.stack(pictures)


@pytest.fixture(params=["demo", "real"])
def pictures(request, demo, tmp_path):
    """uint8 [60, 3, 224, 224]: drawn garments, or photographs."""
    folder = demo if request.param == "demo" else request.getfixturevalue("real_data")
    dataset = read_dataset(folder)
    prepared = transforms.Compose(
        [transforms.Resize([224, 224]), transforms.CenterCrop([200, 160]), transforms.Resize([224, 224])]
    )
    paths = dataset.splits["train"].paths[:60]
    return torch.stack([functional.pil_to_tensor(prepared(load_image(folder / path))) for path in paths])


def test_every_image_is_that_of_torchvision_byte_for_byte(pictures):
    parameters = Parameters(len(pictures), 224)
    ours = Augmentation(compiled=False)(pictures, parameters.draws)
    assert torch.equal(ours, expected(pictures, parameters))


@pytest.mark.usefixtures("compiler")
def test_compiled_it_gives_the_same_bytes(pictures, caplog):
    with caplog.at_level(logging.WARNING, "trainer.augment"):
        compiled = Augmentation(compiled=True)
        for seed in (0, 1):
            draws = Parameters(len(pictures), 224, seed).draws
            assert torch.equal(compiled(pictures, draws), Augmentation(compiled=False)(pictures, draws))
    names = [record.name for record in caplog.records]
    assert "trainer.augment" not in names  # it was compiled


def test_without_a_compiler_it_runs_uncompiled(caplog, monkeypatch):
    def refuse(*_, **__):
        def run(*_):
            raise RuntimeError("no C++ compiler\nand a long story")

        return run

    monkeypatch.setattr(torch, "compile", refuse)
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    parameters = Parameters(5, 32)
    assert torch.equal(
        Augmentation(compiled=True)(images, parameters.draws), expected(images, parameters)
    )
    assert caplog.messages == [
        "the augmentation runs uncompiled: RuntimeError('no C++ compiler\\nand a long story')"
    ]


@pytest.mark.parametrize(
    ("step", "adjust", "theirs", "ours"),
    [(hue, functional.adjust_hue, turn, np.trunc(255 * turn)) for turn in (0.0, 0.3, -0.3, 0.013)]
    + [(saturation, functional.adjust_saturation, by, by) for by in (0.0, 1.3)],
)
def test_all_colours(step, adjust, theirs, ours):
    numbers = np.arange(1 << 24, dtype=np.uint32)
    colours = np.stack([numbers >> 16, (numbers >> 8) & 255, numbers & 255], -1).astype(np.uint8)
    picture = Image.fromarray(colours.reshape(4096, 4096, 3))
    expected = functional.pil_to_tensor(adjust(picture, theirs))
    factors = torch.full((1, 1, 1, 1), ours, dtype=torch.float32)
    for rows in range(0, 4096, 512):  # of 2 GB at once
        part = functional.pil_to_tensor(picture.crop((0, rows, 4096, rows + 512)))
        stepped = step(part[None].float(), factors)[0]
        assert torch.equal(stepped, expected[:, rows : rows + 512].float())


@pytest.mark.parametrize("size", [64, 75, 224])
def test_what_is_drawn_has_torchvisions_distribution(size):
    n = 20_000
    draws = draw(0, 0, n, size)
    torch.manual_seed(0)
    jitter = transforms.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.3)
    ranges = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    drawn = [transforms.ColorJitter.get_params(*ranges) for _ in range(n // 4)]
    for step in range(3):
        assert stats.ks_2samp(draws.factors[:, step], [one[1 + step] for one in drawn]).pvalue > 0.001
    turns = [np.trunc(255 * one[4]) for one in drawn]
    assert stats.ks_2samp(draws.factors[:, 3], turns).pvalue > 0.001
    orders, counts = np.unique(draws.order, axis=0, return_counts=True)
    assert len(orders) == 24
    assert stats.chisquare(counts).pvalue > 0.001
    assert stats.binomtest(int(draws.flip.sum()), n).pvalue > 0.001
    move = transforms.RandomAffine(degrees=15, translate=(0.1, 0.1), scale=(0.5, 1.5), shear=15)
    params = [
        move.get_params(move.degrees, move.translate, move.scale, move.shear, [size, size])
        for _ in range(n // 4)
    ]
    angle, shift, scale, shear = (np.array(column) for column in zip(*params, strict=True))
    theirs = affine(angle, shear[:, 0], scale, shift, size)
    for column in range(6):
        assert stats.ks_2samp(draws.affine[:, column], theirs[:, column]).pvalue > 0.001
    # No two images, and no two of an image's parameters, go together.
    columns = np.column_stack([draws.factors, draws.flip, draws.affine[:, [1, 2, 5]]])
    assert np.abs(np.corrcoef(columns.T) - np.eye(8))[:5].max() < 0.04
    assert np.abs(np.corrcoef(columns[:-1, :5].T, columns[1:, :5].T)[:5, 5:]).max() < 0.04


def test_images_are_normalised_as_the_report_does(demo, tiny, tmp_path):
    report = transforms.Compose(
        [
            transforms.Resize([224, 224]),
            transforms.CenterCrop([200, 160]),
            transforms.Resize([224, 224]),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    dataset = read_dataset(demo)
    train = dataset.splits["train"]
    images = np.load(prepared_images(dataset, train, 224, tmp_path))
    # One that is normalised as ImageNet is.
    workspace = Workspace(tiny.model_copy(update={"backbone": "resnet10t"}), tmp_path)
    for index in range(6):
        theirs = report(load_image(demo / train.paths[index]))
        ours = workspace.runtime.normalise(torch.from_numpy(images[index : index + 1]))[0]
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_random_numbers_of_others_are_left_alone():
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    trainer.augment.Augmentation(compiled=False)(images, draw(0, 0, 4, 16))
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


@pytest.mark.parametrize("one_by_one", [True, False])
def test_each_image_takes_its_steps_in_its_own_order(one_by_one):
    """On a CPU one image after the other, else all that take the same step next."""
    order = Parameters(50, 32).order
    taken = [[] for _ in order]
    calls = 0
    for rows, step in trainer.augment.groups(order, one_by_one):
        calls += 1
        for image in np.arange(50)[rows]:
            taken[image].append(step)
    assert np.array_equal(taken, order)
    assert calls == (200 if one_by_one else 16)
