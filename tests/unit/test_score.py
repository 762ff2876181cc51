"""What epochs and trials are worth."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from search.score import KINDS, PRIOR_IMAGES, epoch_value, score, shrinkage

TABLE = [
    {"name": name, "category": category, "images": images}
    for name, category, images in [
        ("a", "one", 90),
        ("b", "one", 2),
        ("c", "one", 8),
        ("d", "two", 50),
        ("e", "two", 0),
        ("f", "two", 50),
    ]
]
RIGHT = (60, 2, 2, 30, 0, 20)
RESULT = SimpleNamespace(val_accuracy=0.61, val_hits=RIGHT, val_log_loss=1.1)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("best", 0.9),
        ("last", 0.5),
        ("mean-last-5", (0.9 + 0.1 + 0.2 + 0.3 + 0.5) / 5),
        ("shrunken-mean-last-5", (0.9 + 0.1 + 0.2 + 0.3 + 0.5) / 5),
        ("balanced-log-loss", (0.9 + 0.1 + 0.2 + 0.3 + 0.5) / 5),
    ],
)
def test_trials(kind, expected):
    assert kind in KINDS
    assert score([0.8, 0.9, 0.1, 0.2, 0.3, 0.5], kind) == pytest.approx(expected)


def test_the_shrunken_mean_is_the_mean_of_pulled_accuracies():
    pulled = []
    for category in ("one", "two"):
        rows = [
            (r["images"], hit) for r, hit in zip(TABLE, RIGHT, strict=True) if r["category"] == category
        ]
        some = [(n, hit / n, n / (n + PRIOR_IMAGES)) for n, hit in rows if n]
        centre = sum(z * a for _, a, z in some) / sum(z for *_, z in some)
        pulled += [z * a + (1 - z) * centre for _, a, z in some]
    assert epoch_value(RESULT, "shrunken-mean-last-5", TABLE) == pytest.approx(np.mean(pulled))
    weights = shrinkage(TABLE)
    assert weights.sum() == pytest.approx(1)
    assert weights[1] < weights[2] < weights[0]  # the fewer the images, the less they count
    assert weights[4] == 0


def test_other_kinds_of_epochs():
    for kind in ("best", "last", "mean-last-5"):
        assert epoch_value(RESULT, kind, TABLE) == 0.61
    assert epoch_value(RESULT, "balanced-log-loss", TABLE) == pytest.approx(math.exp(-1.1))
