"""What a run says of every validation image, kept so that runs can be compared image by image.

Imports no torch: whoever compares runs may stand on a login node.
"""

import io
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.files import write_atomically


@dataclass(frozen=True)
class Predictions:
    """The predictions of one or more epochs; images in file order."""

    labels: np.ndarray  # uint8 [images, categories], the true index inside each category
    classes: np.ndarray  # uint8 [epochs, images, categories], the predicted one
    log_probs: np.ndarray  # float16 [epochs, images, categories], ln of the true one's probability

    @classmethod
    def join(cls, parts: "Sequence[Predictions]") -> "Predictions":
        """The epochs of all parts, in their order."""
        classes = np.concatenate([part.classes for part in parts])
        return cls(parts[0].labels, classes, np.concatenate([part.log_probs for part in parts]))

    def save(self, path: Path) -> None:
        """Write an .npz file; its folder is made. Raises OSError."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, labels=self.labels, classes=self.classes, log_probs=self.log_probs)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getbuffer())

    @classmethod
    def load(cls, path: Path) -> "Predictions":
        """Raises OSError, ValueError if it is no such file, or damaged."""
        try:
            with np.load(io.BytesIO(path.read_bytes())) as file:
                return cls(file["labels"], file["classes"], file["log_probs"])
        except (EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path} holds no predictions") from error
