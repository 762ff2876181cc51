"""Inputs that are built to be nearly right, bombs, and all that were faults once."""

import hashlib
import io
import json
import struct
import tomllib
import zipfile
import zlib
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import tomli_w
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dashboards.web.accounts import ROLES
from search.export import Accuracy
from search.profile import SlurmProfile
from search.study_config import StudySettings
from tests.fuzz.targets import ATTRIBUTES, CASES, CONFIG, STUDY, TARGETS
from trainer.checkpoint import CheckpointError, Checkpoints
from trainer.config import TUNABLE, TrainConfig
from trainer.loop import train
from trainer.model_file import Description
from trainer.run import Run
from trainer.workspace import Workspace

MEGABYTE = 1 << 20
GROWTH = 300 * MEGABYTE  # of memory, for one input

fuzzed = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=150,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def answer(tmp_path_factory):
    """What a target says of bytes: a line for the user, or None."""

    @cache
    def place(name):
        return TARGETS[name].place(tmp_path_factory.mktemp(name))

    return lambda name, data: TARGETS[name].answer(place(name), data)


@pytest.fixture(scope="module")
def answer_seeds(answer):
    """Has a target read its seeds, once."""

    @cache
    def read(name):
        for seed in TARGETS[name].seeds():
            answer(name, seed)

    return read


@pytest.fixture
def frugal(answer, answer_seeds):
    """The same, and it may not take much memory."""

    def measured(name, data):
        answer_seeds(name)  # what is imported now is not the input's
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        before = memory("VmRSS")
        said = answer(name, data)
        assert memory("VmHWM") - before < GROWTH
        return said

    return measured


def memory(field):
    """Of this process, in bytes: VmRSS now, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


@pytest.mark.parametrize("name", sorted(TARGETS.keys() - {"model", "certificate"}))  # parts of files
def test_the_seeds_are_accepted(name, answer):
    for seed in TARGETS[name].seeds():
        assert answer(name, seed) is None


@pytest.mark.parametrize(
    "case", sorted(CASES.glob("*/*")), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_what_was_a_fault_once(case, frugal):
    frugal(case.parent.name, case.read_bytes())


# Bombs: short files that claim, or unfold to, gigabytes.

QUICKLY = 1  # zlib's level: a third of the time, and a bomb is a 200th of its content all the same


def png(width, height, pixels, kind=2, depth=8, extra=b""):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    parts = [chunk(b"IHDR", header), extra, chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def zeros(megabytes):
    packer = zlib.compressobj(QUICKLY)
    return b"".join(packer.compress(bytes(MEGABYTE)) for _ in range(megabytes)) + packer.flush()


def npz_of_a_gigabyte():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=QUICKLY) as archive:
        for name in ("labels", "classes", "log_probs"):
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, np.zeros((400, MEGABYTE), np.uint8))
    return buffer.getvalue()


def compressed_weights():
    stored, packed = io.BytesIO(), io.BytesIO()
    torch.save({"weight": torch.zeros(400 * MEGABYTE, dtype=torch.uint8)}, stored)
    with (
        zipfile.ZipFile(stored) as whole,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=QUICKLY) as archive,
    ):
        for member in whole.infolist():
            archive.writestr(member.filename, whole.read(member))
    return packed.getvalue()


class Swelling:
    """What torch.load would allow to take any memory."""

    def __reduce__(self):
        return bytearray, (1 << 30,)


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


BOMBS = {
    "image": lambda: png(13000, 13000, zeros(484)),
    "predictions": npz_of_a_gigabyte,
    "pth": compressed_weights,
    "checkpoint": lambda: saved({"x": Swelling()}),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_takes_no_memory(name, frugal):
    assert frugal(name, BOMBS[name]()) is not None


# Nearly right.

numbers = st.one_of(
    st.integers(),
    st.integers(-5, 70),
    st.floats(),
    st.booleans(),
    st.sampled_from([2**31, 2**63, 2**64, 10**400, -(10**400), 1e308]),
)
words = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    st.sampled_from(["", "\0", "a\nb", "\x1b[2J", "x" * 5000, "9" * 400, "1-2:3:4", "9:" * 9]),
)
scalars = st.one_of(numbers, words, st.dates(), st.datetimes())
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(words, inner, max_size=3), inner.map(lambda x: [x])
    ),
    max_leaves=30,
)


def deep(value, levels):
    for _ in range(levels):
        value = {"a": value}
    return value


@st.composite
def changed(draw, text, tables):
    """A file of the user's with other values at known places, and at some unknown ones."""
    known = tomllib.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        table = draw(st.sampled_from(sorted(tables)))
        value = draw(st.one_of(values, st.integers(1, 400).map(lambda levels: deep(1, levels))))
        names = tables[table]
        target = known
        for part in filter(None, table.split(".")):
            target = target.setdefault(part, {}) if isinstance(target, dict) else {}
        if isinstance(target, dict):
            target[draw(st.one_of(st.sampled_from(sorted(names)), words))] = value
    return known


SETTINGS = {
    "": {"study", "space", "train", "slurm"},
    "study": set(StudySettings.model_fields),
    "space": set(TUNABLE),
    "space.lr": {"low", "high", "log"},
    "train": set(TrainConfig.model_fields),
    "slurm.tuning": set(SlurmProfile.model_fields),
}
BUNDLED = {
    "": {"format", "train", "origin", "slurm"},
    "train": set(TrainConfig.model_fields),
    "origin": {"study", "trial", "standing", "dataset", "weights"},
    "origin.accuracy": set(Accuracy.model_fields),
    "slurm.final": set(SlurmProfile.model_fields),
}


@fuzzed
@given(changed(STUDY, SETTINGS))
def test_study_files(answer, tables):
    answer("study", tomli_w.dumps(tables).encode())


@fuzzed
@given(changed(CONFIG, BUNDLED))
def test_configurations(answer, tables):
    answer("config", tomli_w.dumps(tables).encode())


@fuzzed
@given(
    st.sampled_from([f"{table}.{name}" for table in SETTINGS for name in SETTINGS[table]]),
    st.one_of(words, numbers.map(str), st.text()),
)
def test_overrides(answer, place, value):
    answer("set", f"{place}={value}".encode("utf-8", "surrogatepass"))


tokens = st.one_of(
    st.sampled_from(["0", "1", "2", "-1", "01", "²", "٣", "1.0", "9" * 30, "9" * 5000, "\0", "x"]),
    st.text(max_size=5),
)
lines = st.lists(st.lists(tokens, max_size=4).map(" ".join), max_size=5).map("\n".join)
paths = st.one_of(
    st.sampled_from(
        ["img/val-0.jpg", "img/val-1.jpg", "img", "..", "x" * 5000, "a\0b", "/dev/zero", ""]
    ),
    st.text(max_size=10),
)


@fuzzed
@given(
    st.lists(st.tuples(st.text(max_size=5), tokens).map(" ".join), max_size=6),
    st.lists(paths, max_size=4),
    lines,
    st.booleans(),
)
def test_datasets(tmp_path_factory, rows, images, labels, known):
    path = TARGETS["labels"].place(tmp_path_factory.mktemp("data", numbered=True))
    if not known:
        header = ["4", "name type"]
        path.with_name("list_attr_cloth.txt").write_text("\n".join([*header, *rows]))
    path.with_name("val.txt").write_text("\n".join(images))
    TARGETS["labels"].answer(path, labels.encode("utf-8", "replace"))


@fuzzed
@given(
    st.integers(0, 2**32 - 1) | st.integers(0, 40),
    st.integers(0, 2**32 - 1) | st.integers(0, 40),
    st.sampled_from([0, 2, 3, 4, 6, 7]),
    st.sampled_from([1, 2, 4, 8, 16, 3]),
    st.binary(max_size=200).map(zlib.compress) | st.binary(max_size=200),
    st.sampled_from([b"", b"\0\0\0\x08acTL" + bytes(12), b"\xff\xff\xff\xffiTXt", b"\0\0\0\1zTXt\0"]),
)
def test_images(answer, width, height, kind, depth, pixels, extra):
    answer("image", png(width, height, pixels, kind, depth, extra))


@fuzzed
@given(st.integers(0, 65535), st.integers(0, 65535), st.integers(0, 255), st.integers(0, 255))
def test_photographs(answer, width, height, components, marker):
    """A JPEG with other numbers in its frame's header."""
    [data, *_] = TARGETS["image"].seeds()
    frame = data.index(b"\xff\xc0")
    header = struct.pack(">BHHB", 8, height, width, components)
    answer("image", data[: frame + 1] + bytes([0xC0 | marker & 3]) + data[frame + 2 : frame + 4] + header
           + data[frame + 10 :])  # fmt: skip


numeric = st.sampled_from(["u1", "i8", "f2", "f8", "?", "S3", "U2", "O", "M8[s]", "c16", "V5"])
shapes = st.lists(st.integers(0, 3), max_size=4).map(tuple)


@fuzzed
@given(
    st.dictionaries(
        st.sampled_from(["labels", "classes", "log_probs", "other"]),
        st.one_of(st.tuples(numeric, shapes), st.just(("u1", (2, 2))), st.just(("f2", (1, 2, 2)))),
        max_size=4,
    )
)
def test_predictions(answer, arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **{name: np.zeros(shape, kind) for name, (kind, shape) in arrays.items()})
    answer("predictions", buffer.getvalue())


jsons = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@fuzzed
@given(
    st.dictionaries(
        st.text(max_size=5),
        st.fixed_dictionaries(
            {"role": st.sampled_from(ROLES) | jsons, "hash": st.text() | jsons},
            optional={"more": jsons},
        )
        | jsons,
        max_size=3,
    )
    | jsons
)
def test_accounts(answer, rows):
    answer("accounts", json.dumps(rows).encode())


@fuzzed
@given(
    st.dictionaries(
        st.sampled_from(["weight", "bias", "x", "__metadata__"]),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "BF16", "F8_E5M2", "U16", "BOOL", "I64", "F4", "x"]),
                "shape": st.lists(st.sampled_from([0, 1, 2, 3, 2**31, 2**62, -1]), max_size=3),
                "data_offsets": st.lists(st.sampled_from([0, 8, 24, 32, 2**62]), min_size=1, max_size=3),
            }
        )
        | jsons,
        max_size=3,
    ),
    st.integers(0, 2**64 - 1) | st.none(),
)
@pytest.mark.parametrize("name", ["safetensors", "model"])
def test_headers_of_weights(answer, name, header, claimed):
    text = json.dumps(header).encode()
    length = len(text) if claimed is None else claimed
    answer(name, struct.pack("<Q", length) + text + bytes(32))


@settings(fuzzed, max_examples=60)
@given(st.sampled_from([*Description.model_fields, "other"]), jsons)
def test_descriptions_of_models(answer, key, value):
    known = {
        "config": TrainConfig(
            data="x", backbone="resnet10t", weights="none", image_size=32
        ).model_dump(),
        "epoch": 0,
        "val_accuracy": None,
        "attributes": ATTRIBUTES,
        "categories": ["texture", "length"],
        "sizes": [2, 2],
        "format": 1,
    }
    text = json.dumps(known | {key: value})
    answer("model", safetensors.torch.save({"tail.x": torch.zeros(1)}, {"atelier": text}))


@pytest.fixture(scope="module")
def workspace(demo, tmp_path_factory):
    config = TrainConfig(
        data=str(demo),
        backbone="test_resnet",  # timm's smallest
        weights="none",
        trainable="head",
        image_size=32,
        epochs=2,
        warmup_epochs=0,
        train_images=64,
        batch_size=64,
    )
    return Workspace(config, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def state(workspace, tmp_path_factory):
    """That of a run that has trained for an epoch."""
    checkpoints = Checkpoints(tmp_path_factory.mktemp("run"))
    next(train(workspace.config, workspace, checkpoints))
    return checkpoints.latest()


other_values = st.sampled_from(
    [
        None,
        0,
        -1,
        2**70,
        "x",
        [],
        [1],
        [{}],
        {},
        {"a": 1},
        torch.zeros(3),
        torch.zeros(0, dtype=torch.bool),
    ]
)


@settings(fuzzed, max_examples=80)
@given(data=st.data())
def test_states_of_a_run(workspace, state, tmp_path_factory, data):
    """With a value of another kind somewhere, or without one."""
    changed = state | {"predictions": {}}  # as it is in the file, of a run that was not validated
    key = data.draw(st.sampled_from(sorted(changed)))
    value = data.draw(other_values)
    if isinstance(changed[key], dict) and changed[key] and data.draw(st.booleans()):
        inner = data.draw(st.sampled_from(sorted(changed[key])))
        changed[key] = {**changed[key], inner: value}
    elif data.draw(st.booleans()):
        changed[key] = value
    else:
        del changed[key]
    path = tmp_path_factory.mktemp("run") / "attempt-0001-epoch-0001-step-00000001.pt"
    torch.save(changed, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_name(f"{path.name}.sha256").write_text(f"{digest}  {path.name}\n")
    with suppress(CheckpointError):
        Run(workspace.config, workspace, Checkpoints(path.parent))
