"""Runs that go on from runs: lengthened by `--lengthen`, or begun with another's weights by `--init`."""

import json
import os
import shutil
import signal
import tomllib

import pytest
import tomli_w
import torch
from safetensors import safe_open

from tests.integration.conftest import end_of, wait_for_epoch
from trainer.checkpoint import Checkpoints
from trainer.config import TrainConfig
from trainer.run import learning_rate


@pytest.fixture
def train(config, start):
    """Trains the configuration in a process of its own, and kills that in the middle of an epoch."""

    def go(*words, kill=None, code=0):
        process = start(config, *words)
        if kill:
            epoch, number = kill
            wait_for_epoch(process, epoch)
            os.kill(process.pid, number)
        assert end_of(process) == code, process.output.read_text()
        return process.output.read_text()

    return go


@pytest.fixture
def small(config):
    """The same configuration with images that are trained on in no time."""
    config.write_text(config.read_text().replace("image_size = 96", "image_size = 32"))


def change(config, name, **values):
    """Another configuration with other values."""
    tables = tomllib.loads(config.read_text())
    tables["train"] |= values
    config.with_name(name).write_text(tomli_w.dumps(tables))
    return name


def description(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["atelier"])


def rows(run):
    """The lines of the curve, without what a machine's speed decides."""
    lines = (run / "curve.csv").read_text().splitlines()
    return [line.split(",")[:8] for line in lines]


def assert_same_run(one, other):
    for name in ("best.safetensors", "last.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert rows(one) == rows(other)
    states = [Checkpoints(run).latest() for run in (one, other)]
    for key in ("config", "lengthened", "init", "step"):
        assert states[0][key] == states[1][key]
    moments = [state["optimizer"]["state"] for state in states]
    for number, tensors in moments[0].items():
        assert all(torch.equal(moments[1][number][key], tensor) for key, tensor in tensors.items())
    assert len(moments[0]) == len(moments[1]) > 0


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("finished", [True, False])
def test_a_lengthened_run_that_is_killed_equals_an_unbroken_one(train, config, tmp_path, finished):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    if finished:
        train("--run", "whole")
    else:
        train("--run", "whole", kill=(2, signal.SIGINT), code=130)
    [before] = {description(path)["epoch"] for path in whole.glob("best*")}
    shutil.copytree(whole, broken)
    longer = ["--epochs", "8", "--lengthen"]
    said = train("--run", "whole", *longer)
    assert said.count("lengthened from 4 to 8 epochs") == 1
    assert "an unbroken run of 8 epochs is another, with higher rates up to there" in said
    train("--run", "broken", *longer, kill=(5, signal.SIGKILL), code=-9)
    train("--run", "broken", *longer, kill=(6, signal.SIGINT), code=130)
    # From its first checkpoint on it is an ordinary run of its new length.
    assert "lengthened" not in train("--run", "broken", "--epochs", "8")
    assert_same_run(whole, broken)

    values = tomllib.loads(config.read_text())["train"]
    short, long = TrainConfig(**values), TrainConfig(**values | {"epochs": 8})
    [record] = description(whole / "last.safetensors")["lengthened"]
    assert (record["before"], record["epochs"]) == (4, 8)
    assert record["position"] == 4 if finished else 2 < record["position"] < 3
    ends = [epoch + 4 / 5 for epoch in range(8)]  # where the last of an epoch's 5 steps begins
    rates = [learning_rate(end, short if end < record["position"] else long) for end in ends]
    header, *lines = rows(whole)
    assert [float(line[header.index("lr")]) for line in lines] == rates

    accuracies = [float(line[header.index("val_accuracy")]) for line in lines]
    best = description(whole / "best.safetensors")
    assert best["epoch"] == accuracies.index(max(accuracies))
    assert best["config"]["epochs"] == (4 if finished and best["epoch"] == before else 8)
    assert description(whole / "last.safetensors")["epoch"] == 7


def test_what_cannot_be_lengthened_is_refused_and_left_as_it_is(atelier, small, tmp_path):
    atelier("train", "c.toml", "--run", "r")
    before = files(tmp_path / "r")
    for words, expected in (
        (["--epochs", "8"], "made with epochs = 4, this run has 8; --lengthen makes it longer; else"),
        (["--epochs", "2", "--lengthen"], "made with epochs = 4, this run has 2; use the same"),
        (["--epochs", "2"], "made with epochs = 4, this run has 2; use the same"),
        (["--epochs", "8", "--lengthen", "--warmup-epochs", "2"], "warmup_epochs = 1, this run has 2"),
        (["--epochs", "8", "--lengthen", "--train-on", "train+val"], "train_on = 'train'"),
        (["--init", "r"], "made with init = None, this run has 'SHA-256 "),
    ):
        error = atelier("train", "c.toml", "--run", "r", *words, code=2).stderr.splitlines()[-1]
        assert error.startswith("error: ")
        assert expected in error
        assert files(tmp_path / "r") == before
    error = atelier("train", "c.toml", "--run", "nowhere", "--lengthen", code=2).stderr
    assert error == "error: --lengthen: no run in nowhere; leave that out, or give another --run\n"
    assert not (tmp_path / "nowhere").exists()
    # With the length that it has, it is as if nothing was said.
    atelier("train", "c.toml", "--run", "r", "--lengthen")


def test_a_model_ahead_of_its_checkpoint_holds_the_run_to_its_schedule(atelier, small, tmp_path):
    """As after a kill between the two, in the first epochs of a longer schedule."""
    atelier("train", "c.toml", "--run", "r")
    shutil.copytree(tmp_path / "r", tmp_path / "longer")
    atelier("train", "c.toml", "--run", "longer", "--epochs", "6", "--lengthen")
    shutil.copy(tmp_path / "longer" / "last.safetensors", tmp_path / "r" / "best.safetensors")
    before = files(tmp_path / "r")
    for words in (["--epochs", "9", "--lengthen"], []):
        error = atelier("train", "c.toml", "--run", "r", *words, code=2).stderr.splitlines()[-1]
        assert "best.safetensors: is of epoch 6 of 6, and no checkpoint has more than 4" in error
        assert "first go on with --epochs 6 past that epoch" in error
        assert files(tmp_path / "r") == before
    atelier("train", "c.toml", "--run", "r", "--epochs", "6", "--lengthen")
    atelier("train", "c.toml", "--run", "r", "--epochs", "9", "--lengthen")
    lengths = description(tmp_path / "r" / "last.safetensors")["lengthened"]
    assert [(one["before"], one["epochs"], one["position"]) for one in lengths] == [(4, 6, 4), (6, 9, 6)]
    atelier("export-model", "r", "-o", "model")
    assert "After 6 of 6 epochs it was lengthened to 9" in (tmp_path / "model" / "README.md").read_text()


def test_a_run_that_begins_with_another_equals_an_unbroken_one_when_it_is_killed(
    train, config, tmp_path, atelier
):
    train("--run", "parent")
    change(config, config.name, lr=0.002, seed=3, trainable="layer3")
    said = train("--run", "whole", "--init", "parent")
    assert (
        "note: it begins with the weights of parent/best.safetensors; optimizer and schedule begin "
        "anew, with a warm-up of 1 to a rate of 0.002"
    ) in said
    train("--run", "broken", "--init", "parent", kill=(1, signal.SIGKILL), code=-9)
    train("--run", "broken", "--init", "parent", kill=(2, signal.SIGINT), code=130)
    # Another may not take its place, and it may go.
    (tmp_path / "parent" / "best.safetensors").unlink()
    before = files(tmp_path / "broken")
    error = atelier("train", "c.toml", "--run", "broken", "--init", "parent", code=2).stderr
    assert error.endswith(
        "error: --init parent: is not what the run in broken began with, which is "
        "broken/init.safetensors; give that, or another --run\n"
    )
    assert files(tmp_path / "broken") == before
    atelier("export-model", "whole", "-o", "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "The run began with the weights of another run's model." in card
    assert "| weights | of another run, SHA-256 " in card
    # What comes of it does not take the place of what comes of its parent.
    assert (
        "is not of an export of this run"
        in atelier("export-model", "parent/last.safetensors", "-o", "model", code=2).stderr
    )
    shutil.rmtree(tmp_path / "parent")
    train("--run", "broken", "--init", "parent")
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    assert description(tmp_path / "whole" / "last.safetensors")["init"].startswith("SHA-256 ")
    atelier("predict", "broken")


def test_what_a_run_cannot_begin_with(atelier, small, config, tmp_path, finished_run):
    change(config, "efficient.toml", backbone="test_efficientnet", trainable="head")
    for words, expected in (
        (["c.toml", "--init", "nowhere"], "nowhere: no such run; give the run folder of a finished"),
        (
            ["c.toml", "--init", "c.toml"],
            "c.toml is a configuration; train it first, with: atelier train",
        ),
        (["c.toml", "--init", finished_run, "--weights", "w.pth"], "two sources of weights; give one"),
        (["efficient.toml", "--init", finished_run], "is from a run with test_resnet; give weights of"),
    ):
        error = atelier("train", *words, "--run", "r", code=2).stderr.splitlines()[-1]
        assert error.startswith("error: ")
        assert expected in error
        assert not (tmp_path / "r").exists()


def test_a_run_for_other_attributes_has_a_new_head_and_says_so(
    atelier, small, config, demo, tmp_path, finished_run
):
    shutil.copytree(demo, tmp_path / "other")
    listing = tmp_path / "other" / "split" / "list_attr_cloth.txt"
    listing.write_text(listing.read_text().replace("floral", "flowery"))
    name = change(config, "other.toml", data=str(tmp_path / "other"))
    line = f"note: {finished_run}/best.safetensors has learned other attributes, so the head is new"
    assert line in atelier("train", name, "--init", finished_run).stderr.splitlines()
    assert "so the head is new" not in atelier("train", "c.toml", "--init", finished_run).stderr
    atelier("predict", "other.run", "--data", tmp_path / "other")


def test_the_script_of_a_run_that_goes_on_from_a_run(atelier, small, config, tmp_path, finished_run):
    with config.open("a") as file:
        file.write("[slurm.final]\n")
    (tmp_path / "r").mkdir()
    words = ["--run", "r", "--init", finished_run, "--epochs", "9", "--lengthen"]
    script = atelier("train", "c.toml", *words, "--dry-run").stdout
    assert script.splitlines()[-1].endswith(
        f"train --epochs 9 --run {tmp_path}/r --init {finished_run} --lengthen -- {tmp_path}/c.toml"
    )
    error = atelier("train", "c.toml", "--init", "nowhere", "--dry-run", code=2).stderr
    assert "nowhere: no such run" in error
