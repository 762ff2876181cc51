"""The generated dataset has the layout of the real one, and its pictures show their labels."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.dataset import DatasetError
from trainer.demo import CATEGORIES, draw_garment, write_demo

SIZES = {"train": 64, "val": 32, "test": 4}
PICTURES = [f"img/{index:05d}.jpg" for index in range(sum(SIZES.values()))]
CLASSES = [len(names) for names in CATEGORIES.values()]
# As in the real dataset: split/list_attr_cloth.txt.
ATTRIBUTES = [
    *("floral", "graphic", "striped", "embroidered", "pleated", "solid", "lattice"),
    *("long_sleeve", "short_sleeve", "sleeveless", "maxi_length", "mini_length", "no_dress"),
    *("crew_neckline", "v_neckline", "square_neckline", "no_neckline"),
    *("denim", "chiffon", "cotton", "leather", "faux", "knit", "tight", "loose", "conventional"),
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data"
    write_demo(folder, **SIZES)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def labels_of(folder: Path, split: str) -> np.ndarray:
    return np.loadtxt(folder / "split" / f"{split}_attr.txt", dtype=np.int64, ndmin=2)


def test_the_folder_holds_the_files_of_the_layout_and_no_others(demo: Path) -> None:
    lists = {f"split/{name}.txt" for name in (*SIZES, "train_attr", "val_attr", "list_attr_cloth")}
    assert set(files_of(demo)) == {*PICTURES, *lists}


def test_the_splits_list_every_picture_once_and_in_order(demo: Path) -> None:
    listed = [(demo / "split" / f"{name}.txt").read_text().splitlines() for name in SIZES]
    assert [len(lines) for lines in listed] == list(SIZES.values())
    assert [line for lines in listed for line in lines] == PICTURES


def test_the_attributes_and_their_types_are_those_of_the_real_dataset(demo: Path) -> None:
    lines = (demo / "split" / "list_attr_cloth.txt").read_text().splitlines()
    types = [str(kind) for kind, size in enumerate(CLASSES, 1) for _ in range(size)]
    assert lines[:2] == ["26 ", "attribute_name   attribute_type"]
    assert [line.split() for line in lines[2:]] == [
        list(row) for row in zip(ATTRIBUTES, types, strict=True)
    ]


def test_every_picture_is_an_upright_rgb_jpeg(demo: Path) -> None:
    for path in sorted((demo / "img").iterdir()):
        with Image.open(path) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
            assert 150 <= image.width <= 225
            assert 200 <= image.height <= 300


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_class_occurs_and_no_label_is_out_of_range(demo: Path, split: str) -> None:
    labels = labels_of(demo, split)
    assert labels.shape == (SIZES[split], len(CLASSES))
    for column, size in zip(labels.T, CLASSES, strict=True):
        assert set(column.tolist()) == set(range(size))


def test_the_same_seed_gives_the_same_bytes(demo: Path, tmp_path: Path) -> None:
    write_demo(tmp_path / "again", **SIZES)
    assert files_of(tmp_path / "again") == files_of(demo)


def test_another_seed_gives_other_labels_and_pictures(demo: Path, tmp_path: Path) -> None:
    write_demo(tmp_path / "other", **SIZES, seed=1)
    ours, theirs = files_of(demo), files_of(tmp_path / "other")
    assert ours["split/train_attr.txt"] != theirs["split/train_attr.txt"]
    assert ours["img/00000.jpg"] != theirs["img/00000.jpg"]


def test_a_folder_that_is_not_empty_is_refused_in_one_line_and_kept(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(DatasetError, match="not empty") as caught:
        write_demo(tmp_path, **SIZES)
    assert "\n" not in str(caught.value)
    assert files_of(tmp_path) == {"precious.txt": b"mine"}


def test_an_empty_folder_is_filled_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_demo(tmp_path / "data", 2, 2, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert len(list((tmp_path / "data" / "img").iterdir())) == 5


def brightness(label: list[int]) -> np.ndarray:
    picture = draw_garment(tuple(label), np.random.default_rng(7))
    return np.asarray(picture.convert("L"), dtype=np.float32)


CHANGES = [(category, index) for category, size in enumerate(CLASSES) for index in range(size)]


@pytest.mark.parametrize(("category", "index"), CHANGES)
def test_changing_one_attribute_changes_the_picture_beyond_its_colours(
    category: int, index: int
) -> None:
    label = [5, 1, 1, 0, 2, 2]  # solid, short sleeve, mini, crew, cotton, conventional
    changed = label.copy()
    changed[category] = index
    if changed == label:
        changed[category] = (index + 1) % CLASSES[category]
    before, after = brightness(label), brightness(changed)
    differing = np.abs(before - after) > 12  # brightness only, so hue alone does not count
    assert differing.sum() > 60
