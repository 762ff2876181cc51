"""Find few faults that still break a rule, among those of a simulation that broke one."""

from collections.abc import Callable, Sequence

Fails = Callable[[list[str]], bool]


def shrink(faults: Sequence[str], fails: Fails) -> list[str]:
    """A part of the faults, in their order, that still fails, and of which none can be left out.

    What came after the failure is cut off first, and then what came long before its cause. What is left
    is few, and each of them is tried alone. A simulation without any fault may fail too.
    """
    if fails([]):
        return []
    last = _fewest(len(faults), lambda number: fails([*faults[:number]]))
    kept = [*faults[:last]]
    number = _fewest(len(kept), lambda number: fails(kept[-number:]))
    kept = kept[-number:]
    for fault in list(kept):
        without = [one for one in kept if one != fault]
        if fails(without):
            kept = without
    return kept


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
