"""The layouts of a dataset's folder: where its lists are, and what their lines say.

- The challenge's: `split/` has the attribute list, and for each split a list of images and of labels.
- DeepFashion's fine release: the same in `Anno_fine/`.
- DeepFashion's coarse release: `Anno_coarse/` or `Anno/` has the attribute list, and the labels of all
  images in one list. `Eval/` has one list of all images, which says the split of each.

The challenge's labels are indices, one per category. DeepFashion's are flags, one per attribute.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SPLITS = ("train", "val", "test")
ATTRIBUTES = "list_attr_cloth.txt"
ATTRIBUTE_HEAD = "attribute_name attribute_type"
LABEL_HEAD, PARTITION_HEAD = "image_name attribute_labels", "image_name evaluation_status"
MOST_DIGITS = 9  # in a label
MOST_OF_A_TYPE = 255  # attributes of one type: predictions are kept in bytes, and one says "unknown"

# What the numbers in list_attr_cloth.txt stand for (DeepFashion's documentation).
FINE = {"1": "texture", "2": "sleeve", "3": "length", "4": "neckline", "5": "fabric", "6": "fit"}
COARSE = {"1": "texture", "2": "fabric", "3": "shape", "4": "part", "5": "style"}
# The folders that may have the attribute list. The first that has it counts.
FOLDERS = {"split": FINE, "Anno_fine": FINE, "Anno_coarse": COARSE, "Anno": COARSE}

# Flags as bytes. No text has a NUL, so this one can stand for -1.
NO, ZERO, YES = b"\0", b"0", b"1"

Fault = tuple[int, str]  # a line's number, and what is wrong there


@dataclass(frozen=True)
class Lines:
    """The lines of a file that say something of some rows, row by row."""

    path: Path
    numbers: Sequence[int]

    def place(self, row: int) -> str:
        """File and line, as in split/train.txt:3."""
        return f"{self.path}:{self.numbers[row]}"


@dataclass(frozen=True)
class Layout:
    """Where a dataset's folder keeps its lists."""

    folder: Path
    annotations: Path  # the folder of the attribute list and the labels
    is_partitioned: bool  # all splits share one list of images, and one of labels

    @classmethod
    def of(cls, folder: Path) -> "Layout":
        """The layout of a folder. Of one without an attribute list it is the challenge's."""
        found = [folder / name for name in FOLDERS if (folder / name / ATTRIBUTES).is_file()]
        annotations = found[0] if found else folder / "split"
        has_lists = any((annotations / f"{split}.txt").is_file() for split in SPLITS)
        return cls(folder, annotations, not has_lists and annotations.name != "split")

    @property
    def attributes(self) -> Path:
        """The list of attributes."""
        return self.annotations / ATTRIBUTES

    @property
    def category_names(self) -> dict[str, str]:
        """What the types of attributes stand for."""
        return FOLDERS[self.annotations.name]

    def images(self, split: str) -> Path:
        """The list of a split's images."""
        if self.is_partitioned:
            return self.folder / "Eval" / "list_eval_partition.txt"
        return self.annotations / f"{split}.txt"

    def labels(self, split: str) -> Path:
        """The list of their labels."""
        return self.annotations / ("list_attr_img.txt" if self.is_partitioned else f"{split}_attr.txt")

    @property
    def is_ascending(self) -> bool:
        """Whether the types in the attribute list must ascend. In the coarse release they are mixed."""
        return self.category_names is FINE

    @property
    def root(self) -> str:
        """The folder that the listed paths start in. Of DeepFashion's `img.zip` that may be `Img`."""
        inner = not (self.folder / "img").is_dir() and (self.folder / "Img" / "img").is_dir()
        return "Img" if inner else ""


def layouts_around(folder: Path) -> list[Path]:
    """The datasets that are one folder further in or out."""
    inside = {path.parents[1] for name in FOLDERS for path in folder.glob(f"*/{name}/{ATTRIBUTES}")}
    outside = [parent for parent in folder.parents[:1] if Layout.of(parent).attributes.is_file()]
    return [*sorted(inside), *outside]


def attributes_of(lines: list[str], ascending: bool) -> tuple[list[tuple[int, str, str]], list[Fault]]:
    """Line, name and type of each attribute, by ascending types, and what is wrong.

    With `ascending` the types must ascend in the file. Else each keeps the order of its attributes.
    """
    rows = [
        (number, *" ".join(line.split()).rpartition(" ")[::2])
        for number, line in enumerate(lines, 1)
        if number > 2 and line
    ]
    faults = [
        *_faults_of_head(lines, len(rows), "attributes", ATTRIBUTE_HEAD),
        *_faults_of_attributes(rows, ascending),
    ]
    if faults:
        return [], faults
    rows.sort(key=lambda row: int(row[2]))
    return [(number, name, str(int(kind))) for number, name, kind in rows], []


def partition_of(lines: list[str]) -> tuple[dict[str, list[tuple[int, str]]], list[Fault]]:
    """Line and path of each image, by its split, and what is wrong."""
    faults = list(_faults_of_head(lines, len(lines[2:]), "images", PARTITION_HEAD))
    images: dict[str, list[tuple[int, str]]] = {split: [] for split in SPLITS}
    for number, line in enumerate(lines[2:], 3):
        words = line.rsplit(None, 1)
        if len(words) == 2 and words[1] in images:
            images[words[1]].append((number, words[0]))
        else:
            faults.append(
                (number, f"found {' '.join(words)!r}, allowed is a path and train, val or test")
            )
    return images, faults


def labels_by_image(
    lines: list[str], sizes: Sequence[int], columns: np.ndarray
) -> tuple[dict[str, int], np.ndarray, list[Fault]]:
    """A list with a head of which each row is a path and a flag for each attribute.

    Returns the row of each image, the labels int64 [rows, categories], and what is wrong. See
    `labels_of_flags`.
    """
    faults = list(_faults_of_head(lines, len(lines[2:]), "images", LABEL_HEAD))
    rows: dict[str, int] = {}

    def texts() -> Iterator[tuple[int, str]]:
        for row, line in enumerate(lines[2:]):
            path, text = [*line.split(None, 1), "", ""][:2]
            if (first := rows.setdefault(path, row)) != row:
                faults.append((row + 3, f"{path} stands in line {first + 3} already"))
            yield row + 3, text

    flags, wrong = _flags(texts(), len(columns))
    return rows, labels_of_flags(flags, sizes, columns), faults + wrong


def labels_by_row(
    lines: list[str], sizes: Sequence[int], columns: np.ndarray
) -> tuple[np.ndarray, list[Fault]]:
    """The labels of images that another file lists, int64 [rows, categories], and what is wrong.

    A row has an index for each category, -1 if it is unknown, or a flag for each attribute.
    """
    texts = [(number, line.replace(",", " ")) for number, line in enumerate(lines, 1)]
    if lines and len(texts[0][1].split()) == len(columns) != len(sizes):
        flags, faults = _flags(texts, len(columns))
        return labels_of_flags(flags, sizes, columns), faults
    faults, labels = [], []
    for number, text in texts:
        words = text.split()
        if fault := _fault_of_indices(words, sizes):
            faults.append((number, fault))
        else:
            labels.append([int(word) for word in words])
    return np.array(labels, np.int64).reshape(-1, len(sizes)), faults


def labels_of_flags(flags: np.ndarray, sizes: Sequence[int], columns: np.ndarray) -> np.ndarray:
    """Labels, int64 [images, categories], of flags, uint8 [images, attributes].

    `columns` are the flags' columns in the order of the network's outputs. A label is known if its
    category has one YES and nothing unknown. ZERO means unknown if -1 means no, and else it means no.
    """
    zero_is_unknown = not flags.all()  # there is a NO
    labels = np.empty((len(flags), len(sizes)), np.int64)
    for category, members in enumerate(np.split(columns, np.cumsum(sizes)[:-1])):
        part = flags[:, members]
        yes = part == ord(YES)
        known = yes.sum(1) == 1
        if zero_is_unknown:
            known &= (part != ord(ZERO)).all(1)
        labels[:, category] = np.where(known, yes.argmax(1), -1)
    return labels


def _flags(rows: Iterable[tuple[int, str]], attributes: int) -> tuple[np.ndarray, list[Fault]]:
    """The flags of rows without a fault, uint8 [rows, attributes]: NO, ZERO or YES."""
    flags, faults = bytearray(), []
    for number, row in rows:
        words = row.encode().replace(b"-1", NO).split()
        joined = b"".join(words)
        if len(words) == len(joined) == attributes and not joined.strip(NO + ZERO + YES):
            flags += joined
        else:
            faults.append((number, _fault_of_flags(row.encode().split(), attributes)))
    return np.frombuffer(flags, np.uint8).reshape(-1, attributes), faults


def _fault_of_flags(words: list[bytes], attributes: int) -> str:
    if len(words) != attributes:
        return f"{len(words)} flags, expected {attributes}: one for each attribute"
    wrong = next(word for word in words if word not in (b"1", b"0", b"-1"))
    return f"found {wrong.decode()!r}, allowed is 1, 0 or -1 for each attribute"


def _fault_of_indices(words: list[str], sizes: Sequence[int]) -> str | None:
    if len(words) != len(sizes) or not all(word == "-1" or _is_number(word) for word in words):
        return f"expected {len(sizes)} indices, whole numbers from 0, found {' '.join(words)!r}"
    for column, (word, size) in enumerate(zip(words, sizes, strict=True), 1):
        if int(word) >= size:
            return f"label {int(word)} in column {column}, allowed is 0 to {size - 1}"
    return None


def _faults_of_head(lines: list[str], rows: int, what: str, example: str) -> Iterator[Fault]:
    """What is wrong with the first two lines of a list with so many rows."""
    stated, head = [*lines, "", ""][:2]
    if not _is_number(stated):
        yield 1, f"found {stated!r}, allowed is the number of {what}"
    name, value = (word.rpartition("_")[2] for word in example.split())
    if not re.fullmatch(rf"\S*{name}\s+\S*{value}", head, re.IGNORECASE):
        yield 2, f"found {head!r}, allowed is the head '{example}'"
    if not rows:
        yield max(len(lines), 1), f"no {what} in it"
    elif _is_number(stated) and int(stated) != rows:
        yield 1, f"says {stated} {what}, but {rows} follow"


def _faults_of_attributes(rows: list[tuple[int, str, str]], ascending: bool) -> Iterator[Fault]:
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
        if ascending and kind < last:
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
