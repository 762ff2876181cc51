"""Weights by timm's tag, on a node without internet: from a cache that was filled before."""

import os
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file

from search.errors import InputError
from search.slurm.submit import check_weights

NAME = "resnet10t.c3_in1k"
LOAD = """
import sys, torch
from trainer.config import TrainConfig
from trainer.model import load_backbone
backbone = load_backbone(TrainConfig(data=".", backbone=sys.argv[1]))
torch.save({n: s.state_dict() for n, s in backbone.stages.items()}, sys.argv[2])
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's cache folder, empty."""
    import huggingface_hub.constants as constants

    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


def fill(hub, value=None):
    """As `hf download` leaves it, with weights that no other process could draw. Returns them.

    One of layer4's may have a given value.
    """
    commit = "0" * 40
    model = hub / f"models--timm--{NAME}"
    snapshot = model / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    state = timm.create_model(NAME, pretrained=False).state_dict()
    if value is not None:
        state["layer4.0.bn1.weight"][0] = value
    save_file(state, snapshot / "model.safetensors")
    return state


def test_weights_are_loaded_from_the_cache_without_internet(hub, tmp_path):
    state = fill(hub)
    result = tmp_path / "loaded.pt"
    subprocess.run(
        [sys.executable, "-c", LOAD, NAME, str(result)],
        env=os.environ | {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"},
        check=True,
    )
    loaded = torch.load(result, weights_only=True)
    for name, tensor in loaded["layer4"].items():
        assert torch.equal(tensor, state[f"layer4.{name}"])


def test_weights_of_the_cache_are_numbers(hub, tmp_path):
    fill(hub, torch.inf)
    ended = subprocess.run(
        [sys.executable, "-c", LOAD, NAME, str(tmp_path / "loaded.pt")],
        env=os.environ | {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1
    assert (
        "weights = 'timm': 1 of the 512 values of layer4.0.bn1.weight are NaN or infinite; get the"
        in ended.stderr
    )


def test_submit_wants_the_weights_to_be_in_the_cache(hub, tiny):
    config = tiny.model_copy(update={"backbone": NAME, "weights": "timm"})
    with pytest.raises(InputError, match=f"hf download timm/{NAME} config.json"):
        check_weights(config)
    fill(hub)
    check_weights(config)
    with pytest.raises(InputError, match=r"name the weights' tag too, as in resnet10t.TAG"):
        check_weights(config.model_copy(update={"backbone": "resnet10t"}))
