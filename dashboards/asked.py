"""What somebody asks to see, read in the same way from an address and from the command line.

What is not understood is said, and never replaced by something else.
"""

import itertools
from bisect import bisect_left
from collections.abc import Collection, Sequence

from storage.status import TrialRow

DIGITS = 9  # of the largest number that is read; no study has more trials
QUOTED, NAMED = 40, 10  # characters of what was given, and ranges of trials, that a message repeats
AS_IN = "write numbers and ranges of trials, as in 3,5-9"


class AskedError(ValueError):
    """The message is one line, to be put after a name: what was given, and what is allowed."""


def read_trials(text: str) -> list[range]:
    """Numbers of trials and ranges of them, as in 3,5-9: ascending, apart. Raises AskedError."""
    tight = "-".join(part.strip() for part in text.split("-"))
    ranges = [_range(word) for word in tight.replace(",", " ").split()]
    if not ranges:
        raise AskedError(f"{_quoted(text)}: {AS_IN}")
    merged: list[range] = []
    for one in sorted(ranges, key=lambda one: one.start):
        if merged and one.start <= merged[-1].stop:
            merged[-1] = range(merged[-1].start, max(merged[-1].stop, one.stop))
        else:
            merged.append(one)
    return merged


def _range(word: str) -> range:
    ends = word.split("-")
    if len(ends) > 2 or not all(map(_is_number, ends)):
        raise AskedError(f"{_quoted(word)}: {AS_IN}")
    first, last = int(ends[0]), int(ends[-1])
    if last < first:
        raise AskedError(f"{_quoted(word)}: the smaller number comes first, as in 3,5-9")
    return range(first, last + 1)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= DIGITS


def _quoted(text: str) -> str:
    return repr(text if len(text) <= QUOTED else text[:QUOTED] + "…")


def read_count(text: str, least: int, most: int) -> int:
    """A whole number between two limits. Raises AskedError."""
    if not _is_number(text) or not least <= int(text) <= most:
        raise AskedError(f"{_quoted(text)}: write a whole number from {least} to {most}")
    return int(text)


def read_choice(text: str, allowed: Collection[str]) -> str:
    """One of some words. Raises AskedError."""
    if text not in allowed:
        raise AskedError(f"{_quoted(text)}: allowed are {', '.join(allowed) or 'none yet'}")
    return text


def pick(rows: Sequence[TrialRow], asked: list[range]) -> tuple[list[TrialRow], list[range]]:
    """The rows, which ascend, with the numbers of `read_trials`; and the numbers that none has."""
    chosen: list[TrialRow] = []
    absent: list[range] = []
    for one in asked:
        start, stop = (
            bisect_left(rows, end, key=lambda row: row.number) for end in (one.start, one.stop)
        )
        chosen += rows[start:stop]
        present = [one.start - 1, *(row.number for row in rows[start:stop]), one.stop]
        absent += [range(low + 1, high) for low, high in itertools.pairwise(present) if low + 1 < high]
    return chosen, absent


def in_words(numbers: list[range]) -> str:
    """Trials, as in: trials 3, 5-9."""
    words = [f"{one.start}-{one.stop - 1}" if len(one) > 1 else f"{one.start}" for one in numbers]
    rest = f" and {len(words) - NAMED} more" if len(words) > NAMED else ""
    several = len(words) > 1 or len(numbers[0]) > 1
    return f"trial{'s' if several else ''} {', '.join(words[:NAMED])}{rest}"
