"""The dataset's folder layout: read it, check it, and tell one dataset from another.

`img/*.jpg`; `split/{train,val,test}.txt` with one image path a line; `split/{train,val}_attr.txt` with
one 0-based attribute index per category a line; `split/list_attr_cloth.txt` with the attributes and
their categories. Nothing here has a fixed size, so the full DeepFashion set reads the same way.
"""

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

# What the numbers in list_attr_cloth.txt stand for (DeepFashion's documentation).
CATEGORY_NAMES = {
    "1": "texture",
    "2": "sleeve",
    "3": "length",
    "4": "neckline",
    "5": "fabric",
    "6": "fit",
}

FORMATS = ("JPEG", "PNG")  # Pillow knows dozens, and each has errors of its own
MOST_PIXELS = 25_000_000  # of an image: decoded, a JPEG in many passes takes 10 bytes for each
MOST_DIGITS = 9  # of a label


class DatasetError(ValueError):
    """The dataset is missing or broken; the message is one line and names file and line."""


@dataclass(frozen=True)
class Split:
    """Images of one split, in file order. `labels` is int64 [images, categories] or None (test)."""

    name: str
    paths: tuple[str, ...]
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class Dataset:
    """A dataset folder that has been read: attributes, categories and splits."""

    folder: Path
    attributes: tuple[str, ...]
    categories: tuple[str, ...]
    sizes: tuple[int, ...]  # attributes per category, in file order
    splits: dict[str, Split]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over labels, lists and image bytes: equal data has an equal fingerprint."""
        digest = hashlib.sha256(repr((self.attributes, self.sizes)).encode())
        for split in self.splits.values():
            labels = b"" if split.labels is None else split.labels.tobytes()
            digest.update(f"{split.name}:{len(split)}".encode() + labels)
            for path in split.paths:
                digest.update(path.encode() + (self.folder / path).read_bytes())
        return digest.hexdigest()

    def split(self, name: str) -> Split:
        """One split, or several as one, as in "train+val". Raises DatasetError."""
        parts = [self.splits.get(part) for part in name.split("+")]
        found = [part for part in parts if part is not None]
        if len(found) < len(parts):
            raise DatasetError(
                f"{self.folder}: no split {name!r}; it has {', '.join(self.splits)}, each as "
                "split/NAME.txt"
            )
        if len(found) == 1:
            return found[0]
        labels = [part.labels for part in found if part.labels is not None]
        return Split(
            name,
            tuple(path for part in found for path in part.paths),
            np.concatenate(labels) if len(labels) == len(found) else None,
        )

    def attribute_table(self, split: str) -> list[dict[str, str | int]]:
        """Name, category and number of images of every attribute, in the order of the outputs."""
        labels = self.splits[split].labels
        assert labels is not None  # only the test split may have none
        counts = [
            count
            for column, size in zip(labels.T, self.sizes, strict=True)
            for count in np.bincount(column, minlength=size).tolist()
        ]
        kinds = [
            kind for kind, size in zip(self.categories, self.sizes, strict=True) for _ in range(size)
        ]
        return [
            {"name": name, "category": kind, "images": count}
            for name, kind, count in zip(self.attributes, kinds, counts, strict=True)
        ]


def read_dataset(folder: Path | str) -> Dataset:
    """Read the lists and labels of a dataset (not its images).

    Raises DatasetError with the first thing that is wrong.
    """
    dataset, findings = _read(Path(folder))
    if findings and not Path(folder).is_dir():
        raise DatasetError(f"{findings[0]}; name its folder with --data")
    if findings:
        more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
        raise DatasetError(f"{findings[0]}{more}; list all with: atelier data check {Path(folder)}")
    assert dataset is not None  # no findings
    return dataset


def check_dataset(folder: Path | str) -> list[str]:
    """Everything that is wrong with a dataset, images included: one `file:line: what` each."""
    folder = Path(folder)
    dataset, findings = _read(folder)
    if dataset is not None:
        for split in dataset.splits.values():
            findings.extend(_broken_images(folder, split))
    return findings


def _read(folder: Path) -> tuple[Dataset | None, list[str]]:
    if not folder.is_dir():
        found = "it is a file, not a folder" if folder.exists() else "the folder does not exist"
        return None, [f"no dataset at {folder}: {found}"]
    try:
        attributes, types = _read_attributes(folder / "split" / "list_attr_cloth.txt")
    except DatasetError as error:
        return None, [str(error)]
    kinds = Counter(types)  # in the order of the file
    sizes = tuple(kinds.values())
    categories = tuple(CATEGORY_NAMES.get(kind, f"category {kind}") for kind in kinds)
    splits, findings = {}, []
    for name in ("train", "val", "test"):
        if name == "test" and not (folder / "split" / "test.txt").exists():
            continue  # the public part of the challenge comes without it
        split, problems = _read_split(folder, name, sizes)
        findings += problems
        if split is not None:
            splits[name] = split
    return Dataset(folder, tuple(attributes), categories, sizes, splits), findings


def _read_attributes(path: Path) -> tuple[list[str], list[str]]:
    lines = _lines(path)
    rows = [(number, line.split()) for number, line in enumerate(lines[2:], 3) if line.strip()]
    for number, row in rows:
        if len(row) != 2:
            raise DatasetError(f"{path}:{number}: expected a name and a type, found {row}")
    if not rows:
        raise DatasetError(f"{path}:1: no attributes in it")
    names = [row[0] for _, row in rows]
    types = [row[1] for _, row in rows]
    if len(list(groupby(types))) > len(set(types)):
        raise DatasetError(f"{path}:3: the attributes of one type must stand together")
    return names, types


def read_labels(path: Path, images: int, sizes: tuple[int, ...]) -> np.ndarray:
    """The labels of so many images, int64 [images, categories]. Raises DatasetError."""
    labels, findings = _checked_labels(path, _lines(path), images, sizes)
    if findings:
        raise DatasetError(findings[0])
    return labels


def _checked_labels(
    path: Path, rows: list[str], images: int, sizes: tuple[int, ...]
) -> tuple[np.ndarray, list[str]]:
    wrong = len(rows) != images
    findings = [f"{path}:{len(rows)}: {len(rows)} rows for {images} images"] if wrong else []
    labels, problems = _parse_labels(path, rows, sizes)
    return labels, findings + problems


def _read_split(folder: Path, name: str, sizes: tuple[int, ...]) -> tuple[Split | None, list[str]]:
    listing, labelling = folder / "split" / f"{name}.txt", folder / "split" / f"{name}_attr.txt"
    try:
        paths = [line.strip() for line in _lines(listing)]
        rows = None if name == "test" and not labelling.exists() else _lines(labelling)
    except DatasetError as error:
        return None, [str(error)]
    findings = [f"{listing}:1: no images in it"] if not paths else []
    for number, path in enumerate(paths, 1):
        if not path or not os.path.isfile(folder / path):  # False too for what cannot be a path
            findings.append(f"{listing}:{number}: no such image: {path or '(empty line)'}")
    if rows is None:
        return Split(name, tuple(paths), None), findings
    labels, problems = _checked_labels(labelling, rows, len(paths), sizes)
    return Split(name, tuple(paths), labels), findings + problems


def _parse_labels(path: Path, rows: list[str], sizes: tuple[int, ...]) -> tuple[np.ndarray, list[str]]:
    labels: list[list[int]] = []  # of the right rows: memory is taken for what is there
    findings = []
    for number, row in enumerate(rows, 1):
        words = row.split()
        if len(words) != len(sizes) or not all(
            word.isdecimal() and len(word) <= MOST_DIGITS for word in words
        ):
            findings.append(f"{path}:{number}: expected {len(sizes)} indices, found {row.strip()!r}")
            continue
        values = [int(word) for word in words]
        for column, (value, size) in enumerate(zip(values, sizes, strict=True), 1):
            if value >= size:
                findings.append(
                    f"{path}:{number}: label {value} in column {column}, allowed is 0 to {size - 1}"
                )
                break
        else:
            labels.append(values)
    return np.array(labels, dtype=np.int64).reshape(len(labels), len(sizes)), findings


def _broken_images(folder: Path, split: Split) -> Iterator[str]:
    listing = folder / "split" / f"{split.name}.txt"
    for number, path in enumerate(split.paths, 1):
        if not os.path.isfile(folder / path):
            continue  # reported by the reader
        try:
            load_image(folder / path)
        except DatasetError as error:
            yield f"{listing}:{number}: {error}"


def load_image(path: Path) -> Image.Image:
    """Decode one image. Raises DatasetError if that fails, or if it is too large or not RGB."""
    try:
        # Pillow only warns of some that are too large here, which would be a second line.
        with (
            warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning),
            Image.open(path, formats=FORMATS) as image,
        ):
            _check_image(path, image)  # before memory is taken for its pixels
            image.load()
    except DatasetError:
        raise
    except Exception as error:  # what a damaged image raises depends on where it is damaged
        raise DatasetError(f"{path}: cannot be read ({error})") from None
    return image


def _check_image(path: Path, image: Image.Image) -> None:
    if image.width * image.height > MOST_PIXELS:
        size = f"{image.width} x {image.height}"
        raise DatasetError(f"{path}: {size} pixels, allowed are {MOST_PIXELS:,} in all; make it smaller")
    if image.mode != "RGB":
        raise DatasetError(f"{path}: mode {image.mode}, allowed is RGB")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: cannot be read ({error})") from None
