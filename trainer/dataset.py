"""Read a dataset's folder, and fingerprint it to tell one dataset from another.

`trainer/layouts.py` knows the layouts that the folder may have. A label is the index, from 0, of an
attribute inside its category, or -1 if it is unknown. Nothing here has a fixed size.
"""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from trainer.kind import kind_of
from trainer.layouts import (
    ATTRIBUTES,
    SPLITS,
    Fault,
    Layout,
    Lines,
    attributes_of,
    labels_by_image,
    labels_by_row,
    layouts_around,
    partition_of,
)
from trainer.text import TextError, as_on_disk, read_lines, same_letters

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
    split: str | None = None  # if it is about one split

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
    images_from: Lines | None = None  # None of splits that are joined
    labels_from: Lines | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def place(self, row: int, of_labels: bool = False) -> str:
        """The file and line that list an image, or its labels."""
        lines = self.labels_from if of_labels else self.images_from
        assert lines is not None
        return lines.place(row)


@dataclass(frozen=True)
class Dataset:
    """A dataset folder that has been read: attributes, categories and the requested splits."""

    folder: Path
    attributes: tuple[str, ...]
    categories: tuple[str, ...]
    sizes: tuple[int, ...]  # attributes per category, in file order
    splits: dict[str, Split]
    attributes_from: Lines

    @property
    def fingerprint(self) -> str:
        """SHA-256 over labels, lists and image bytes. Equal data has an equal fingerprint."""
        return self._digests[0]

    def images_digest(self, split: Split) -> str:
        """A digest of the split's images in their order."""
        return "+".join(
            hashlib.sha256(b"".join(self._digests[1][part])).hexdigest()[:16]
            for part in split.name.split("+")
        )

    def image_digests(self, split: Split) -> list[bytes]:
        """A digest of each of the split's images."""
        return [digest for part in split.name.split("+") for digest in self._digests[1][part]]

    @cached_property
    def _digests(self) -> tuple[str, dict[str, list[bytes]]]:
        """The digest of everything, and of each image, by split."""
        of_everything = hashlib.sha256(repr((self.attributes, self.sizes)).encode())
        images: dict[str, list[bytes]] = {}
        for split in self.splits.values():
            labels = b"" if split.labels is None else split.labels.tobytes()
            of_everything.update(f"{split.name}:{len(split)}".encode() + labels)
            images[split.name] = []
            for path in split.paths:
                data = (self.folder / path).read_bytes()
                of_everything.update(same_letters(path).encode() + data)
                images[split.name].append(hashlib.sha256(data).digest())
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

    @property
    def columns(self) -> np.ndarray:
        """Where each attribute stands in the attribute list, from 0: int64 [attributes]."""
        return np.argsort(np.argsort(self.attributes_from.numbers))

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
    return _Reader(as_on_disk(folder)).listed_splits()


def examine(
    folder: Path, splits: Sequence[str], labelled: bool = True
) -> tuple[Dataset | None, list[Finding]]:
    """Read the dataset with these splits as far as possible, and what is wrong in its text files.

    That labels are unknown is no error, but a warning.
    """
    reader = _Reader(as_on_disk(folder))
    return reader.read(splits, labelled), reader.findings


def read_labels(
    path: Path, images: int, sizes: Sequence[int], columns: np.ndarray | None = None
) -> np.ndarray:
    """Read the labels of so many images: int64 [images, categories], -1 for unknown.

    `columns` are `Dataset.columns`; without it the attribute list is sorted. Raises DatasetError.
    """
    reader = _Reader(path.parent)
    labels = reader.labels(path, images, sizes, np.arange(sum(sizes)) if columns is None else columns)
    if reader.findings or labels is None:
        raise DatasetError(str(reader.findings[0]))
    return labels


class _Reader:
    """Reads the text files of a dataset folder, and collects what is wrong with them."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._layout = folder, Layout.of(folder)
        self._root = self._layout.root
        self.findings: list[Finding] = []
        self._split: str | None = None  # that is being read
        self._names: dict[Path, dict[str, list[str]]] = {}  # the names in each folder, for `_on_disk`

    def _add(self, place: str, kind: str, text: str) -> None:
        self.findings.append(Finding(place, kind, text, split=self._split))

    def _add_faults(self, path: Path, kind: str, faults: Sequence[Fault]) -> None:
        for number, text in faults:
            self._add(f"{path}:{number}", kind, text)

    def read(self, splits: Sequence[str], labelled: bool) -> Dataset | None:
        """The dataset with these splits. None if its attributes cannot be read."""
        folder, layout = self._folder, self._layout
        if not folder.is_dir():
            problem = "the folder does not exist"
            if folder.exists():
                problem = f"it is {kind_of(folder) or 'a file'}, not a folder"
            self._add(f"no dataset at {folder}", MISSING, problem)
            return None
        rows = self._attributes()
        if not rows:
            return None
        counts = Counter(kind for _, _, kind in rows)  # by ascending types
        dataset = self._dataset = Dataset(
            folder,
            tuple(name for _, name, _ in rows),
            tuple(layout.category_names.get(kind, f"category {kind}") for kind in counts),
            tuple(counts.values()),
            {},
            Lines(layout.attributes, [number for number, _, _ in rows]),
        )
        for name in splits:
            self._split = name
            if (split := self._read_split(name, labelled)) is not None:
                dataset.splits[name] = split
        self.findings += _unknown(dataset)
        return dataset

    def listed_splits(self) -> list[str]:
        """The splits that have a list of images."""
        if self._layout.is_partitioned:
            return [name for name, images in self._partition.items() if images]
        return [name for name in SPLITS if self._layout.images(name).is_file()]

    def _lines(self, path: Path) -> list[str] | None:
        try:
            return read_lines(path)
        except FileNotFoundError:
            near = layouts_around(self._folder) if path.name == ATTRIBUTES else []
            self._add(str(path), MISSING, f"no such file{f'; did you mean {near[0]}?' if near else ''}")
        except TextError as error:
            place, _, text = str(error).partition(": ")
            self._add(place, "unreadable files", text)
        return None

    def _attributes(self) -> list[tuple[int, str, str]]:
        """Lines, names and types in the order of the network's outputs; none if the list has a fault."""
        path = self._layout.attributes
        lines = self._lines(path)
        if lines is None:
            return []
        rows, faults = attributes_of(lines, self._layout.is_ascending)
        self._add_faults(path, "attributes", faults)
        return rows

    @cached_property
    def _partition(self) -> dict[str, list[tuple[int, str]]]:
        """Line and path of the images of each split, from the one list of all."""
        path = self._layout.images("")
        lines = self._lines(path)
        if lines is None:
            return {}
        images, faults = partition_of(lines)
        self._add_faults(path, "missing images", faults)
        return images

    def _listed(self, name: str) -> list[tuple[int, str]] | None:
        """Line and path of a split's images. None if there is no list."""
        if self._layout.is_partitioned:
            return self._partition.get(name)
        lines = self._lines(self._layout.images(name))
        return None if lines is None else [*enumerate(lines, 1)]

    def _read_split(self, name: str, labelled: bool) -> Split | None:
        path, listed = self._layout.images(name), self._listed(name)
        if listed is None:
            return None
        if not listed:
            self._add(f"{path}:1", "missing images", f"no images of {name} in it")
        paths = []
        for number, image in listed:
            on_disk = self._on_disk(os.path.join(self._root, image)) if image else None
            if on_disk is None:
                self._add(
                    f"{path}:{number}", "missing images", f"no such image: {image or '(empty line)'}"
                )
            paths.append(on_disk or image)
        # The public part of the challenge has no labels of the test split.
        has_labels = labelled and (name != "test" or self._layout.labels(name).exists())
        labels, labels_from = self._labels(name, listed) if has_labels else (None, None)
        images_from = Lines(path, [number for number, _ in listed])
        return Split(name, tuple(paths), labels, images_from, labels_from)

    def _labels(
        self, name: str, listed: list[tuple[int, str]]
    ) -> tuple[np.ndarray | None, Lines | None]:
        """The labels of a split's images, and where they come from. None if they have a fault."""
        path, dataset = self._layout.labels(name), self._dataset
        if not self._layout.is_partitioned:
            labels = self.labels(path, len(listed), dataset.sizes, dataset.columns)
            return labels, Lines(path, range(1, len(listed) + 1))
        if self._by_image is None:
            return None, None
        rows, labels = self._by_image
        text = f"the image has no row in {path}"
        lacking = [(number, text) for number, image in listed if image not in rows]
        self._add_faults(self._layout.images(name), "labels", lacking)
        if lacking:
            return None, None
        chosen = [rows[image] for _, image in listed]
        return labels[chosen], Lines(path, [row + 3 for row in chosen])

    @cached_property
    def _by_image(self) -> tuple[dict[str, int], np.ndarray] | None:
        """Each image's row, and the rows' labels, from the one list of all. None if it has a fault."""
        path = self._layout.labels("")
        lines = self._lines(path)
        if lines is None:
            return None
        rows, labels, faults = labels_by_image(lines, self._dataset.sizes, self._dataset.columns)
        self._add_faults(path, "labels", faults)
        return None if faults else (rows, labels)

    def _on_disk(self, path: str) -> str | None:
        """A listed path in the spelling that it has on disk.

        The list may have backslashes, other upper and lower case, or another Unicode form of accents,
        because it may come from another system. None if no file fits, or if several do.
        """
        if os.path.isfile(os.path.join(self._folder, path)):  # also False for what cannot be a path
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

    def labels(
        self, path: Path, images: int, sizes: Sequence[int], columns: np.ndarray
    ) -> np.ndarray | None:
        """The labels, int64 [images, categories]. None if something is wrong with them."""
        rows = self._lines(path)
        if rows is None:
            return None
        labels, faults = labels_by_row(rows, sizes, columns)
        if len(rows) != images:
            faults = [(max(len(rows), 1), f"{len(rows)} rows for {images} images"), *faults]
        self._add_faults(path, "labels", faults)
        return None if faults else labels


def _unknown(dataset: Dataset) -> Iterator[Finding]:
    """A finding for each category of a split, in the line of its first unknown label."""
    for split in dataset.splits.values():
        if split.labels is None:
            continue
        unknown = split.labels < 0
        if unknown.all() and unknown.size:
            place = split.place(0, of_labels=True)
            text = "every label is unknown; a split needs labels"
            yield Finding(place, "labels", text, split=split.name)
            continue
        for category, column in zip(dataset.categories, unknown.T, strict=True):
            if count := int(column.sum()):
                text = (
                    f"{category} is unknown in {count} of {len(split)} images, first in this one (-1, "
                    "or not exactly one attribute); unknown_labels = true in [train] leaves them out of "
                    f"{category}"
                )
                place = split.place(int(column.argmax()), of_labels=True)
                yield Finding(place, UNKNOWN, text, False, split.name)
