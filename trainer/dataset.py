"""Read a dataset's folder, and fingerprint it to tell one dataset from another.

- `img/*.jpg`: the images.
- `split/{train,val,test}.txt`: the path of one image in each line.
- `split/{train,val}_attr.txt`: the labels of one image in each line. A label is the index, from 0, of an
  attribute inside its category, or -1 if it is unknown.
- `split/list_attr_cloth.txt`: the number of attributes, a head, and each attribute with the number of
  its category.

Nothing here has a fixed size, so the full DeepFashion set is read in the same way.
"""

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import TrainConfig
from trainer.kind import kind_of
from trainer.text import TextError, as_on_disk, read_lines, same_letters

# What the numbers in list_attr_cloth.txt stand for (DeepFashion's documentation).
CATEGORY_NAMES = {
    "1": "texture",
    "2": "sleeve",
    "3": "length",
    "4": "neckline",
    "5": "fabric",
    "6": "fit",
}

ATTRIBUTES = "list_attr_cloth.txt"
HEAD = re.compile(r"\S*name\s+\S*type", re.IGNORECASE)  # attribute_name attribute_type
MOST_DIGITS = 9  # in a label
MOST_OF_A_TYPE = 255  # attributes of one type: predictions are kept in bytes, and one says "unknown"
LEARNED = ("train", "val")  # the splits of a search
MISSING, UNKNOWN = "missing files", "unknown labels"  # kinds of findings


class DatasetError(ValueError):
    """The dataset is missing or broken. The message is one line and names file and line."""


@dataclass(frozen=True)
class Finding:
    """Something that is wrong or worth knowing about a dataset."""

    place: str  # a file, with a line if there is one, as in train.txt:3
    kind: str  # in the plural, for a summary
    text: str
    is_error: bool = True  # else a warning: the dataset can be used as it is

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


@dataclass(frozen=True)
class Split:
    """The images of one split, in file order.

    `labels` is int64 [images, categories], with -1 for an unknown label, or None.
    """

    name: str
    paths: tuple[str, ...]
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class Dataset:
    """A dataset folder that has been read: attributes, categories and the requested splits."""

    folder: Path
    attributes: tuple[str, ...]
    categories: tuple[str, ...]
    sizes: tuple[int, ...]  # attributes per category, in file order
    splits: dict[str, Split]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over labels, lists and image bytes. Equal data has an equal fingerprint."""
        return self._digests[0]

    def images_digest(self, split: Split) -> str:
        """A digest of the split's images in their order."""
        return "+".join(self._digests[1][part] for part in split.name.split("+"))

    @cached_property
    def _digests(self) -> tuple[str, dict[str, str]]:
        """The digest of everything, and of each split's images."""
        of_everything = hashlib.sha256(repr((self.attributes, self.sizes)).encode())
        images = {}
        for split in self.splits.values():
            labels = b"" if split.labels is None else split.labels.tobytes()
            of_everything.update(f"{split.name}:{len(split)}".encode() + labels)
            of_images = hashlib.sha256()
            for path in split.paths:
                data = (self.folder / path).read_bytes()
                of_everything.update(same_letters(path).encode() + data)
                of_images.update(hashlib.sha256(data).digest())
            images[split.name] = of_images.hexdigest()[:16]
        return of_everything.hexdigest(), images

    def split(self, name: str) -> Split:
        """One split by its name, or several joined, as in "train+val"."""
        parts = [self.splits[part] for part in name.split("+")]
        if len(parts) == 1:
            return parts[0]
        labels = [part.labels for part in parts if part.labels is not None]
        return Split(
            name,
            tuple(path for part in parts for path in part.paths),
            np.concatenate(labels) if len(labels) == len(parts) else None,
        )

    def training_rows(self, config: TrainConfig) -> np.ndarray:
        """Indices of the images that a run learns from, equal for every seed. Raises DatasetError."""
        images, limit = len(self.split(config.train_on)), config.train_images
        if limit is None:
            return np.arange(images)
        if limit > images:
            raise DatasetError(
                f"train_images = {limit}: the dataset has {images} training images; allowed is 1 to "
                f"{images}"
            )
        return np.sort(np.random.default_rng(0).permutation(images)[:limit])

    def attribute_table(self, config: TrainConfig) -> list[dict[str, str | int]]:
        """Name, category and number of images of every attribute, in the order of the network's outputs.

        `images` counts the validation images, `train_images` the images that a run learns from.
        """
        categories = [
            name for name, size in zip(self.categories, self.sizes, strict=True) for _ in range(size)
        ]
        val = self.counts(self.split("val"))
        train = self.counts(self.split(config.train_on), self.training_rows(config))
        return [
            {"name": name, "category": category, "images": images, "train_images": train_images}
            for name, category, images, train_images in zip(
                self.attributes, categories, val, train, strict=True
            )
        ]

    @property
    def names(self) -> list[tuple[str, ...]]:
        """The attributes of each category."""
        ends = np.cumsum(self.sizes)
        return [self.attributes[end - size : end] for end, size in zip(ends, self.sizes, strict=True)]

    def counts(self, split: Split, rows: np.ndarray | None = None) -> list[int]:
        """How many images of a labelled split, or of some of its rows, have each attribute."""
        assert split.labels is not None
        labels = split.labels if rows is None else split.labels[rows]
        return [
            count
            for column, size in zip(labels.T, self.sizes, strict=True)
            for count in np.bincount(column + 1, minlength=size + 1)[1:].tolist()  # without the unknown
        ]


def absent_attributes(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each split in which attributes have no image. `table` is an attribute table."""
    lines = []
    for split, key, consequence in (
        ("training", "train_images", "no network can learn it"),
        ("validation", "images", "the score leaves it out"),
    ):
        # A study of an earlier version has no numbers of training images.
        if names := [str(row["name"]) for row in table if row.get(key) == 0]:
            lines.append(f"no {split} image has {', '.join(names)}: {consequence}")
    return lines


def read_dataset(
    folder: Path | str,
    splits: Sequence[str] = LEARNED,
    labelled: bool = True,
    unknown_labels: bool = False,
) -> Dataset:
    """Read the lists and labels of some splits, but no images. Labels are read if `labelled` is True.

    They may be -1 if `unknown_labels` is True. Raises DatasetError with the first finding.
    """
    dataset, findings = examine(Path(folder), splits, labelled)
    findings = [one for one in findings if one.is_error or not unknown_labels]
    if dataset is not None and not findings:
        return dataset
    more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
    advice = f"list all with: atelier data check {folder}"
    if findings[0].kind == MISSING:
        more, advice = "", "name the dataset's folder with --data"
        if (usable := listed_splits(Path(folder))) and dataset is not None:
            splits = f"--split {' or '.join(usable)}"
            without = f"without it the folder is only good for: atelier predict {splits}"
            advice = without if labelled else f"give {splits}"
    raise DatasetError(f"{findings[0]}{more}; {advice}")


def listed_splits(folder: Path) -> list[str]:
    """The splits that have a list of images."""
    folder = as_on_disk(folder)
    return [name for name in (*LEARNED, "test") if _list(folder, name).is_file()]


def examine(
    folder: Path, splits: Sequence[str], labelled: bool = True
) -> tuple[Dataset | None, list[Finding]]:
    """Read the dataset with these splits as far as possible, and what is wrong in its text files.

    That labels are unknown is no error, but a warning.
    """
    reader = _Reader(as_on_disk(folder))
    return reader.read(splits, labelled), reader.findings


def read_labels(path: Path, images: int, sizes: tuple[int, ...]) -> np.ndarray:
    """Read the labels of so many images: int64 [images, categories], -1 for unknown.

    Raises DatasetError.
    """
    reader = _Reader(path.parent)
    labels = reader.labels(path, images, sizes)
    if reader.findings or labels is None:
        raise DatasetError(str(reader.findings[0]))
    return labels


def _list(folder: Path, split: str) -> Path:
    return folder / "split" / f"{split}.txt"


class _Reader:
    """Reads the text files of a dataset folder, and collects what is wrong with them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.findings: list[Finding] = []
        self._names: dict[Path, dict[str, list[str]]] = {}  # the names in each folder, for `_on_disk`

    def _add(self, place: str, kind: str, text: str) -> None:
        self.findings.append(Finding(place, kind, text))

    def read(self, splits: Sequence[str], labelled: bool) -> Dataset | None:
        """The dataset with these splits. None if its attributes cannot be read."""
        folder = self._folder
        if not folder.is_dir():
            problem = "the folder does not exist"
            if folder.exists():
                problem = f"it is {kind_of(folder) or 'a file'}, not a folder"
            self._add(f"no dataset at {folder}", MISSING, problem)
            return None
        rows = self._attributes(folder / "split" / ATTRIBUTES)
        if rows is None:
            return None
        counts = Counter(kind for _, kind in rows)  # in the order of the file
        sizes = tuple(counts.values())
        read_splits = [self._split(name, sizes, labelled) for name in splits]
        dataset = Dataset(
            folder,
            tuple(name for name, _ in rows),
            tuple(CATEGORY_NAMES.get(kind, f"category {kind}") for kind in counts),
            sizes,
            {split.name: split for split in read_splits if split is not None},
        )
        self.findings += _unknown(dataset)
        return dataset

    def _lines(self, path: Path) -> list[str] | None:
        try:
            return read_lines(path)
        except FileNotFoundError:
            hint = _elsewhere(self._folder) if path.name == ATTRIBUTES else ""
            self._add(str(path), MISSING, f"no such file{hint}")
        except TextError as error:
            place, _, text = str(error).partition(": ")
            self._add(place, "unreadable files", text)
        return None

    def _attributes(self, path: Path) -> list[tuple[str, str]] | None:
        """Names and types in the order of the network's outputs. None if the list has a fault."""
        lines = self._lines(path)
        if lines is None:
            return None
        rows = [
            (number, *" ".join(line.split()).rpartition(" ")[::2])
            for number, line in enumerate(lines, 1)
            if number > 2 and line
        ]
        faults = [*_faults_of_head(lines, len(rows)), *_faults_of_attributes(rows)]
        for number, text in faults:
            self._add(f"{path}:{number}", "attributes", text)
        return None if faults else [(name, str(int(kind))) for _, name, kind in rows]

    def _split(self, name: str, sizes: tuple[int, ...], labelled: bool) -> Split | None:
        listing = _list(self._folder, name)
        listed = self._lines(listing)
        if listed is None:
            return None
        if not listed:
            self._add(f"{listing}:1", "missing images", "no images in it")
        paths = []
        for number, path in enumerate(listed, 1):
            path_on_disk = self._on_disk(path) if path else None
            if path_on_disk is None:
                listed_path = path or "(empty line)"
                self._add(f"{listing}:{number}", "missing images", f"no such image: {listed_path}")
            paths.append(path_on_disk or path)
        label_file = listing.with_name(f"{name}_attr.txt")
        # The public part of the challenge has no labels of the test split.
        has_labels = labelled and (name != "test" or label_file.exists())
        labels = self.labels(label_file, len(paths), sizes) if has_labels else None
        return Split(name, tuple(paths), labels)

    def _on_disk(self, path: str) -> str | None:
        """A listed path in the spelling that it has on disk.

        The list may have backslashes, other upper and lower case, or another Unicode form of accents,
        because it may come from another system. None if no file fits, or if several do.
        """
        if os.path.isfile(self._folder / path):  # also False for a text that cannot be a path
            return path
        real_path = ""
        for part in path.replace("\\", "/").split("/"):
            place = self._folder / real_path
            names = self._names_in(place).get(same_letters(part).casefold(), [])
            if os.path.exists(place / part):
                names = [part]
            if len(names) != 1:
                return None
            real_path = os.path.join(real_path, names[0])
        return real_path if os.path.isfile(self._folder / real_path) else None

    def _names_in(self, place: Path) -> dict[str, list[str]]:
        if place not in self._names:
            self._names[place] = defaultdict(list)
            for present in os.listdir(place) if os.path.isdir(place) else []:
                self._names[place][same_letters(present).casefold()].append(present)
        return self._names[place]

    def labels(self, path: Path, images: int, sizes: tuple[int, ...]) -> np.ndarray | None:
        """The labels, int64 [images, categories]. None if something is wrong with them."""
        rows = self._lines(path)
        if rows is None:
            return None
        faults = (
            [(max(len(rows), 1), f"{len(rows)} rows for {images} images")] if len(rows) != images else []
        )
        values = []
        for number, row in enumerate(rows, 1):
            words = row.replace(",", " ").split()
            if fault := _fault_of_labels(words, sizes):
                faults.append((number, fault))
            else:
                values.append([int(word) for word in words])
        for number, fault in faults:
            self._add(f"{path}:{number}", "labels", fault)
        return None if faults else np.array(values, np.int64).reshape(images, len(sizes))


def _unknown(dataset: Dataset) -> Iterator[Finding]:
    """A finding for each category of a split, in the line of its first unknown label."""
    for split in dataset.splits.values():
        if split.labels is None:
            continue
        path = _list(dataset.folder, f"{split.name}_attr")
        unknown = split.labels < 0
        if unknown.all() and unknown.size:
            yield Finding(f"{path}:1", "labels", "every label is unknown; a split needs labels")
            continue
        for category, column in zip(dataset.categories, unknown.T, strict=True):
            if count := int(column.sum()):
                text = (
                    f"{category} is unknown (-1) in {count} of {len(split)} images, first in this one; "
                    f"unknown_labels = true in [train] leaves them out of {category}"
                )
                yield Finding(f"{path}:{int(column.argmax()) + 1}", UNKNOWN, text, is_error=False)


def _fault_of_labels(words: list[str], sizes: tuple[int, ...]) -> str | None:
    if len(words) != len(sizes) or not all(word == "-1" or _is_number(word) for word in words):
        return f"expected {len(sizes)} indices, whole numbers from 0, found {' '.join(words)!r}"
    for column, (word, size) in enumerate(zip(words, sizes, strict=True), 1):
        if int(word) >= size:
            return f"label {int(word)} in column {column}, allowed is 0 to {size - 1}"
    return None


def _faults_of_head(lines: list[str], attributes: int) -> Iterator[tuple[int, str]]:
    """What is wrong with the first two lines of an attribute list, with the line's number."""
    stated, head = [*lines, "", ""][:2]
    if not _is_number(stated):
        yield 1, f"found {stated!r}, allowed is the number of attributes"
    if not HEAD.fullmatch(head):
        yield 2, f"found {head!r}, allowed is the head 'attribute_name attribute_type'"
    if not attributes:
        yield max(len(lines), 1), "no attributes in it"
    elif _is_number(stated) and int(stated) != attributes:
        yield 1, f"says {stated} attributes, but {attributes} follow"


def _faults_of_attributes(rows: list[tuple[int, str, str]]) -> Iterator[tuple[int, str]]:
    """What is wrong with the rows of an attribute list: line, name and type."""
    last, lines, counts = 0, dict[tuple[str, int], int](), Counter[int]()
    for line, name, text in rows:
        if not name or not _is_number(text):
            row = f"{name} {text}".strip()
            yield line, f"found {row!r}, allowed is a name and the number of its type"
            continue
        kind = int(text)
        if (first := lines.setdefault((name, kind), line)) != line:
            yield line, f"{name} of type {kind} stands in line {first} already"
        if kind < last:
            yield (
                line,
                f"type {kind} after type {last}; sort them, since the columns of the labels go by "
                "ascending types",
            )
        counts[kind] += 1
        if counts[kind] == MOST_OF_A_TYPE + 1:
            yield line, f"more than {MOST_OF_A_TYPE} attributes of type {kind}; leave some out"
        last = kind


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) <= MOST_DIGITS


def _elsewhere(folder: Path) -> str:
    """A hint for a message, if the dataset is one folder further in or out."""
    inside = sorted(path.parents[1] for path in folder.glob(f"*/split/{ATTRIBUTES}"))
    outside = [parent for parent in folder.parents[:1] if (parent / "split" / ATTRIBUTES).is_file()]
    datasets = [*inside, *outside]
    return f"; did you mean {datasets[0]}?" if datasets else ""
