"""What an epoch reports, and how it is computed: a new metric goes here.

Logits are float [images, attributes], one slice after another for each category. Targets are int64
[images, categories]: the index inside the slice, or -1 for an unknown label, which counts nowhere.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from trainer.loss import class_counts, one_hot
from trainer.predictions import Predictions


@dataclass(frozen=True, kw_only=True)
class EpochResult:
    """The metrics of one finished epoch. Accuracies are fractions in [0, 1].

    Without validation the val_ fields are NaN or empty.
    """

    epoch: int  # from 0
    stream_epoch: int  # of the stream of training images; above `epoch` if the run joined a pack late
    lr: float  # of the epoch's last step
    train_loss: float
    train_accuracy: float  # average per-class accuracy, with dropout and augmentation
    val_loss: float = math.nan
    val_accuracy: float = math.nan  # average per-class accuracy: the challenge's metric
    val_overall: float = math.nan  # mean over categories of the plain accuracy
    val_category: tuple[float, ...] = ()  # plain accuracy of each category; NaN without known labels
    val_hits: tuple[int, ...] = ()  # correctly predicted images of each attribute
    val_log_loss: float = math.nan  # mean over attributes of their images' mean -ln p(true attribute)
    seconds: float  # of the device; the run's share, if several go side by side
    images: int  # training images seen
    peak_memory: int  # bytes of the GPU's memory, on a CPU of the process
    busy: float | None = None  # share of the time in which the GPU computed, for all runs beside it
    predictions: Predictions | None = field(default=None, repr=False, compare=False)
    # If a loss is not finite: what was not finite first, and what to do. This is not stored.
    cause: str | None = field(default=None, compare=False)

    @property
    def finite(self) -> bool:
        """False when the loss overflowed or became NaN: the trial cannot recover."""
        return math.isfinite(self.train_loss) and (not self.validated or math.isfinite(self.val_loss))

    @property
    def validated(self) -> bool:
        """Whether there was a validation split to measure on."""
        return bool(self.val_category)

    def columns(self) -> dict[str, Any]:
        """The fields that the table `epoch` and a checkpoint store."""
        return {name: getattr(self, name) for name in COLUMNS}

    def differing(self, recorded: Mapping[str, Any]) -> dict[str, float | None]:
        """The REPEATABLE columns that are not equal to those on record, bit for bit.

        Each with its distance: of several numbers the largest, and None if one is not finite.
        """
        return {
            name: _distance(recorded[name], getattr(self, name))
            for name in REPEATABLE
            if not _equal(recorded[name], getattr(self, name))
        }


COLUMNS = tuple(
    column.name for column in fields(EpochResult) if column.name not in ("predictions", "cause")
)
# The columns that are equal, bit for bit, when the epoch is trained again.
REPEATABLE = tuple(
    name
    for name in COLUMNS
    if name not in ("epoch", "stream_epoch", "seconds", "images", "peak_memory", "busy")
)


def _equal(recorded: Any, again: Any) -> bool:
    if isinstance(recorded, list):
        return len(recorded) == len(again) and all(map(_equal, recorded, again))
    if recorded is None:  # an earlier version did not record it
        return True
    return bool(recorded == again) or (math.isnan(recorded) and math.isnan(again))


def _distance(recorded: Any, again: Any) -> float | None:
    pairs = zip(recorded, again, strict=False) if isinstance(recorded, list) else [(recorded, again)]
    largest = max((abs(float(one) - float(other)) for one, other in pairs), default=math.nan)
    return largest if math.isfinite(largest) else None


def validation_metrics(
    loss: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    sizes: tuple[int, ...],
    images: np.ndarray,
    attempt: int = 0,
) -> dict[str, Any]:
    """The fields of an EpochResult that are measured on the validation images.

    `images`, int [images], and `attempt` go with the predictions.
    """
    classes, log_probs = _predict(logits, targets, sizes)
    right = classes == targets
    category = right.double().sum(0) / (targets >= 0).sum(0)
    return {
        "val_loss": float(loss),
        "val_accuracy": float(_mean_over_attributes(right, targets, sizes)),
        "val_overall": float(category[~category.isnan()].mean()),
        "val_category": tuple(category.tolist()),
        "val_hits": tuple(_sums_by_attribute(right, targets, sizes).long().tolist()),
        "val_log_loss": float(-_mean_over_attributes(log_probs, targets, sizes)),
        "predictions": Predictions(
            targets.byte().cpu().numpy(),
            classes.byte().unsqueeze(0).cpu().numpy(),
            log_probs.half().unsqueeze(0).cpu().numpy(),
            np.array([attempt], np.int32),
            images.astype(np.int32),
        ),
    }


def per_class_accuracy(logits: torch.Tensor, targets: torch.Tensor, sizes: tuple[int, ...]) -> float:
    """The challenge's metric: the mean of the attributes' accuracies."""
    classes, _ = _predict(logits, targets, sizes)
    return float(_mean_over_attributes(classes == targets, targets, sizes))


def _predict(
    logits: torch.Tensor, targets: torch.Tensor, sizes: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted classes (int64) and ln of the true classes' probability, both [images, categories].

    Where the label is unknown, the second is that of class 0.
    """
    slices = torch.split(logits.float(), [*sizes], 1)
    log_probs = [
        F.log_softmax(part, 1).gather(1, target.clamp(min=0).unsqueeze(1))
        for part, target in zip(slices, targets.T, strict=True)
    ]
    return torch.stack([part.argmax(1) for part in slices], 1), torch.cat(log_probs, 1)


def _mean_over_attributes(
    values: torch.Tensor, targets: torch.Tensor, sizes: tuple[int, ...]
) -> torch.Tensor:
    """Average values [images, categories] by true attribute, then over the attributes that occur."""
    counts = class_counts(targets, sizes)
    sums = _sums_by_attribute(values, targets, sizes)
    present = counts > 0
    return (sums[present] / counts[present]).mean()


def _sums_by_attribute(
    values: torch.Tensor, targets: torch.Tensor, sizes: tuple[int, ...]
) -> torch.Tensor:
    """Add up values [images, categories] by true attribute: float64 [attributes]."""
    columns = zip(targets.T, values.double().T, sizes, strict=True)
    # Not with bincount, because its sums on CUDA depend on the order of the threads.
    return torch.cat(
        [(one_hot(target, size) * value.unsqueeze(1)).sum(0) for target, value, size in columns]
    )
