"""A search, its confirmation and a prediction on data of which some labels are unknown (-1)."""

import json
import shutil

import numpy as np
import pytest

from search.confirm.evidence import predictions_of
from storage.studies import study_entry
from trainer.predictions import UNKNOWN


@pytest.fixture
def data(demo, tmp_path):
    """A quarter of all labels is unknown, and in val the whole last category."""
    folder = shutil.copytree(demo, tmp_path / "data")
    for split in ("train", "val"):
        path = folder / "split" / f"{split}_attr.txt"
        labels = np.loadtxt(path, dtype=int)
        labels[np.random.default_rng(1).random(labels.shape) < 0.25] = -1
        labels[:, 5] = labels[:, 5] if split == "train" else -1
        np.savetxt(path, labels, "%d")
    return folder


def test_a_study_with_unknown_labels_is_searched_confirmed_and_predicted(
    atelier, engine, data, tmp_path
):
    words = ("search", "study.toml", "--data", data, "--workers", "1", "--set", "train.epochs=2")
    said = atelier(*words, code=2).stderr
    assert f"{data}/split/train_attr.txt:4: texture is unknown" in said
    assert "unknown_labels = true in [train]" in said
    atelier(*words, "--set", "train.unknown_labels=true")
    entry = study_entry(engine, "tiny")
    labels = np.loadtxt(data / "split" / "val_attr.txt", dtype=int)
    kept = predictions_of(entry, 0)
    assert np.array_equal(kept.labels == UNKNOWN, labels < 0)
    assert sum(row["images"] for row in entry.attributes) == (labels >= 0).sum()

    atelier("confirm", "tiny", "--top", "2", "--seeds", "2", "--data", data)
    known = json.loads(atelier("confirm", "tiny", "--json").stdout)
    for candidate in known["candidates"]:
        score = candidate["estimate"]["score"]
        assert 0 < score["low"] < score["value"] < score["high"] < 1
    for name in ("tiny", "tiny-confirm"):
        assert "all " in atelier("verify", name).stdout
    atelier("report", "tiny", "-o", "report")
    assert "nan" not in (tmp_path / "report" / "report.md").read_text().lower().split()

    atelier("export", "tiny", "-o", "best.toml")
    atelier("train", "best.toml")
    val = data / "split" / "val_attr.txt"
    result = atelier("predict", "best.run", "--split", "val", "--scores", val, "-o", "val.zip")
    assert f"{(labels < 0).sum()} of 480 labels in {val} are unknown (-1)" in result.stderr
    rows = [line[27:].split() for line in result.stdout.splitlines()]
    assert len(rows) == 7  # none for the last category
    for value, low, high in ((float(row[0]), float(row[3]), float(row[5])) for row in rows):
        assert low <= value <= high
    categories = [float(row[0]) for row in rows[2:]]
    assert float(rows[1][0]) == pytest.approx(np.mean(categories), abs=1e-4)
