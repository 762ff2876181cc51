"""What a complete trial predicted of each validation image, and where it was wrong."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from storage.paths import RunFolder
from storage.studies import StudyEntry
from trainer.config import ALL_LABELLED
from trainer.predictions import UNKNOWN, Predictions

SURE, WRONG, RIGHT, ALL = SHOWN = ("surely wrong", "wrong", "right", "all")


class PredictionsError(ValueError):
    """A trial's predictions cannot be read. The message is one line."""


def attribute_names(entry: StudyEntry) -> dict[str, list[str]]:
    """The attributes of each category of the study's dataset, in the order of the network's outputs."""
    names: dict[str, list[str]] = {}
    for row in entry.attributes:
        names.setdefault(row["category"], []).append(row["name"])
    return names


def attribute_sizes(entry: StudyEntry) -> list[int]:
    """How many attributes each category of the study's dataset has."""
    return [len(names) for names in attribute_names(entry).values()]


def predictions_of(entry: StudyEntry, number: int) -> Predictions:
    """What a complete trial predicted. Raises PredictionsError."""
    path = RunFolder(entry.name, entry.created).predictions(number)
    sizes = attribute_sizes(entry)
    try:
        predictions = Predictions.load(path)
        labels, classes = predictions.labels, predictions.classes
        fits = labels.shape[1] == len(sizes) and (classes < sizes).all()
        if fits and ((labels < sizes) | (labels == UNKNOWN)).all():
            return predictions
    except (OSError, ValueError):
        pass
    raise PredictionsError(f"{path} cannot be read; use the ATELIER_HOME that the workers used")


@dataclass(frozen=True)
class Verdict:
    """What a trial said of one image in one category."""

    category: str
    true: str  # empty if it is unknown
    predicted: str
    probability_of_true: float  # what the true attribute got

    @property
    def is_wrong(self) -> bool:
        return bool(self.true) and self.true != self.predicted


class Judgement:
    """What was right and wrong after the last epoch of some predictions.

    The images are in the order of the split's list. `names` are the attributes of each category.
    """

    def __init__(
        self,
        found: Predictions,
        names: Mapping[str, Sequence[str]],
        number: int = 0,
        split: str = "val",
    ) -> None:
        """`number` is the trial's, and `split` is `TrainConfig.val_split`."""
        self.number, self.names, self.split = number, names, split
        self.images = found.images  # which ones of the split they are
        # [images, categories], as those below; -1 where a label is unknown.
        self.labels = np.where(found.labels == UNKNOWN, -1, found.labels.astype(int))
        self.classes = found.classes[-1].astype(int)
        self.probabilities = np.exp(found.log_probs[-1].astype(float))  # of the true attribute
        self.wrong = (self.labels >= 0) & (self.labels != self.classes)

    @classmethod
    def of_trial(cls, entry: StudyEntry, number: int) -> Self:
        """That of a complete trial. Raises PredictionsError."""
        split = ALL_LABELLED if entry.settings["train"].get("folds") else "val"
        return cls(predictions_of(entry, number), attribute_names(entry), number, split)

    def __len__(self) -> int:
        return len(self.labels)

    def of(self, image: int) -> list[Verdict]:
        """What was said of an image, in each category."""
        columns = zip(
            self.names.items(),
            self.labels[image],
            self.classes[image],
            self.probabilities[image],
            strict=True,
        )
        return [
            Verdict(category, names[label] if label >= 0 else "", names[predicted], float(probability))
            for (category, names), label, predicted, probability in columns
        ]

    def confusion(self, category: str) -> np.ndarray:
        """How many images have each true attribute (row) and were given each (column): int [n, n]."""
        column, size = [*self.names].index(category), len(self.names[category])
        known = self.labels[:, column] >= 0
        counts = np.zeros((size, size), int)
        np.add.at(counts, (self.labels[known, column], self.classes[known, column]), 1)
        return counts

    def choose(
        self,
        shown: str,
        category: str = "",
        true: str = "",
        predicted: str = "",
        other: "Judgement | None" = None,
    ) -> np.ndarray:
        """The images to show, by their number. Empty texts ask for all.

        An image is wrong if it is wrong in any of the categories that are asked for. Those that are
        "surely wrong" come in the order of the probability that the true attribute got. With another
        trial's predictions only images are left on which the two differ. Raises PredictionsError if
        those are for other images.
        """
        if other is not None and not (
            np.array_equal(self.images, other.images) and np.array_equal(self.labels, other.labels)
        ):
            raise PredictionsError(
                f"trials {self.number} and {other.number} predicted other images; they do not compare"
            )
        columns = [i for i, name in enumerate(self.names) if category in ("", name)]
        wanted = np.ones(len(self), bool)
        for text, values in ((true, self.labels), (predicted, self.classes)):
            if text:
                wanted &= self._has(text, values)
        wrong = self.wrong[:, columns]
        if shown in (SURE, WRONG):
            wanted &= wrong.any(1)
        elif shown == RIGHT:
            wanted &= ~wrong.any(1) & (self.labels[:, columns] >= 0).any(1)
        if other is not None:
            wanted &= (self.classes != other.classes)[:, columns].any(1)
        images = np.flatnonzero(wanted)
        if shown != SURE:
            return images
        least = np.where(wrong, self.probabilities[:, columns], np.inf).min(1)
        return images[np.argsort(least[images], kind="stable")]

    def _has(self, attribute: str, values: np.ndarray) -> np.ndarray:
        column, place = next(
            (column, names.index(attribute))
            for column, names in enumerate(self.names.values())
            if attribute in names
        )
        found: np.ndarray = values[:, column] == place
        return found
