"""An exported model predicts without Atelier what it predicts here, and its card says what is known."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import timm
import tomli_w
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from scipy.special import softmax
from typer.testing import CliRunner

from search.cli import app
from trainer.dataset import read_dataset
from trainer.images import READER
from trainer.loop import train
from trainer.model_file import ModelFiles, SavedModel
from trainer.stream import prepared
from trainer.workspace import Workspace

ROOT = Path(__file__).parents[2]
FILES = {"model.safetensors", "config.json", "README.md"}
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Runs a script in a process in which none of Atelier's packages can be imported.
ALONE = (
    "import runpy, sys\n"
    "ours = ('atelier_command', 'search', 'trainer', 'storage', 'dashboards')\n"
    "sys.modules.update(dict.fromkeys(ours))\n"
    "sys.argv = sys.argv[1:]\n"
    "runpy.run_path(sys.argv[0], run_name='__main__')\n"
)


@pytest.fixture(scope="module")
def run_of(demo, tmp_path_factory):
    """Trains a small network until it tells images apart. Returns its run folder."""

    def make(tiny, backbone, trainable, **more):
        folder = tmp_path_factory.mktemp("run")
        changes = {"backbone": backbone, "trainable": trainable, "lr": 0.01, **more}
        workspace = Workspace(tiny.model_copy(update=changes), folder / "cache")
        files = ModelFiles(folder, workspace.dataset)
        list(train(workspace.config, workspace, keep=files.keep))
        return folder

    return make


@pytest.fixture
def atelier(tmp_path, home, monkeypatch):
    """Runs `atelier WORDS` without a database, and checks the exit code. Returns what it said."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()

    def run(*words, code=0):
        result = CliRunner().invoke(app, [*map(str, words)], catch_exceptions=False)
        assert result.exit_code == code, result.output
        return result.output

    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def pictures(demo, tmp_path):
    """The demo's validation images, and one that EXIF turns."""
    paths = [demo / path for path in read_dataset(demo).split("val").paths]
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(paths[0]) as image:
        image.crop((0, 0, 60, 120)).save(tmp_path / "turned.jpg", exif=exif)
    return [*paths, tmp_path / "turned.jpg"]


def by_the_snippet(folder, pictures):
    """What the code of the documentation prints: for each picture, attribute and share by category."""
    [text] = PYTHON.findall((ROOT / "docs" / "confirm.md").read_text("utf-8"))
    assert len(text.splitlines()) <= 20
    script = folder.with_suffix(".py")
    script.write_text(text)
    command = [sys.executable, "-c", ALONE, script, folder, *pictures]
    ended = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    found = {str(picture): {} for picture in pictures}
    for line in ended.stdout.splitlines():
        picture, category, attribute, share = line.split("\t")
        found[picture][category] = (attribute, float(share))
    return list(found.values())


def by_onnx(folder, pictures, at_once):
    """The same by ONNX Runtime, from prepared pixels."""
    config = json.loads((folder / "config.json").read_text())
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    images = torch.stack(
        [prepared(picture, config["pretrained_cfg"]["input_size"][1]) for picture in pictures]
    )
    for part in torch.split(images, at_once):
        [logits] = session.run(["logits"], {"images": part.numpy()})
        for row in logits:
            shares = [softmax(row[slice(*category["logits"])]) for category in config["categories"]]
            yield {
                category["name"]: (category["labels"][share.argmax()], share.max())
                for category, share in zip(config["categories"], shares, strict=True)
            }


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert {name: attribute for name, (attribute, _) in one.items()} == {
            name: attribute for name, (attribute, _) in other.items()
        }
        for name, (_, share) in one.items():
            assert share == pytest.approx(other[name][1], abs=1e-4)


@pytest.mark.parametrize(
    ("backbone", "trainable", "more"),
    [
        ("test_resnet", "layer4", {"frozen_batchnorm": "train"}),
        ("test_efficientnet", "conv_head", {}),
    ],
)
def test_the_same_is_predicted_without_atelier(
    run_of, tiny, atelier, pictures, tmp_path, backbone, trainable, more
):
    run = run_of(tiny, backbone, trainable, **more)
    atelier("export-model", run, "-o", "model", "--to", "onnx")
    folder = tmp_path / "model"
    expected = list(SavedModel(run / "best.safetensors").look_at(pictures))
    assert len({tuple(one.values()) for one in expected}) > len(pictures) / 2
    assert any(len({one[name][0] for one in expected}) > 1 for name in expected[0])
    assert_same(by_the_snippet(folder, pictures), expected)
    for at_once in (len(pictures), 1):
        assert_same(list(by_onnx(folder, pictures, at_once)), expected)


def test_the_tensors_have_timms_names_and_the_files_nothing_of_this_machine(
    finished_run, atelier, tmp_path, demo
):
    said = atelier("export-model", finished_run, "-o", "model", "--to", "onnx")
    assert said.splitlines()[-1].startswith("the model is in model: model.safetensors, ")
    folder = tmp_path / "model"
    assert {path.name for path in folder.iterdir()} == {*FILES, "model.onnx"}
    saved = safetensors.torch.load_file(folder / "model.safetensors")
    names = timm.create_model("test_resnet", num_classes=0).state_dict().keys()
    linear = [f"fc.{layer}.{kind}" for layer in (0, 2, 5) for kind in ("weight", "bias")]
    assert saved.keys() == {*names, *linear}
    assert [saved[f"fc.{layer}.weight"].shape[0] for layer in (0, 2, 5)] == [512, 128, 26]
    for path in folder.iterdir():
        for word in (str(demo), str(ROOT), "site-packages"):
            assert word.encode() not in path.read_bytes(), path

    # timm itself finds the network without its head.
    images = torch.rand(2, 3, 32, 32)
    trunk = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    whole = SavedModel(finished_run / "best.safetensors", torch.device("cpu")).as_timm()
    torch.testing.assert_close(whole.fc(trunk(images)), whole(images))


def test_the_card_has_the_code_of_the_documentation(finished_run, atelier, tmp_path):
    atelier("export-model", finished_run)
    card = (tmp_path / "model" / "README.md").read_text()
    assert PYTHON.findall(card) == PYTHON.findall((ROOT / "docs" / "confirm.md").read_text("utf-8"))


ORIGIN = {
    "study": "fashion",
    "trial": 18,
    "standing": "confirmed",
    "reader": READER,
    "accuracy": {
        **{"value": 0.6553, "error": 0.0161, "low": 0.6236, "high": 0.6867},
        **{"noise": "images and seeds", "seeds": 5, "probability_best": 0.97, "optimism": 0.0049},
    },
}


@pytest.fixture
def exported(atelier, tiny, tmp_path):
    """Trains a configuration with this origin, and exports its model. Returns the model's card."""

    def export(origin, *words):
        tables = {"format": 1, "train": tiny.model_dump(exclude_none=True), "origin": origin}
        (tmp_path / "c.toml").write_text(tomli_w.dumps(tables))
        atelier("train", "c.toml", *words)
        atelier("export-model", "c.run")
        return ModelCard.load(tmp_path / "model" / "README.md")

    return export


def test_the_card_says_what_the_search_knew(exported, tmp_path, demo):
    card = exported(ORIGIN, "--epochs", "4", "--warmup-epochs", "1")
    for line in (
        "The configuration is trial 18 of the search `fashion`: confirmed.",
        "in 5 runs: 65.53 % (95 %: 62.36 to 68.67; noise of images and seeds).",
        "for the trial that it puts first is expected to be too high by 0.49 points.",
        "- This run has epochs = 4 instead of 3.",
    ):
        assert line in card.text
    assert card.text.count("This run has") == 1
    with safe_open(tmp_path / "c.run" / "best.safetensors", "pt") as file:
        [text] = file.metadata().values()
    value = json.loads(text)["val_accuracy"]
    [result] = card.data.eval_results
    assert (card.data.library_name, card.data.pipeline_tag) == ("timm", "image-classification")
    assert (result.dataset_name, result.dataset_split) == ("demo", "val")
    assert result.metric_value == pytest.approx(value)
    percent = re.search(r"([\d.]+) % \(95 %: ([\d.]+) to ([\d.]+); noise of images\)", card.text)
    found, low, high = map(float, percent.groups())
    assert found == pytest.approx(100 * value, abs=0.005)
    assert 0 < low < found < high < 100

    # The images of each attribute, counted from the lists themselves.
    rows = {
        name: np.loadtxt(demo / "split" / f"{name}_attr.txt", dtype=int) for name in ("train", "val")
    }
    sleeves = [int((rows[name][:, 1] == 0).sum()) for name in ("train", "val")]
    assert "| long_sleeve | sleeve | {} | {} |".format(*sleeves) in card.text


def test_the_card_of_a_configuration_that_no_search_has_found(exported):
    text = exported({}, "--train-on", "train+val").text
    assert "No search has found the configuration." in text
    assert "so nothing was validated" in text
    assert "%" not in text.partition("## Use")[0]


def test_an_origin_without_an_accuracy(exported):
    text = exported({"study": "s", "trial": 1, "standing": "chosen by hand", "accuracy": {}}).text
    assert "trial 1 of the search `s`: chosen by hand." in text
    assert "It" not in text.partition("chosen by hand.")[2].partition("## Use")[0]


def as_of_an_earlier_version(path):
    """Take away what earlier versions did not keep."""
    with safe_open(path, "pt") as file:
        [(key, text)] = file.metadata().items()
    values = json.loads(text)
    del values["facts"]
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, {key: json.dumps(values)})


def test_of_a_run_of_an_earlier_version_nothing_is_known(exported, atelier, tmp_path):
    exported(ORIGIN)
    as_of_an_earlier_version(tmp_path / "c.run" / "best.safetensors")
    atelier("export-model", "c.run")
    text = (tmp_path / "model" / "README.md").read_text()
    assert "Nothing is known of where the configuration comes from" in text
    assert "Nothing more is known of it" in text
    assert "18" not in text.partition("## Use")[0]


def test_an_export_replaces_only_its_own(run_of, finished_run, tiny, atelier, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    atelier("export-model", finished_run, "--to", "onnx")
    before = (folder / "model.safetensors").read_bytes()
    atelier("export-model", finished_run / "last.safetensors")
    assert {path.name for path in folder.iterdir()} == FILES  # an ONNX file would be of another epoch
    assert (folder / "model.safetensors").read_bytes() == before  # there was one epoch
    said = atelier("export-model", run_of(tiny, "test_resnet", "head"), code=2)
    assert "model: has README.md, which is not of an export of this run; give another folder" in said
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere: no such run; give the run folder of a finished: atelier train"),
        (["unfinished"], "unfinished: the run is not finished; go on with atelier train"),
        (["junk.safetensors"], "junk.safetensors: cannot be read"),
        (["odd.safetensors"], "odd.safetensors: what it says of its training cannot be read"),
        (["{run}", "-o", "file"], "file: is a file; give a folder"),
        (["{run}", "-o", "full"], "full: has notes.txt, which is not of an export of this run"),
        (["{run}", "-o", "mine"], "mine: has config.json, which is not of an export of this run"),
        (["{run}", "-o", "odd"], "odd: has README.md, which is not of an export of this run"),
        (["{run}", "--to", "tflite"], "--to 'tflite': allowed is onnx, or leave it out"),
        (["{run}", "--to", "onnx"], "no package onnxscript is installed, and a model in ONNX needs"),
    ],
)
def test_what_cannot_be_exported(atelier, finished_run, tmp_path, monkeypatch, words, said):
    for name in ("unfinished", "full", "mine", "odd/README.md"):
        (tmp_path / name).mkdir(parents=True)
    model = (finished_run / "best.safetensors").read_bytes()
    files = {
        "unfinished/best.safetensors": model,
        "junk.safetensors": model[:5000],
        "file": b"mine",
        "full/notes.txt": b"mine",
        "mine/config.json": b"{}",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with safe_open(finished_run / "best.safetensors", "pt") as file:
        [(key, text)] = file.metadata().items()
    odd = {key: json.dumps(json.loads(text) | {"facts": {"attributes": 1}})}
    tensors = safetensors.torch.load_file(finished_run / "best.safetensors")
    safetensors.torch.save_file(tensors, tmp_path / "odd.safetensors", odd)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    before = sorted(tmp_path.rglob("*"))
    line = atelier("export-model", *(word.format(run=finished_run) for word in words), code=2)
    assert line.count("\n") == 1
    assert said in line
    assert sorted(tmp_path.rglob("*")) == before
    assert all((tmp_path / name).read_bytes() == content for name, content in files.items())
