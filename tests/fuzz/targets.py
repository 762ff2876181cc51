"""Every reader of files that others may have written, and what it may answer to any bytes at all.

Allowed are a result and an error that the command line tells the user in one line; a traceback, a hang
or a gigabyte of memory is a fault. Another reader is one more entry in TARGETS. They are imported where
they are called, so that `instrumented.py` can instrument them, and only those that are asked for.
"""

import argparse
import hashlib
import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np
from PIL import ExifTags, Image, ImageCms, PngImagePlugin

from search.error_lines import one_line

if TYPE_CHECKING:
    from torch import Tensor

    from search.study_config import StudyConfig
    from storage.studies import StudyEntry

ROOT = Path(__file__).parents[2]
CASES = Path(__file__).parent / "cases"  # by target: inputs that were faults once

STUDY = """
[study]
name = "tiny"
max_trials = 2
max_gpu_hours = 1.5
score = "best"
rungs = [1]
[space]
lr = { low = 1e-3, high = 2e-3, log = true }
batch_size = [32, 64]
[train]
data = "data"
backbone = "resnet10t"
weights = "none"
epochs = 3
warmup_epochs = 1
[slurm.tuning]
time = "1-00:00:00"
setup = ["module load x"]
"""
CONFIG = """
format = 1
[train]
data = "data"
epochs = 3
warmup_epochs = 1
[origin]
study = "tiny"
trial = 3
dataset = "0123"
accuracy = { value = 0.5, low = 0.4, high = 0.6, noise = "images", seeds = 1 }
[slurm.final]
gpus = 1
"""
ATTRIBUTES = ["plain", "striped", "short", "long"]
SIZES = (2, 2)
FLAGS = b"2\nimage_name attribute_labels\nimg/val-0.jpg -1 1 -1 1\nimg/val-1.jpg 1 0 1 -1\n"
PARTITION = b"2\nimage_name evaluation_status\nimg/val-0.jpg train\nimg/val-1.jpg val\n"


@dataclass(frozen=True)
class Target:
    """One reader: it is given a file with the bytes, in a folder with all else that it needs."""

    read: Callable[[Path], object]
    seeds: Callable[[], Iterable[bytes]]  # valid files
    file: str = "file"  # the path in the folder
    beside: Callable[[Path], None] = lambda folder: None  # puts the rest into the folder
    share: int = 10  # of the inputs: fewer where one takes long

    def place(self, folder: Path) -> Path:
        """Prepare the folder. Returns the path for the bytes."""
        self.beside(folder)
        path = folder / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def answer(self, path: Path, data: bytes) -> str | None:
        """What the user is told about the bytes; None if they are accepted. Raises what is a fault."""
        path.write_bytes(data)
        try:
            self.read(path)
        except Exception as error:  # as the command line does; what is no user's is raised again
            line = one_line(error)
            if line is None:
                raise
            assert line.isprintable(), line  # so it is one line
            return line
        return None


def _read_study(path: Path) -> None:
    from search.toml_file import load_study_file

    _use(load_study_file(path))


def _read_override(path: Path) -> None:
    from search.toml_file import load_study_file

    # As Python decodes a command line, which may hold any bytes.
    text = path.read_bytes().decode("utf-8", "surrogateescape")
    _use(load_study_file(path.with_name("study.toml"), [text]))


def _use(file: "StudyConfig") -> None:
    """What every command does next with a study file."""
    from search.sampling import make_sampler

    file.parameters(), file.rungs(), file.largest, file.identity(), file.places()
    make_sampler(file, file.study.first)


def _read_config(path: Path) -> None:
    from search.export import changed, check_origin, load_bundle

    bundle = load_bundle(path)
    config, _ = changed(bundle, {"epochs": 7}, path)
    check_origin(bundle, config, "0123")


def _read_array(path: Path) -> None:
    from search.profile import SlurmProfile
    from search.slurm.script import render_script

    text = path.read_bytes().decode("utf-8", "surrogateescape")
    render_script(SlurmProfile(), text, ["worker"], Path("/"), {}, "log")


def _read_pack(path: Path) -> None:
    from search.cli.options import check_pack

    check_pack(path.read_bytes().decode("utf-8", "surrogateescape"))


def _read_dataset(path: Path) -> None:
    from trainer.check import check_dataset, summary
    from trainer.config import TrainConfig
    from trainer.dataset import read_dataset
    from trainer.division import attribute_table

    folder = path.parents[1]
    _, findings = check_dataset(folder)
    assert summary(findings).isprintable()
    dataset = read_dataset(folder, unknown_labels=True)
    attribute_table(dataset, TrainConfig(data=str(folder))), dataset.fingerprint


def _read_truth(path: Path) -> None:
    from trainer.dataset import read_labels

    read_labels(path, 2, SIZES)


def _read_image(path: Path) -> None:
    from torchvision.transforms import functional

    from trainer.images import load_image
    from trainer.stream import deterministic_transform

    functional.pil_to_tensor(deterministic_transform(32)(load_image(path)))


def _read_prepared(path: Path) -> None:
    from trainer.dataset import read_dataset
    from trainer.stream import prepared_images, read_images

    dataset = read_dataset(path.parents[1])
    split = dataset.splits["val"]
    cache = path.parent
    named = prepared_images(dataset, split, 32, cache)
    os.replace(path, named)
    images = read_images(prepared_images(dataset, split, 32, cache), np.arange(len(split)))
    assert images.shape == (2, 3, 32, 32), images.shape
    assert str(images.dtype) == "torch.uint8", images.dtype


def _read_checkpoint(path: Path) -> None:
    """With the digest that belongs to the bytes, whatever they are."""
    from trainer.checkpoint import Checkpoints

    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_name(path.name + ".sha256").write_text(f"{digest}  {path.name}\n")
    assert isinstance(Checkpoints(path.parent).latest(), dict | None)


def _read_damaged_checkpoint(path: Path) -> None:
    """Bytes that were others when the digest was written, so that they must not be loaded."""
    from trainer.checkpoint import Checkpoints

    path.with_name(path.name + ".sha256").write_text(f"{'0' * 64}  {path.name}\n")
    assert Checkpoints(path.parent).latest() is None


def _read_digest(path: Path) -> None:
    from trainer.checkpoint import Checkpoints

    path.with_suffix("").write_bytes(_checkpoint())
    Checkpoints(path.parent).latest()


def _read_weights(path: Path) -> None:
    from torch import nn

    from trainer.weights import load_weights

    load_weights(path, "linear", [nn.Linear(3, 2).state_dict()], ())


def _read_model(path: Path) -> None:
    from trainer.model_file import SavedModel

    SavedModel(path)


def _read_predictions(path: Path) -> None:
    from dashboards.predictions import predictions_of
    from search.confirm.intervals import hits, of_hits

    home = {"ATELIER_HOME": str(path.parents[3])}
    with mock.patch.dict(os.environ, home):
        predictions = predictions_of(_entry(), 0)
    of_hits(hits(predictions), predictions.labels, SIZES)


def _entry() -> "StudyEntry":
    from storage.studies import StudyEntry

    attributes = [{"name": f"a{i}", "category": kind} for i, kind in enumerate((1, 1, 3, 3))]
    created = datetime(2026, 1, 1, tzinfo=UTC)
    return StudyEntry(1, "tiny", 2, {}, "0123", attributes, "5", created, {})


def _read_accounts(path: Path) -> None:
    from argon2 import extract_parameters

    from dashboards.web.accounts import Accounts

    for account in Accounts(path.parent).all().values():
        assert f"{account.name}: {account.role}".isprintable(), account
        assert account.stamp
        extract_parameters(account.hash)  # as a login does


def _read_backup(path: Path) -> None:
    from storage.archive import read_backup

    read_backup(path)


def _read_database_url(path: Path) -> None:
    from storage.network import Network

    Network(path.parent).url  # noqa: B018


def _read_certificate(path: Path) -> None:
    from dashboards.web.accounts import Accounts
    from dashboards.web.server import Address

    Address("127.0.0.1", 8080, path, path).check(Accounts(path.parent))


def _dataset(folder: Path) -> None:
    """Two images a split, of a texture and a length."""
    (folder / "img").mkdir(parents=True, exist_ok=True)
    (folder / "split").mkdir(exist_ok=True)
    rows = "".join(f"{name} {kind}\n" for name, kind in zip(ATTRIBUTES, "1133", strict=True))
    (folder / "split" / "list_attr_cloth.txt").write_text(f"4\nattribute_name attribute_type\n{rows}")
    for split in ("train", "val"):
        paths = [f"img/{split}-{index}.jpg" for index in range(2)]
        for index, path in enumerate(paths):
            Image.new("RGB", (40, 50), (index * 99, 50, 90)).save(folder / path)
        (folder / "split" / f"{split}.txt").write_text("".join(f"{path}\n" for path in paths))
        (folder / "split" / f"{split}_attr.txt").write_text("0 1\n1 0\n")


def _coarse_dataset(folder: Path) -> None:
    """The same, with one list of all labels and one of all images."""
    _dataset(folder)
    for name in ("Anno", "Eval"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "split" / "list_attr_cloth.txt").rename(folder / "Anno" / "list_attr_cloth.txt")
    (folder / "Anno" / "list_attr_img.txt").write_bytes(FLAGS)
    (folder / "Eval" / "list_eval_partition.txt").write_bytes(PARTITION)


def _study_beside(folder: Path) -> None:
    (folder / "study.toml").write_text(STUDY)


def _images() -> Iterable[bytes]:
    picture = Image.linear_gradient("L").resize((16, 20)).convert("RGB")
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Title", "seed", zip=True)
    notes.add_itxt("Comment", "seed", zip=True)
    for name, options in (
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"exif": turned}),
        ("PNG", {"pnginfo": notes}),
        ("PNG", {"icc_profile": b"seed" * 40, "exif": turned}),
        ("PNG", {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()}),
        ("WEBP", {"exif": turned}),
        ("GIF", {"transparency": 3}),
        ("BMP", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("AVIF", {}),
    ):
        buffer = io.BytesIO()
        picture.save(buffer, name, **options)
        yield buffer.getvalue()


def _prepared() -> Iterable[bytes]:
    for images in (np.zeros((2, 3, 32, 32), np.uint8), np.zeros(3, np.uint8)):
        buffer = io.BytesIO()
        np.save(buffer, images)
        yield buffer.getvalue()


@cache
def _checkpoint() -> bytes:
    import torch

    buffer = io.BytesIO()
    state = {"format": 4, "tail": {"weight": torch.zeros(2, 3)}, "history": [{"epoch": 0}], "step": 1}
    torch.save(state, buffer)
    return buffer.getvalue()


def _weights() -> "dict[str, Tensor]":
    """Of the layer that reads them, and the same each time; all in one storage."""
    import torch

    numbers = torch.arange(8.0)
    return {"weight": numbers[:6].reshape(2, 3), "bias": numbers[6:]}


def _saved_weights() -> Iterable[bytes]:
    import torch

    names = {f"module.{name}": tensor for name, tensor in _weights().items()}
    wrapped = {"args": argparse.Namespace(lr=1), "state_dict": names}
    for content, zipped in itertools.product((_weights(), wrapped), (True, False)):
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
        # The older format holds the storage's address, which is another each time.
        yield re.sub(rb"\d{14,15}", lambda found: b"1" * len(found[0]), buffer.getvalue())


def _safe_weights() -> Iterable[bytes]:
    import safetensors.torch

    yield safetensors.torch.save({name: tensor.clone() for name, tensor in _weights().items()})


def _models() -> Iterable[bytes]:
    """Of all the tensors only one: a whole model has megabytes, of which most are weights."""
    import safetensors.torch
    import torch

    from trainer.config import TrainConfig

    config = TrainConfig(data="data", backbone="resnet10t", weights="none", image_size=32)
    description = {
        "config": config.model_dump(),
        "epoch": 1,
        "val_accuracy": 0.5,
        "attributes": ATTRIBUTES,
        "categories": ["texture", "length"],
        "sizes": SIZES,
        "format": 1,
    }
    yield safetensors.torch.save({"tail.x": torch.zeros(2)}, {"atelier": json.dumps(description)})


def _predictions() -> Iterable[bytes]:
    for save in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        labels = np.array([[0, 1], [1, 0]], np.uint8)
        save(
            buffer,
            labels=labels,
            classes=np.stack([labels, labels]),
            log_probs=np.zeros((2, 2, 2), np.float16),
        )
        yield buffer.getvalue()


def _accounts() -> Iterable[bytes]:
    known = "$argon2id$v=19$m=65536,t=3,p=4$c2VlZHNlZWRzZWVk$c2VlZHNlZWRzZWVkc2VlZHNlZWRzZWVk"
    yield json.dumps({"vera": {"role": "viewer", "hash": known}}).encode()


def _backups() -> Iterable[bytes]:
    """One of a single table and a single file."""
    members = {"tables/studies": b"1\ts\n", "files/artifacts/1": b"x"}
    manifest = {
        "format": 1,
        "created": "2026-01-01T00:00:00+00:00",
        "schema_revision": "0008",
        "optuna": "5.0.0",
        "columns": {"studies": ["study_id", "study_name"]},
        "members": {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in members.items()
        },
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in {**members, "manifest.json": json.dumps(manifest).encode()}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    yield buffer.getvalue()[:-7168]  # less padding: inputs are short


TARGETS = {
    "study": Target(
        _read_study,
        lambda: [STUDY.encode(), (ROOT / "studies" / "fashion.toml").read_bytes()],
    ),
    "set": Target(
        _read_override,
        lambda: [b"train.epochs=10", b"space.lr.high=1e-2", b'train.data="x"', b"slurm.x.qos=q"],
        beside=_study_beside,
    ),
    "config": Target(_read_config, lambda: [CONFIG.encode()]),
    "array": Target(_read_array, lambda: [b"0-7%4", b"1,3,5-9:2"], share=2),
    "pack": Target(_read_pack, lambda: [b"4", b"auto"], share=2),
    "attributes": Target(
        _read_dataset,
        lambda: [b"4\nname type\nplain 1\nstriped 1\nshort 3\nlong 3\n"],
        "split/list_attr_cloth.txt",
        _dataset,
    ),
    "list": Target(
        _read_dataset, lambda: [b"img/val-0.jpg\nimg/val-1.jpg\n"], "split/val.txt", _dataset
    ),
    "labels": Target(
        _read_dataset, lambda: [b"0 1\n1 0\n", b"1 0 0 1\n0 1 1 0\n"], "split/val_attr.txt", _dataset
    ),
    "flags": Target(
        _read_dataset,
        lambda: [FLAGS],
        "Anno/list_attr_img.txt",
        _coarse_dataset,
    ),
    "partition": Target(
        _read_dataset,
        lambda: [PARTITION],
        "Eval/list_eval_partition.txt",
        _coarse_dataset,
    ),
    "scores": Target(_read_truth, lambda: [b"0 1\n1 0\n"], share=5),
    "image": Target(_read_image, _images),
    "prepared": Target(_read_prepared, _prepared, "cache/file.npy", _dataset, share=5),
    "checkpoint": Target(_read_checkpoint, lambda: [_checkpoint()], "attempt-0001-epoch-0001.pt"),
    "damaged": Target(
        _read_damaged_checkpoint, lambda: [_checkpoint()], "attempt-0001-epoch-0001.pt", share=2
    ),
    "digest": Target(
        _read_digest,
        lambda: [hashlib.sha256(_checkpoint()).hexdigest().encode()],
        "attempt-0001-epoch-0001.pt.sha256",
        share=2,
    ),
    "pth": Target(_read_weights, _saved_weights, "file.pth"),
    "safetensors": Target(_read_weights, _safe_weights, "file.safetensors"),
    "model": Target(_read_model, _models, "best.safetensors", share=5),
    "predictions": Target(
        _read_predictions, _predictions, "runs/tiny-20260101-000000/predictions/trial-00000.npz"
    ),
    "accounts": Target(_read_accounts, _accounts, "dashboard.json"),
    "backup": Target(_read_backup, _backups, "backup.tar"),
    "database-url": Target(
        _read_database_url, lambda: [b"postgresql://u@h:5/d?sslmode=x"], "database.url"
    ),
    "certificate": Target(_read_certificate, lambda: [b""], share=1),
}
