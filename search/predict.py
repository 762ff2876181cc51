"""`atelier predict --split`: predicts a split of the dataset, in the challenge's form."""

import hashlib
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dashboards.outputs import check_overwritable, mark
from search.comparable import reader_note
from search.confirm.intervals import Interval, of_hits, of_mean
from search.run_folder import model_path
from trainer.dataset import read_dataset, read_labels
from trainer.files import write_atomically
from trainer.images import READER
from trainer.model_file import SavedModel


def reader_notes(model: SavedModel) -> list[str]:
    """A note if the network learned from images that another version of the reader had read."""
    reader = model.description.reader
    return [] if reader == READER else [reader_note("run", reader)]


def source_of(model: SavedModel) -> str:
    """A mark that tells what comes of this run from what comes of another.

    It stays if the run is lengthened. Runs of one configuration and one `init` have the same.
    """
    config, lengthened = model.config, model.description.lengthened
    epochs = lengthened[0].before if lengthened else config.epochs
    text = config.model_copy(update={"epochs": epochs}).model_dump_json()
    text += model.description.init or ""
    return mark(hashlib.sha256(text.encode()).hexdigest()[:16])


class Predictor:
    """A run's model and the images to predict. `truth` is a file with their labels, -1 if unknown.

    Raises InputError, DatasetError and ModelError before anything is computed.
    """

    def __init__(self, run: Path, split: str, data: str | None, truth: Path | None) -> None:
        path = model_path(run)
        self._model = SavedModel(path)
        # The best epoch was chosen by the validation images.
        chosen = "val" if path.stem == "best" else None
        self.learned_from = split in (*self._model.config.train_split.split("+"), chosen)
        self._dataset = read_dataset(data or self._model.config.data, split.split("+"), labelled=False)
        self._model.check(self._dataset)
        self.notes = reader_notes(self._model)
        self._split = self._dataset.split(split)
        sizes, columns = self._dataset.sizes, self._dataset.columns
        self._truth = read_labels(truth, len(self._split), sizes, columns) if truth else None
        if self._truth is not None and (unknown := int((self._truth < 0).sum())):
            self.notes.append(
                f"note: {unknown} of {self._truth.size} labels in {truth} are unknown (-1) and count "
                "nowhere"
            )

    @property
    def source(self) -> str:
        """A mark that tells this configuration's predictions from those of another."""
        return source_of(self._model)

    def predict(self, cache: Path, flip: bool) -> np.ndarray:
        """The attributes, int64 [images, categories], in the order of the split's list."""
        return self._model.predict(self._dataset, self._split, cache, flip)

    def scores(self, classes: np.ndarray) -> Mapping[str, Interval]:
        """The accuracies of predictions, the challenge's first; none without the truth."""
        if self._truth is None:
            return {}
        right, known = classes == self._truth, self._truth >= 0
        columns = zip(self._dataset.categories, right.T, known.T, strict=True)
        return {
            "average per-class accuracy": of_hits(right, self._truth, self._dataset.sizes),
            "overall accuracy": of_mean(_by_image(right, known)),
            **{
                name: of_mean(column[is_known].astype(float))
                for name, column, is_known in columns
                if is_known.any()
            },
        }


def _by_image(right: np.ndarray, known: np.ndarray) -> np.ndarray:
    """What each image adds to the overall accuracy, the mean of these: float [images].

    Where a label is unknown this is the category's accuracy, and the known ones weigh the more. So their
    variance is that of a ratio (Cochran 1977, section 2.11). `right` and `known` are bool [images,
    categories].
    """
    right, known = (part[:, known.any(0)] for part in (right, known))
    share = known.mean(0)
    accuracy = right.sum(0) / known.sum(0)
    return np.asarray((right / share + (1 - known / share) * accuracy).mean(1))


def check_submission(output: Path, source: str) -> None:
    """Check that predictions of this source may be written there. Raises OutputError, OSError."""
    check_overwritable(output, source, "a prediction of this run")


def write_submission(classes: np.ndarray, output: Path, source: str) -> None:
    """Write a zip with prediction.txt: one line for each image, with indices between spaces.

    The zip's comment is the source.
    """
    text = "".join(" ".join(map(str, row)) + "\n" for row in classes.tolist())
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.comment = source.encode()
        archive.writestr("prediction.txt", text)
    with data.getbuffer() as view:
        write_atomically(output, view)
