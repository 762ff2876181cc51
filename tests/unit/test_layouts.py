"""DeepFashion's own layouts, fine and coarse: read as they are published, and every fault is named."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from search.cli import app
from trainer.check import check_dataset
from trainer.dataset import Dataset, DatasetError, listed_splits, read_dataset, read_labels
from trainer.demo import write_demo
from trainer.layouts import COARSE
from trainer.loop import train
from trainer.workspace import Workspace

SIZES = {"train": 60, "val": 30, "test": 10}
MIXED = np.random.default_rng(2).permutation(23)  # the coarse attribute list goes by names, not by types


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "data"
    write_demo(folder, *SIZES.values())
    return folder


def flags_of(drawn: Path, split: str, no: int) -> np.ndarray:
    """A column for each of the 26 attributes, with 1 for yes."""
    dataset = read_dataset(drawn)
    labels = dataset.splits[split].labels
    flags = [np.eye(size)[column] for column, size in zip(labels.T, dataset.sizes, strict=True)]
    return np.where(np.concatenate(flags, 1) == 1, 1, no)


def unpacked(drawn: Path, folder: Path) -> list[str]:
    """Put the images where img.zip does if it is unpacked in Img/. Returns the attribute list."""
    shutil.copytree(drawn / "img", folder / "Img" / "img")
    return (drawn / "split" / "list_attr_cloth.txt").read_text().splitlines()


@pytest.fixture
def fine(drawn: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "fine"
    unpacked(drawn, folder)
    shutil.copytree(drawn / "split", folder / "Anno_fine")
    for split in ("train", "val"):
        np.savetxt(folder / "Anno_fine" / f"{split}_attr.txt", flags_of(drawn, split, 0), "%d")
    return folder


@pytest.fixture
def coarse(drawn: Path, tmp_path: Path) -> Path:
    """The demo's first five categories, as the coarse release has its own five."""
    folder = tmp_path / "coarse"
    rows = unpacked(drawn, folder)[2:25]
    (folder / "Anno_coarse").mkdir()
    (folder / "Eval").mkdir()
    head = ["23", "attribute_name  attribute_type", *(rows[place] for place in MIXED)]
    (folder / "Anno_coarse" / "list_attr_cloth.txt").write_text("\n".join(head) + "\n")
    labels, partition = [], []
    for split in ("train", "val"):
        paths = (drawn / "split" / f"{split}.txt").read_text().splitlines()
        for path, flags in zip(paths, flags_of(drawn, split, -1)[:, MIXED], strict=True):
            labels.append(f"{path}   {' '.join(f'{flag:2}' for flag in flags)}")
            partition.append(f"{path}    {split}")
    order = np.random.default_rng(1).permutation(len(labels))  # nothing says that the lists agree
    labels = ["90", "image_name  attribute_labels", *(labels[row] for row in order)]
    partition = ["90", "image_name  evaluation_status", *partition]
    (folder / "Anno_coarse" / "list_attr_img.txt").write_text("\n".join(labels) + "\n")
    (folder / "Eval" / "list_eval_partition.txt").write_text("\n".join(partition) + "\n")
    return folder


def change(path: Path, line: int, change) -> None:
    lines = path.read_text().splitlines()
    lines[line - 1 : line] = change(lines[line - 1])
    path.write_text("".join(f"{row}\n" for row in lines))


def named(dataset: Dataset, split: str) -> list[list[str | None]]:
    """The attributes of each image by name; None where the label is unknown."""
    labels = dataset.splits[split].labels
    return [
        [None if label < 0 else names[label] for label, names in zip(row, dataset.names, strict=True)]
        for row in labels
    ]


def test_the_fine_release_is_the_challenges_data_in_other_words(fine, drawn):
    ours, theirs = read_dataset(fine), read_dataset(drawn)
    assert (ours.attributes, ours.categories) == (theirs.attributes, theirs.categories)
    for split in ("train", "val"):
        assert np.array_equal(ours.splits[split].labels, theirs.splits[split].labels)
    assert ours.splits["val"].paths == tuple(f"Img/{path}" for path in theirs.splits["val"].paths)
    assert listed_splits(fine) == ["train", "val", "test"]
    scores = fine / "Anno_fine" / "val_attr.txt"
    assert np.array_equal(read_labels(scores, 30, ours.sizes, ours.columns), theirs.splits["val"].labels)


def test_the_coarse_release_is_read_by_its_lists(coarse, drawn):
    ours, theirs = read_dataset(coarse), read_dataset(drawn)
    assert ours.categories == tuple(COARSE.values())
    assert ours.sizes == theirs.sizes[:5]
    for split in ("train", "val"):
        assert named(ours, split) == [row[:5] for row in named(theirs, split)]
        assert len(ours.splits[split]) == SIZES[split]
    assert listed_splits(coarse) == ["train", "val"]
    assert [finding for finding in check_dataset(coarse)[1] if finding.is_error] == []


def test_the_folder_may_be_called_anno_and_the_images_may_lie_beside_it(coarse):
    before = read_dataset(coarse)
    (coarse / "Anno_coarse").rename(coarse / "Anno")
    (coarse / "Img" / "img").rename(coarse / "img")
    assert named(read_dataset(coarse), "train") == named(before, "train")


def test_a_label_is_known_if_an_image_has_one_attribute_for_sure(coarse, drawn):
    dataset = read_dataset(coarse)
    path = coarse / "Anno_coarse" / "list_attr_img.txt"
    line = dataset.splits["train"].labels_from.numbers[7]
    columns = np.split(dataset.columns, np.cumsum(dataset.sizes)[:-1])
    first = dataset.splits["train"].labels[7]

    def spoil(row):
        image, *flags = row.split()
        flags[columns[0][first[0]]] = "-1"  # none of it
        flags[columns[1][(first[1] + 1) % 3]] = "1"  # two of it
        flags[columns[2][(first[2] + 1) % 3]] = "0"  # maybe two of it
        flags[columns[3][first[3]]] = "0"  # maybe none of it
        return [" ".join([image, *flags])]

    change(path, line, spoil)
    with pytest.raises(DatasetError) as caught:
        read_dataset(coarse)
    said = str(caught.value)
    assert said.startswith(f"{path}:{line}: texture is unknown in 1 of 60 images, first in this one")
    assert "unknown_labels = true in [train]" in said
    assert "(and 3 more)" in said
    spoilt = read_dataset(coarse, unknown_labels=True).splits["train"].labels
    assert spoilt[7].tolist() == [-1, -1, -1, -1, first[4]]
    assert np.array_equal(np.delete(spoilt, 7, 0), np.delete(dataset.splits["train"].labels, 7, 0))
    result = CliRunner().invoke(app, ["data", "check", str(coarse)])
    assert result.exit_code == 0
    assert f"warning: {path}:{line}: part is unknown in 1 of 60 images" in result.output
    assert "60 train, 30 val; 23 attributes; no errors" in result.output


def test_without_minus_one_a_zero_means_no(fine):
    path = fine / "Anno_fine" / "train_attr.txt"
    change(path, 4, lambda row: [" ".join(["1", "1", *row.split()[2:]])])
    change(path, 5, lambda row: [" ".join([*["0"] * 7, *row.split()[7:]])])
    with pytest.raises(DatasetError, match=r"train_attr.txt:4: texture is unknown in 2 of 60 images"):
        read_dataset(fine)
    labels = read_dataset(fine, unknown_labels=True).splits["train"].labels
    assert Counter(labels.ravel().tolist())[-1] == 2
    assert labels[3, 0] == labels[4, 0] == -1


ATTRIBUTES, LABELS = "Anno_coarse/list_attr_cloth.txt", "Anno_coarse/list_attr_img.txt"
PARTITION = "Eval/list_eval_partition.txt"
FAULTS = {
    "attributes without a number": (ATTRIBUTES, 1, lambda _: [], "1: found 'attribute_name  attribute"),
    "a number too high": (LABELS, 1, lambda _: ["91"], "1: says 91 images, but 90 follow"),
    "no number": (
        LABELS,
        1,
        lambda _: [],
        "1: found 'image_name  attribute_labels', allowed is the num",
    ),
    "no head": (LABELS, 2, lambda _: [], "2: found 'img/"),
    "a flag too few": (
        LABELS,
        5,
        lambda row: [row[:-2]],
        "5: 22 flags, expected 23: one for each attri",
    ),
    "a flag too many": (LABELS, 5, lambda row: [row + " 1"], "5: 24 flags, expected 23"),
    "a 2": (LABELS, 9, lambda row: [row[:-2] + " 2"], "9: found '2', allowed is 1, 0 or -1"),
    "two flags as one": (LABELS, 9, lambda row: [row[:-2] + "11"], "9: found '"),
    "another blank": (LABELS, 9, lambda row: [row[:-2] + "\x1f1"], "9: found '"),
    "a word": (LABELS, 9, lambda row: [row[:-2] + " ¹"], "9: found '¹', allowed is 1, 0 or -1"),
    "nothing": (LABELS, 9, lambda _: [""], "9: 0 flags, expected 23"),
    "an image twice": (LABELS, 9, lambda row: [row, row], "10: img/"),
    "an image that is split off": (LABELS, 9, lambda row: [row[3:]], "the image has no row in "),
    "another split": (
        PARTITION,
        3,
        lambda row: [row.split()[0] + " dev"],
        "allowed is a path and train,",
    ),
    "no split": (PARTITION, 3, lambda row: row.split()[:1], "3: found 'img/"),
    "no image": (PARTITION, 3, lambda _: ["img/none.jpg train"], "3: no such image: img/none.jpg"),
    "no head of the partition": (PARTITION, 2, lambda _: [], "2: found 'img/"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_with_file_and_line(name, coarse):
    file, line, edit, expected = FAULTS[name]
    change(coarse / file, line, edit)
    with pytest.raises(DatasetError) as caught:
        read_dataset(coarse, unknown_labels=True)
    assert "\n" not in str(caught.value)
    errors = [str(finding) for finding in check_dataset(coarse)[1] if finding.is_error]
    assert any(str(coarse) in error and expected in error for error in errors), errors


@pytest.mark.parametrize("file", [LABELS, PARTITION])
def test_a_list_that_is_missing_is_named_once(file, coarse):
    (coarse / file).unlink()
    errors = [str(finding) for finding in check_dataset(coarse)[1] if finding.is_error]
    if file == PARTITION:
        assert errors == [f"{coarse / file}: no such file"]
    else:  # then it is good for a prediction
        assert errors == []
    with pytest.raises(DatasetError, match="no such file"):
        read_dataset(coarse)


def test_a_split_without_images_is_no_split(coarse):
    path = coarse / PARTITION
    path.write_text(path.read_text().replace(" val\n", " test\n"))
    with pytest.raises(DatasetError, match=r"list_eval_partition.txt:1: no images of val in it"):
        read_dataset(coarse)
    assert listed_splits(coarse) == ["train", "test"]


def test_what_is_wrong_with_test_is_a_warning(coarse):
    path = coarse / PARTITION
    change(path, 1, lambda _: ["91"])
    path.write_text(path.read_text() + "img/gone.jpg test\n")
    findings = check_dataset(coarse)[1]
    assert [finding.is_error for finding in findings] == [False] * len(findings)
    assert f"{path}:93: no such image: img/gone.jpg" in map(str, findings)


def test_the_folder_inside_or_around_is_not_the_dataset(coarse):
    for folder in (coarse.parent, coarse / "Anno_coarse"):
        with pytest.raises(DatasetError) as caught:
            read_dataset(folder)
        assert f"did you mean {coarse}?" in str(caught.value)


def test_a_network_learns_from_the_coarse_release(coarse, tiny, tmp_path):
    path = coarse / LABELS
    for line in range(3, 30):  # no attribute at all
        change(path, line, lambda row: [row.replace(" 1", "-1")])
    settings = {"data": str(coarse), "unknown_labels": True, "epochs": 2, "batch_size": 16}
    config = tiny.model_copy(update=settings)
    workspace = Workspace(config, tmp_path / "cache")
    results = list(train(config, workspace))
    assert all(result.finite and 0 < result.val_accuracy < 1 for result in results)
    assert sum(row["images"] for row in workspace.attributes) < 30 * 5
