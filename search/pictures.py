"""`atelier predict RUN PICTURES…`: attributes of pictures of one's own, with their probabilities."""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dashboards.outputs import check_overwritable
from search.errors import InputError
from search.predict import reader_notes
from search.run_folder import model_path
from trainer.files import write_atomically
from trainer.images import ImageError
from trainer.kind import IMAGES, kind_of
from trainer.model_file import Attributes, SavedModel

# Of files that are meant as pictures, even if they cannot be read.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic")
LIST = "-"  # stands for a list on standard input


@dataclass(frozen=True)
class Prediction:
    """What a picture shows, or why nobody can say."""

    picture: Path
    attributes: Attributes
    error: str | None = None


def find_pictures(words: Sequence[str], lines: Iterable[str]) -> list[Path]:
    """The pictures that the words name: files, folders with all that is in them, and `lines` for LIST.

    Raises InputError if there is none, or none where a word says.
    """
    found: list[Path] = []
    for word in words:
        if word == LIST:
            found += [Path(line.rstrip("\n")) for line in lines if line.strip()]
        elif Path(word).is_dir():
            found += filter(_is_picture, sorted(Path(word).rglob("*")))
        elif os.path.exists(word):
            found.append(Path(word))  # if it cannot be read, its line says why
        else:
            raise InputError(f"{word}: no such file or folder; give pictures that are there")
    if not found:
        raise InputError(
            f"{', '.join(words)}: no picture there; give files, folders with pictures, or {LIST} for a "
            "list on standard input"
        )
    return found


def _is_picture(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        return path.suffix.lower() in SUFFIXES or kind_of(path) in IMAGES
    except OSError:
        return True  # its line says why it cannot be read


class PicturePredictor:
    """A run's model, for pictures that belong to no dataset. Raises InputError, ModelError."""

    def __init__(self, run: Path) -> None:
        self._model = SavedModel(model_path(run))
        self.notes = reader_notes(self._model)
        self.categories = self._model.description.categories

    def predict(self, pictures: Sequence[Path], flip: bool) -> Iterator[Prediction]:
        """Predict the pictures, in their order."""
        for picture, found in zip(pictures, self._model.look_at(pictures, flip), strict=True):
            if isinstance(found, ImageError):
                yield Prediction(picture, {}, str(found))
            else:
                yield Prediction(picture, found)


def check_table(output: Path, categories: Sequence[str]) -> None:
    """Check that a table may be written there. Raises InputError, OutputError, OSError."""
    if output.suffix not in (".csv", ".jsonl"):
        raise InputError(f"--output {output}: allowed are names that end in .csv or .jsonl")
    marker = ",".join(_header(categories)) if output.suffix == ".csv" else '{"picture": '
    check_overwritable(output, marker, "a prediction of pictures")


def write_table(predictions: Iterable[Prediction], output: Path, categories: Sequence[str]) -> None:
    """Write a line for each picture. Raises OSError."""
    text = io.StringIO()
    if output.suffix == ".csv":
        table = csv.writer(text, lineterminator="\n")
        table.writerow(_header(categories))
        table.writerows(_row(one, categories) for one in predictions)
    else:
        text.writelines(json.dumps(_object(one)) + "\n" for one in predictions)
    write_atomically(output, text.getvalue().encode("utf-8", "surrogateescape"))


def _header(categories: Sequence[str]) -> list[str]:
    pairs = [word for name in categories for word in (name, f"{name}_probability")]
    return ["picture", *pairs, "error"]


def _row(prediction: Prediction, categories: Sequence[str]) -> list[str]:
    if prediction.error:
        return [str(prediction.picture), *[""] * 2 * len(categories), prediction.error]
    pairs = [prediction.attributes[name] for name in categories]
    cells = [cell for name, share in pairs for cell in (name, f"{share:.4f}")]
    return [str(prediction.picture), *cells, ""]


def _object(prediction: Prediction) -> dict[str, object]:
    found: dict[str, object] = {"picture": str(prediction.picture)}
    for category, (name, probability) in prediction.attributes.items():
        found[category] = {"attribute": name, "probability": probability}
    return found | ({"error": prediction.error} if prediction.error else {})
