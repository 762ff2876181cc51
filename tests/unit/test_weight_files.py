"""Weights files as people have them: in any wrapper the same weights, or a line that says why not."""

import argparse
import datetime
import gzip
import io
import json
import logging
import os
import pathlib
import pickle
import tarfile
import zipfile
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import safetensors.torch
import timm
import tomli_w
import torch
from torch import nn
from typer.testing import CliRunner

from search.cli import app
from search.errors import InputError
from search.slurm.submit import check_weights
from trainer.checkpoint import Checkpoints
from trainer.config import TrainConfig
from trainer.kind import kind_of
from trainer.loop import train
from trainer.model import ModelError, load_backbone
from trainer.model_file import ModelFiles, SavedModel
from trainer.torch_file import reason
from trainer.workspace import Workspace

RESNET, EFFICIENTNET = "test_resnet", "test_efficientnet"  # timm's smallest


class Odd:
    """Of no class that torch knows; its code may not run."""

    ran = False

    def __init__(self, **values):
        self.__dict__.update(values)

    def __setstate__(self, state):
        Odd.ran = True


class OddDict(dict):
    """As Lightning's AttributeDict."""

    def __setitem__(self, key, value):
        Odd.ran = True


class Evil:
    """As it would be in a file that is an attack."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return eval, (self.command,)


class ByShell:
    def __reduce__(self):
        return os.system, ("true",)


def weights_of(backbone, seed=0):
    """As of a training, so that none has the value that a new network would have."""
    generator = torch.Generator().manual_seed(seed)
    state = timm.create_model(backbone).state_dict()
    return OrderedDict(
        (name, torch.rand(one.shape, generator=generator) + 0.1 if one.is_floating_point() else one + 7)
        for name, one in state.items()
    )


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def loaded(backbone, path):
    config = TrainConfig(data=".", backbone=backbone, weights=str(path), trainable="head")
    stages = load_backbone(config).stages
    return {f"{k}/{name}": one for k, part in stages.items() for name, one in part.state_dict().items()}


def assert_same(one, other, ints=True):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        if ints or tensor.is_floating_point():
            assert tensor.dtype == other[name].dtype
            assert torch.equal(tensor, other[name]), name


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A backbone's stages as they are with `weights_of` in a plain file."""
    made = {}
    for backbone in (RESNET, EFFICIENTNET):
        path = tmp_path_factory.mktemp("plain") / "w.pth"
        torch.save(weights_of(backbone), path)
        made[backbone] = loaded(backbone, path)
    for name, one in made[RESNET].items():
        stage, name = name.split("/")
        if stage == "layer2":
            assert torch.equal(one, weights_of(RESNET)[f"layer2.{name}"])
    return made


def without(state, *words):
    return {name: one for name, one in state.items() if not any(word in name for word in words)}


def lightning(state):
    return {
        "epoch": 3,
        "state_dict": prefixed(state, "model.backbone."),
        "hyper_parameters": OddDict(lr=0.1, sizes=OddDict(a=[1])),
        "callbacks": {Odd: {"best": torch.tensor(0.5), "when": datetime.datetime(2026, 1, 1)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
    }


def of_a_script(state):
    return {
        "arch": "resnet18",
        "args": argparse.Namespace(lr=0.1, out=pathlib.Path("a"), more=Odd(x=1)),
        "best_acc1": np.float64(0.5),
        "losses": np.zeros(3),
        "rng": np.random.get_state(),
        "counts": defaultdict(list, a=[1]),
        "kinds": {frozenset([1]): range(3), "dtype": torch.float32, "set": {1}},
        "state_dict": prefixed(state, "module."),
    }


def jumbled(state):
    """The same dict in two places, one that holds itself, and a copy."""
    file = {"model": state, "again": state, "copy": {n: one.clone() for n, one in state.items()}}
    return file | {"self": file}


WRAPPED = {
    "state_dict": lambda state: {"state_dict": state},
    "model_state_dict and optimizer": lambda state: {
        "epoch": 3,
        "model_state_dict": state,
        "optimizer_state_dict": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1}]},
    },
    "a key of one's own": lambda state: {"deep": {"in_here": [1, {"it is": state}]}},
    "a tuple": lambda state: (state, 5),
    "DataParallel": lambda state: prefixed(state, "module."),
    "compiled": lambda state: prefixed(state, "_orig_mod."),
    "both": lambda state: {"model": prefixed(state, "module._orig_mod.")},
    "an encoder with a projection": lambda state: {
        **prefixed(without(state, "fc", "classifier"), "encoder."),
        "projection.weight": torch.zeros(3, 3),
    },
    "averaged": lambda state: {**prefixed(state, "module."), "n_averaged": torch.tensor(3)},
    "no classifier": lambda state: without(state, "fc.", "classifier."),
    "a classifier of other classes": lambda state: {
        name: one[:5] if name.startswith(("fc.", "classifier.")) else one for name, one in state.items()
    },
    "as float64": lambda state: {
        n: one.double() if one.is_floating_point() else one for n, one in state.items()
    },
    "as Parameters": lambda state: {
        n: nn.Parameter(one) if one.is_floating_point() else one for n, one in state.items()
    },
    "a dict of no dict's class": lambda state: OddDict(model=OddDict(state)),
    "an object with attributes": lambda state: {"train_state": Odd(params=state, step=3)},
    "a nested dict": lambda state: nested(state),
    "Lightning's": lightning,
    "a script's": of_a_script,
    "jumbled": jumbled,
}


def nested(state):
    tree = {}
    for name, one in state.items():
        *places, last = name.split(".")
        branch = tree
        for place in places:
            branch = branch.setdefault(place, {})
        branch[last] = one
    return tree


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("backbone", [RESNET, EFFICIENTNET])
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrapped_weights_are_those_of_the_plain_file(wrapper, backbone, zipped, plain, tmp_path):
    path = tmp_path / "checkpoint.pth.tar"
    content = WRAPPED[wrapper](weights_of(backbone))
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert_same(loaded(backbone, path), plain[backbone])
    assert not Odd.ran


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.bin", "w.ckpt", "w"])
def test_a_file_is_what_its_bytes_are(name, plain, tmp_path):
    state = weights_of(RESNET)
    for save in (torch.save, lambda state, path: safetensors.torch.save_file(state, path)):
        save(state, tmp_path / name)
        assert_same(loaded(RESNET, tmp_path / name), plain[RESNET])


def test_old_files_count_no_batches(plain, tmp_path):
    torch.save(without(weights_of(RESNET), "num_batches_tracked"), tmp_path / "w.pth")
    assert_same(plain[RESNET], loaded(RESNET, tmp_path / "w.pth"), ints=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_as_many_bits(dtype, tmp_path):
    state = {n: one.to(dtype) for n, one in weights_of(RESNET).items()}
    torch.save(state, tmp_path / "half.pth")
    torch.save({name: one.float() for name, one in state.items()}, tmp_path / "whole.pth")
    assert_same(loaded(RESNET, tmp_path / "half.pth"), loaded(RESNET, tmp_path / "whole.pth"))


def test_the_log_says_what_was_taken(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    state = weights_of(RESNET)
    path = tmp_path / "w.pth"
    for plain in (state, without(state, "fc.")):
        torch.save(plain, path)
        loaded(RESNET, path)
    assert not caplog.messages
    torch.save({"state_dict": prefixed(state, "module."), "ema": {"decay": torch.zeros(1)}}, path)
    loaded(RESNET, path)
    assert caplog.messages == [
        f"weights = '{path}': the backbone's are under 'state_dict.module.'; "
        "not of the backbone: fc.weight, fc.bias and 1 more"
    ]


@pytest.fixture(scope="module")
def run_of(demo, tmp_path_factory):
    """Trains a run for an epoch, and returns its folder."""

    def make(backbone, trainable, **more):
        folder = tmp_path_factory.mktemp("run")
        config = TrainConfig(
            **{
                **dict(data=str(demo), backbone=backbone, weights="none", trainable=trainable),
                **dict(image_size=32, epochs=1, warmup_epochs=0, train_images=64, batch_size=32),
                **more,
            }
        )
        workspace = Workspace(config, folder / "cache")
        files = ModelFiles(folder, workspace.dataset)
        list(train(config, workspace, Checkpoints(folder / "checkpoints"), keep=files.keep))
        return folder

    return make


@pytest.mark.parametrize(
    ("backbone", "cuts"),
    [
        (RESNET, ["stem", "layer4", "head"]),
        (EFFICIENTNET, ["blocks.2", "conv_head"]),
    ],
)
def test_a_runs_own_file_gives_its_backbone(backbone, cuts, run_of):
    for cut in cuts:
        path = run_of(backbone, cut) / "best.safetensors"
        model = SavedModel(path)
        taken = loaded(backbone, path)
        parts = [*model._trunk.named_children(), *model._tail[0].named_children()]
        own = {f"{k}/{name}": one for k, part in parts for name, one in part.state_dict().items()}
        assert_same({name.replace("blocks.", "blocks_"): one for name, one in taken.items()}, own)


def test_a_checkpoint_with_the_whole_network_is_taken(run_of):
    folder = run_of(RESNET, "layer4", frozen_batchnorm="train")
    [checkpoint] = (folder / "checkpoints").glob("*.pt")
    assert_same(loaded(RESNET, checkpoint), loaded(RESNET, folder / "last.safetensors"))


def refusal(backbone, path):
    with pytest.raises(ModelError) as raised:
        loaded(backbone, path)
    said = str(raised.value)
    assert said.isprintable(), said  # so it is one line, and without colours
    assert "torch.load" not in said
    assert "weights_only" not in said
    assert said.startswith(f"weights = '{path}': ")
    return said


def damaged(state, name, value):
    state = dict(state)
    state[name] = state[name].clone()
    state[name].view(-1)[:3] = value
    return state


def shaped(state, name, *shape):
    return {**state, name: torch.zeros(shape)}


def maze(levels):
    """With more ways through it than anybody can go."""
    inner = {}
    for _ in range(levels):
        inner = {"left": inner, "right": inner}
    return inner


REFUSED = {
    "student and teacher": (
        lambda state: {"student": state, "teacher": weights_of(RESNET, 1)},
        ["under 'student.' and under 'teacher.'", "differ", "save those that you mean"],
    ),
    "an average beside": (
        lambda state: {"state_dict": state, "state_dict_ema": weights_of(RESNET, 1)},
        ["under 'state_dict.' and under 'state_dict_ema.'"],
    ),
    "two encoders": (
        lambda state: {
            "state_dict": prefixed(state, "module.encoder_q.")
            | prefixed(weights_of(RESNET, 1), "module.encoder_k.")
        },
        ["'state_dict.module.encoder_q.' and under 'state_dict.module.encoder_k.'"],
    ),
    "with and without": (
        lambda state: state | prefixed(weights_of(RESNET, 1), "module."),
        ["at the top and under 'module.'"],
    ),
    "one name twice": (
        lambda state: {"a.b": state, "a": {"b": weights_of(RESNET, 1)}},
        ["two tensors by the name a.b.conv1.0.weight"],
    ),
    "a part": (
        lambda state: without(state, "layer4.", "layer3."),
        ["lacks", "tensors: layer3.0.conv1.weight", "give weights of test_resnet"],
    ),
    "another backbone": (
        lambda state: {"arch": "resnet26", "model": without(state, "layer4.")},
        ["names resnet26 as its backbone, and lacks"],
    ),
    "another family": (
        lambda state: weights_of(EFFICIENTNET),
        ["lacks", "give weights of test_resnet"],
    ),
    "names of another kind": (
        lambda state: {"a": torch.zeros(1), "b": {"c": torch.zeros(1)}, "d\n\x1b[1m": torch.zeros(1)},
        ["has none of the backbone's tensors, but a, b.c and 1 more"],
    ),
    "another shape": (
        lambda state: {"model": shaped(state, "layer2.0.conv1.weight", 5, 4, 3, 3)},
        ["model.layer2.0.conv1.weight is of shape [5, 4, 3, 3], and the backbone's of ["],
    ),
    "a bare tensor": (lambda state: torch.zeros(3), ["but a tensor without a name"]),
    "no tensors": (lambda state: {"epoch": 3, "args": Odd(x=1)}, ["holds no tensors"]),
    "dicts as a maze": (lambda state: maze(60), ["holds no tensors"]),
    "a number": (lambda state: 3, ["holds no tensors"]),
    "one tensor": (lambda state: torch.zeros(3), ["has none of the backbone's tensors"]),
    "a whole network": (
        lambda state: timm.create_model(RESNET),
        ["holds a whole timm.models.resnet.ResNet, not its weights; save", "model.state_dict()"],
    ),
    "a whole network inside": (
        lambda state: {"epoch": 3, "model": nn.DataParallel(timm.create_model(RESNET))},
        ["holds a whole torch.nn.parallel.data_parallel.DataParallel"],
    ),
    "whole numbers": (
        lambda state: {n: one.mul(100).to(torch.int8) for n, one in state.items()},
        ["conv1.0.weight is of int8; allowed are dense tensors of float32, float16, bfloat16, float64"],
    ),
    "complex numbers": (
        lambda state: {**state, "conv1.0.weight": state["conv1.0.weight"].to(torch.complex64)},
        ["conv1.0.weight is of complex64"],
    ),
    "sparse": (
        lambda state: {**state, "conv1.0.weight": state["conv1.0.weight"].to_sparse()},
        ["conv1.0.weight is of sparse_coo"],
    ),
    "without values": (
        lambda state: {**state, "conv1.0.weight": state["conv1.0.weight"].to("meta")},
        ["conv1.0.weight is without values"],
    ),
    "NaN": (
        lambda state: damaged(state, "layer2.0.bn1.running_var", torch.nan),
        ["3 of the", "values of layer2.0.bn1.running_var are NaN or infinite"],
    ),
    "infinity": (
        lambda state: {
            "model": damaged(damaged(state, "conv1.0.weight", torch.inf), "bn1.bias", -torch.inf)
        },
        ["3 of the", "values of conv1.0.weight, and some of 1 more tensors are NaN or infinite"],
    ),
    "more than float32 holds": (
        lambda state: damaged({n: one.double() for n, one in state.items()}, "bn1.weight", 1e300),
        ["values of bn1.weight are NaN or infinite"],
    ),
    "an attack by a shell": (
        lambda state: {"x": ByShell(), "state_dict": state},
        ["cannot be read (UnpicklingError: Trying to load unsupported GLOBAL posix.system"],
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(kind, tmp_path):
    make, expected = REFUSED[kind]
    path = tmp_path / "w.pth"
    torch.save(make(weights_of(RESNET)), path)
    said = refusal(RESNET, path)
    for words in expected:
        assert words in said


def test_no_code_of_a_file_is_run(plain, tmp_path):
    path, sign = tmp_path / "w.pth", tmp_path / "ran"
    attack = Evil(f"__import__('pathlib').Path({str(sign)!r}).touch()")
    for zipped in (True, False):
        content = {"state_dict": weights_of(RESNET), "x": attack, "y": [attack, {attack: 1}]}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        assert_same(loaded(RESNET, path), plain[RESNET])
    assert not sign.exists()
    torch.load(path, weights_only=False)
    assert sign.exists()  # it is an attack


def zip_of(members, path):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def as_bytes(save):
    buffer = io.BytesIO()
    save(buffer, np.zeros(3))
    return buffer.getvalue()


def tar_of(state, path):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("w.pth"))


def cut_off(state, path, zipped=True):
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:-3000])


def cut_off_safetensors(state, path):
    path.write_bytes(safetensors.torch.save(state)[:-3000])


def scripted(state, path):
    with pytest.warns(FutureWarning, match="deprecated"):
        torch.jit.script(nn.Linear(2, 2)).save(path)


def of_bytes(data):
    return lambda state, path: path.write_bytes(data)


OTHER_FILES = {
    "empty": (
        of_bytes(b""),
        "is an empty file (get it again); allowed is a safetensors file or a file of",
    ),
    "a page": (of_bytes(b"\r\n<!DOCTYPE html>\n<html>Not found"), "is an HTML page (of a download that"),
    "an error": (
        of_bytes(b"<?xml version='1.0'?><Error>"),
        "is an XML text (of a download that failed?)",
    ),
    "a pointer": (
        of_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "is a Git LFS pointer (run: git lfs pull)",
    ),
    "TorchScript": (scripted, "is a TorchScript archive"),
    "ONNX": (of_bytes(b"\x08\x08\x12\x07pytorch\x1a\x052.1.0"), "is an ONNX model"),
    "Keras": (of_bytes(b"\x89HDF\r\n\x1a\n" + bytes(90)), "is an HDF5 file, as Keras writes"),
    "Keras 3": (
        lambda state, path: zip_of({"metadata.json": "{}", "model.weights.h5": ""}, path),
        "is a Keras model",
    ),
    "npz": (lambda state, path: path.write_bytes(as_bytes(np.savez)), "is a NumPy .npz archive"),
    "npy": (lambda state, path: path.write_bytes(as_bytes(np.save)), "is a NumPy array"),
    "gzip": (
        lambda state, path: path.write_bytes(gzip.compress(b"x")),
        "is a gzip file (unpack it first)",
    ),
    "a zip": (lambda state, path: zip_of({"w/w.pth": "x"}, path), "is a zip archive (unpack it first)"),
    "a tar": (tar_of, "is a tar archive (unpack it first)"),
    "an index": (
        of_bytes(json.dumps({"weight_map": {"conv1.weight": "1.safetensors"}}).encode()),
        "is a JSON text, as an index of other files",
    ),
    "a pickle": (
        lambda state, path: path.write_bytes(pickle.dumps({"a": 1})),
        "is a pickle that is not of torch.save",
    ),
    "noise": (of_bytes(b"noise" * 99), "is of no known kind; allowed is"),
    "a folder": (lambda state, path: path.mkdir(), "is a folder; give the file of weights in it"),
    "nothing": (
        lambda state, path: None,
        "no such file; give a file's path with --weights, or timm, or none",
    ),
    "half a zip": (cut_off, "is a zip archive that is damaged or cut off (get it again)"),
    "half of an older file": (lambda state, path: cut_off(state, path, False), "cannot be read ("),
    "half of a safetensors file": (cut_off_safetensors, "cannot be read (SafetensorError: "),
    "a late protocol": (
        lambda state, path: torch.save(state, path, pickle_protocol=4),
        "cannot be read (UnpicklingError: Unsupported operand 149); get the file again, or save it anew",
    ),
    "an older whole network": (
        lambda state, path: torch.save(
            timm.create_model(RESNET), path, _use_new_zipfile_serialization=False
        ),
        "holds a whole network",
    ),
}


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("kind", OTHER_FILES)
def test_other_files_are_called_what_they_are(kind, tmp_path):
    make, expected = OTHER_FILES[kind]
    path = tmp_path / "w.pth"
    make(weights_of(RESNET), path)
    assert expected in refusal(RESNET, path)


def test_submit_looks_at_the_file(tiny, tmp_path):
    path = tmp_path / "w.pth"
    config = tiny.model_copy(update={"weights": str(path)})
    path.write_bytes(b"<html>")
    with pytest.raises(InputError, match="is an HTML page"):
        check_weights(config)
    torch.save({}, path)
    check_weights(config)


def test_a_runs_file_of_another_backbone(run_of, tmp_path):
    folder = run_of(EFFICIENTNET, "head")
    said = refusal(RESNET, folder / "best.safetensors")
    assert said.endswith("is from a run with test_efficientnet; give weights of test_resnet")


def test_a_checkpoint_with_a_part_of_the_network(run_of):
    [checkpoint] = (run_of(RESNET, "layer4") / "checkpoints").glob("*.pt")
    assert refusal(RESNET, checkpoint).endswith(
        "is a checkpoint and has only a run's trained part; give the run's best.safetensors"
    )


@pytest.mark.parametrize("name", ["trunk.layer2.0.bn1.running_var", "tail.1.5.bias"])
def test_a_runs_file_with_nan_is_no_model(name, run_of, tmp_path):
    path = run_of(RESNET, "layer4") / "best.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = damaged(safetensors.torch.load_file(path), name, torch.nan)
    safetensors.torch.save_file(state, tmp_path / "bad.safetensors", metadata)
    with pytest.raises(
        ModelError, match=f"3 of the .* values of {name} are NaN or infinite; give a run of"
    ):
        SavedModel(tmp_path / "bad.safetensors")


def test_what_torch_says_is_without_advice(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"x": Odd()}, path)
    with pytest.raises(pickle.UnpicklingError) as raised:
        torch.load(path, weights_only=True)
    assert "\x1b[" in str(raised.value)  # so it is worth a test
    name = f"{Odd.__module__}.Odd"
    assert reason(raised.value) == (
        f"UnpicklingError: Unsupported global: GLOBAL {name} was not an allowed global by default"
    )
    hints = (
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other\n"
        "For debugging consider passing CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA`\n"
    )
    assert reason(RuntimeError(hints)) == "RuntimeError: CUDA error: out of memory"
    assert reason(ValueError("got <x object at 0x7fd608229510>")) == "ValueError: got <x object>"


@pytest.mark.parametrize("verb", ["search", "train"])
def test_the_command_line_says_it_in_one_line(verb, study_text, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)  # elsewhere may be the best.toml of a search
    path, weights = tmp_path / "file.toml", tmp_path / "w.pth"
    torch.save({"a": weights_of(RESNET), "b": weights_of(RESNET, 1)}, weights)
    train = tiny.model_copy(update={"backbone": RESNET}).model_dump(exclude_none=True)
    path.write_text(study_text if verb == "search" else tomli_w.dumps({"train": train}))
    result = CliRunner().invoke(app, [verb, str(path), "--weights", str(weights)])
    assert result.exit_code == 2, result.output
    [line] = result.output.strip().splitlines()
    assert line.startswith(
        f"error: weights = '{weights}': has weights that fit under 'a.' and under 'b.'"
    )


def test_kinds_of_images(tmp_path):
    path = tmp_path / "a.jpg"
    for data, kind in (
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'>", "an SVG image"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "a WebP image"),
        (b"\xff\xd8\xff\xe0", "a JPEG image"),
    ):
        path.write_bytes(data)
        assert kind_of(path) == kind
