"""Reads trials, counts and choices that a user asks to see, alike from an address and from a command.

Text that is not understood is an error. No default takes its place.
"""

import itertools
from bisect import bisect_left
from collections.abc import Collection, Sequence

from storage.status import TrialRow

DIGITS = 9  # of the largest number that is read; no study has more trials
QUOTED, NAMED = 40, 10  # how much a message repeats: characters of the text, ranges of trials
EXAMPLE = "write numbers and ranges of trials, as in 3,5-9"


class ArgumentError(ValueError):
    """The text cannot be read. The message says what was given and what is allowed, in one line.

    The caller puts the option's name before it.
    """


def read_trials(text: str) -> list[range]:
    """Read trial numbers and ranges, as in 3,5-9. Returns ascending ranges with gaps between them.

    Raises ArgumentError.
    """
    without_spaces = "-".join(part.strip() for part in text.split("-"))  # around the dash
    ranges = [_range(word) for word in without_spaces.replace(",", " ").split()]
    if not ranges:
        raise ArgumentError(f"{_quoted(text)}: {EXAMPLE}")
    merged: list[range] = []
    for numbers in sorted(ranges, key=lambda numbers: numbers.start):
        if merged and numbers.start <= merged[-1].stop:
            merged[-1] = range(merged[-1].start, max(merged[-1].stop, numbers.stop))
        else:
            merged.append(numbers)
    return merged


def _range(word: str) -> range:
    ends = word.split("-")
    if len(ends) > 2 or not all(map(_is_number, ends)):
        raise ArgumentError(f"{_quoted(word)}: {EXAMPLE}")
    first, last = int(ends[0]), int(ends[-1])
    if last < first:
        raise ArgumentError(f"{_quoted(word)}: the smaller number comes first, as in 3,5-9")
    return range(first, last + 1)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= DIGITS


def _quoted(text: str) -> str:
    return repr(text if len(text) <= QUOTED else text[:QUOTED] + "…")


def read_count(text: str, least: int, most: int) -> int:
    """Read a whole number between two limits. Raises ArgumentError."""
    if not _is_number(text) or not least <= int(text) <= most:
        raise ArgumentError(f"{_quoted(text)}: write a whole number from {least} to {most}")
    return int(text)


def read_choice(text: str, allowed: Collection[str]) -> str:
    """Read one of the allowed words. Raises ArgumentError."""
    if text not in allowed:
        raise ArgumentError(f"{_quoted(text)}: allowed are {', '.join(allowed) or 'none yet'}")
    return text


def pick(rows: Sequence[TrialRow], wanted: list[range]) -> tuple[list[TrialRow], list[range]]:
    """Pick the rows with these numbers. Returns them, and the numbers that no row has.

    `rows` ascend by number; `wanted` is what `read_trials` returns.
    """
    chosen: list[TrialRow] = []
    absent: list[range] = []
    for numbers in wanted:
        start, stop = (
            bisect_left(rows, end, key=lambda row: row.number) for end in (numbers.start, numbers.stop)
        )
        chosen += rows[start:stop]
        present = [numbers.start - 1, *(row.number for row in rows[start:stop]), numbers.stop]
        absent += [range(low + 1, high) for low, high in itertools.pairwise(present) if low + 1 < high]
    return chosen, absent


def in_words(trials: list[range]) -> str:
    """Name the trials, as in: trials 3, 5-9."""
    words = [
        f"{numbers.start}-{numbers.stop - 1}" if len(numbers) > 1 else f"{numbers.start}"
        for numbers in trials
    ]
    rest = f" and {len(words) - NAMED} more" if len(words) > NAMED else ""
    several = len(words) > 1 or len(trials[0]) > 1
    return f"trial{'s' if several else ''} {', '.join(words[:NAMED])}{rest}"
