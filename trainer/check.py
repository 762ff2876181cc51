"""`atelier data check`: everything that is wrong or worth knowing about a dataset."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from trainer.dataset import ATTRIBUTES, LEARNED, Dataset, Finding, Split, examine, listed_splits
from trainer.images import ImageError, image_digest
from trainer.text import as_on_disk, read_lines

Row = tuple[Split, int]  # an image's place: its split, and its index in it


def check_dataset(folder: Path) -> tuple[Dataset | None, list[Finding]]:
    """The dataset as far as it can be read, and all findings.

    An error keeps a search from beginning or, in a folder without labels, a prediction. All else is a
    warning.
    """
    present = listed_splits(folder)
    labelled = any((as_on_disk(folder) / "split" / f"{name}_attr.txt").is_file() for name in LEARNED)
    wanted = dict.fromkeys([*LEARNED, *present]) if labelled or not present else present
    dataset, findings = examine(folder, [*wanted], labelled)
    if dataset is not None:
        if labelled and all(name in dataset.splits for name in LEARNED) and not findings:
            findings += _absent(dataset)
        findings += _of_images(dataset)
    if labelled:  # a search does not look at the test split
        findings = [replace(f, is_error=f.is_error and not _is_of_test(f)) for f in findings]
    return dataset, sorted(findings, key=lambda finding: not finding.is_error)


def _is_of_test(finding: Finding) -> bool:
    return "/split/test" in finding.place


def summary(findings: list[Finding]) -> str:
    """How many there are of each kind, errors apart from warnings."""
    words = []
    for name, is_error in (("errors", True), ("warnings", False)):
        kinds = Counter(f.kind for f in findings if f.is_error is is_error)
        each = ", ".join(f"{kind}: {count}" for kind, count in kinds.items())
        number = "1 " + name[:-1] if kinds.total() == 1 else f"{kinds.total() or 'no'} {name}"
        words.append(number + (f" ({each})" if each else ""))
    return ", ".join(words)


def _of_images(dataset: Dataset) -> Iterator[Finding]:
    equal: dict[bytes, list[Row]] = defaultdict(list)
    for split in dataset.splits.values():
        for index, path in enumerate(split.paths):
            file = dataset.folder / path
            if not os.path.isfile(file):
                continue  # the reader has found that
            try:
                equal[image_digest(file)].append((split, index))
            except ImageError as error:
                yield Finding(_place(dataset, (split, index)), "broken images", str(error))
    for first, *others in equal.values():
        for other in others:
            yield from _repeated(dataset, first, other)


def _repeated(dataset: Dataset, first: Row, other: Row) -> Iterator[Finding]:
    """What there is to say of two rows with the same image."""
    (split, index), (other_split, other_index) = first, other
    there = f"{split.name}.txt:{index + 1}"
    if split is not other_split:
        kind, text = (
            "images in two splits",
            f"the image of {there} too, so {other_split.name} is not unseen",
        )
    elif Path(split.paths[index]) == Path(other_split.paths[other_index]):
        kind, text = "images listed twice", f"listed in {there} already"
    else:
        kind, text = "equal images", f"the same image as {there}, byte for byte, under another name"
    yield Finding(_place(dataset, other), kind, text, is_error=False)
    if split.labels is None or other_split.labels is None:
        return
    columns = zip(dataset.names, split.labels[index], other_split.labels[other_index], strict=True)
    differing = [f"{names[mine]}, not {names[its]}" for names, its, mine in columns if its != mine]
    if differing:
        text = f"other labels than {there}, the same image: {'; '.join(differing)}"
        yield Finding(_place(dataset, other, "_attr"), "contradicting labels", text, is_error=False)


def _place(dataset: Dataset, row: Row, suffix: str = "") -> str:
    split, index = row
    return f"{dataset.folder / 'split' / split.name}{suffix}.txt:{index + 1}"


def _absent(dataset: Dataset) -> Iterator[Finding]:
    listing = dataset.folder / "split" / ATTRIBUTES
    rows = [number for number, line in enumerate(read_lines(listing), 1) if number > 2 and line]
    counts = [dataset.counts(dataset.splits[name]) for name in LEARNED]
    for line, attribute, *images in zip(rows, dataset.attributes, *counts, strict=True):
        lacking = [name for name, count in zip(LEARNED, images, strict=True) if not count]
        if lacking:
            text = f"no image of {' and '.join(lacking)} has {attribute}"
            yield Finding(f"{listing}:{line}", "attributes without images", text, is_error=False)
