"""The trunk's output that is kept: what is read, from wherever, is what would be computed."""

import itertools
import multiprocessing
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch

from tests.unit.test_train import curve
from trainer import feature_places
from trainer.allocation import FEATURES
from trainer.feature_files import FeatureFiles
from trainer.feature_places import FeaturesError, Places, open_store, places
from trainer.features import Block, FeatureStore, Memory, Rows, View
from trainer.loop import train, train_epoch
from trainer.run import Run
from trainer.workspace import Workspace

CPU = torch.device("cpu")
ROWS = Rows((2, 3, 3), torch.float32, CPU)
PARTS = [np.arange(start, min(start + 4, 10)) for start in range(0, 10, 4)]
SPLITS = {"train": 10}


def output(indices):
    """Trunk output as a network makes it: the channels last."""
    values = torch.from_numpy(indices).float().view(-1, 1, 1, 1) + torch.arange(18.0).view(1, 2, 3, 3)
    return values.contiguous(memory_format=torch.channels_last)


def view(epoch, seed=0):
    return View("train", 10, seed, epoch)


class Maker:
    """Makes output, and counts."""

    def __init__(self):
        self.calls = 0

    def __call__(self, indices):
        self.calls += 1
        return output(indices)


def read(store, make, epoch=0, parts=PARTS):
    blocks = list(store.blocks(view(epoch), parts, make))
    for block, part in zip(blocks, parts, strict=True):
        assert torch.equal(block, output(part))
        assert block.stride() == output(part).stride()  # another layout may be computed otherwise
    return blocks


@pytest.fixture(autouse=True)
def anywhere(monkeypatch):
    """Tests may run in a tmpfs."""
    monkeypatch.setattr(feature_places, "LOCAL", (*feature_places.LOCAL, "tmpfs"))


@pytest.fixture
def files(tmp_path):
    made = []

    def open_files(kind="kind", budget=1e6, root=tmp_path / "features"):
        made.append(FeatureFiles(root, kind, budget, ROWS, SPLITS))
        return made[-1]

    yield open_files
    for one in made:
        one.close()


# Memory


def test_a_view_is_made_once_and_read_without_a_copy():
    store, make = FeatureStore([Memory(CPU, 1e6, ROWS)]), Maker()
    read(store, make)
    [first, *_] = read(store, make)
    assert make.calls == len(PARTS)
    assert first.data_ptr() == read(store, make)[0].data_ptr()
    assert store.reads == {"the trunk": 3, "main memory": 6}


def test_other_blocks_of_the_same_images_are_read_too():
    store, make = FeatureStore([Memory(CPU, 1e6, ROWS)]), Maker()
    read(store, make)
    read(store, make, parts=[np.array([7, 3, 1]), np.array([9, 8, 0, 2, 4, 5, 6])])
    assert make.calls == len(PARTS)


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_only_what_other_runs_have_not_made_is_made(place, files):
    store = FeatureStore([Memory(CPU, 1e6, ROWS)] if place == "memory" else [], files())
    made = []

    def make(indices):
        made.extend(indices.tolist())
        return output(indices)

    read(store, make, parts=[np.array([7, 3, 1, 0]), np.array([9, 8])])
    read(store, make, parts=[np.array([2, 3, 9]), np.array([4, 1, 5, 6, 7])])
    assert made == [7, 3, 1, 0, 9, 8, 2, 4, 5, 6]


def test_what_is_there_but_cannot_be_read_is_made(files, monkeypatch):
    make = Maker()
    monkeypatch.setattr(FeatureFiles, "get", lambda *_: None)
    for _ in range(2):
        read(FeatureStore([Memory(CPU, 1e6, ROWS)], files(), seconds=0.001), make)
    assert make.calls == 2 * len(PARTS)


def test_later_epochs_make_room_for_earlier_ones():
    memory = Memory(CPU, 2 * 10 * ROWS.bytes, ROWS)
    store, make = FeatureStore([memory]), Maker()
    for epoch in (5, 4, 7, 0):
        read(store, make, epoch)
    assert [store.keeps(view(epoch)) for epoch in (0, 4, 5, 7, 1)] == [True, True, False, False, True]
    assert memory.used <= memory.budget
    assert not store.keeps(view(4, seed=1))  # no better than what is there


def test_memory_that_is_not_there_costs_only_time(monkeypatch):
    memory, make = Memory(CPU, 1e9, ROWS), Maker()
    store = FeatureStore([memory])
    read(store, make)

    def full(*_):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(memory, "_empty", full)
    for epoch in (1, 1, 0):
        read(store, make, epoch)
    assert make.calls == 3 * len(PARTS)
    assert memory.budget == memory.used


def test_what_runs_need_is_left_to_them():
    memory, make = Memory(CPU, 1e6, ROWS), Maker()
    store = FeatureStore([memory])
    list(store.blocks(view(0), PARTS[:1], make))
    store.leave_to_runs(5 * ROWS.bytes)
    assert memory.budget == (4 + 5) * ROWS.bytes


def test_what_does_not_fit_is_made_each_time():
    store, make = FeatureStore([Memory(CPU, 9 * ROWS.bytes, ROWS)]), Maker()
    assert not store.keeps(view(0))
    read(store, make)
    read(store, make)
    assert make.calls == 2 * len(PARTS)


# Files


def test_workers_of_a_machine_share_files(files):
    make = Maker()
    read(FeatureStore(shared=files()), make)
    other = FeatureStore([Memory(CPU, 1e6, ROWS)], files())
    read(other, make)
    read(other, make)
    assert make.calls == len(PARTS)
    assert other.reads == {"disk": 3, "main memory": 3}


def fork(work):
    """A process that works, and ends with 0 if nothing was raised."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)


def test_while_another_makes_a_block_the_next_one_is_made(tmp_path):
    """Two processes: each makes some of the blocks, and none is made twice."""
    parts = [np.arange(number, number + 1) for number in range(10)]

    def work(name):
        def make(indices):
            with (tmp_path / name).open("a") as made:
                made.write(f"{indices[0]}\n")
            time.sleep(0.05)
            return output(indices)

        files = FeatureFiles(tmp_path / "features", "kind", 1e6, ROWS, SPLITS)
        both.wait()
        read(FeatureStore(shared=files), make, parts=parts)

    both = multiprocessing.Barrier(2)
    children = [fork(lambda name=name: work(name)) for name in ("one", "other")]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    made = [(tmp_path / name).read_text().split() for name in ("one", "other")]
    assert sorted(map(int, itertools.chain(*made))) == [*range(10)]
    assert all(made)


def test_a_damaged_row_is_made_again(files):
    store, make = FeatureStore(shared=files()), Maker()
    read(store, make)
    [path] = [one for one in store._shared._folder.iterdir() if one.suffix == "" and "train" in one.name]
    data = bytearray(path.read_bytes())
    data[5 * ROWS.bytes + 3] ^= 4  # one bit of image 5, in the second block
    path.write_bytes(data)
    read(store, make)
    assert make.calls == len(PARTS) + 1
    read(store, make)
    assert make.calls == len(PARTS) + 1


@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_bytes(b"x" * 7)])
@pytest.mark.parametrize("suffix", ["", ".crc32"])
def test_a_file_that_is_gone_or_cut_off_is_made_again(files, spoil, suffix):
    store, make = FeatureStore(shared=files()), Maker()
    read(store, make)
    for path in store._shared._folder.iterdir():
        if path.suffix == suffix and "train" in path.name:
            spoil(path)
    read(store, make)
    assert make.calls > len(PARTS)


@pytest.mark.parametrize("taken", [0, 5])
def test_a_full_disk_costs_only_time(files, monkeypatch, taken):
    store, make = FeatureStore(shared=files()), Maker()
    monkeypatch.setattr("trainer.feature_files.os.pwrite", lambda *_: taken)
    read(store, make)
    read(store, make)
    assert make.calls == 2 * len(PARTS)
    assert not store.keeps(view(0))


def test_a_limit_of_the_disk_is_kept_by_all_together(files):
    """Also while none of the views has been written."""
    budget = 15 * ROWS.bytes
    stores = [FeatureStore(shared=files(kind, budget)) for kind in ("one", "one", "other")]
    parts = PARTS[:1]
    for epoch, store in enumerate(stores):
        list(store.blocks(view(epoch), parts, Maker()))
    assert [store.keeps(view(epoch)) for epoch, store in enumerate(stores)] == [True, False, False]


def test_room_is_taken_for_the_images_that_are_used(files):
    store = FeatureStore(shared=files(budget=3 * ROWS.bytes))
    few, parts = View("train", 3, 0, 0), [np.array([1, 5, 9])]
    assert not store.keeps(view(0))
    for _ in range(2):
        assert torch.equal(*store.blocks(few, parts, Maker()), output(parts[0]))
    assert store.reads == {"the trunk": 1, "disk": 1}
    assert not store.keeps(view(0))  # as all of its rows would need more


def test_who_waits_for_another_does_so_for_a_while_only(files):
    """Its worker was stopped while it made the block."""
    one, other = files(), files()
    block = Block(view(0), PARTS[0])

    def hold():
        with one.claims(block) as is_mine:
            assert is_mine
            os.kill(os.getpid(), signal.SIGSTOP)

    child = fork(hold)
    os.waitpid(child, os.WUNTRACED)
    try:
        make = Maker()
        read(FeatureStore(shared=other, seconds=0.01), make)
        assert make.calls == len(PARTS)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_who_comes_while_the_last_one_deletes_begins_anew(tmp_path, monkeypatch):
    root, remove = tmp_path / "features", shutil.rmtree
    one = FeatureFiles(root, "kind", 1e6, ROWS, SPLITS)
    read(FeatureStore(shared=one), Maker())
    joined = []

    def slow(folder):
        joined.append(FeatureFiles(root, "kind", 1e6, ROWS, SPLITS))
        remove(folder)

    monkeypatch.setattr("trainer.feature_files.shutil.rmtree", slow)
    one.close()
    monkeypatch.undo()
    make = Maker()
    for _ in range(2):
        read(FeatureStore(shared=joined[0]), make)
    assert make.calls == len(PARTS)
    joined[0].close()
    one.close()  # once more does no harm
    assert list(root.glob("*/")) == []


def test_the_last_one_deletes_the_files_and_the_next_one_what_was_left(tmp_path, files):
    root = tmp_path / "features"
    one, other = (FeatureFiles(root, "kind", 1e6, ROWS, SPLITS) for _ in range(2))
    read(FeatureStore(shared=one), Maker())
    one.close()
    make = Maker()
    read(FeatureStore(shared=other), make)
    assert make.calls == 0
    other.close()
    assert list(root.glob("*/")) == []

    def killed():
        read(FeatureStore(shared=FeatureFiles(root, "killed", 1e6, ROWS, SPLITS)), Maker())
        os.kill(os.getpid(), signal.SIGKILL)

    assert os.waitpid(fork(killed), 0)[1] == signal.SIGKILL
    assert [path.name for path in root.glob("*/")] == ["killed"]
    (root / "killed-before-its-lock").mkdir()
    files()
    assert [path.name for path in root.glob("*/")] == ["kind"]


def test_a_folder_of_somebody_else_is_not_used(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    for name in ("link", "open"):
        with pytest.raises(PermissionError):
            FeatureFiles(tmp_path / name, "kind", 1e6, ROWS, SPLITS)


# What the user says


@pytest.mark.parametrize(
    "word", ["memory", "memory=much", "memory=-1", "ram=4", "folder=here", "disk=nan"]
)
def test_what_is_not_understood_is_refused(monkeypatch, word):
    monkeypatch.setenv(FEATURES, f"disk=1 {word}")
    with pytest.raises(FeaturesError, match=r"allowed are device=GB.*folder=/FOLDER"):
        places(CPU)


def test_what_is_said_counts(monkeypatch, tmp_path):
    monkeypatch.setenv(FEATURES, f"memory=0.5 disk=0 folder={tmp_path}")
    found = places(CPU)
    assert (found.memory, found.disk, found.folder.parent) == (5e8, 0, tmp_path)
    assert found.every_epoch
    monkeypatch.setenv(FEATURES, f"folder={tmp_path}")
    assert places(CPU).disk > 0


def test_a_disk_that_is_slower_than_computing_is_not_used(tmp_path):
    where = Places(0, 0, 1e6, tmp_path / "features")
    for seconds, used in ((1e-9, False), (60.0, True)):
        store = open_store(where, ROWS, lambda: "kind", SPLITS, 4, seconds)
        assert store.keeps(view(0)) is used
        assert (where.folder / "kind").exists() is used
        store.close()
        assert list(where.folder.glob("*/")) == []


@pytest.mark.parametrize("found", ["no room", "an error", "another kind of file system"])
def test_a_disk_that_cannot_be_used_is_left_alone(tmp_path, monkeypatch, found):
    where = Places(0, 0, 1 if found == "no room" else 1e6, tmp_path / "features")
    if found == "an error":
        monkeypatch.setattr("trainer.feature_files.os.posix_fadvise", broken)
    elif found == "another kind of file system":
        monkeypatch.setattr("trainer.feature_places.LOCAL", ())
    store = open_store(where, ROWS, lambda: "kind", SPLITS, 4, 60.0)
    assert not store.keeps(view(0))
    assert list(tmp_path.glob("features/*/")) == []  # and its locks are free


def broken(*_):
    raise OSError(5, "Input/output error")


# In training


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def shared(config, cache, **sizes):
    return Workspace(config, cache, places=lambda _: Places(**{"device": 0, "memory": 0, **sizes}))


def test_trials_go_through_their_own_epochs_in_any_company(tiny, cache):
    """And the curves equal those of a process that keeps nothing, bit for bit."""
    workspace = shared(tiny, cache, memory=1e9)
    first = Run(tiny, workspace)
    list(train_epoch([first]))
    late = Run(tiny.model_copy(update={"batch_size": 32, "lr": 0.002}), workspace)
    for _ in range(2):
        assert len(list(train_epoch([first, late]))) == 2
    for run in (first, late):
        assert [result.stream_epoch for result in run.history] == list(range(len(run.history)))
        alone = itertools.islice(train(run.config, shared(tiny, cache)), len(run.history))
        assert curve(run.history) == curve(alone)
    assert workspace.store.reads["the trunk"] == 3 * 2 + 1  # blocks of three epochs, and validation's


def test_epochs_that_are_not_kept_are_shared_by_those_in_training(tiny, cache):
    workspace = shared(tiny, cache)
    first, late = Run(tiny, workspace), Run(tiny, workspace)
    list(train_epoch([first]))
    list(train_epoch([first, late]))
    assert [result.stream_epoch for result in late.history] == [1]


@pytest.mark.parametrize("place", ["memory", "disk", *["device"] * torch.cuda.is_available()])
def test_every_place_gives_the_same_curve(tiny, cache, tmp_path, place):
    sizes = {place: 1e9, "folder": tmp_path / "features"}
    expected = curve(train(tiny, shared(tiny, cache)))
    workspace = shared(tiny, cache, **sizes)
    for _ in range(2):
        assert curve(train(tiny, workspace)) == expected
    assert workspace.store.reads["the trunk"] == 3 * 2 + 1
    workspace.close()


@pytest.mark.parametrize(
    ("backbone", "cut"),
    [("test_resnet", cut) for cut in ("stem", "layer1", "layer3", "head")]
    + [("test_efficientnet", cut) for cut in ("stem", "blocks.2", "conv_head", "head")],
)
def test_no_tail_changes_what_is_kept(tiny, cache, backbone, cut):
    """Blocks are handed out without a copy."""
    config = tiny.model_copy(update={"backbone": backbone, "trainable": cut, "train_images": 64})
    workspace = shared(config, cache, memory=1e9)
    results = [Run(config, workspace) for _ in range(2)]
    first, again = (curve([outcome for _, outcome in train_epoch([run])]) for run in results)
    assert first == again
    assert workspace.store.reads["the trunk"] == 2


def test_subsets_of_the_images_share_the_rows(tiny, cache, tmp_path):
    sizes = {"disk": 1e9, "folder": tmp_path / "features"}
    whole = shared(tiny, cache, **sizes)
    list(train(tiny, whole))
    fewer = tiny.model_copy(update={"train_images": 70})
    subset = shared(fewer, cache, **sizes)
    assert curve(train(fewer, subset)) == curve(train(fewer, shared(fewer, cache)))
    assert subset.store.reads["the trunk"] == 0
    whole.close()
    subset.close()


def test_rows_that_depend_on_their_neighbours_are_kept_by_blocks(tiny, cache, monkeypatch):
    """A trunk that gives each image the output of the one before."""
    workspace = shared(tiny, cache, memory=1e9)
    features = workspace.runtime.features
    monkeypatch.setattr(
        workspace.runtime, "features", lambda trunk, images: features(trunk, images.roll(1, 0))
    )

    def epoch(batch_size):
        run = Run(tiny.model_copy(update={"batch_size": batch_size}), workspace)
        return curve([outcome for _, outcome in train_epoch([run])])

    first = [epoch(batch_size) for batch_size in (64, 100)]
    assert [epoch(batch_size) for batch_size in (64, 100)] == first
    # Blocks of 256 and of 200 images, and one of validation.
    assert workspace.store.reads["the trunk"] == 2 + 2 + 1


CHANGES = {
    "image_size": {"image_size": 48},
    "augment": {"augment": "none"},
    "tf32": {"allow_tf32": False},
    "precision": {"precision": "fp32" if torch.cuda.is_available() else "bf16"},
    "cut": {"trainable": "layer3"},
    "backbone": {"backbone": "test_efficientnet", "trainable": "head"},
    "images": {"train_on": "train+val"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_setting_is_another_kind(tiny, cache, change):
    kinds = {shared(one, cache)._kind() for one in (tiny, tiny, tiny.model_copy(update=CHANGES[change]))}
    assert len(kinds) == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [("READER", 99), ("torch.__version__", "9"), ("timm.__version__", "9"), ("device_model", str)],
)
def test_another_environment_is_another_kind(tiny, cache, monkeypatch, name, value):
    workspace = shared(tiny, cache)
    before = workspace._kind()
    monkeypatch.setattr(f"trainer.workspace.{name}", value)
    assert workspace._kind() != before


def test_other_weights_or_parts_are_another_kind(tiny, cache, monkeypatch):
    workspace = shared(tiny, cache)
    kinds = {workspace._kind()}
    next(workspace.frozen.parameters())[0] += 1e-6
    kinds.add(workspace._kind())
    monkeypatch.setattr(type(workspace.runtime), "images_at_once", 17)
    kinds.add(workspace._kind())
    assert len(kinds) == 3


def test_a_seed_and_an_epoch_have_views_of_their_own(tiny, cache):
    workspace = shared(tiny, cache, memory=1e9)
    images = workspace.division(tiny).train
    found = {workspace._view("train", images, 256, *key) for key in [(0, 0), (0, 1), (1, 0)]}
    assert len(found) == 3
