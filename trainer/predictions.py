"""A run's predictions for every validation image, kept to compare runs image by image.

Imports no torch, so that runs can be compared on a login node.
"""

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from trainer.files import write_atomically

UNKNOWN = 255  # -1, an unknown label, as a byte
# Limit of a file's unpacked arrays, because a zip can claim any size. An epoch with 1,000 images of 6
# categories has 18 kB.
MOST_BYTES = 1 << 28
BY_EPOCH = ("classes", "log_probs", "attempts")  # the fields that have a row for each epoch


@dataclass(frozen=True)
class Predictions:
    """The predictions of one or more epochs, with the images in the order of the split."""

    labels: np.ndarray  # uint8 [images, categories], the true index inside each category, or UNKNOWN
    classes: np.ndarray  # uint8 [epochs, images, categories], the predicted index
    # float16 [epochs, images, categories], ln of the true index's probability; of index 0 if UNKNOWN
    log_probs: np.ndarray
    attempts: np.ndarray  # int32 [epochs], the attempt at the trial that trained the epoch; 0 if unknown
    images: np.ndarray  # int32 [images], which ones of `TrainConfig.val_split` they are, ascending

    @classmethod
    def join(cls, parts: "Sequence[Predictions]") -> "Predictions":
        """Join the epochs of all parts, in their order."""
        joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in BY_EPOCH}
        return replace(parts[0], **joined)

    def split(self) -> "list[Predictions]":
        """The predictions of each epoch."""
        return [
            replace(self, **{name: getattr(self, name)[epoch : epoch + 1] for name in BY_EPOCH})
            for epoch in range(len(self.classes))
        ]

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
            labels, classes = arrays["labels"], arrays["classes"]
            # Earlier versions did not say which attempt it was, and judged the whole split.
            attempts = arrays.get("attempts", np.zeros(len(classes), np.int32))
            images = arrays.get("images", np.arange(len(labels), dtype=np.int32))
            predictions = cls(labels, classes, arrays["log_probs"], attempts, images)
        if not predictions.is_valid:
            raise ValueError("other dtypes or shapes")
        return predictions

    @property
    def is_valid(self) -> bool:
        """Whether dtypes and shapes are as stated above, with at least one epoch and one image."""
        return (
            [getattr(array, "dtype", None) for array in vars(self).values()]
            == [np.uint8, np.uint8, np.float16, np.int32, np.int32]
            and self.labels.ndim == 2
            and self.classes.ndim == 3
            and self.classes.size > 0
            and self.classes.shape == self.log_probs.shape
            and self.classes.shape[1:] == self.labels.shape
            and self.attempts.shape == self.classes.shape[:1]
            and self.images.shape == self.labels.shape[:1]
            and bool((np.diff(self.images, prepend=-1) > 0).all())
        )
