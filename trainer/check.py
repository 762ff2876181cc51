"""`atelier data check`: everything that is wrong or worth knowing about a dataset."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from trainer.dataset import LEARNED, Dataset, Finding, Split, examine, listed_splits
from trainer.images import ImageError, image_digest
from trainer.layouts import Layout
from trainer.text import as_on_disk

Row = tuple[Split, int]  # where an image is listed: its split, and its index there


def check_dataset(folder: Path) -> tuple[Dataset | None, list[Finding]]:
    """Read the dataset as far as possible, and collect all findings.

    An error prevents a search or, in a folder without labels, a prediction. All else is a warning.
    """
    present, layout = listed_splits(folder), Layout.of(as_on_disk(folder))
    labelled = any(layout.labels(name).is_file() for name in LEARNED)
    splits = dict.fromkeys([*LEARNED, *present]) if labelled or not present else present
    dataset, findings = examine(folder, [*splits], labelled)
    if dataset is not None:
        is_whole = not any(finding.is_error for finding in findings)
        if labelled and is_whole and all(name in dataset.splits for name in LEARNED):
            findings += _absent(dataset)
        findings += _of_images(dataset)
    if labelled:  # a search does not use the test split
        findings = [replace(f, is_error=f.is_error and f.split != "test") for f in findings]
    return dataset, sorted(findings, key=lambda finding: not finding.is_error)


def summary(findings: list[Finding]) -> str:
    """Say how many findings there are of each kind, first the errors and then the warnings."""
    parts = []
    for name, is_error in (("errors", True), ("warnings", False)):
        kinds = Counter(f.kind for f in findings if f.is_error is is_error)
        by_kind = ", ".join(f"{kind}: {count}" for kind, count in kinds.items())
        number = "1 " + name[:-1] if kinds.total() == 1 else f"{kinds.total() or 'no'} {name}"
        parts.append(number + (f" ({by_kind})" if by_kind else ""))
    return ", ".join(parts)


def _of_images(dataset: Dataset) -> Iterator[Finding]:
    rows_by_digest: dict[bytes, list[Row]] = defaultdict(list)
    for split in dataset.splits.values():
        for index, path in enumerate(split.paths):
            file = dataset.folder / path
            if not os.path.isfile(file):
                continue  # `examine` has reported that
            try:
                rows_by_digest[image_digest(file)].append((split, index))
            except ImageError as error:
                yield Finding(split.place(index), "broken images", str(error), True, split.name)
    for first, *repeats in rows_by_digest.values():
        for repeat in repeats:
            yield from _repeated(dataset, first, repeat)


def _repeated(dataset: Dataset, first: Row, repeat: Row) -> Iterator[Finding]:
    """The findings about two rows with the same image."""
    (split, index), (repeat_split, repeat_index) = first, repeat
    first_place = Path(split.place(index)).name
    if split is not repeat_split:
        kind, text = (
            "images in two splits",
            f"the image of {first_place} too, so {repeat_split.name} is not unseen",
        )
    elif Path(split.paths[index]) == Path(repeat_split.paths[repeat_index]):
        kind, text = "images listed twice", f"listed in {first_place} already"
    else:
        kind, text = (
            "equal images",
            f"the same image as {first_place}, byte for byte, under another name",
        )
    yield Finding(repeat_split.place(repeat_index), kind, text, is_error=False)
    if split.labels is None or repeat_split.labels is None:
        return
    columns = zip(dataset.names, split.labels[index], repeat_split.labels[repeat_index], strict=True)
    differing = [
        f"{names[label]}, not {names[first_label]}"
        for names, first_label, label in columns
        if first_label != label and min(first_label, label) >= 0
    ]
    if differing:
        text = f"other labels than {first_place}, the same image: {'; '.join(differing)}"
        place = repeat_split.place(repeat_index, of_labels=True)
        yield Finding(place, "contradicting labels", text, is_error=False)


def _absent(dataset: Dataset) -> Iterator[Finding]:
    counts = [dataset.counts(dataset.splits[name]) for name in LEARNED]
    for row, (attribute, *images) in enumerate(zip(dataset.attributes, *counts, strict=True)):
        lacking = [name for name, count in zip(LEARNED, images, strict=True) if not count]
        if lacking:
            text = f"no image of {' and '.join(lacking)} has {attribute}"
            place = dataset.attributes_from.place(row)
            yield Finding(place, "attributes without images", text, is_error=False)
