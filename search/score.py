"""What a trial is worth, from its epochs. docs/confirm.md shows how the kinds compare."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

if TYPE_CHECKING:  # it imports torch
    from trainer.metrics import EpochResult

Kind = Literal["mean-last-5", "best", "last", "shrunken-mean-last-5", "balanced-log-loss"]
KINDS: tuple[str, ...] = get_args(Kind)
LAST = 5  # epochs whose mean is taken
PRIOR_IMAGES = 10  # how many images the category's mean counts for, where an attribute is shrunken to it

Attributes = Sequence[Mapping[str, Any]]  # see trainer.division.attribute_table


def epoch_value(result: "EpochResult", kind: Kind, attributes: Attributes) -> float:
    """What one epoch is worth, in [0, 1]. Optuna is told this value, and the strategy compares it."""
    if kind == "balanced-log-loss":
        # As a probability, so that more is better. It is a geometric mean; attributes weigh the same.
        return math.exp(-result.val_log_loss)
    if kind == "shrunken-mean-last-5":
        images = np.array([row["images"] for row in attributes])
        return float(np.array(result.val_hits) @ (shrinkage(attributes) / np.maximum(images, 1)))
    return result.val_accuracy


def shrinkage(attributes: Attributes) -> np.ndarray:
    """The weight of each attribute's accuracy in the shrunken mean, float [attributes]; the sum is 1.

    Each accuracy a_c is pulled to its category's mean m by z_c a_c + (1 - z_c) m with the credibility
    z_c = n_c / (n_c + k), n_c images and k = PRIOR_IMAGES; m is the mean weighted by z (Bühlmann and
    Straub 1970). The mean of the pulled accuracies is then m itself in every category, so all of it is
    one weighted mean.
    """
    images = np.array([row["images"] for row in attributes], dtype=float)
    categories = np.array([row["category"] for row in attributes])
    credibility = images / (images + PRIOR_IMAGES)
    weights = np.zeros(len(images))
    for category in dict.fromkeys(categories.tolist()):
        members = (categories == category) & (images > 0)
        if members.any():
            weights[members] = members.sum() * credibility[members] / credibility[members].sum()
    weights /= weights.sum()
    return weights


def score(values: Sequence[float], kind: Kind) -> float:
    """What a finished trial is worth, from what its epochs are worth."""
    if kind == "best":
        return max(values)
    if kind == "last":
        return values[-1]
    tail = values[-LAST:]
    return sum(tail) / len(tail)
