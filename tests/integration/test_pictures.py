"""Predictions for pictures of one's own: as for the same pictures in a dataset, and broken ones told."""

import csv
import json
import shutil

import numpy as np
import pytest

from trainer.dataset import read_dataset
from trainer.model_file import SavedModel


@pytest.fixture
def rows(atelier, finished_run, tmp_path):
    """Predict pictures. Returns the lines of the table, in its order."""

    def predict(*pictures, code=0):
        atelier("predict", finished_run, *pictures, "-o", "out.csv", code=code)
        with (tmp_path / "out.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    return predict


@pytest.fixture
def pictures(demo, tmp_path):
    """A folder with pictures in folders; one has no suffix, one is a text, one is damaged."""
    folder = tmp_path / "pictures"
    (folder / "inner").mkdir(parents=True)
    paths = read_dataset(demo).split("val").paths
    shutil.copy(demo / paths[0], folder / "a.jpg")
    shutil.copy(demo / paths[1], folder / "inner" / "named without suffix")
    (folder / "notes.txt").write_text("no picture")
    (folder / "z.jpg").write_bytes((demo / paths[2]).read_bytes()[:200])
    return folder


@pytest.mark.parametrize("flip", [False, True])
def test_a_picture_is_predicted_as_in_a_dataset(rows, demo, finished_run, tmp_path, flip):
    dataset = read_dataset(demo)
    split = dataset.split("val")
    model = SavedModel(finished_run / "best.safetensors")
    expected = model.predict(dataset, split, tmp_path / "cache", flip)
    words = ["--tta", "flip"] if flip else []
    found = rows(*(str(demo / path) for path in split.paths), *words)
    assert [row["picture"] for row in found] == [str(demo / path) for path in split.paths]
    attributes = iter(dataset.attributes)
    for column, (category, size) in enumerate(zip(dataset.categories, dataset.sizes, strict=True)):
        names = np.array([next(attributes) for _ in range(size)])
        assert [row[category] for row in found] == names[expected[:, column]].tolist()
        shares = [float(row[f"{category}_probability"]) for row in found]
        assert all(1 / size - 1e-4 <= share <= 1 for share in shares)


def test_a_broken_picture_is_a_line_and_not_the_end(rows, pictures, atelier, finished_run):
    found = {row["picture"]: row for row in rows(str(pictures))}
    assert [*found] == [
        str(pictures / name) for name in ("a.jpg", "inner/named without suffix", "z.jpg")
    ]
    whole, broken = found[str(pictures / "a.jpg")], found[str(pictures / "z.jpg")]
    assert whole["fit"]
    assert not whole["error"]
    assert "cannot be read" in broken["error"]
    assert not broken["fit"]
    said = atelier("predict", finished_run, str(pictures), "-o", "out.csv").stderr
    assert "predicted 2 of 3 pictures, in out.csv" in said
    assert "1 cannot be read, their lines say why; the first: " in said


def test_without_a_picture_that_can_be_read_it_fails(rows, pictures):
    [row] = rows(str(pictures / "z.jpg"), code=1)
    assert "cannot be read" in row["error"]


def test_a_list_on_standard_input_and_lines_of_json(atelier, finished_run, pictures, tmp_path):
    listed = f"{pictures / 'z.jpg'}\n\n{pictures / 'a.jpg'}\n"
    atelier("predict", finished_run, "-", "-o", "out.jsonl", typed=listed)
    broken, whole = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert broken.keys() == {"picture", "error"}
    assert whole["picture"] == str(pictures / "a.jpg")
    assert 0 < whole["fit"]["probability"] <= 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["empty"], "empty: no picture there; give files, folders with pictures, or - for a list"),
        (["x.jpg", "--split", "val"], "--split, --scores and --data are of a dataset; leave them out"),
        (["x.jpg", "-o", "out.txt"], "out.txt: allowed are names that end in .csv or .jsonl"),
        (["x.jpg", "-o", "mine.csv"], "mine.csv: there is a file that is not a prediction of pictures"),
        (["x.jpg", "-o", "none/out.csv"], "no such folder"),
        (["x.jpg", "y.jpg"], "y.jpg: no such file or folder"),
    ],
)
def test_what_cannot_be_asked(atelier, finished_run, tmp_path, words, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine.csv").write_text("a,b\n1,2\n")
    (tmp_path / "x.jpg").touch()
    result = atelier("predict", finished_run, *words, code=2)
    assert said in result.stderr
    assert (tmp_path / "mine.csv").read_text() == "a,b\n1,2\n"
    assert not (tmp_path / "out.csv").exists()
