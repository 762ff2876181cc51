"""What was not finite first: each part of a run is spoilt in turn, and named."""

import itertools
import re
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import save_file

from trainer.checkpoint import Checkpoints
from trainer.loop import train, train_epoch
from trainer.run import Run
from trainer.stream import Stream
from trainer.workspace import Workspace

DIVERGED = "training diverged: lower lr or weight_decay"
STEPS = 5  # of an epoch of 300 images


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def prepared(tiny, cache):
    """A run with other settings, before its first epoch."""

    def run(**settings):
        # In bf16, as on a GPU, the remedy would be fp32.
        config = tiny.model_copy(update={"precision": "fp32"} | settings)
        return Run(config, Workspace(config, cache))

    return run


def cause(run, spoil=None, after=0):
    """Why the run's first epoch is not finite, where `spoil` is called with the run after some step."""
    steps = itertools.count(1)

    def interrupt(run, _):
        if next(steps) == after:
            with torch.no_grad():
                spoil(run)
        return False

    [(_, result)] = train_epoch([run], interrupt)
    assert not result.finite
    return result.cause


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"lr": 1e30}, f"the logits of every category, in step 3 of 5; {DIVERGED}"),
        (
            {"lr": 1e30, "frozen_batchnorm": "train"},
            f"the logits of every category, in step 3 of 5; {DIVERGED}",
        ),
        ({"lr": 1e30, "warmup_epochs": 0}, f"the logits of every category, in step 2 of 5; {DIVERGED}"),
        (
            {"lr": 1e12, "trainable": "head"},
            f"the loss of every category, while the logits are finite, in step 3 of 5; {DIVERGED}",
        ),
        (
            {"weight_decay": 1e39},
            "the logits of every category, in step 2 of 5; the learning rate was 0 until then: lower "
            "weight_decay, or give other weights",
        ),
        (
            {"weight_decay": 1e39, "precision": "bf16"},
            "lower weight_decay, or give other weights, or precision = 'fp32'",
        ),
    ],
)
def test_settings_that_overflow(prepared, settings, expected):
    assert cause(prepared(**settings)).endswith(expected)


def bias(run, category):
    """The last layer's bias for a category: a view."""
    names = run.workspace.dataset.categories
    return torch.split(run.tail[1][-1].bias, [*run.workspace.sizes])[names.index(category)]


def spoil_bias(run):
    bias(run, "neckline")[1] = torch.nan


def spoil_two(run):
    bias(run, "fit")[0] = torch.inf
    bias(run, "texture")[3] = -torch.inf


def stretch_bias(run):
    """So far that the difference of two logits overflows."""
    bias(run, "fit")[0], bias(run, "fit")[1] = 3e38, -3e38


def spoil_weights(run):
    run.tail[1][0].weight[7, 7] = torch.nan


def spoil_statistics(run):
    next(one for one in run.tail.modules() if hasattr(one, "running_var")).running_var[0] = torch.nan


@pytest.mark.parametrize(
    ("spoil", "after", "expected"),
    [
        (spoil_bias, 3, "the logits of category neckline, in step 4 of 5"),
        (spoil_two, 1, "the logits of categories texture, fit, in step 2 of 5"),
        (stretch_bias, 4, "the loss of category fit, while the logits are finite, in step 5 of 5"),
        (spoil_weights, 2, "the logits of every category, in step 3 of 5"),
        (spoil_weights, STEPS, "the weights of the tail, in the validation after step 5"),
        (
            spoil_statistics,
            STEPS,
            "the BatchNorms' running statistics of the tail, in the validation after step 5",
        ),
        (
            stretch_bias,
            STEPS,
            "the loss of category fit, while the logits are finite, in the validation after step 5",
        ),
    ],
)
def test_what_is_trained(prepared, spoil, after, expected):
    said = cause(prepared(), spoil, after)
    remedy = (
        DIVERGED if after > 1 else "the learning rate was 0 until then"
    )  # the warm-up's first rate is 0
    assert said.startswith(f"first {expected}; {remedy}")


@pytest.mark.parametrize(("split", "step"), [("train", 1), ("train", 3), ("train", 5), ("val", 5)])
def test_features_of_an_image(prepared, split, step):
    run = prepared(augment="none")
    workspace = run.workspace
    for _ in range(2):  # made, and then read
        trained = list(workspace.train_blocks(run.runnable_trunk, run.images.train, 0, 0, 256))
        validated = list(workspace.val_features(run.runnable_trunk, run.images.val))
    number = (step - 1) * 64 + 7 if split == "train" else 7
    row = workspace.stream.order(run.images.train, 0, 0)[number] if split == "train" else number
    kept = trained[number // 256][0] if split == "train" else validated[0]
    kept[number % 256, 0] = torch.inf  # nothing is copied: this is the memory that is read later
    where = f"in step {step} of 5" if split == "train" else "in the validation after step 5"
    name = workspace.dataset.split(split).paths[row]
    assert cause(run) == (
        f"first the trunk's features of {name}, {where}; look at that image, and mend it or leave it "
        "out of the split, or give other weights"
    )


def test_features_that_a_weights_file_makes_too_large(prepared, tmp_path):
    state = timm.create_model("test_resnet", pretrained=False).state_dict()
    state["bn1.weight"] *= 3e38  # finite, as it was before
    save_file(state, tmp_path / "w.safetensors")
    run = prepared(trainable="layer1", weights=str(tmp_path / "w.safetensors"))
    found = re.fullmatch(
        r"first the trunk's features of (\d+) of 64 images, such as img/\d+.jpg, in step 1 of 5; the "
        r"trunk learns nothing: give other weights",
        cause(run),
    )
    assert found
    assert 1 < int(found[1]) <= 64


def test_the_runs_own_trunk_stays_as_it_was(prepared):
    spoilt, sound = (prepared(lr=lr, frozen_batchnorm="train", epochs=1) for lr in (1e30, 1e-9))
    cause(spoilt)
    list(train_epoch([sound]))
    expected = sound.trunk.state_dict()
    assert all(torch.equal(one, expected[name]) for name, one in spoilt.trunk.state_dict().items())


def test_a_run_that_was_interrupted_after_it_went_wrong(tiny, cache, tmp_path):
    workspace, checkpoints = Workspace(tiny, cache), Checkpoints(tmp_path / "run")
    steps = itertools.count(1)

    def interrupt(run, _):
        step = next(steps)
        if step == 2:
            with torch.no_grad():
                spoil_bias(run)
        return step == 4

    assert list(train(tiny, workspace, checkpoints, interrupt)) == []
    result = next(train(tiny, workspace, checkpoints))
    assert result.cause == f"first the logits of category neckline, in step 3 of 5; {DIVERGED}"
    again = next(train(tiny, workspace, checkpoints))  # from the checkpoint's history
    assert (again.finite, again.cause) == (False, None)


def test_the_others_of_a_pack_get_what_they_get_alone(tiny, cache):
    workspace = Workspace(tiny, cache)
    alone = next(train(tiny, workspace))
    spoilt = Run(tiny.model_copy(update={"lr": 1e30}), workspace)
    results = dict(train_epoch([spoilt, Run(tiny, workspace)]))
    assert "in step 3 of 5" in results.pop(spoilt).cause
    [other] = results.values()
    assert replace(other, seconds=0, peak_memory=0) == replace(alone, seconds=0, peak_memory=0)
    assert other.cause is None


def test_a_finite_epoch_makes_no_features_again(prepared, monkeypatch):
    made, images = [], Stream.images

    def counted(*arguments):
        made.append(arguments)
        return images(*arguments)

    monkeypatch.setattr(Stream, "images", counted)
    finite, spoilt = prepared(), prepared(lr=1e30)
    for run in (finite, spoilt):
        run.evaluate()  # the first use tries the trunk
    made.clear()
    list(train_epoch([finite]))
    assert len(made) == 2  # blocks
    cause(spoilt)
    assert len(made) == 2 + 2 + 1  # and the block of the third step again
