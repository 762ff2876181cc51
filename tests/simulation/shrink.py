"""Find few faults that still break a rule, among those of a simulation that broke one."""

from collections.abc import Callable, Sequence

# Which of several lists of faults break a rule.
Fails = Callable[[list[list[str]]], list[bool]]


def shrink(faults: Sequence[str], fails: Fails, at_once: int = 1) -> list[str]:
    """A part of the faults, in their order, that still fails, and of which none can be left out.

    What came after the failure is cut off first. Then parts of what is left are left out, smaller and
    smaller ones: this is delta debugging (Zeller and Hildebrandt, 2002). A simulation without any fault
    may fail too. So many lists are tried `at_once`.
    """
    if fails([[]])[0]:
        return []
    kept = [*faults[: _fewest(len(faults), lambda number: fails([[*faults[:number]]])[0])]]
    size, is_shorter = len(kept), False
    while size > 1 or is_shorter:
        size = (size + 1) // 2
        kept, is_shorter = _without_parts(kept, size, fails, at_once)
    return kept


def _without_parts(kept: list[str], size: int, fails: Fails, at_once: int) -> tuple[list[str], bool]:
    """What is left if each part of this size is left out that can be; and whether one was."""
    start, length = 0, len(kept)
    while start < len(kept):
        starts = range(start, len(kept), size)[:at_once]
        shorter = [kept[:first] + kept[first + size :] for first in starts]
        failed = fails(shorter)
        if any(failed):
            kept, start = shorter[failed.index(True)], starts[failed.index(True)]
        else:
            start = starts[-1] + size
    return kept, len(kept) < length


def _fewest(most: int, fails: Callable[[int], bool]) -> int:
    """The smallest number from 1 on that fails, by halving: `most` does."""
    least = 1
    while least < most:
        middle = (least + most) // 2
        if fails(middle):
            most = middle
        else:
            least = middle + 1
    return most
