"""A run's predictions for every validation image, kept to compare runs image by image.

Imports no torch, so that runs can be compared on a login node.
"""

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.files import write_atomically

UNKNOWN = 255  # -1, an unknown label, as a byte
# Limit of a file's unpacked arrays, because a zip can claim any size. An epoch with 1,000 images of 6
# categories has 18 kB.
MOST_BYTES = 1 << 28


@dataclass(frozen=True)
class Predictions:
    """The predictions of one or more epochs, with the images in file order."""

    labels: np.ndarray  # uint8 [images, categories], the true index inside each category, or UNKNOWN
    classes: np.ndarray  # uint8 [epochs, images, categories], the predicted index
    # float16 [epochs, images, categories], ln of the true index's probability; of index 0 if UNKNOWN
    log_probs: np.ndarray
    attempts: np.ndarray  # int32 [epochs], the attempt at the trial that trained the epoch; 0 if unknown

    @classmethod
    def join(cls, parts: "Sequence[Predictions]") -> "Predictions":
        """Join the epochs of all parts, in their order."""
        joined = zip(*(part._by_epoch for part in parts), strict=True)
        return cls(parts[0].labels, *map(np.concatenate, joined))

    def split(self) -> "list[Predictions]":
        """The predictions of each epoch."""
        return [
            Predictions(self.labels, *(array[epoch : epoch + 1] for array in self._by_epoch))
            for epoch in range(len(self.classes))
        ]

    @property
    def _by_epoch(self) -> tuple[np.ndarray, ...]:
        return self.classes, self.log_probs, self.attempts

    def save(self, path: Path) -> None:
        """Write an .npz file, and make its folder if needed. Raises OSError."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **vars(self))
        path.parent.mkdir(parents=True, exist_ok=True)
        with buffer.getbuffer() as view:
            write_atomically(path, view)

    @classmethod
    def load(cls, path: Path) -> "Predictions":
        """Read a file of `save`. Raises OSError, and ValueError for a damaged or another file."""
        data = path.read_bytes()
        try:
            return cls._read(io.BytesIO(data))
        except Exception as error:  # what a damaged file raises depends on where it is damaged
            raise ValueError(f"{path} holds no predictions") from error

    @classmethod
    def _read(cls, file: io.BytesIO) -> "Predictions":
        with zipfile.ZipFile(file) as archive:
            if sum(member.file_size for member in archive.infolist()) > MOST_BYTES:
                raise ValueError(f"more than {MOST_BYTES} bytes")
        with np.load(file) as arrays:
            classes = arrays["classes"]
            # Earlier versions did not say which attempt it was.
            attempts = arrays.get("attempts", np.zeros(len(classes), np.int32))
            predictions = cls(arrays["labels"], classes, arrays["log_probs"], attempts)
        if not predictions.is_valid:
            raise ValueError("other dtypes or shapes")
        return predictions

    @property
    def is_valid(self) -> bool:
        """Whether dtypes and shapes are as stated above, with at least one epoch and one image."""
        arrays = (self.labels, *self._by_epoch)
        return (
            [getattr(array, "dtype", None) for array in arrays]
            == [np.uint8, np.uint8, np.float16, np.int32]
            and self.labels.ndim == 2
            and self.classes.ndim == 3
            and self.classes.size > 0
            and self.classes.shape == self.log_probs.shape
            and self.classes.shape[1:] == self.labels.shape
            and self.attempts.shape == self.classes.shape[:1]
        )
