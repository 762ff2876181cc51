"""Which pictures the validation images of a study are, and small copies of them."""

import hashlib
import io
import os
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np

from dashboards.predictions import Judgement
from storage.paths import image_cache, make_private
from trainer.dataset import DatasetError, read_dataset
from trainer.files import write_atomically
from trainer.images import READER, ImageError, load_image
from trainer.layouts import Layout

PIXELS = 224  # width and height that a small copy fits into
QUALITY = 85  # of its JPEG


class PicturesError(ValueError):
    """The pictures are not to be had on this machine. The message is one line."""


def find_pictures(folder: str, judgement: Judgement) -> list[Path]:
    """The images of a data folder that a trial was judged by, in their order. Raises PicturesError."""
    try:
        layout = Layout.of(Path(folder))
        lists = [layout.attributes]
        for part in judgement.split.split("+"):
            lists += layout.images(part), layout.labels(part)
        pictures, labels = _read(folder, judgement.split, *(path.stat().st_mtime_ns for path in lists))
    except (DatasetError, OSError) as error:
        reason = str(error).partition("; ")[0] if isinstance(error, DatasetError) else error.strerror
        raise PicturesError(
            f"the pictures are in {folder}, which this machine does not see ({reason})"
        ) from None
    images = judgement.images
    if images[-1] >= len(labels) or not np.array_equal(labels[images], judgement.labels):
        raise PicturesError(
            f"{folder} has other validation images or labels now than when the trials ran: no picture "
            "is shown"
        )
    return [pictures[image] for image in images]


def file_names(folder: str, judgement: Judgement) -> list[str]:
    """The paths of `find_pictures`, from the data folder on. Raises PicturesError."""
    return [os.path.relpath(path, folder) for path in find_pictures(folder, judgement)]


@lru_cache(maxsize=8)
def _read(folder: str, name: str, *_: int) -> tuple[tuple[Path, ...], np.ndarray]:
    dataset = read_dataset(folder, name.split("+"), unknown_labels=True)
    split = dataset.split(name)
    assert split.labels is not None
    return tuple(dataset.folder / path for path in split.paths), split.labels


def thumbnail(folder: str, picture: Path) -> bytes:
    """A small copy of a picture of a data folder, as JPEG. It is made once. Raises PicturesError."""
    try:
        real = picture.resolve(strict=True)
        if not real.is_relative_to(Path(folder).resolve()):
            raise PicturesError(f"{picture} leads out of the data folder, so it is not shown")
        status = real.stat()
        identity = f"{real} {status.st_mtime_ns} {status.st_size} {READER} {PIXELS}"
        kept = image_cache() / "thumbnails" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.jpg"
        with suppress(OSError):
            return kept.read_bytes()
        small = _small(real)
    except (ImageError, OSError, RuntimeError) as error:  # the last of a loop of links
        raise PicturesError(str(error)) from None
    with suppress(OSError):  # a full disk, or a home that cannot be written
        make_private(kept.parent)
        write_atomically(kept, small)
    return small


def _small(picture: Path) -> bytes:
    image, data = load_image(picture), io.BytesIO()
    image.thumbnail((PIXELS, PIXELS))
    image.save(data, "JPEG", quality=QUALITY)
    return data.getvalue()
