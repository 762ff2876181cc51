"""What the sizes of batches and images decide is known before the first step, and only that."""

import pytest

from trainer.loop import train, train_epoch
from trainer.model import ModelError, check_size, load_backbone, stage_table
from trainer.run import Run
from trainer.workspace import Workspace

# Settings of which an epoch ends with a batch of one image, and what is allowed besides other batches.
REFUSED = [
    ({"batch_size": 32}, ", or image_size = 64, or trainable = 'head'"),
    ({"batch_size": 1}, ", or image_size = 64, or trainable = 'head'"),
    ({"train_images": 1}, ", or image_size = 64, or trainable = 'head'"),
    ({"trainable": "stem"}, ", or image_size = 64, or trainable = 'head'"),
    ({"backbone": "test_efficientnet"}, ", or image_size = 64, or trainable = 'head'"),
    ({"backbone": "skresnet18", "image_size": 64}, ", or trainable = 'head'"),
    (
        {"frozen_batchnorm": "train", "trainable": "head"},
        ", or image_size = 64, or frozen_batchnorm = 'eval'",
    ),
    ({"frozen_batchnorm": "train"}, ", or image_size = 64"),
]
# The same, but each channel has several values, or none is normalised by its batch.
TAKEN = [
    {"batch_size": 32, "image_size": 64},
    {"batch_size": 1, "image_size": 33, "train_images": 5},
    {"trainable": "head"},
    {"trainable": "head", "train_images": 1},
    {"backbone": "test_efficientnet", "trainable": "head"},
    {"backbone": "test_efficientnet_gn"},
    {"frozen_batchnorm": "train", "image_size": 64},
    {"backbone": "skresnet18", "trainable": "head"},
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def made(tiny, cache):
    """The workspace of a short run of 65 images, for runs with these batch sizes; default: its own."""

    def workspace(settings, batch_sizes=None):
        if "efficientnet" in settings.get("backbone", ""):
            settings = {"trainable": "blocks.3", **settings}
        short = {"train_images": 65, "epochs": 1, "warmup_epochs": 0}
        config = tiny.model_copy(update=short | settings)
        sizes = [config.batch_size] if batch_sizes is None else batch_sizes
        return Workspace(config, cache, batch_sizes=sizes)

    return workspace


@pytest.mark.parametrize(("settings", "others"), REFUSED)
def test_a_last_batch_of_one_image_is_refused_where_it_would_fail(made, settings, others):
    workspace = made(settings, [])
    config = workspace.config
    with pytest.raises(ModelError) as refused:
        made(settings)
    assert str(refused.value) == (
        f"batch_size = {config.batch_size}: the last batch of {config.train_images} training images has "
        f"1 image, of which a BatchNorm of {config.backbone} gets 1 value per channel, at image_size = "
        f"{config.image_size}; allowed is another batch_size or train_images{others}"
    )
    [(_, outcome)] = train_epoch([Run(config, workspace)])
    assert "Expected more than 1 value per channel" in str(outcome)


@pytest.mark.parametrize("settings", TAKEN)
def test_a_last_batch_of_one_image_is_taken_where_it_can_be(made, settings):
    workspace = made(settings)
    [result] = train(workspace.config, workspace)
    assert result.finite


@pytest.mark.parametrize(
    ("images", "sizes", "wrong"),
    [
        (65, [32, 64, 128], "32 or 64"),
        (300, [64, 32, 299, 23, 13], "13 or 23 or 299"),
        (300, [64, 1, 150, 300, 1000], "1"),
        (2, [2, 1, 64], "1"),
        (1, [1, 64], "1 or 64"),
    ],
)
def test_every_batch_size_is_looked_at(made, images, sizes, wrong):
    settings = {"train_images": images}
    with pytest.raises(ModelError, match=f"^batch_size = {wrong}: the last batch of {images} "):
        made(settings, sizes)
    made(settings, [size for size in sizes if str(size) not in wrong.split(" or ")])


@pytest.mark.parametrize(
    ("backbone", "trainable", "size"),
    [
        ("resnetaa34d", "layer4", 48),
        ("resnetaa34d", "head", 48),  # in the trunk
        ("resnetaa34d", "stem", 176),
        ("resnetaa50", "layer4", 80),
        ("resnetaa50", "head", 1000),
    ],
)
def test_an_image_size_that_a_backbone_does_not_take(tiny, backbone, trainable, size):
    settings = {"backbone": backbone, "trainable": trainable, "image_size": size}
    config = tiny.model_copy(update=settings)
    with pytest.raises(
        ModelError, match=f"^image_size = {size}: {backbone} takes no images of that size"
    ):
        check_size(config, load_backbone(config))
    with pytest.raises(ModelError, match="give another, such as a multiple of 32"):
        stage_table(config, 26)
    other = config.model_copy(update={"image_size": 64})
    check_size(other, load_backbone(other))
